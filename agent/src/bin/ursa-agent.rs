//! `ursa-agent`: runs this node's agent, joins it to a control plane, and shows what it does.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use ursa_agent::agent::config::AgentConfig;
use ursa_agent::agent::metrics;
use ursa_agent::agent::node::NodeIdentity;
use ursa_agent::agent::socket::{Request, ask};
use ursa_agent::agent::status::AgentStatus;
use ursa_agent::agent::{Reload, SetLogLevel};
use ursa_agent::host::{self, DoctorOptions, JoinOptions, LeaveOptions};

const EXAMPLES: &str = "\
Examples:
  ursa-agent join TICKET     # once; `ursa ticket create` on the control plane makes the ticket
  ursa-agent run             # as root, or with the capabilities in ursa-agent.service
  ursa-agent status
  ursa-agent status --json
  ursa-agent join TICKET --unit web.service --port 8080   # a service of systemd's, into the mesh
  ursa-agent leave --unit web.service                     # and out of it
  ursa-agent doctor                                       # what is wrong, if anything is

Each file in /etc/ursa/workloads.d is the Dataplane of one workload. Settings in /etc/ursa/agent.yaml
can be variables, too: runDir is URSA_RUN_DIR.

Exit codes: 0 done, 1 failed (doctor: something is wrong), 2 wrong usage.";

/// Ursa's node agent: gives every service on this machine an Envoy, an identity and its place in the mesh.
#[derive(Debug, Parser)]
#[command(name = "ursa-agent", version, about, after_help = EXAMPLES, max_term_width = 120)]
struct Cli {
    /// Configuration file [default: /etc/ursa/agent.yaml, if it exists]
    #[arg(long, global = true, env = "URSA_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent. It can be stopped and started at any time: Envoys and connections stay.
    Run {
        /// `host:port` of the control plane, instead of the one that was joined
        #[arg(long, value_name = "HOST:PORT")]
        control_plane: Option<String>,
        /// Log level: trace, debug, info, warn or error
        #[arg(long, value_name = "LEVEL")]
        log_level: Option<String>,
    },
    /// Join this node to a control plane by a ticket from `ursa ticket create`, and a service of it to a mesh.
    Join {
        /// The ticket; `-` reads it from standard input, where no process list shows it. With --unit it isn't needed once
        /// the node has joined
        #[arg(required_unless_present = "unit")]
        ticket: Option<String>,
        /// This machine's name as control shows it [default: the host name]
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        service: JoinOptions,
    },
    /// Take a service out of the mesh: what `join` made is removed, and the service runs on.
    Leave(LeaveOptions),
    /// Say what is wrong with this machine's part of the mesh; the exit code is 1 then.
    Doctor(DoctorOptions),
    /// What `join` runs in the service's place.
    #[command(hide = true)]
    SelfTestCall {
        /// `host:port`
        target: String,
        /// Ask as HTTP does
        #[arg(long)]
        http: bool,
    },
    /// Show the workloads of this node: state, processes, certificate, configuration, errors.
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print metrics in Prometheus's text format, as for node_exporter's textfile collector
        #[arg(long, conflicts_with = "json")]
        metrics: bool,
    },
    /// Print a shell's completion script.
    Completion {
        /// Which shell
        shell: Shell,
    },
    /// Print the manual page, or write the pages of all commands into a folder.
    #[command(hide = true)]
    Man {
        /// The folder
        dir: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ursa-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well; only `doctor` says otherwise without an error.
fn run(cli: Cli) -> anyhow::Result<bool> {
    match &cli.command {
        Command::SelfTestCall { target, http } => {
            writeln!(io::stdout(), "{}", host::call_for_selftest(target, *http)?)?;
            return Ok(true);
        }
        Command::Completion { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "ursa-agent", &mut io::stdout());
            return Ok(true);
        }
        Command::Man { dir: None } => {
            clap_mangen::Man::new(Cli::command())
                .render(&mut io::stdout())
                .context("can't print the manual page")?;
            return Ok(true);
        }
        Command::Man { dir: Some(dir) } => {
            clap_mangen::generate_to(Cli::command(), dir)
                .with_context(|| format!("can't write manual pages to {}", dir.display()))?;
            return Ok(true);
        }
        _ => {}
    }
    let config = AgentConfig::load(cli.config.as_deref())?;
    let file = cli.config;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start the asynchronous runtime")?;
    match cli.command {
        Command::Run { control_plane, log_level } => {
            let over = move |mut config: AgentConfig| {
                config.control_plane = control_plane.clone().or(config.control_plane);
                config.log_level = log_level.clone().unwrap_or(config.log_level);
                config
            };
            let config = over(config);
            let reload = Reload {
                read: Box::new(move || Ok(over(AgentConfig::load(file.as_deref())?))),
                set_log_level: start_log(&config.log_level)?,
            };
            runtime.block_on(ursa_agent::agent::run(config, reload))
        }
        Command::Join { ticket, name, service } => {
            let ticket = ticket.map(read_ticket).transpose()?;
            match ticket {
                Some(ticket) if service.unit.is_none() => runtime.block_on(join(&config, ticket, name)),
                ticket => Ok(runtime.block_on(host::join(&config, ticket.as_deref(), name, &service))?),
            }
        }
        Command::Leave(options) => Ok(runtime.block_on(host::leave(&config, &options))?),
        Command::Doctor(options) => return Ok(runtime.block_on(host::doctor(&config, &options))?),
        Command::Status { json, metrics } => runtime.block_on(status(&config, json, metrics)),
        Command::SelfTestCall { .. } | Command::Completion { .. } | Command::Man { .. } => Ok(()),
    }
    .map(|()| true)
}

fn read_ticket(ticket: String) -> anyhow::Result<String> {
    if ticket == "-" {
        return io::read_to_string(io::stdin()).context("can't read the ticket from standard input");
    }
    Ok(ticket)
}

/// Starts logging; the result changes the level.
fn start_log(level: &str) -> anyhow::Result<SetLogLevel> {
    let (filter, handle) = tracing_subscriber::reload::Layer::new(filter_of(level)?);
    tracing_subscriber::registry()
        .with(filter)
        .with(tracing_subscriber::fmt::layer().with_writer(io::stderr).json())
        .init();
    Ok(Box::new(move |level| handle.reload(filter_of(level)?).context("the log level can't be changed")))
}

fn filter_of(level: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(level)
        .with_context(|| format!("`{level}` is no log level; use trace, debug, info, warn or error"))
}

async fn join(config: &AgentConfig, ticket: String, name: Option<String>) -> anyhow::Result<()> {
    // A running agent uses its new identity at once; without one, the files wait for it.
    let socket = config.socket();
    let (node_id, zone) = if tokio::net::UnixStream::connect(&socket).await.is_ok() {
        let request = Request::Join { ticket, name };
        let reply = ask(&socket, &request).await.map_err(anyhow::Error::msg)?;
        let text = |key: &str| reply.get(key).and_then(|value| value.as_str()).unwrap_or("?").to_owned();
        (text("nodeId"), text("zone"))
    } else {
        let name = name.unwrap_or_else(|| config.node_name());
        let node = NodeIdentity::join(&config.node_dir(), &ticket, &name).await?;
        (node.node_id, node.zone)
    };
    writeln!(io::stdout(), "joined zone {zone} as node {node_id}")?;
    Ok(())
}

async fn status(config: &AgentConfig, json: bool, metrics: bool) -> anyhow::Result<()> {
    let reply = ask(&config.socket(), &Request::Status).await.map_err(anyhow::Error::msg)?;
    let status = reply.get("status").cloned().unwrap_or_default();
    let text = if json {
        serde_json::to_string_pretty(&status)? + "\n"
    } else {
        let status = serde_json::from_value::<AgentStatus>(status)
            .context("the running agent is of another version; use --json")?;
        if metrics { metrics::render(&status) } else { status.to_text() }
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
