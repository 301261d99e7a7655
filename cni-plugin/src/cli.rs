//! People's commands. A runtime's calls never come here.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::explain;
use crate::install::command::{Install, KubeconfigCommand, NodeCommand, Status, Uninstall};

const HELP: &str = "\
The container runtime starts ursa-cni itself (CNI 0.3.0 to 1.1.0), chained in a conflist:

  {\"cniVersion\": \"1.0.0\", \"name\": \"pods\", \"plugins\": [
    {\"type\": \"bridge\", \"bridge\": \"cni0\", \"ipam\": {\"type\": \"host-local\", \"subnet\": \"10.9.0.0/16\"}},
    {\"type\": \"ursa-cni\",
     \"capabilities\": {\"io.kubernetes.cri.pod-annotations\": true},
     \"excludeNamespaces\": [\"kube-system\"]}]}

Whether a pod is meshed says the first of these that says anything: excludeNamespaces (never); the pod's annotation
kuma.io/sidecar-injection (`enabled` or `disabled`; anything else is an error); `annotations` and `labels` in the
plugin's configuration; what the agent has written down of the pod's labels and its namespace; `default`. Only a pod
about which nobody can say, with the agent away for 2 s, is told to try again later (code 11): one whose annotations
the runtime doesn't deliver although `capabilities` asks for them, or one that says nothing with \"default\": \"ask\".

Other keys: default (disabled; enabled; ask: the agent), runDir (/run/ursa; agent.sock and the record of what was done
are there), stateDir (/var/lib/ursa/agent; the agent's decisions.json), redirect (see `ursa-init --help`; by default
group 5678 is exempt, and each proxy has a user of its own; the pod's annotations traffic.kuma.io/… win),
kubeletProbes (false; true, or the ports: what comes from the node itself goes past the proxy), workload (for the agent:
name, mesh, labels, ports).

A pod's annotations kuma.io/mesh and kuma.io/workload say its mesh and, with that, its SPIFFE id, except where
workload.mesh and the label kuma.io/workload in workload.labels are set: these win, always. Set them wherever
those who write pods aren't trusted to choose an identity.

Examples:
  ursa-cni explain pod.yaml                        # is this pod meshed, by whose word, and how
  ursa-cni install --watch                         # into the node's network, and repaired when somebody rewrites it
  ursa-cni status                                  # is it in place
  ursa-cni uninstall
  CNI_COMMAND=VERSION ursa-cni < /dev/null         # what a runtime asks first

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 `status` found something amiss.";

/// The CNI plugin of Ursa: puts pods into the mesh as they start.
#[derive(Debug, Parser)]
#[command(name = "ursa-cni", version, about, after_help = HELP, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say whether a pod is meshed and who decides that, from its manifest
    Explain(explain::Arguments),
    /// Put the plugin into the network that this node's pods get, and renew it
    Install(Install),
    /// Take it out again, so that every pod can still end
    Uninstall(Uninstall),
    /// Say whether it is in place, and who fights over it
    Status(Status),
    /// Bring the agent to a Kubernetes node, or take it away
    Node(NodeCommand),
    /// Write a kubeconfig for another plugin that needs one; ursa-cni needs none
    Kubeconfig(KubeconfigCommand),
    /// Print a shell's completion script
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the pages of all commands into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: PathBuf,
    },
}

/// Runs the command that the process's arguments name.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Explain(arguments) => explain::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Install(command) => command.run(),
        Command::Uninstall(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Node(command) => command.run(),
        Command::Kubeconfig(command) => command.run(),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ursa-cni", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir } => clap_mangen::generate_to(Cli::command(), &dir)
            .with_context(|| format!("can't write manual pages to {}", dir.display()))
            .map(|()| ExitCode::SUCCESS),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ursa-cni: {error:#}");
            ExitCode::FAILURE
        }
    }
}
