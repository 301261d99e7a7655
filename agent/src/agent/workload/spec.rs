//! What a workload is: its Dataplane, and how it lives on this machine.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use ursa_init::RedirectIntent;
use ursa_init::intent::{Cgroup, Dns, Ids, Inbound, InboundMode, Outbound, Part, Tproxy};
use ursa_model::{ParseError, Resource};

use crate::agent::config::AgentConfig;
use crate::launcher::Handover;
use crate::relay::hex;

/// The key of a workload file that isn't part of the Dataplane.
const LOCAL: &str = "ursa";
/// Where the Dataplane tells of a redirect by TPROXY.
const TPROXY_MARK: &str = "tproxyMark";
/// Socket paths hold 107 bytes, and the run directory needs most of them.
const ID_LENGTH: usize = 40;

/// The users of the proxies of pods, from which the supervisor gives each one of its own: above what systemd's
/// UIDS-GIDS assigns to anybody, and below its foreign range.
pub const POD_UIDS: RangeInclusive<u32> = 1_900_000_000..=1_900_065_535;

/// A text describes no workload.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It is no YAML object.
    #[error("{0}")]
    Yaml(String),
    /// Part `ursa` is wrong.
    #[error("`ursa`: {0}")]
    Local(String),
    /// It is no Dataplane.
    #[error("type is {0}; a workload file holds a resource of type Dataplane")]
    Type(String),
    /// The Dataplane is wrong.
    #[error("{0}")]
    Dataplane(#[from] ParseError),
    /// The Dataplane is wrong, with all violations.
    #[error("the Dataplane is invalid: {0}")]
    Invalid(String),
    /// The proxy's user can't be root.
    #[error("ursa.proxyUid: 0 (root) can't be the proxy: everything root does would go past the mesh")]
    Root,
    /// The redirect is wrong.
    #[error("ursa.redirect: {0}")]
    Redirect(String),
}

/// Where a workload came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "value")]
pub enum Origin {
    /// A file.
    File(String),
    /// CNI ADD of this container.
    Cni(String),
    /// Left by a former agent; only to be removed.
    Orphan,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.write_str(path),
            Self::Cni(container) => write!(f, "CNI container {container}"),
            Self::Orphan => f.write_str("a former agent"),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Local {
    unit: Option<String>,
    netns: Option<PathBuf>,
    proxy_uid: Option<u32>,
    proxy_gid: Option<u32>,
    uids: Vec<Ids>,
    slices: Vec<Cgroup>,
    redirect: Option<RedirectIntent>,
    concurrency: Option<u32>,
    resolv_conf: Option<PathBuf>,
    dataplane_token_file: Option<PathBuf>,
}

/// A workload. Two equal ones need nothing done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSpec {
    /// Mesh of the Dataplane.
    pub mesh: String,
    /// Name of the Dataplane.
    pub name: String,
    /// Where it came from.
    pub origin: Origin,
    /// The Dataplane in its REST form.
    pub dataplane: Value,
    /// The systemd unit of the application; its sidecar starts and stops with it.
    #[serde(default)]
    pub unit: Option<String>,
    /// Its network namespace; the agent's own when absent.
    pub netns: Option<PathBuf>,
    /// User of shim and Envoy, which no other workload has: a proxy of the same user could take its key.
    pub uid: u32,
    /// Group of shim and Envoy.
    pub gid: u32,
    /// Envoy's worker threads.
    pub concurrency: u32,
    /// The resolver that the workload would use without a mesh.
    pub resolv_conf: PathBuf,
    /// The redirect; absent when something else (`ursa-init`, the CNI plugin) puts it in place.
    pub redirect: Option<RedirectIntent>,
    /// The users that the workload runs as, where it shares its network namespace with others.
    #[serde(default)]
    pub uids: Vec<Ids>,
    /// The slices that it runs in, likewise.
    #[serde(default)]
    pub slices: Vec<Cgroup>,
    /// The port of the shim's DNS, where the redirect sends lookups.
    #[serde(default = "default_dns_port")]
    pub dns_port: u16,
    /// The file with its dataplane token; absent when the node's grant is all that vouches for it.
    #[serde(default)]
    pub dataplane_token_file: Option<PathBuf>,
}

impl WorkloadSpec {
    /// Reads a workload file.
    pub fn from_yaml(text: &str, origin: Origin, config: &AgentConfig) -> Result<Self, SpecError> {
        let value: Value =
            ursa_model::yaml::from_str(text).map_err(|error| SpecError::Yaml(error.to_string()))?;
        Self::from_value(value, origin, config)
    }

    /// Reads a Dataplane with an optional part `ursa`.
    pub fn from_value(mut value: Value, origin: Origin, config: &AgentConfig) -> Result<Self, SpecError> {
        let object = value.as_object_mut().ok_or_else(|| {
            SpecError::Yaml("expected a Dataplane: fields type, mesh, name, networking".to_owned())
        })?;
        let local: Local = match object.remove(LOCAL) {
            None | Some(Value::Null) => Local::default(),
            Some(local) => {
                serde_json::from_value(local).map_err(|error| SpecError::Local(error.to_string()))?
            }
        };
        let dataplane = Resource::from_json(&value)?;
        if dataplane.descriptor.name != "Dataplane" {
            return Err(SpecError::Type(dataplane.descriptor.name.to_owned()));
        }
        let violations = dataplane.validate();
        if !violations.is_empty() {
            return Err(SpecError::Invalid(violations.to_string()));
        }
        let uid = local.proxy_uid.unwrap_or(config.proxy_uid);
        // A group of its own goes with a user of its own, unless the operator says otherwise.
        let gid = local.proxy_gid.or(local.proxy_uid).unwrap_or(config.proxy_gid);
        if uid == 0 {
            return Err(SpecError::Root);
        }
        let told_apart = !local.uids.is_empty() || !local.slices.is_empty();
        // In the agent's own namespace rules would catch the whole machine: only for what the operator spelled out.
        let unasked = (local.netns.is_some() || told_apart).then(RedirectIntent::default);
        let mut redirect = local.redirect.or(unasked);
        let dns_port = redirect.as_ref().map_or_else(default_dns_port, |intent| intent.dns.port);
        let mut dataplane_json = dataplane.to_json();
        if let Some(intent) = &mut redirect {
            if !intent.proxy_uids.contains(&uid) {
                intent.proxy_uids.push(uid);
            }
            agree_on_ports(intent, &mut dataplane_json).map_err(SpecError::Redirect)?;
            agree_on_mode(intent, &mut dataplane_json).map_err(SpecError::Redirect)?;
            if told_apart && intent.inbound.include_ports.is_empty() {
                intent.inbound.include_ports = own_ports(&dataplane_json);
            }
        }
        let spec = Self {
            mesh: dataplane.meta.mesh.clone(),
            name: dataplane.meta.name.clone(),
            origin,
            dataplane: dataplane_json,
            unit: local.unit,
            netns: local.netns,
            uid,
            gid,
            concurrency: local.concurrency.unwrap_or(config.concurrency).max(1),
            resolv_conf: local.resolv_conf.unwrap_or_else(|| config.resolv_conf.clone()),
            redirect,
            uids: local.uids,
            slices: local.slices,
            dns_port,
            dataplane_token_file: local.dataplane_token_file.or_else(|| config.dataplane_token_file.clone()),
        };
        if spec.is_transparent() && spec.netns.is_none() {
            return Err(SpecError::Redirect(
                "inbound.mode tproxy: Envoy would hold CAP_NET_RAW in the machine's own network namespace, and with it \
                 could read all that passes there; give the workload one of its own (`ursa.netns`), or leave the mode \
                 at redirect"
                    .to_owned(),
            ));
        }
        if spec.redirect.is_some() {
            super::redirect::plan(&[&spec]).map_err(SpecError::Redirect)?;
        }
        Ok(spec)
    }

    /// Its part of the redirect of a namespace that it shares; `None` when it has no redirect.
    pub fn part(&self) -> Option<Part> {
        let intent = self.redirect.clone()?;
        Some(Part { name: self.node_id(), uids: self.uids.clone(), slices: self.slices.clone(), intent })
    }

    /// Whether the kernel can tell its traffic from that of others in its namespace.
    pub const fn is_told_apart(&self) -> bool {
        !self.uids.is_empty() || !self.slices.is_empty()
    }

    /// Whether its Envoy accepts connections to addresses that it hasn't got, and calls the workload from them: where
    /// the redirect is by TPROXY.
    pub fn is_transparent(&self) -> bool {
        tproxy_mark(&self.dataplane) != 0
    }

    /// Name of its directories, and of its sidecar's unit: that of the service where there is one.
    pub fn id(&self) -> String {
        self.unit.as_deref().map_or_else(|| id_of(&self.mesh, &self.name), service_id)
    }

    /// `<mesh>.<name>`: node id towards control and Envoy.
    pub fn node_id(&self) -> String {
        format!("{}.{}", self.mesh, self.name)
    }

    /// The label that names the service this workload is part of, or the Dataplane's own name.
    pub fn cluster(&self) -> String {
        self.dataplane
            .pointer("/labels/kuma.io~1workload")
            .and_then(Value::as_str)
            .unwrap_or(&self.name)
            .to_owned()
    }

    /// Its Dataplane as control is to know it: unless `called`, no inbound is ready for callers.
    pub fn dataplane_as(&self, called: bool) -> Value {
        let mut dataplane = self.dataplane.clone();
        let inbounds = dataplane.pointer_mut("/networking/inbound").and_then(Value::as_array_mut);
        for inbound in inbounds.into_iter().flatten().filter_map(Value::as_object_mut) {
            // One that is to be ignored has no callers anyway.
            if !called && inbound.get("state").is_none_or(|state| state == "Ready") {
                inbound.insert("state".to_owned(), "NotReady".into());
            }
        }
        dataplane
    }

    /// Whether `other` differs in what only a new shim can change. One that takes settings while it runs follows the rest.
    pub fn needs_restart(&self, other: &Self, handover: Handover) -> bool {
        let identity = (&self.netns, self.uid, self.gid, self.is_transparent())
            != (&other.netns, other.uid, other.gid, other.is_transparent());
        let arguments = (self.concurrency, &self.resolv_conf, self.dns_port)
            != (other.concurrency, &other.resolv_conf, other.dns_port);
        identity || (arguments && handover == Handover::Files)
    }
}

fn default_dns_port() -> u16 {
    Dns::default().port
}

/// The Dataplane tells control on which ports Envoy listens, the redirect tells the kernel: they must be the same. What
/// only one of the two says, the other takes over.
fn agree_on_ports(intent: &mut RedirectIntent, dataplane: &mut Value) -> Result<(), String> {
    let (inbound, outbound) = (Inbound::default().port, Outbound::default().port);
    let ports = [
        ("redirectPortInbound", inbound, &mut intent.inbound.port),
        ("redirectPortOutbound", outbound, &mut intent.outbound.port),
    ];
    for (key, default, port) in ports {
        let path = format!("/networking/transparentProxying/{key}");
        let told = dataplane.pointer(&path).and_then(Value::as_u64).unwrap_or_default();
        match u16::try_from(told) {
            Ok(0) if *port != default => {
                tell(dataplane, key, (*port).into());
            }
            Ok(0) => {}
            Ok(told) if *port == default || *port == told => *port = told,
            _ => {
                return Err(format!(
                    "port {port} contradicts networking.transparentProxying.{key}: {told}; say it once"
                ));
            }
        }
    }
    Ok(())
}

/// Likewise whether connections keep their addresses, and with which mark Envoy then calls the workload.
fn agree_on_mode(intent: &mut RedirectIntent, dataplane: &mut Value) -> Result<(), String> {
    let told = tproxy_mark(dataplane);
    let mark = intent.tproxy.mark;
    match (told, intent.inbound.mode) {
        (0, InboundMode::Redirect) => {}
        (0, InboundMode::Tproxy) => tell(dataplane, TPROXY_MARK, mark.into()),
        (told, _) if mark == Tproxy::default().mark || mark == told => {
            intent.inbound.mode = InboundMode::Tproxy;
            intent.tproxy.mark = told;
        }
        (told, _) => {
            return Err(format!(
                "tproxy.mark {mark} contradicts networking.transparentProxying.{TPROXY_MARK}: {told}; say it once"
            ));
        }
    }
    Ok(())
}

/// The mark of the proxy's calls to the workload; 0 where they don't carry the client's address.
fn tproxy_mark(dataplane: &Value) -> u32 {
    let told =
        dataplane.pointer("/networking/transparentProxying").and_then(|told| told[TPROXY_MARK].as_u64());
    told.and_then(|mark| u32::try_from(mark).ok()).unwrap_or_default()
}

fn tell(dataplane: &mut Value, key: &str, value: Value) {
    let networking = &mut dataplane["networking"];
    if !networking["transparentProxying"].is_object() {
        networking["transparentProxying"] = serde_json::json!({});
    }
    networking["transparentProxying"][key] = value;
}

/// The ports on which the workload itself listens.
fn own_ports(dataplane: &Value) -> Vec<ursa_init::intent::Ports> {
    let inbounds = dataplane.pointer("/networking/inbound").and_then(Value::as_array);
    let ports = inbounds.into_iter().flatten().filter_map(|inbound| inbound.get("port")?.as_u64());
    ports.filter_map(|port| u16::try_from(port).ok()).map(ursa_init::intent::Ports::one).collect()
}

/// Name of the directories of a systemd service's workload: the service's own.
fn service_id(unit: &str) -> String {
    let name = unit.strip_suffix(".service").unwrap_or(unit);
    if is_harmless(name) { name.to_owned() } else { hex(&Sha256::digest(unit.as_bytes())[..16]) }
}

fn is_harmless(id: &str) -> bool {
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    id.len() <= ID_LENGTH && !id.is_empty() && id.chars().all(harmless) && !id.starts_with('.')
}

/// Name of a workload's directories: readable while it is short and harmless.
pub fn id_of(mesh: &str, name: &str) -> String {
    let id = format!("{mesh}.{name}");
    if is_harmless(&id) { id } else { hex(&Sha256::digest(id.as_bytes())[..16]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<WorkloadSpec, SpecError> {
        WorkloadSpec::from_yaml(text, Origin::File("w.yaml".into()), &AgentConfig::default())
    }

    const WEB: &str = "type: Dataplane\nmesh: default\nname: web-1\nlabels: {kuma.io/workload: web}\n\
                       networking: {address: 10.0.0.1, inbound: [{name: main, port: 8080, protocol: http}]}\n";

    #[test]
    fn a_dataplane_is_a_workload() {
        let spec = read(WEB).unwrap();
        assert_eq!((spec.id().as_str(), spec.cluster().as_str()), ("default.web-1", "web"));
        assert!(spec.redirect.is_none(), "never rules in the machine's own namespace unasked");
    }

    #[test]
    fn one_that_is_not_to_be_called_says_so_on_every_inbound() {
        let spec = read(&WEB.replace(
            "protocol: http}",
            "protocol: http}, {name: old, port: 81, state: Ignored}, {name: up, port: 82, state: Ready}",
        ))
        .unwrap();
        let states = |called| {
            let dataplane = spec.dataplane_as(called);
            let inbounds = dataplane.pointer("/networking/inbound").unwrap().as_array().unwrap().clone();
            inbounds.into_iter().map(|inbound| inbound.get("state").cloned()).collect::<Vec<_>>()
        };
        assert_eq!(states(true), [None, Some("Ignored".into()), Some("Ready".into())]);
        assert_eq!(states(false), [Some("NotReady".into()), Some("Ignored".into()), Some("NotReady".into())]);
    }

    #[test]
    fn the_local_part_stays_here() {
        let spec = read(&format!("{WEB}ursa: {{netns: /run/netns/web, proxyUid: 7}}\n")).unwrap();
        assert_eq!((spec.uid, spec.gid), (7, 7));
        assert_eq!(spec.redirect.unwrap().proxy_uids, [7]);
        assert!(spec.dataplane.get("ursa").is_none());
    }

    #[test]
    fn dataplane_and_redirect_agree_on_ports() {
        let spec = read(&format!(
            "{WEB}ursa: {{uids: [2001], proxyUid: 7, redirect: {{inbound: {{port: 15106}}, dns: {{port: 15153}}}}}}\n"
        ));
        let spec = spec.unwrap();
        assert_eq!(
            spec.dataplane.pointer("/networking/transparentProxying/redirectPortInbound"),
            Some(&15106.into())
        );
        let intent = spec.redirect.clone().unwrap();
        assert_eq!((intent.inbound.include_ports.len(), spec.dns_port), (1, 15153));
        let proxying = "address: 10.0.0.1, transparentProxying: {redirectPortOutbound: 15101},";
        let told = WEB.replace("address: 10.0.0.1,", proxying);
        let spec = read(&format!("{told}ursa: {{slices: [ursa.slice/web.slice], proxyUid: 7}}\n")).unwrap();
        assert_eq!(spec.redirect.unwrap().outbound.port, 15101);
        let error = read(&format!("{told}ursa: {{netns: /x, redirect: {{outbound: {{port: 15201}}}}}}\n"));
        assert!(error.unwrap_err().to_string().contains("say it once"));
    }

    #[test]
    fn dataplane_and_redirect_agree_on_tproxy() {
        let mark = |spec: &WorkloadSpec| {
            let told = spec.dataplane.pointer("/networking/transparentProxying/tproxyMark").cloned();
            (told, spec.redirect.as_ref().map(|intent| (intent.inbound.mode, intent.tproxy.mark)))
        };
        let file = |redirect: &str| {
            format!("{WEB}ursa: {{netns: /x, proxyUid: 7, redirect: {{inbound: {{mode: {redirect}}}}}}}\n")
        };
        let plain = read(&file("redirect")).unwrap();
        assert_eq!(mark(&plain), (None, Some((InboundMode::Redirect, 1337))));
        let spec = read(&file("tproxy")).unwrap();
        assert_eq!(mark(&spec), (Some(1337.into()), Some((InboundMode::Tproxy, 1337))));
        assert!(
            spec.is_transparent() && plain.needs_restart(&spec, Handover::Settings),
            "its Envoy needs other rights"
        );
        let spec = read(&file("tproxy}, tproxy: {mark: 99")).unwrap();
        assert_eq!(mark(&spec), (Some(99.into()), Some((InboundMode::Tproxy, 99))));

        let told = WEB.replace("10.0.0.1,", "10.0.0.1, transparentProxying: {tproxyMark: 42},");
        let spec = read(&format!("{told}ursa: {{netns: /x, proxyUid: 7}}\n")).unwrap();
        assert_eq!(mark(&spec), (Some(42.into()), Some((InboundMode::Tproxy, 42))));
        let error = read(&format!("{told}ursa: {{netns: /x, redirect: {{tproxy: {{mark: 99}}}}}}\n"));
        assert!(error.unwrap_err().to_string().contains("say it once"));
        for own in [format!("{told}ursa: {{}}\n"), file("tproxy").replace("netns: /x, ", "")] {
            let error = read(&own).unwrap_err().to_string();
            assert!(error.contains("the machine's own network namespace"), "{own}: {error}");
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        for (text, expected) in [
            ("", "Dataplane"),
            ("type: Mesh\nname: default\n", "Mesh"),
            ("{", ""),
            (&format!("{WEB}ursa: {{netn: /x}}\n"), "netn"),
            (&format!("{WEB}ursa: {{proxyUid: 0}}\n"), "root"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn long_names_get_short_directories() {
        let long = WEB.replace("web-1", &"a".repeat(60));
        let spec = read(&long).unwrap();
        assert_eq!(spec.id().len(), 32);
    }
}
