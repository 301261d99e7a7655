//! Puts the plugin into the network that pods get, and takes it out again.
//!
//! The program first, then the configuration; out in the opposite order. At every moment, whatever is killed, any pod
//! can start and stop. No token and no kubeconfig is needed.

/// Says something to people. Who no longer listens doesn't stop the work.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, $($text)*).and_then(|()| out.flush());
    }};
}

mod attachments;
pub(crate) mod command;
pub mod conflist;
pub mod directory;
mod error;
mod file;
pub mod kubeconfig;
mod lock;
pub mod node;
mod place;
pub mod plugin;
mod remove;
mod status;
mod stub;
mod versions;
mod watch;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use error::InstallError;
pub use remove::{Left, uninstall, uninstall_and_stay};
pub use status::{Status, status};
pub(crate) use stub::is_stub;
pub use watch::watch;

use conflist::Plugin;
use error::io;
use lock::{Lock, What};
use place::Change;

/// Where things are on the node.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The node's file system, where the runtime is looked for.
    pub root: PathBuf,
    /// The runtime's configuration directory.
    pub net_dir: PathBuf,
    /// The runtime's plugin directory.
    pub bin_dir: PathBuf,
    /// libcni's cache, which holds the attachments.
    pub cache_dir: PathBuf,
    /// Where the agent's socket is.
    pub run_dir: PathBuf,
}

impl Layout {
    /// The plugin's program.
    pub fn program(&self) -> PathBuf {
        self.bin_dir.join(plugin::TYPE)
    }
}

/// How the plugin gets into the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A drop-in where the runtime surely reads it, else an edit.
    Auto,
    /// A file of its own in the network's drop-in directory; needs libcni 1.3, and nobody can check that.
    DropIn,
    /// An edit of the network's list.
    Edit,
}

/// What is to be installed, and where.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Where things are.
    pub layout: Layout,
    /// The program to install.
    pub program: PathBuf,
    /// The plugin's entry.
    pub entry: Plugin,
    /// The network's file; by default the one that the runtime would choose.
    pub conf_name: Option<String>,
    /// How.
    pub mode: Mode,
    /// A file of this name for the plugin alone, in place of the chain.
    pub standalone: Option<String>,
    /// What a list is called that a single plugin becomes; by default its own name.
    pub network_name: Option<String>,
    /// Where else the programs of the list's plugins may be.
    pub plugin_dirs: Vec<PathBuf>,
    /// Whether the list's plugins are asked for their versions.
    pub check_versions: bool,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The file that holds the plugin's entry.
    pub path: PathBuf,
    /// The network's file, which may be another one.
    pub base: PathBuf,
    /// Whether the configuration was changed.
    pub changed: bool,
    /// Whether the program was.
    pub program_changed: bool,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// How often a file that changes meanwhile is read again.
const ATTEMPTS: usize = 10;

/// Installs, or renews what is installed. Nothing is changed unless everything can be.
pub fn install(wish: &Wish) -> Result<Installed, InstallError> {
    let layout = &wish.layout;
    if !layout.net_dir.is_dir() {
        let found = " (the directory doesn't exist)".to_owned();
        return Err(InstallError::Absent { dir: layout.net_dir.clone(), found });
    }
    let _lock = Lock::hold(&layout.run_dir, What::Install)?;
    file::clean(&layout.net_dir)?;
    let plan = place::plan(wish)?;
    fs::create_dir_all(&layout.bin_dir).map_err(io("create", &layout.bin_dir))?;
    file::clean(&layout.bin_dir)?;
    let program_changed = put_program(wish)?;
    let mut plan = Some(plan);
    for _ in 0..ATTEMPTS {
        let now = match plan.take() {
            Some(plan) => plan,
            None => place::plan(wish)?,
        };
        if place::apply(&now)? {
            let changed = !matches!(now.change, Change::Nothing);
            let warnings = now.warnings;
            return Ok(Installed { path: now.path, base: now.base, changed, program_changed, warnings });
        }
    }
    Err(busy(&layout.net_dir))
}

fn busy(net_dir: &Path) -> InstallError {
    InstallError::Unusable {
        path: net_dir.to_owned(),
        why: "somebody writes to it all the time".to_owned(),
        next: "Find out who (the base CNI's agent?), and try again.",
    }
}

/// Puts the program in place, once a copy of it has answered on this machine.
fn put_program(wish: &Wish) -> Result<bool, InstallError> {
    let program = wish.layout.program();
    let is_link = fs::symlink_metadata(&program).is_ok_and(|meta| meta.is_symlink());
    if is_link || !file::same(&wish.program, &program) {
        file::replace_program(&program, &wish.program, works)?;
        stub::forget(&wish.layout)?;
        return Ok(true);
    }
    stub::forget(&wish.layout)?;
    Ok(false)
}

fn works(copy: &Path) -> Result<(), InstallError> {
    let why = match versions::supported(copy) {
        Ok(spoken) if spoken.iter().any(|version| version == crate::spec::NEWEST) => return Ok(()),
        Ok(spoken) => format!("it supports only the versions {} of CNI", spoken.join(", ")),
        Err(why) => why,
    };
    Err(InstallError::Binary { path: copy.to_owned(), why })
}

/// What is in the directory instead of a network.
fn found_instead(directory: &directory::Directory) -> String {
    let broken: Vec<_> = directory.broken().map(|(name, why)| format!("{name}: {why}")).collect();
    if broken.is_empty() { String::new() } else { format!(" (found only {})", broken.join("; ")) }
}

fn read_directory(dir: &Path) -> Result<directory::Directory, InstallError> {
    match directory::Directory::read(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(directory::Directory::default()),
        read => read.map_err(io("read", dir)),
    }
}
