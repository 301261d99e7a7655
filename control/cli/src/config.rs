//! The contexts file, in kumactl's format: `~/.ursa/config`, or kumactl's own where only that exists.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::args::{AddArgs, ConfigArgs, ControlPlanesArgs, Global};
use crate::client::{Api, Endpoint};
use crate::output::{self, put, say};

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Config {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    contexts: Vec<NamedContext>,
    #[serde(alias = "control_planes", skip_serializing_if = "Vec::is_empty")]
    control_planes: Vec<ControlPlane>,
    #[serde(alias = "current_context", skip_serializing_if = "String::is_empty")]
    current_context: String,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NamedContext {
    #[serde(alias = "control_plane")]
    control_plane: String,
    #[serde(skip_serializing_if = "Defaults::is_empty")]
    defaults: Defaults,
    name: String,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Defaults {
    #[serde(skip_serializing_if = "String::is_empty")]
    mesh: String,
}

impl Defaults {
    fn is_empty(&self) -> bool {
        self.mesh.is_empty()
    }
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct ControlPlane {
    coordinates: Coordinates,
    name: String,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Coordinates {
    #[serde(alias = "api_server")]
    api_server: ApiServer,
}

/// Where an API is and how to speak with it.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ApiServer {
    #[serde(alias = "auth_conf", skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub(crate) auth_conf: std::collections::BTreeMap<String, String>,
    #[serde(alias = "auth_type", skip_serializing_if = "String::is_empty")]
    pub(crate) auth_type: String,
    #[serde(alias = "ca_cert_file", skip_serializing_if = "String::is_empty")]
    pub(crate) ca_cert_file: String,
    #[serde(alias = "client_cert_file", skip_serializing_if = "String::is_empty")]
    pub(crate) client_cert_file: String,
    #[serde(alias = "client_key_file", skip_serializing_if = "String::is_empty")]
    pub(crate) client_key_file: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) headers: Vec<Header>,
    #[serde(alias = "skip_verify", skip_serializing_if = "std::ops::Not::not")]
    pub(crate) skip_verify: bool,
    pub(crate) url: String,
}

#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) key: String,
    pub(crate) value: String,
}

const DEFAULT_SOCKET: &str = "/run/ursa/control.sock";
const DEFAULT_URL: &str = "http://localhost:5681";

impl Config {
    /// The known control planes, for errors.
    fn names(&self) -> String {
        let names: Vec<&str> = self.control_planes.iter().map(|plane| plane.name.as_str()).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }
}

/// What a command needs to run: the API and the default mesh.
pub(crate) struct Session {
    pub(crate) api: Api,
    default_mesh: String,
}

impl Session {
    /// Socket given > context given or configured > the local socket > localhost.
    pub(crate) fn open(global: &Global) -> anyhow::Result<Self> {
        let local = |endpoint| Self { api: Api::new(endpoint, global), default_mesh: "default".into() };
        if let Some(socket) = &global.socket {
            return Ok(local(Endpoint::Unix(socket.clone())));
        }
        let config = if global.no_config { Config::default() } else { load(global)?.1 };
        let wanted = global.context.as_deref().unwrap_or(&config.current_context);
        if global.no_config || wanted.is_empty() {
            let socket = Path::new(DEFAULT_SOCKET);
            if !global.no_config && socket.exists() {
                return Ok(local(Endpoint::Unix(socket.to_owned())));
            }
            return Ok(local(Endpoint::Url(ApiServer { url: DEFAULT_URL.into(), ..ApiServer::default() })));
        }
        let context =
            config.contexts.iter().find(|context| context.name == wanted).with_context(|| {
                format!("there is no Context with name {wanted:?}; see `ursa config view`")
            })?;
        let server =
            config.control_planes.iter().find(|plane| plane.name == context.control_plane).with_context(
                || format!("there is no Control Plane with name {:?}", context.control_plane),
            )?;
        let mesh = if context.defaults.mesh.is_empty() { "default" } else { &context.defaults.mesh };
        Ok(Self {
            api: Api::new(Endpoint::Url(server.coordinates.api_server.clone()), global),
            default_mesh: mesh.to_owned(),
        })
    }

    pub(crate) fn mesh(&self, given: Option<&str>) -> String {
        given.unwrap_or(&self.default_mesh).to_owned()
    }
}

fn load(global: &Global) -> anyhow::Result<(PathBuf, Config)> {
    let path = if let Some(path) = &global.config_file {
        path.clone()
    } else {
        let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into()));
        let (ours, theirs) = (home.join(".ursa/config"), home.join(".kumactl/config"));
        if !ours.exists() && theirs.exists() { theirs } else { ours }
    };
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim().is_empty() => Ok((path, Config::default())),
        Ok(text) => {
            let config = output::from_yaml(&text)
                .with_context(|| format!("cannot read the configuration {}", path.display()))?;
            Ok((path, config))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && global.config_file.is_none() => {
            Ok((path, Config::default()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot open the configuration {}", path.display())),
    }
}

/// The file holds tokens: only its owner reads it, and a crash leaves the old one.
fn save(path: &Path, config: &Config) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let new = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .with_context(|| format!("cannot write {}", new.display()))?;
    file.write_all(output::to_yaml(config)?.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}

/// `ursa config`
pub(crate) async fn run(global: &Global, args: ConfigArgs) -> anyhow::Result<()> {
    let (path, mut config) = load(global)?;
    match args {
        ConfigArgs::View => put!("{}", output::to_yaml(&config)?),
        ConfigArgs::ControlPlanes(ControlPlanesArgs::List) => {
            let active = config
                .contexts
                .iter()
                .find(|context| context.name == config.current_context)
                .map(|context| context.control_plane.clone());
            let rows = config.control_planes.iter().map(|plane| {
                let mark = if active.as_deref() == Some(&plane.name) { "*" } else { "" };
                vec![mark.into(), plane.name.clone(), plane.coordinates.api_server.url.clone()]
            });
            output::table(&["ACTIVE", "NAME", "ADDRESS"], rows);
        }
        ConfigArgs::ControlPlanes(ControlPlanesArgs::Add(args)) => add(global, &path, config, args).await?,
        ConfigArgs::ControlPlanes(ControlPlanesArgs::Remove { name }) => {
            let before = config.control_planes.len();
            config.control_planes.retain(|plane| plane.name != name);
            if config.control_planes.len() == before {
                bail!("there is no Control Plane with name {name:?}; known are: {}", config.names());
            }
            config.contexts.retain(|context| context.control_plane != name);
            if !config.contexts.iter().any(|context| context.name == config.current_context) {
                config.current_context =
                    config.contexts.first().map(|context| context.name.clone()).unwrap_or_default();
            }
            save(&path, &config)?;
            say!("removed Control Plane {name:?}");
            if !config.current_context.is_empty() {
                say!("switched active Control Plane to {:?}", config.current_context);
            }
        }
        ConfigArgs::ControlPlanes(ControlPlanesArgs::Switch { name }) => {
            if !config.contexts.iter().any(|context| context.name == name) {
                bail!("there is no Control Plane with name {name:?}; known are: {}", config.names());
            }
            config.current_context.clone_from(&name);
            save(&path, &config)?;
            say!("switched active Control Plane to {name:?}");
        }
    }
    Ok(())
}

async fn add(global: &Global, path: &Path, mut config: Config, args: AddArgs) -> anyhow::Result<()> {
    let (address, name) = match (args.address, args.name) {
        (Some(address), Some(name)) => (address, name),
        (None, None) => bail!("required flag(s) \"address\", \"name\" not set"),
        (None, _) => bail!("required flag(s) \"address\" not set"),
        (_, None) => bail!("required flag(s) \"name\" not set"),
    };
    if !args.auth_type.is_empty() && args.auth_type != "tokens" {
        bail!("authentication plugin of type {:?} is not found", args.auth_type);
    }
    let exists = config.control_planes.iter().any(|plane| plane.name == name);
    if exists && !args.overwrite {
        bail!("Control Plane with name {name:?} already exists. Use --overwrite to replace an existing one.");
    }
    let pair = |text: &String| {
        text.split_once('=')
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .with_context(|| format!("{text:?} must be formatted as key=value"))
    };
    let mut auth_conf: std::collections::BTreeMap<String, String> =
        args.auth_conf.iter().map(pair).collect::<Result<_, _>>()?;
    if let Some(token) = auth_conf.get_mut("token")
        && token == "-"
    {
        // A process list shows arguments, but not this.
        let text =
            std::io::read_to_string(std::io::stdin()).context("cannot read the token from standard input")?;
        text.trim().clone_into(token);
    }
    let headers = args.headers.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
    let server = ApiServer {
        url: address.clone(),
        ca_cert_file: args.ca_cert_file,
        client_cert_file: args.client_cert_file,
        client_key_file: args.client_key_file,
        skip_verify: args.skip_verify,
        headers: headers.into_iter().map(|(key, value)| Header { key, value }).collect(),
        auth_type: args.auth_type,
        auth_conf,
    };
    if !args.skip_check {
        check(global, &server, &address).await?;
    }
    config.control_planes.retain(|plane| plane.name != name);
    config
        .control_planes
        .push(ControlPlane { name: name.clone(), coordinates: Coordinates { api_server: server } });
    config.contexts.retain(|context| context.name != name);
    config.contexts.push(NamedContext {
        name: name.clone(),
        control_plane: name.clone(),
        defaults: Defaults::default(),
    });
    config.current_context.clone_from(&name);
    save(path, &config)?;
    say!("added Control Plane {name:?}");
    say!("switched active Control Plane to {name:?}");
    Ok(())
}

/// A wrong address is better found now than at the first command.
async fn check(global: &Global, server: &ApiServer, address: &str) -> anyhow::Result<()> {
    let api = Api::new(Endpoint::Url(server.clone()), global);
    let index = api.get("/").await.context("could not connect to the Control Plane API Server")?;
    let product = index.get("product").and_then(serde_json::Value::as_str).unwrap_or_default();
    match product {
        // Nobody is asked for a token there, but here.
        "Ursa" | "Kuma" if server.auth_conf.contains_key("token") => {
            api.get("/who-am-i").await.map(drop).context("the Control Plane API Server refuses the token")
        }
        "Ursa" | "Kuma" => Ok(()),
        "" => bail!("{address} answers, but not as a control plane does; check the address and the port"),
        other => bail!(
            "this CLI is for Kuma but the control plane you're connected to is {other}. Please use the CLI for \
             your control plane"
        ),
    }
}
