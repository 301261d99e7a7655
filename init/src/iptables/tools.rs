//! The programs: which there are, which of the two kinds they are, and how they are run.

use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::plan::Family;

/// Where the programs are, whatever `PATH` says; then `PATH`.
const FOLDERS: [&str; 6] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin", "/usr/local/bin"];
/// How long one program may take. They take milliseconds; a lock that somebody holds takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the programs of the old kind wait for their lock, in seconds.
const LOCK_WAIT: &str = "10";

/// The two kinds of iptables: they keep their rules in different places of the kernel, and don't see each other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Variant {
    /// On nf_tables.
    Nft,
    /// On the old tables.
    Legacy,
}

impl Variant {
    /// Both, the one on nf_tables first.
    pub(crate) const ALL: [Self; 2] = [Self::Nft, Self::Legacy];

    /// As it stands in the programs' names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }
}

/// The programs of one kind.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    pub(super) variant: Variant,
    v4: Programs,
    /// `None` where the namespace has no IPv6, or the programs are missing.
    v6: Option<Programs>,
}

#[derive(Debug, Clone)]
struct Programs {
    restore: PathBuf,
    save: PathBuf,
}

impl Tools {
    /// Finds the programs of a kind.
    pub(super) fn find(variant: Variant) -> Result<Self, Error> {
        let programs = |family| {
            let word = command(family);
            let of = |what: &str| find(variant, word, what).ok_or_else(|| missing(variant, word, what));
            Ok::<_, Error>(Programs { restore: of("restore")?, save: of("save")? })
        };
        let v4 = programs(Family::V4)?;
        let v6 = if has_ipv6() { Some(programs(Family::V6)?) } else { None };
        Ok(Self { variant, v4, v6 })
    }

    /// The families that this namespace has.
    pub(super) fn families(&self) -> impl Iterator<Item = Family> + use<> {
        std::iter::once(Family::V4).chain(self.v6.as_ref().map(|_| Family::V6))
    }

    fn programs(&self, family: Family) -> &Programs {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => self.v6.as_ref().unwrap_or(&self.v4),
        }
    }

    /// All rules of a family as text.
    pub(super) fn save(&self, family: Family) -> Result<String, Error> {
        let program = &self.programs(family).save;
        run(program, &[], "").map_err(|detail| failed(program, "read the rules", &detail))
    }

    /// As [`save`](Self::save), with the counters of every rule.
    pub(super) fn save_counted(&self, family: Family) -> Result<String, Error> {
        let program = &self.programs(family).save;
        run(program, &["-c"], "").map_err(|detail| failed(program, "read the rules", &detail))
    }

    /// Applies the text; every table in it is taken whole or not at all, one after the other.
    pub(super) fn restore(&self, family: Family, text: &str) -> Result<(), Error> {
        let program = &self.programs(family).restore;
        let args: &[&str] = match self.variant {
            Variant::Nft => &["--noflush"],
            Variant::Legacy => &["--noflush", "--wait", LOCK_WAIT],
        };
        match run(program, args, text) {
            Ok(_) => Ok(()),
            // The message names a line of what was written.
            Err(detail) => Err(failed(program, "write the rules", &with_line(&detail, text))),
        }
    }
}

/// Whether the namespace speaks IPv6 at all, switched off or not.
fn has_ipv6() -> bool {
    Path::new("/proc/thread-self/net/if_inet6").exists()
}

const fn command(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

fn find(variant: Variant, command: &str, what: &str) -> Option<PathBuf> {
    let named = look_up(&format!("{command}-{}-{what}", variant.name()));
    named.or_else(|| look_up(&format!("{command}-{what}")).filter(|plain| kind(plain) == Some(variant)))
}

fn look_up(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = FOLDERS.iter().map(PathBuf::from).chain(std::env::split_paths(&path));
    // An entry of PATH that isn't absolute would depend on where we were started.
    folders.filter(|folder| folder.is_absolute()).map(|folder| folder.join(program)).find(|p| p.is_file())
}

/// Which kind a program without a kind in its name is: `iptables-save v1.8.9 (nf_tables)`; before 1.8 there was
/// only the old one, and it said nothing.
fn kind(program: &Path) -> Option<Variant> {
    let version = run(program, &["--version"], "").ok()?;
    if version.contains("nf_tables") {
        Some(Variant::Nft)
    } else {
        version.contains('v').then_some(Variant::Legacy)
    }
}

fn missing(variant: Variant, command: &str, what: &str) -> Error {
    let other = variant.other().name();
    let there = if find(variant.other(), command, what).is_some() {
        format!("; the programs for the backend iptables-{other} are there")
    } else {
        String::new()
    };
    Error::Iptables {
        what: format!("find {command}-{}-{what}", variant.name()),
        detail: format!("it is neither in {} nor in PATH", FOLDERS.join(", ")),
        hint: format!(
            " (install iptables: `apt-get install iptables`, `dnf install iptables-{}`, `apk add iptables{}`{there})",
            variant.name(),
            if variant == Variant::Legacy { " iptables-legacy" } else { "" },
        ),
    }
}

/// What a program said, and what it most likely means.
fn failed(program: &Path, what: &str, detail: &str) -> Error {
    let says = |text: &str| detail.contains(text);
    let hint = if says("Permission denied") || says("you must be root") {
        " (needs root, or CAP_NET_ADMIN and CAP_NET_RAW that survive the start of a program)"
    } else if says("xtables lock") {
        " (another program holds the lock of iptables, /run/xtables.lock: `fuser -v /run/xtables.lock` names it)"
    } else if says("is incompatible, use 'nft' tool") {
        " (somebody wrote into iptables' own table with `nft`; use the backend nftables, or remove that table)"
    } else if says("can't initialize")
        || says("Couldn't load")
        || says("No chain/target/match")
        || says("Can't find")
        || says("extension not found")
        || says("No such file")
    {
        " (the kernel or the programs lack a part: `modprobe -a iptable_nat ip6table_nat iptable_raw iptable_mangle \
         xt_owner xt_addrtype xt_REDIRECT xt_CT xt_TPROXY xt_comment xt_cgroup`, or use the backend nftables)"
    } else {
        ""
    };
    Error::Iptables {
        what: format!("{what} with {}", program.display()),
        detail: detail.to_owned(),
        hint: hint.to_owned(),
    }
}

/// Adds the text of the line that the message counts.
fn with_line(detail: &str, text: &str) -> String {
    let number = detail.split("line ").nth(1).map(|rest| rest.trim_start_matches([':', ' ']));
    let number =
        number.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok());
    match number.and_then(|n| text.lines().nth(n.checked_sub(1)?)) {
        Some(line) => format!("{detail} ('{line}')"),
        None => detail.to_owned(),
    }
}

/// Runs a program in the calling thread's network namespace; what it wrote, or what it complained about.
fn run(program: &Path, args: &[&str], input: &str) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        scope.spawn(move || {
            // A program that gives up early says why; that it reads no further says nothing.
            stdin.map(|mut pipe| pipe.write_all(input.as_bytes()))
        });
        for (which, pipe) in [stdout.map(Pipe::Out), stderr.map(Pipe::Err)].into_iter().enumerate() {
            let tell = tell.clone();
            scope.spawn(move || tell.send((which, pipe.map(Pipe::read).unwrap_or_default())));
        }
        drop(tell);
        let mut texts = [String::new(), String::new()];
        let mut late = false;
        for _ in 0..2 {
            let Ok((which, text)) = told.recv_timeout(PATIENCE) else {
                late = true;
                // Its pipes close, and so the readers end.
                let _ = child.kill();
                break;
            };
            texts[which] = text;
        }
        let status = child.wait().map_err(|e| e.to_string())?;
        let [out, err] = texts;
        if late {
            return Err(format!("no answer within {} s", PATIENCE.as_secs()));
        }
        if status.success() {
            return Ok(out);
        }
        let said = err.split_whitespace().collect::<Vec<_>>().join(" ");
        Err(if said.is_empty() { format!("it ended with {status}") } else { said })
    })
}

/// One of the pipes from a program.
enum Pipe {
    Out(std::process::ChildStdout),
    Err(std::process::ChildStderr),
}

impl Pipe {
    fn read(self) -> String {
        let mut bytes = Vec::new();
        // What was read before an error is as good as it gets.
        let _ = match self {
            Self::Out(mut pipe) => pipe.read_to_end(&mut bytes),
            Self::Err(mut pipe) => pipe.read_to_end(&mut bytes),
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Runs `f` on a thread whose programs look up no names: iptables asks for a user called `1000` before it takes
/// 1000 for a number, and a directory server that is behind the very network we redirect may never answer.
pub(super) fn without_name_lookups<T: Send>(f: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let work = || {
            if let Err(error) = hide_name_services() {
                // As without it: works wherever names are looked up in files only.
                tracing::debug!(%error, "name services can't be hidden from iptables");
            }
            f()
        };
        let spawned = thread::Builder::new().name("iptables".to_owned()).spawn_scoped(scope, work);
        let handle = spawned.map_err(|e| Error::kernel("start a thread for iptables", e))?;
        handle.join().unwrap_or_else(|_| Err(Error::Panicked("the work with iptables".to_owned())))
    })
}

/// Gives the thread a view of the file system in which no name service is configured.
fn hide_name_services() -> nix::Result<()> {
    const CONFIG: &str = "/etc/nsswitch.conf";
    const CACHE: &str = "/run/nscd";
    if !Path::new(CONFIG).exists() {
        return Ok(());
    }
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Without configuration the C library reads /etc/passwd and nothing else, once its cache is out of sight.
    mount(Some("/dev/null"), CONFIG, none, MsFlags::MS_BIND, none)?;
    if Path::new(CACHE).exists() {
        mount(Some("none"), CACHE, Some("tmpfs"), MsFlags::empty(), none)?;
    }
    Ok(())
}
