//! Whether the installation is intact.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::attachments::Attachments;
use super::conflist::{Conf, Conflist};
use super::directory::{ConfFile, Kind};
use super::error::InstallError;
use super::file;
use super::lock::{Lock, What};
use super::{Layout, found_instead, place, plugin, read_directory, stub, versions, watch};

/// What is installed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// The file that the runtime takes the pods' network from.
    pub network: Option<PathBuf>,
    /// Where the plugin's entry is.
    pub entry: Option<PathBuf>,
    /// The versions of CNI that the installed program supports.
    pub program: Option<String>,
    /// Whether an `ursa-cni install --watch` runs on this node.
    pub watched: bool,
    /// What isn't as it should be.
    pub problems: Vec<String>,
}

impl Status {
    /// Whether pods that start now get into the mesh.
    pub fn is_intact(&self) -> bool {
        self.problems.is_empty()
    }

    /// Also asks that the installed program is `own`, to the byte.
    pub fn compare_program(&mut self, layout: &Layout, own: &Path) {
        let program = layout.program();
        if self.program.is_some() && !file::same(own, &program) {
            let (program, own) = (program.display(), own.display());
            self.problems.push(format!(
                "{program} is another program than {own}: of another version, or not renewed yet"
            ));
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = String::new();
        let path =
            |path: &Option<PathBuf>| path.as_ref().map_or("none".to_owned(), |p| p.display().to_string());
        let _ = writeln!(out, "state     {}", if self.is_intact() { "intact" } else { "NOT intact" });
        let _ = writeln!(out, "network   {}", path(&self.network));
        let _ = writeln!(out, "entry     {}", path(&self.entry));
        let _ = writeln!(out, "program   {}", self.program.as_deref().unwrap_or("none"));
        let _ =
            writeln!(out, "repaired  {}", if self.watched { "yes, a watch runs" } else { "no watch runs" });
        for problem in &self.problems {
            let _ = writeln!(out, "problem   {problem}");
        }
        f.write_str(out.trim_end())
    }
}

/// Looks at everything. Changes nothing.
pub fn status(layout: &Layout) -> Result<Status, InstallError> {
    let mut status = Status::default();
    let directory = read_directory(&layout.net_dir)?;
    match directory.chosen(plugin::TYPE) {
        None => {
            let found = found_instead(&directory);
            status.problems.push(format!(
                "there is no network configuration in {}{found}: the base CNI isn't installed yet",
                layout.net_dir.display()
            ));
        }
        Some(base) => {
            status.network = Some(layout.net_dir.join(&base.name));
            status.entry = entry(layout, base);
            // Multus attaches a standalone file by name.
            let standalone = directory.files.iter().find(|file| file.holds(plugin::TYPE, false));
            if status.entry.is_none() {
                status.entry = standalone.map(|file| layout.net_dir.join(&file.name));
            }
            if status.entry.is_none() {
                let elsewhere = directory.files.iter().find(|file| file.holds(plugin::TYPE, true));
                let elsewhere = elsewhere.map_or(String::new(), |file| {
                    format!(" (it is in {}, which the runtime doesn't use)", file.name)
                });
                status.problems.push(format!(
                    "{} doesn't hold ursa-cni{elsewhere}: pods start outside the mesh; run `ursa-cni install`",
                    base.name
                ));
            }
        }
    }
    program(layout, &mut status);
    status.watched = Lock::is_held(&layout.run_dir, What::Watch)?;
    if status.watched
        && let Ok(text) = fs::read_to_string(watch::state_file(&layout.run_dir))
        && let Ok(state) = serde_json::from_str::<Value>(&text)
        && let Some(fight) = state.get("fight").and_then(Value::as_str)
    {
        status.problems.push(fight.to_owned());
    }
    Ok(status)
}

/// Where the network's entry is.
fn entry(layout: &Layout, base: &ConfFile) -> Option<PathBuf> {
    let text = base.text.as_deref().ok()?;
    if base.kind == Kind::Single {
        return None;
    }
    let list = Conflist::parse(text).ok()?;
    if list.has(plugin::TYPE) {
        return Some(layout.net_dir.join(&base.name));
    }
    let drop_in = place::drop_in_of(&layout.net_dir, list.name())?;
    let holds = fs::read_to_string(&drop_in).is_ok_and(|text| Conf::parse(&text).is_ok());
    (holds && list.reads_drop_ins()).then_some(drop_in)
}

fn program(layout: &Layout, status: &mut Status) {
    let program = layout.program();
    if stub::is_in_place(layout) {
        let waiting = Attachments::read(&layout.cache_dir, &layout.run_dir, plugin::TYPE).cached.len();
        status.program = Some("the stub that uninstall left".to_owned());
        status.problems.push(format!(
            "{} is the stub for {waiting} pods that started before `uninstall`; run `ursa-cni uninstall` again to remove it, \
             or `ursa-cni install`",
            program.display()
        ));
        return;
    }
    match versions::supported(&program) {
        Ok(spoken) => {
            let newest = spoken.last().map_or("", String::as_str);
            status.program = Some(format!("{} (CNI up to {newest})", program.display()));
        }
        Err(why) => status.problems.push(format!(
            "{} doesn't answer: {why}; every pod of a network that names it fails; run `ursa-cni install`",
            program.display()
        )),
    }
}
