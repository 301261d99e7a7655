//! What can be typed. Names and defaults are kumactl's, so that scripts move over unchanged.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::examples;

/// Ursa's command line
#[derive(Parser)]
#[command(name = "ursa", version, disable_help_subcommand = true,
    arg_required_else_help = true, after_help = examples::ALL, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How the control plane is reached.
#[derive(Args)]
pub(crate) struct Global {
    /// Configuration file [default: ~/.ursa/config]
    #[arg(long, global = true, value_name = "FILE", env = "URSA_CONFIG_FILE")]
    pub(crate) config_file: Option<PathBuf>,
    /// Context to use instead of the configuration's current one
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Ignore the configuration file and talk to http://localhost:5681
    #[arg(long, global = true)]
    pub(crate) no_config: bool,
    /// The control plane's unix socket; used by default where it exists and no context is configured
    #[arg(long, global = true, value_name = "PATH", env = "URSA_SOCKET")]
    pub(crate) socket: Option<PathBuf>,
    /// Time for one request, as in 30s or 1m; 0 waits for ever
    #[arg(long, global = true, default_value = "1m", value_parser = parse_duration)]
    pub(crate) api_timeout: std::time::Duration,
    /// Log level: off, info or debug
    #[arg(long, global = true, default_value = "off", value_parser = ["off", "info", "debug"])]
    pub(crate) log_level: String,
}

/// The verbs.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create or update resources
    #[command(after_help = examples::APPLY)]
    Apply(ApplyArgs),
    /// Show resources
    #[command(after_help = examples::get())]
    Get(GetArgs),
    /// Delete a resource
    #[command(after_help = examples::DELETE)]
    Delete(DeleteArgs),
    /// Show how resources are doing
    #[command(after_help = examples::INSPECT)]
    Inspect(InspectArgs),
    /// Generate tokens and keys
    #[command(subcommand, after_help = examples::GENERATE)]
    Generate(GenerateArgs),
    /// Manage the contexts of this command line
    #[command(subcommand, after_help = examples::CONFIG)]
    Config(ConfigArgs),
    /// Tickets with which nodes join
    #[command(subcommand, after_help = examples::TICKET)]
    Ticket(TicketArgs),
    /// Shut out a node that joined, or let it in again
    #[command(subcommand, after_help = examples::NODE)]
    Node(NodeArgs),
    /// Allow one workload to call another (writes a `MeshTrafficPermission`)
    #[command(after_help = examples::ALLOW)]
    Allow(AllowArgs),
    /// Start this machine's control plane, and print a ticket and the command that uses it
    #[command(after_help = examples::UP)]
    Up(UpArgs),
    /// Join this node with a ticket; with --unit, put a service of it into the mesh
    #[command(after_help = examples::JOIN)]
    Join(JoinArgs),
    /// Take a service of this node out of the mesh; it runs on
    #[command(disable_help_flag = true)]
    Leave(AgentArgs),
    /// Say what is wrong with this node's part of the mesh; the exit code is 1 then
    #[command(disable_help_flag = true)]
    Doctor(AgentArgs),
    /// Print the versions of this program and of the control plane
    Version(VersionArgs),
    /// Print a completion script
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write the pages of all commands into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: Option<PathBuf>,
    },
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns
    Table,
    /// YAML
    Yaml,
    /// JSON
    Json,
}

#[derive(Args)]
pub(crate) struct ApplyArgs {
    /// File, folder, URL, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<String>,
    /// Value for {{ name }} in the input; may be repeated
    #[arg(short, long = "var", value_name = "NAME=VALUE")]
    pub(crate) vars: Vec<String>,
    /// Print what would be applied, and apply nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct GetArgs {
    /// Type: plural for a list, singular with a name for one
    #[arg(value_name = "TYPE")]
    pub(crate) kind: String,
    /// Name of the resource
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Mesh
    #[arg(short, long)]
    pub(crate) mesh: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Format,
    /// Length of a page
    #[arg(long)]
    pub(crate) size: Option<u32>,
    /// Where the page starts
    #[arg(long)]
    pub(crate) offset: Option<String>,
}

#[derive(Args)]
pub(crate) struct DeleteArgs {
    /// Type, singular
    #[arg(value_name = "TYPE")]
    pub(crate) kind: String,
    /// Name of the resource
    pub(crate) name: String,
    /// Mesh
    #[arg(short, long)]
    pub(crate) mesh: Option<String>,
}

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// dataplanes, dataplane, nodes, services, zones, meshes, or a policy's type
    #[arg(value_name = "TYPE")]
    pub(crate) kind: String,
    /// Name, for what is singular
    pub(crate) name: Option<String>,
    /// Mesh
    #[arg(short, long)]
    pub(crate) mesh: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Format,
    /// For `dataplane`: what to show; without it identity, certificate, state, and what Envoy refused. Ursa's
    /// control plane doesn't serve policies and config yet
    #[arg(long = "type", value_parser = ["policies", "config-dump", "stats", "clusters", "config"])]
    pub(crate) what: Option<String>,
    /// For `dataplanes`: only those with this tag; may be repeated
    #[arg(long = "tag", value_name = "NAME=VALUE")]
    pub(crate) tags: Vec<String>,
    /// With --type config-dump: endpoints too
    #[arg(long)]
    pub(crate) include_eds: bool,
    /// With --type config (not served yet): with shadow policies in force
    #[arg(long)]
    pub(crate) shadow: bool,
    /// With --type config (not served yet): what to include (diff)
    #[arg(long)]
    pub(crate) include: Vec<String>,
    /// Accepted for old scripts; the new API is the only one
    #[arg(long, hide = true)]
    pub(crate) new_api: bool,
    /// Where the page starts
    #[arg(long)]
    pub(crate) offset: Option<String>,
    /// Length of a page
    #[arg(long)]
    pub(crate) size: Option<u32>,
}

#[derive(Subcommand)]
pub(crate) enum GenerateArgs {
    /// Token with which a data plane proxy authenticates
    DataplaneToken(DataplaneTokenArgs),
    /// Token with which a zone authenticates
    ZoneToken(ZoneTokenArgs),
    /// Token with which a user authenticates
    UserToken(UserTokenArgs),
    /// Self-signed TLS certificate
    TlsCertificate(TlsCertificateArgs),
    /// Private key that signs tokens
    SigningKey(SigningKeyArgs),
    /// Public part of a signing key
    PublicKey(PublicKeyArgs),
}

/// Signing without the control plane.
#[derive(Args)]
pub(crate) struct OfflineArgs {
    /// Sign with this key instead of asking the control plane
    #[arg(long, value_name = "FILE")]
    pub(crate) signing_key_path: Option<PathBuf>,
    /// Id of that key
    #[arg(long)]
    pub(crate) kid: Option<String>,
}

#[derive(Args)]
pub(crate) struct DataplaneTokenArgs {
    /// Name of the Dataplane
    #[arg(long, default_value = "")]
    pub(crate) name: String,
    /// Mesh
    #[arg(short, long)]
    pub(crate) mesh: Option<String>,
    /// Type of proxy
    #[arg(long, default_value = "")]
    pub(crate) proxy_type: String,
    /// Label that the Dataplane must carry, with its allowed values; may be repeated
    #[arg(long = "tag", value_name = "NAME=VALUE[,VALUE]")]
    pub(crate) tags: Vec<String>,
    /// Workload to which the token is bound
    #[arg(long, default_value = "")]
    pub(crate) workload: String,
    /// How long the token is valid, as in 720h
    #[arg(long)]
    pub(crate) valid_for: String,
    #[command(flatten)]
    pub(crate) offline: OfflineArgs,
}

#[derive(Args)]
pub(crate) struct ZoneTokenArgs {
    /// Zone
    #[arg(long)]
    pub(crate) zone: String,
    /// What the token is good for; may be repeated
    #[arg(long)]
    pub(crate) scope: Vec<String>,
    /// How long the token is valid, as in 720h
    #[arg(long)]
    pub(crate) valid_for: String,
    #[command(flatten)]
    pub(crate) offline: OfflineArgs,
}

#[derive(Args)]
pub(crate) struct UserTokenArgs {
    /// Name of the user
    #[arg(long)]
    pub(crate) name: String,
    /// Group of the user; may be repeated
    #[arg(long = "group")]
    pub(crate) groups: Vec<String>,
    /// How long the token is valid, as in 720h
    #[arg(long)]
    pub(crate) valid_for: String,
    #[command(flatten)]
    pub(crate) offline: OfflineArgs,
}

#[derive(Args)]
pub(crate) struct TlsCertificateArgs {
    /// Use of the certificate
    #[arg(long = "type", value_parser = ["client", "server"])]
    pub(crate) usage: String,
    /// DNS name or address; may be repeated
    #[arg(long = "hostname", required = true)]
    pub(crate) hostnames: Vec<String>,
    /// Where the key goes; - is standard output
    #[arg(long, default_value = "key.pem")]
    pub(crate) key_file: String,
    /// Where the certificate goes; - is standard output
    #[arg(long, default_value = "cert.pem")]
    pub(crate) cert_file: String,
    /// Kind of key
    #[arg(long, default_value = "ecdsa", value_parser = ["rsa", "ecdsa"])]
    pub(crate) key_type: String,
}

#[derive(Args)]
pub(crate) struct SigningKeyArgs {
    /// Form of the output
    #[arg(long, default_value = "pem-base64", value_parser = ["pem-base64", "pem"])]
    pub(crate) format: String,
}

#[derive(Args)]
pub(crate) struct PublicKeyArgs {
    /// The private key
    #[arg(long, value_name = "FILE")]
    pub(crate) signing_key_path: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum ConfigArgs {
    /// Print the configuration
    View,
    /// Known control planes
    #[command(subcommand)]
    ControlPlanes(ControlPlanesArgs),
}

#[derive(Subcommand)]
pub(crate) enum ControlPlanesArgs {
    /// List them
    List,
    /// Add one and switch to it
    Add(AddArgs),
    /// Remove one
    Remove {
        /// Its name
        #[arg(long)]
        name: String,
    },
    /// Make one the current
    Switch {
        /// Its name
        #[arg(long)]
        name: String,
    },
}

#[derive(Args)]
pub(crate) struct AddArgs {
    /// URL of its API, http(s)://host:port
    #[arg(long)]
    pub(crate) address: Option<String>,
    /// Its name
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Replace one of the same name
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Certificate to show
    #[arg(long, default_value = "")]
    pub(crate) client_cert_file: String,
    /// Its key
    #[arg(long, default_value = "")]
    pub(crate) client_key_file: String,
    /// CA that signed the control plane's certificate
    #[arg(long, default_value = "")]
    pub(crate) ca_cert_file: String,
    /// Believe any certificate; each command then prints a warning
    #[arg(long)]
    pub(crate) skip_verify: bool,
    /// Header sent with each request; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_delimiter = ',')]
    pub(crate) headers: Vec<String>,
    /// How to authenticate (tokens)
    #[arg(long, default_value = "")]
    pub(crate) auth_type: String,
    /// Its parameters, as in token=…; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) auth_conf: Vec<String>,
    /// Don't try to reach the control plane
    #[arg(long)]
    pub(crate) skip_check: bool,
}

#[derive(Subcommand)]
pub(crate) enum TicketArgs {
    /// Create a ticket that lets one node join and run the named workloads
    Create(TicketCreateArgs),
}

#[derive(Subcommand)]
pub(crate) enum NodeArgs {
    /// End a node's sessions at once, and give it no certificate any more
    Revoke {
        /// Its name or id, as `ursa get nodes` shows them
        name: String,
    },
    /// Let a revoked node in again
    Restore {
        /// Its name or id
        name: String,
    },
}

#[derive(Args)]
pub(crate) struct TicketCreateArgs {
    /// Mesh
    #[arg(short, long)]
    pub(crate) mesh: Option<String>,
    /// Workload that the node may run; may be repeated, * is any
    #[arg(long = "workload", required = true)]
    pub(crate) workloads: Vec<String>,
    /// How long the ticket may be used, as in 1h
    #[arg(long, default_value = "1h")]
    pub(crate) valid_for: String,
    /// How many nodes may use it
    #[arg(long)]
    pub(crate) uses: Option<u32>,
}

#[derive(Args)]
pub(crate) struct AllowArgs {
    /// The workload that calls
    pub(crate) source: String,
    /// The workload that is called
    pub(crate) destination: String,
    /// Mesh
    #[arg(short, long)]
    pub(crate) mesh: Option<String>,
    /// Print the policy, and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct UpArgs {
    /// Mesh
    #[arg(short, long, default_value = "default")]
    pub(crate) mesh: String,
    /// Workload that the node may run; may be repeated, * is any
    #[arg(long = "workload", default_value = "*")]
    pub(crate) workloads: Vec<String>,
    /// How long the ticket may be used, as in 1h
    #[arg(long, default_value = "1h")]
    pub(crate) valid_for: String,
    /// How many nodes may use it
    #[arg(long)]
    pub(crate) uses: Option<u32>,
}

/// What the agent's program is told as it is.
#[derive(Args)]
pub(crate) struct AgentArgs {
    /// As `ursa-agent` takes them; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<std::ffi::OsString>,
}

#[derive(Args)]
pub(crate) struct JoinArgs {
    /// The ticket, from `ursa ticket create`; - reads it from standard input
    pub(crate) ticket: String,
    /// Put this systemd service into the mesh, too: `ursa-agent join --help` lists what else can be said of it (--port,
    /// --protocol, --slice, --dry-run, …)
    #[arg(long, value_name = "UNIT")]
    pub(crate) unit: Option<String>,
    /// Name of this node [default: its hostname]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The running agent's socket [default: /run/ursa/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) agent_socket: Option<PathBuf>,
    /// The agent's configuration, where it isn't /etc/ursa/agent.yaml; it says where the socket is
    #[arg(long, value_name = "FILE", env = "URSA_AGENT_CONFIG", conflicts_with = "agent_socket")]
    pub(crate) agent_config: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct VersionArgs {
    /// More about this build
    #[arg(short = 'a', long)]
    pub(crate) detailed: bool,
}

/// Go's durations in the form that people type: 100ms, 30s, 5m, 1h, 1h30m.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let invalid = || format!("{text:?} is not a duration such as 100ms, 30s, 5m or 1h30m");
    if text == "0" {
        return Ok(std::time::Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0.0f64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
        let value: f64 = rest[..digits].parse().map_err(|_| invalid())?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let seconds = match &rest[digits..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(invalid()),
        };
        total += value * seconds;
        rest = &rest[unit_end..];
    }
    if text.is_empty() { Err(invalid()) } else { Ok(std::time::Duration::from_secs_f64(total)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(parse_duration("1h30m").unwrap().as_secs(), 5400);
        assert_eq!(parse_duration("100ms").unwrap().as_millis(), 100);
        assert!(parse_duration("5 minutes").unwrap_err().contains("1h30m"));
        assert!(parse_duration("").is_err());
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
