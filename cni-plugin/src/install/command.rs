//! The installer's command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};

use super::kubeconfig::Kubeconfig;
use super::node::{self, Node};
use super::{InstallError, Layout, Left, Mode, Wish, plugin};

/// Exit code of `status` when something is amiss.
const EXIT_NOT_INTACT: u8 = 3;

/// Where things are on the node.
#[derive(Debug, Args)]
struct Place {
    /// Root of the node's file system; the other directories are below it. In a container, where that is mounted
    #[arg(long, value_name = "DIR", default_value = "/", env = "URSA_CNI_ROOT")]
    root: PathBuf,
    /// The runtime's configuration directory
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d", env = "URSA_CNI_NET_DIR")]
    net_dir: PathBuf,
    /// The runtime's plugin directory
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin", env = "URSA_CNI_BIN_DIR")]
    bin_dir: PathBuf,
    /// Where the runtime keeps its attachments
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cni", env = "URSA_CNI_CACHE_DIR")]
    cache_dir: PathBuf,
    /// Where the agent's socket is
    #[arg(long, value_name = "DIR", default_value = "/run/ursa", env = "URSA_RUN_DIR")]
    run_dir: PathBuf,
}

impl Place {
    fn layout(&self) -> Layout {
        let under = |path: &Path| self.root.join(path.strip_prefix("/").unwrap_or(path));
        Layout {
            root: self.root.clone(),
            net_dir: under(&self.net_dir),
            bin_dir: under(&self.bin_dir),
            cache_dir: under(&self.cache_dir),
            run_dir: under(&self.run_dir),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeFlag {
    /// A drop-in where the runtime surely reads it (containerd 2.2 or newer, and no other runtime), else an edit
    Auto,
    /// A file of its own in `<net-dir>/<network>/`; needs libcni 1.3, and an older runtime ignores it without a word
    DropIn,
    /// An edit of the network's list; every other byte of it stays
    Edit,
}

const INSTALL_HELP: &str = "\
Examples:
  ursa-cni install                                  # into the network that the runtime would choose
  ursa-cni install --conf-name 10-calico.conflist --exclude-namespace monitoring
  ursa-cni install --watch --ready-file /run/ready  # and repair it until SIGTERM
  ursa-cni install --root /host                     # in a container, with the node's / at /host
  ursa-cni install --root /tmp/copy                 # try it on a copy of /etc/cni/net.d

--plugin-config is a JSON object with the plugin's keys (`ursa-cni --help`). `__NAME__` in its texts
stands for the environment variable NAME; __CNI_NET_DIR__, __CNI_BIN_DIR__ and __RUN_DIR__ are known.
Nothing is changed unless everything can be: the file must be valid, and every plugin in it must
support its version.";

/// Installs the plugin.
#[derive(Debug, Args)]
#[command(after_help = INSTALL_HELP)]
pub(crate) struct Install {
    #[command(flatten)]
    place: Place,
    /// Stay, and put the plugin back when somebody takes it out; waits for the base CNI where there is none yet
    #[arg(long)]
    watch: bool,
    /// Exists while the plugin is in place
    #[arg(long, value_name = "FILE", requires = "watch")]
    ready_file: Option<PathBuf>,
    /// How the plugin gets into the network
    #[arg(long, value_enum, default_value = "auto", env = "URSA_CNI_MODE")]
    mode: ModeFlag,
    /// The network's file; by default the first valid one, as the runtime chooses
    #[arg(long, value_name = "NAME", env = "URSA_CNI_CONF_NAME")]
    conf_name: Option<String>,
    /// A file for the plugin alone instead of the chain, for networks that are attached by name (Multus)
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "ursa-cni.conf", conflicts_with = "conf_name")]
    standalone: Option<String>,
    /// Name of the list that a single plugin's file becomes; by default that file's own, so that addresses stay known
    #[arg(long, value_name = "NAME")]
    network_name: Option<String>,
    /// The plugin's configuration
    #[arg(long, value_name = "FILE", env = "URSA_CNI_PLUGIN_CONFIG")]
    plugin_config: Option<PathBuf>,
    /// A namespace whose pods are never meshed; may be repeated
    #[arg(long, value_name = "NAMESPACE")]
    exclude_namespace: Vec<String>,
    /// The program to install; by default this one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where else the list's plugins may be, below --root; may be repeated
    #[arg(long, value_name = "DIR")]
    plugin_dir: Vec<PathBuf>,
    /// Don't ask the list's plugins whether they support its cniVersion
    #[arg(long)]
    skip_version_check: bool,
}

impl Install {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let wish = self.wish()?;
        if self.watch {
            super::watch(&wish, self.ready_file.as_deref())?;
            return Ok(ExitCode::SUCCESS);
        }
        let installed = super::install(&wish)?;
        for warning in &installed.warnings {
            eprintln!("ursa-cni: warning: {warning}");
        }
        let path = installed.path.display();
        let state = if installed.changed { "is now in" } else { "was in place in" };
        say!("ursa-cni {state} {path}");
        let program = wish.layout.program();
        let state = if installed.program_changed { "copied to" } else { "unchanged:" };
        say!("program {state} {}", program.display());
        Ok(ExitCode::SUCCESS)
    }

    fn wish(&self) -> anyhow::Result<Wish> {
        let layout = self.place.layout();
        let origin =
            self.plugin_config.as_ref().map_or("defaults".to_owned(), |file| file.display().to_string());
        let invalid = |why: String| InstallError::Plugin { origin: origin.clone(), why };
        let file = self.plugin_config.as_ref().map(|file| {
            std::fs::read_to_string(file)
                .with_context(|| format!("can't read --plugin-config {}", file.display()))
        });
        let entry = plugin::entry(file.transpose()?.as_deref(), &self.exclude_namespace).map_err(invalid)?;
        let entry = plugin::fill(&entry, &|name| match name {
            "CNI_NET_DIR" => Some(self.place.net_dir.display().to_string()),
            "CNI_BIN_DIR" => Some(self.place.bin_dir.display().to_string()),
            "RUN_DIR" => Some(self.place.run_dir.display().to_string()),
            other => std::env::var(other).ok(),
        })
        .map_err(invalid)?;
        plugin::check(&entry).map_err(invalid)?;
        let program = match &self.binary {
            Some(binary) => binary.clone(),
            None => std::env::current_exe()
                .context("can't find this program's own file; name it with --binary")?,
        };
        let under = |path: &PathBuf| layout.root.join(path.strip_prefix("/").unwrap_or(path));
        Ok(Wish {
            program,
            entry,
            conf_name: self.conf_name.clone(),
            mode: match self.mode {
                ModeFlag::Auto => Mode::Auto,
                ModeFlag::DropIn => Mode::DropIn,
                ModeFlag::Edit => Mode::Edit,
            },
            standalone: self.standalone.clone(),
            network_name: self.network_name.clone(),
            plugin_dirs: self.plugin_dir.iter().map(under).collect(),
            check_versions: !self.skip_version_check,
            layout,
        })
    }
}

const UNINSTALL_HELP: &str = "\
Examples:
  ursa-cni uninstall
  ursa-cni uninstall --drain-timeout 600    # wait ten minutes for the pods that started with it
  ursa-cni uninstall --root /host           # in a container, with the node's / at /host

The configuration goes first, then it waits, then the program goes. Runtimes call DEL for a pod by
the list that it was started with: while such pods run, a stub that does nothing stays in the
program's place. Run it again when they have ended; doing it twice is fine.";

/// Removes the plugin.
#[derive(Debug, Args)]
#[command(after_help = UNINSTALL_HELP)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    place: Place,
    /// How many seconds to wait until the pods that started with the plugin have ended
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
    /// Stay until SIGTERM, and remove the stub when the last pod that needs it has ended
    #[arg(long, conflicts_with = "drain_timeout")]
    stay: bool,
}

impl Uninstall {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let layout = self.place.layout();
        if self.stay {
            super::uninstall_and_stay(&layout, |left| tell(&layout, left))?;
            return Ok(ExitCode::SUCCESS);
        }
        let patience = Duration::from_secs(self.drain_timeout);
        tell(&layout, &super::uninstall(&layout, patience, |text| say!("{text}"))?);
        Ok(ExitCode::SUCCESS)
    }
}

fn tell(layout: &Layout, left: &Left) {
    left.done.iter().for_each(|done| say!("{done}"));
    if !left.sidecars.is_empty() {
        say!(
            "{} pods keep their sidecar while ursa-agent runs: restart them before you remove it ({})",
            left.sidecars.len(),
            left.sidecars.join(", ")
        );
    }
    if left.attachments.is_empty() {
        say!("ursa-cni is removed");
    } else {
        say!(
            "{} pods that started with ursa-cni still run, and the runtime will call it when they end: {} is now a stub that \
                 does nothing. Run `ursa-cni uninstall` again when they have ended ({})",
            left.attachments.len(),
            layout.program().display(),
            left.attachments.join(", ")
        );
    }
}

const STATUS_HELP: &str = "\
Examples:
  ursa-cni status
  ursa-cni status --root /host || echo 'pods start outside the mesh'

Exit codes: 0 intact, 1 it can't be told, 2 wrong usage, 3 not intact.";

/// Says whether the plugin is in place.
#[derive(Debug, Args)]
#[command(after_help = STATUS_HELP)]
pub(crate) struct Status {
    #[command(flatten)]
    place: Place,
    /// Also whether the installed program is this very one, and not an older or newer one
    #[arg(long)]
    same_program: bool,
}

impl Status {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let layout = self.place.layout();
        let mut status = super::status(&layout)?;
        if self.same_program {
            let own = std::env::current_exe().context("can't find this program's own file")?;
            status.compare_program(&layout, &own);
        }
        say!("{status}");
        Ok(if status.is_intact() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NOT_INTACT) })
    }
}

const NODE_HELP: &str = "\
Examples (in a container of the image, with the node's / at /host):
  ursa-cni node install --root /host --agent-config /etc/ursa-config/agent.yaml
  ursa-cni node remove --root /host

The agent is a unit of the node's systemd: it and its sidecars outlive this container. Where no systemd runs, files are
copied and nothing is started. Configuration and state (/etc/ursa, /var/lib/ursa) stay when it is removed.";

/// Brings the agent to a Kubernetes node, and takes it away.
#[derive(Debug, Args)]
#[command(after_help = NODE_HELP)]
pub(crate) struct NodeCommand {
    #[command(subcommand)]
    command: NodeSubcommand,
}

#[derive(Debug, Subcommand)]
enum NodeSubcommand {
    /// Copy programs, units and configuration to the node and start the agent; also upgrades it
    Install {
        #[command(flatten)]
        node: NodePlace,
        /// The agent's configuration, copied to /etc/ursa/agent.yaml
        #[arg(long, value_name = "FILE")]
        agent_config: Option<PathBuf>,
        /// Copy only
        #[arg(long)]
        no_start: bool,
    },
    /// Stop the agent and remove its programs and units
    Remove {
        #[command(flatten)]
        node: NodePlace,
        /// Even though sidecars run
        #[arg(long)]
        force: bool,
    },
    /// Run the node's systemctl
    #[command(hide = true)]
    Systemctl {
        #[arg(long, value_name = "DIR")]
        root: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct NodePlace {
    #[command(flatten)]
    place: Place,
    /// Root of the file system that holds usr/bin/ursa-agent and the units, as packages install them
    #[arg(long, value_name = "DIR", default_value = "/")]
    from: PathBuf,
    /// Directory of the programs on the node
    #[arg(long, value_name = "DIR", default_value = "/opt/ursa")]
    prefix: PathBuf,
}

impl NodePlace {
    fn node(&self, config: Option<&PathBuf>) -> Node {
        Node {
            root: self.place.root.clone(),
            from: self.from.clone(),
            prefix: self.prefix.clone(),
            config: config.cloned(),
        }
    }
}

impl NodeCommand {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        match &self.command {
            NodeSubcommand::Install { node, agent_config, no_start } => {
                let node = node.node(agent_config.as_ref());
                let changed = node.install()?;
                for path in &changed {
                    say!("installed {}", path.display());
                }
                if !no_start {
                    let started = node.start(!changed.is_empty());
                    say!(
                        "{}",
                        if started {
                            "ursa-agent runs"
                        } else {
                            "ursa-agent was not started: no systemd answers here"
                        }
                    );
                }
            }
            NodeSubcommand::Remove { node, force } => {
                let removed = node.node(None).remove(&node.place.layout(), *force)?;
                for path in removed {
                    say!("removed {}", path.display());
                }
            }
            NodeSubcommand::Systemctl { root, arguments } => {
                return Err(node::become_systemctl(root, arguments))
                    .with_context(|| format!("can't run systemctl below {}", root.display()));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

const KUBECONFIG_HELP: &str = "\
Example:
  ursa-cni kubeconfig --host 10.96.0.1 --ca-file /var/run/secrets/kubernetes.io/serviceaccount/ca.crt \\
    --token-file /var/run/secrets/kubernetes.io/serviceaccount/token --name other-cni";

/// Writes a kubeconfig for another plugin.
#[derive(Debug, Args)]
#[command(after_help = KUBECONFIG_HELP)]
pub(crate) struct KubeconfigCommand {
    /// The API server's name or address
    #[arg(long, env = "KUBERNETES_SERVICE_HOST")]
    host: String,
    /// Its port
    #[arg(long, default_value = "443", env = "KUBERNETES_SERVICE_PORT")]
    port: String,
    /// Its protocol
    #[arg(long, default_value = "https")]
    protocol: String,
    /// Its CA, as PEM
    #[arg(long, value_name = "FILE")]
    ca_file: PathBuf,
    /// The token
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// Name of user and context
    #[arg(long, default_value = "other-cni")]
    name: String,
}

impl KubeconfigCommand {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let read =
            |path: &Path| std::fs::read(path).with_context(|| format!("can't read {}", path.display()));
        let token = String::from_utf8(read(&self.token_file)?)
            .with_context(|| format!("{} is no text", self.token_file.display()))?;
        let kubeconfig = Kubeconfig {
            name: &self.name,
            protocol: &self.protocol,
            host: &self.host,
            port: &self.port,
            ca: &read(&self.ca_file)?,
            token: token.trim(),
        };
        say!("{}", kubeconfig.render());
        Ok(ExitCode::SUCCESS)
    }
}
