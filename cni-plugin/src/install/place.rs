//! Where the plugin's entry goes, and what has to change for that.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::conflist::{self, Conf, ConfError, Conflist};
use super::directory::{ConfFile, Directory, Kind};
use super::error::{InstallError, io};
use super::{Mode, Wish, file, found_instead, plugin, read_directory, versions};
use crate::spec::VERSIONS;

/// Name of our file in a network's drop-in directory.
pub(super) const DROP_IN: &str = "ursa-cni.conf";
/// What a single plugin's file is kept as while a list of the same stem is in its place.
pub(super) const SAVED: &str = ".ursa-saved";

/// One thing to do.
#[derive(Debug)]
pub(super) enum Change {
    /// All is as wished.
    Nothing,
    /// A list gets another text, which was made of `seen`.
    Edit { seen: String, text: String },
    /// A single plugin becomes a list beside it, and steps aside.
    Convert { conf: PathBuf, seen: String, text: String },
    /// A file of ours alone.
    Own { text: String },
}

/// A list that loses the entry, since a drop-in has it.
#[derive(Debug)]
struct Cleaning {
    path: PathBuf,
    seen: String,
    text: String,
}

/// What has to change.
#[derive(Debug)]
pub(super) struct Plan {
    /// The file that will hold the entry.
    pub(super) path: PathBuf,
    pub(super) change: Change,
    /// The network's file.
    pub(super) base: PathBuf,
    /// The same file's former places of the entry: lists to clean, drop-ins to remove.
    drop_in_to_remove: Option<PathBuf>,
    list_to_clean: Option<Cleaning>,
    pub(super) warnings: Vec<String>,
}

impl Plan {
    fn new(path: PathBuf, change: Change) -> Self {
        Self {
            base: path.clone(),
            path,
            change,
            drop_in_to_remove: None,
            list_to_clean: None,
            warnings: Vec::new(),
        }
    }
}

/// Looks at the directory and decides. Changes nothing.
pub(super) fn plan(wish: &Wish) -> Result<Plan, InstallError> {
    let dir = &wish.layout.net_dir;
    let directory = read_directory(dir)?;
    if let Some(name) = &wish.standalone {
        return standalone(wish, &directory, name);
    }
    let base = base(wish, &directory)?;
    let path = dir.join(&base.name);
    refuse_link(&path)?;
    let text = base.text.as_deref().unwrap_or_default();
    let mut plan = match base.kind {
        Kind::List => list(wish, &path, text)?,
        Kind::Single => single(wish, &path, text)?,
    };
    plan.base = path;
    for (name, why) in directory.broken().filter(|(name, _)| *name < base.name.as_str()) {
        plan.warnings.push(format!(
            "{} stands before {} and is invalid: {why}; containerd stops at it",
            name, base.name
        ));
    }
    Ok(plan)
}

/// The file of the network to chain into.
fn base<'a>(wish: &Wish, directory: &'a Directory) -> Result<&'a ConfFile, InstallError> {
    let dir = &wish.layout.net_dir;
    let Some(name) = &wish.conf_name else {
        return directory
            .chosen(plugin::TYPE)
            .ok_or_else(|| InstallError::Absent { dir: dir.clone(), found: found_instead(directory) });
    };
    let Some(file) = directory.named(name) else {
        let there: Vec<_> = directory.files.iter().map(|file| file.name.as_str()).collect();
        let there = if there.is_empty() { "nothing".to_owned() } else { there.join(", ") };
        return Err(InstallError::Absent {
            dir: dir.clone(),
            found: format!(" (--conf-name is {name}; there is {there})"),
        });
    };
    match file.problem() {
        None => Ok(file),
        Some(why) => Err(InstallError::Unusable {
            path: dir.join(name),
            why,
            next: "Repair it, or leave out --conf-name to take the file that the runtime would.",
        }),
    }
}

/// A link is another's decision where the file is: a rename would replace the link by a file.
fn refuse_link(path: &Path) -> Result<(), InstallError> {
    let meta = fs::symlink_metadata(path).map_err(io("read", path))?;
    if !meta.is_symlink() {
        return Ok(());
    }
    Err(InstallError::Unusable {
        path: path.to_owned(),
        why: "it is a symbolic link".to_owned(),
        next: "Use --mode drop-in (libcni 1.3 or newer), or replace the link by the file.",
    })
}

fn unusable(path: &Path, error: &ConfError) -> InstallError {
    let next = "Repair it, or name another file with --conf-name.";
    InstallError::Unusable { path: path.to_owned(), why: error.to_string(), next }
}

/// Refuses a list of which a runtime would run nothing, or not us.
fn check_versions(wish: &Wish, path: &Path, list: &Conflist<'_>) -> Result<Vec<String>, InstallError> {
    let refuse = |why: String| InstallError::Versions { path: path.to_owned(), why };
    let spoken = list.versions();
    if spoken.is_empty() {
        return Err(refuse("it names no cniVersion, which means 0.1.0, and ursa-cni needs 0.3.0".to_owned()));
    }
    if let Some(version) = spoken.iter().find(|version| !VERSIONS.contains(&version.as_str())) {
        return Err(refuse(format!(
            "ursa-cni doesn't support cniVersion {version}, only {}",
            VERSIONS.join(", ")
        )));
    }
    if !wish.check_versions {
        return Ok(Vec::new());
    }
    let mut dirs = vec![wish.layout.bin_dir.clone()];
    dirs.extend(wish.plugin_dirs.iter().cloned());
    let others = list.types().filter(|kind| *kind != plugin::TYPE);
    let verdict = versions::judge(others, &spoken, |kind| versions::supported(&versions::find(kind, &dirs)?));
    if verdict.refused.is_empty() {
        let warn =
            |why| format!("whether every plugin supports cniVersion {} is unknown: {why}", spoken.join(", "));
        return Ok(verdict.unknown.into_iter().map(warn).collect());
    }
    Err(refuse(verdict.refused.join("; ")))
}

fn list(wish: &Wish, path: &Path, text: &str) -> Result<Plan, InstallError> {
    let list = Conflist::parse(text).map_err(|error| unusable(path, &error))?;
    let warnings = check_versions(wish, path, &list)?;
    let drop_in = drop_in_of(&wish.layout.net_dir, list.name());
    let by_drop_in = match wish.mode {
        Mode::Edit => false,
        Mode::Auto => {
            list.reads_drop_ins()
                && drop_in.is_some()
                && versions::runtime_reads_drop_ins(&wish.layout.root, &wish.layout.root.join("proc"))
        }
        Mode::DropIn if !list.reads_drop_ins() => {
            let why = "its loadOnlyInlinedPlugins is true, so drop-ins aren't read".to_owned();
            return Err(InstallError::Unusable { path: path.to_owned(), why, next: "Use --mode edit." });
        }
        Mode::DropIn => true,
    };
    let mut plan = match drop_in {
        Some(drop_in) if by_drop_in => {
            let alone = format!("{:#}\n", Value::Object(wish.entry.clone()));
            let mut plan = Plan::new(drop_in.clone(), own(&drop_in, alone));
            // Twice is better than never: the entry in the list goes after the drop-in came.
            let without = list.without(plugin::TYPE).filter(|without| without != text);
            plan.list_to_clean = without.map(|without| Cleaning {
                path: path.to_owned(),
                seen: text.to_owned(),
                text: without,
            });
            plan
        }
        None if by_drop_in => {
            let why = format!("the network's name {:?} is no name of a directory", list.name());
            return Err(InstallError::Unusable { path: path.to_owned(), why, next: "Use --mode edit." });
        }
        drop_in => {
            let with = list.with(&wish.entry);
            let change = if with == text {
                Change::Nothing
            } else {
                Change::Edit { seen: text.to_owned(), text: with }
            };
            let mut plan = Plan::new(path.to_owned(), change);
            plan.drop_in_to_remove = drop_in.filter(|path| path.exists());
            plan
        }
    };
    plan.warnings = warnings;
    Ok(plan)
}

/// A network's drop-in of ours; none when its name is no name of a directory.
pub(super) fn drop_in_of(net_dir: &Path, network: &str) -> Option<PathBuf> {
    let is_name = !network.contains('/') && !matches!(network, "" | "." | "..");
    is_name.then(|| net_dir.join(network).join(DROP_IN))
}

fn single(wish: &Wish, path: &Path, text: &str) -> Result<Plan, InstallError> {
    let conf = Conf::parse(text).map_err(|error| unusable(path, &error))?;
    let with =
        conf.with(&wish.entry, wish.network_name.as_deref()).map_err(|error| unusable(path, &error))?;
    let list = path.with_extension("conflist");
    let converted = Conflist::parse(&with).map_err(|error| unusable(path, &error))?;
    let warnings = check_versions(wish, path, &converted)?;
    if let Ok(there) = fs::read_to_string(&list)
        && !Conflist::parse(&there).is_ok_and(|there| there.has(plugin::TYPE))
    {
        return Err(InstallError::Unusable {
            path: list,
            why: format!(
                "{} would become this list, but there is one already that isn't ours",
                path.display()
            ),
            next: "Remove one of the two.",
        });
    }
    let change = Change::Convert { conf: path.to_owned(), seen: text.to_owned(), text: with };
    let mut plan = Plan::new(list, change);
    plan.warnings = warnings;
    Ok(plan)
}

fn standalone(wish: &Wish, directory: &Directory, name: &str) -> Result<Plan, InstallError> {
    let path = wish.layout.net_dir.join(name);
    let refuse =
        |why: String, next: &'static str| Err(InstallError::Unusable { path: path.clone(), why, next });
    if Kind::of(name) != Some(Kind::Single) || name.contains('/') {
        return refuse("a file for a single plugin is named *.conf".to_owned(), "Give it such a name.");
    }
    match directory.chosen(plugin::TYPE) {
        None => {
            let found = found_instead(directory);
            return Err(InstallError::Absent { dir: wish.layout.net_dir.clone(), found });
        }
        Some(base) if base.name.as_str() >= name => {
            let why = format!("it would stand before {}, and pods would get no address", base.name);
            return refuse(why, "Give it a name that sorts behind, such as ursa-cni.conf.");
        }
        Some(_) => {}
    }
    if let Some(there) = directory.named(name)
        && there.types() != [plugin::TYPE]
    {
        return refuse("it is another plugin's".to_owned(), "Give it another name.");
    }
    let text = conflist::standalone(
        &wish.entry,
        Some(wish.network_name.as_deref().unwrap_or(plugin::TYPE)),
        Some("1.0.0"),
    );
    let change = own(&path, text);
    Ok(Plan::new(path, change))
}

fn own(path: &Path, text: String) -> Change {
    if fs::read(path).is_ok_and(|there| there == text.as_bytes()) {
        Change::Nothing
    } else {
        Change::Own { text }
    }
}

/// Whether a file still is what a change was made of.
pub(super) fn is_still(path: &Path, seen: &str) -> Result<bool, InstallError> {
    match fs::read(path) {
        Ok(now) => Ok(now == seen.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("read", path)(error)),
    }
}

/// Carries a plan out. False when a file is no longer what the plan was made of.
pub(super) fn apply(plan: &Plan) -> Result<bool, InstallError> {
    match &plan.change {
        Change::Nothing => {}
        Change::Edit { seen, text } => {
            if !is_still(&plan.path, seen)? {
                return Ok(false);
            }
            file::replace(&plan.path, text.as_bytes())?;
        }
        Change::Convert { conf, seen, text } => {
            if !is_still(conf, seen)? {
                return Ok(false);
            }
            // The list first: until the single plugin has stepped aside, the runtime goes on with that.
            file::replace_like(&plan.path, text.as_bytes(), conf)?;
            file::rename(conf, &saved(conf))?;
        }
        Change::Own { text } => {
            let dir = plan.path.parent().unwrap_or(&plan.path);
            fs::create_dir_all(dir).map_err(io("create", dir))?;
            file::clean(dir)?;
            file::replace(&plan.path, text.as_bytes())?;
        }
    }
    if let Some(Cleaning { path, seen, text }) = &plan.list_to_clean {
        if !is_still(path, seen)? {
            return Ok(false);
        }
        file::replace(path, text.as_bytes())?;
    }
    if let Some(drop_in) = &plan.drop_in_to_remove {
        remove_drop_in(drop_in)?;
    }
    Ok(true)
}

/// Removes a drop-in of ours, and its directory when nothing else is in it.
pub(super) fn remove_drop_in(path: &Path) -> Result<bool, InstallError> {
    if let Some(dir) = path.parent().filter(|dir| dir.is_dir()) {
        file::clean(dir)?;
    }
    let removed = file::remove(path)?;
    if removed && let Some(dir) = path.parent() {
        // Fails when it isn't empty, as it should.
        let _ = fs::remove_dir(dir);
    }
    Ok(removed)
}

/// What a single plugin's file is kept as.
pub(super) fn saved(conf: &Path) -> PathBuf {
    let mut name = conf.as_os_str().to_owned();
    name.push(SAVED);
    PathBuf::from(name)
}
