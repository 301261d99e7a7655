//! The sections of the configuration, with their defaults.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use ursa_model::vip;

/// The kind of authentication in which every dataplane shows a token.
pub(super) const DP_TOKEN: &str = "dpToken";

macro_rules! sections {
    ($( $(#[$meta:meta])* pub struct $name:ident { $( $(#[$field_meta:meta])* pub $field:ident : $type:ty = $default:expr ),* $(,)? } )*) => { $(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", default, deny_unknown_fields)]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )* }
            }
        }
    )* };
}

/// What this control plane is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It serves the proxies of one zone.
    #[default]
    #[serde(alias = "standalone")]
    Zone,
    /// It holds what several zones share.
    Global,
}

/// Where resources are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum StoreType {
    /// One file on this machine.
    #[default]
    Embedded,
}

/// Which kind of machines are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Environment {
    /// VMs and bare metal.
    #[default]
    Universal,
}

sections! {
    /// The whole configuration of a control plane.
    pub struct Config {
        /// Which kind of machines are served.
        pub environment: Environment = Environment::Universal,
        /// Zone or global.
        pub mode: Mode = Mode::Zone,
        /// Folders, addresses and certificates that several parts share.
        pub general: General = General::default(),
        /// Where resources are kept.
        pub store: StoreConfig = StoreConfig::default(),
        /// The REST API.
        pub api_server: ApiServer = ApiServer::default(),
        /// Discovery and identity, for agents.
        pub dp_server: DpServer = DpServer::default(),
        /// Health and metrics.
        pub diagnostics: Diagnostics = Diagnostics::default(),
        /// Zones under a global control plane.
        pub multizone: Multizone = Multizone::default(),
        /// Who may do what.
        pub access: Access = Access::default(),
        /// What is made without being asked for.
        pub defaults: Defaults = Defaults::default(),
        /// Addresses for services.
        pub ipam: Ipam = Ipam::default(),
        /// MeshServices from workloads.
        pub mesh_service: MeshServiceConfig = MeshServiceConfig::default(),
        /// Identities of nodes and workloads.
        pub identity: IdentityConfig = IdentityConfig::default(),
    }

    /// What several parts share.
    pub struct General {
        /// Folder for what control makes itself (certificates, store); must survive a restart.
        pub work_dir: PathBuf = PathBuf::from("/var/lib/ursa/control"),
        /// Certificate of the servers; one is made in `workDir` when it is empty.
        pub tls_cert_file: String = String::new(),
        /// Key of `tlsCertFile`.
        pub tls_key_file: String = String::new(),
    }

    /// Where resources are kept.
    pub struct StoreConfig {
        /// The kind of store.
        pub r#type: StoreType = StoreType::Embedded,
        /// The embedded store.
        pub embedded: Embedded = Embedded::default(),
        /// Allows the deletion of a mesh with dataplanes in it.
        pub unsafe_delete: bool = false,
    }

    /// The embedded store.
    pub struct Embedded {
        /// The database file; empty: `store.db` in `general.workDir`.
        pub path: String = String::new(),
        /// The file with the keys that encrypt secrets; empty: `store.key` in `general.workDir`.
        pub key_file: String = String::new(),
    }

    /// The REST API.
    pub struct ApiServer {
        /// Plain HTTP, on loopback only.
        pub http: HttpServer = HttpServer::default(),
        /// HTTPS.
        pub https: HttpsServer = HttpsServer::default(),
        /// The local operator's unix socket; empty: none.
        pub socket: String = "/run/ursa/control.sock".into(),
        /// Who is who.
        pub authn: Authn = Authn::default(),
        /// Refuses every write.
        pub read_only: bool = false,
        /// Origins of web pages that may call the API (`https://ui.example.com`), or regular expressions of
        /// whole origins.
        pub cors_allowed_domains: Vec<String> = Vec::new(),
        /// The API's address as clients see it; empty: as in the request.
        pub root_url: String = String::new(),
        /// The largest body that is accepted, in bytes.
        pub max_body_bytes: u64 = 10 * 1024 * 1024,
        /// A web page elsewhere.
        pub gui: Gui = Gui::default(),
    }

    /// Plain HTTP.
    pub struct HttpServer {
        /// Whether it listens.
        pub enabled: bool = true,
        /// A loopback address.
        pub interface: String = "127.0.0.1".into(),
        /// The port.
        pub port: u16 = 5681,
    }

    /// HTTPS.
    pub struct HttpsServer {
        /// Whether it listens.
        pub enabled: bool = true,
        /// The address.
        pub interface: String = "0.0.0.0".into(),
        /// The port.
        pub port: u16 = 5682,
        /// Certificate; empty: `general.tlsCertFile`, or one made in `workDir`.
        pub tls_cert_file: String = String::new(),
        /// Key of `tlsCertFile`.
        pub tls_key_file: String = String::new(),
        /// CAs whose client certificates are taken. A certificate makes nobody an admin: tokens do.
        pub tls_ca_file: String = String::new(),
        /// Refuses connections without a certificate from `tlsCaFile`.
        pub require_client_cert: bool = false,
    }

    /// Who is who.
    pub struct Authn {
        /// The only way is `tokens`.
        pub r#type: String = "tokens".into(),
        /// Takes everybody who comes over loopback TCP for an admin. Off: any process of this
        /// machine, a sidecared one included, could otherwise rule the mesh.
        pub localhost_is_admin: bool = false,
        /// User tokens.
        pub tokens: Tokens = Tokens::default(),
    }

    /// User tokens.
    pub struct Tokens {
        /// Makes the GlobalSecret `admin-user-token` at the first start.
        pub bootstrap_admin_token: bool = true,
        /// Whether this control plane issues tokens.
        pub enable_issuer: bool = true,
        /// What tokens are checked against.
        pub validator: Validator = Validator::default(),
    }

    /// What tokens are checked against.
    pub struct Validator {
        /// The signing keys in the store.
        pub use_secrets: bool = true,
        /// Public keys of issuers elsewhere.
        pub public_keys: Vec<PublicKey> = Vec::new(),
    }

    /// A public key of an issuer elsewhere.
    pub struct PublicKey {
        /// The key's id in tokens.
        pub kid: String = String::new(),
        /// The key in PEM.
        pub key: String = String::new(),
        /// Or a file with it.
        pub key_file: String = String::new(),
        /// For dataplane tokens: of which mesh.
        pub mesh: String = String::new(),
    }

    /// A web page that is served elsewhere; this control plane has none of its own yet.
    pub struct Gui {
        /// Whether `GET /` names it.
        pub enabled: bool = true,
        /// Its address; empty: there is none.
        pub root_url: String = String::new(),
        /// Its path, below the API's address; without effect until there is a page.
        pub base_path: String = "/gui".into(),
    }

    /// Discovery and identity, for agents.
    pub struct DpServer {
        /// The address.
        pub interface: String = "0.0.0.0".into(),
        /// The port.
        pub port: u16 = 5678,
        /// The address that join tickets carry, `host:port`; empty: this host's name and `port`.
        pub public_address: String = String::new(),
        /// Who may register a dataplane.
        pub authn: DpAuthn = DpAuthn::default(),
    }

    /// Who may register a dataplane.
    pub struct DpAuthn {
        /// The data plane proxies.
        pub dp_proxy: DpProxyAuthn = DpProxyAuthn::default(),
    }

    /// How a dataplane proves itself beside its node's certificate.
    pub struct DpProxyAuthn {
        /// Empty: the node's grant, or a dataplane token. `dpToken`: a dataplane token, whatever was granted.
        pub r#type: String = String::new(),
        /// Dataplane tokens.
        pub dp_token: DpToken = DpToken::default(),
    }

    /// Dataplane tokens.
    pub struct DpToken {
        /// Whether this control plane issues them.
        pub enable_issuer: bool = true,
        /// What they are checked against.
        pub validator: Validator = Validator::default(),
    }

    /// Health and metrics.
    pub struct Diagnostics {
        /// The address.
        pub interface: String = "127.0.0.1".into(),
        /// The port.
        pub server_port: u16 = 5680,
        /// Serves debugging endpoints too.
        pub debug_endpoints: bool = false,
    }

    /// Zones.
    pub struct Multizone {
        /// This zone.
        pub zone: ZoneConfig = ZoneConfig::default(),
    }

    /// This zone.
    pub struct ZoneConfig {
        /// Its name.
        pub name: String = "default".into(),
        /// The global control plane; empty: this zone stands alone.
        pub global_address: String = String::new(),
        /// Accepts resources without the label `kuma.io/origin` in a federated zone.
        pub disable_origin_label_validation: bool = false,
    }

    /// Who may do what.
    pub struct Access {
        /// The only kind is `static`.
        pub r#type: String = "static".into(),
        /// Lists of users and groups.
        pub r#static: StaticAccess = StaticAccess::default(),
    }

    /// Lists of users and groups, one for each right.
    pub struct StaticAccess {
        /// Secrets and global secrets.
        pub admin_resources: Granted = Granted::admin(),
        /// Dataplane tokens and join tickets.
        pub generate_dp_token: Granted = Granted::admin(),
        /// User tokens.
        pub generate_user_token: Granted = Granted::admin(),
        /// Zone tokens.
        pub generate_zone_token: Granted = Granted::admin(),
        /// Configuration dumps of proxies.
        pub view_config_dump: Granted = Granted::authenticated(),
        /// Statistics of proxies.
        pub view_stats: Granted = Granted::authenticated(),
        /// Clusters of proxies.
        pub view_clusters: Granted = Granted::authenticated(),
        /// The control plane's configuration.
        pub control_plane_metadata: Granted = Granted::authenticated(),
    }

    /// Who has a right.
    pub struct Granted {
        /// Users by name.
        pub users: Vec<String> = Vec::new(),
        /// Groups by name.
        pub groups: Vec<String> = Vec::new(),
    }

    /// What is made without being asked for.
    pub struct Defaults {
        /// Doesn't make the mesh `default`.
        pub skip_mesh_creation: bool = false,
        /// Doesn't make tenant resources.
        pub skip_tenant_resources: bool = false,
        /// Doesn't make hostname generators.
        pub skip_hostname_generators: bool = false,
    }

    /// Addresses for services: parts of the ranges that every node routes to `lo`. The IPv6 address of a
    /// service carries its IPv4 address in its last 32 bits, so these ranges are those of both families.
    pub struct Ipam {
        /// For MeshService.
        pub mesh_service: Cidr = Cidr { cidr: "241.0.0.0/8".into() },
        /// For MeshExternalService.
        pub mesh_external_service: Cidr = Cidr { cidr: "242.0.0.0/8".into() },
        /// For MeshMultiZoneService.
        pub mesh_multi_zone_service: Cidr = Cidr { cidr: "243.0.0.0/8".into() },
    }

    /// A range of addresses.
    pub struct Cidr {
        /// In CIDR notation.
        pub cidr: String = "241.0.0.0/8".into(),
    }

    /// MeshServices from workloads.
    pub struct MeshServiceConfig {
        /// How long a generated MeshService without dataplanes is kept.
        pub deletion_grace_period: String = "1h".into(),
    }

    /// Identities of nodes and workloads.
    pub struct IdentityConfig {
        /// How long a node's certificate is valid.
        pub node_validity: String = "720h".into(),
        /// How long a closed session's dataplanes are kept.
        pub session_grace: String = "30s".into(),
    }
}

impl Granted {
    fn admin() -> Self {
        Self { users: vec!["mesh-system:admin".into()], groups: vec!["mesh-system:admin".into()] }
    }

    fn authenticated() -> Self {
        Self { users: Vec::new(), groups: vec!["mesh-system:authenticated".into()] }
    }
}

impl Ipam {
    /// Where MeshService addresses come from.
    pub fn mesh_service_range(&self) -> vip::Range {
        // What was loaded has been checked.
        self.mesh_service.cidr.parse().unwrap_or(vip::MESH_SERVICE)
    }
}

impl Config {
    /// Whether this zone belongs to a global control plane.
    pub fn is_federated(&self) -> bool {
        self.mode == Mode::Zone && !self.multizone.zone.global_address.is_empty()
    }

    /// The name of this zone, empty on a global control plane.
    pub fn zone(&self) -> &str {
        match self.mode {
            Mode::Zone => &self.multizone.zone.name,
            Mode::Global => "",
        }
    }

    /// Whether a node's grant isn't enough to register a dataplane.
    pub fn token_required(&self) -> bool {
        self.dp_server.authn.dp_proxy.r#type == DP_TOKEN
    }

    /// Where the store lies.
    pub fn store_options(&self) -> crate::store::StoreOptions {
        let mut options = crate::store::StoreOptions::in_dir(&self.general.work_dir);
        let embedded = &self.store.embedded;
        if !embedded.path.is_empty() {
            options.path = PathBuf::from(&embedded.path);
        }
        if !embedded.key_file.is_empty() {
            options.key_file = PathBuf::from(&embedded.key_file);
        }
        options
    }
}
