//! Asking the container runtime which pods there are.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::uri::PathAndQuery;
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};
use ursa_model::labels::Labels;

use super::proto;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest answer: a thousand pods with long annotations fit.
const LONGEST: usize = 16 << 20;
const LIST: PathAndQuery = PathAndQuery::from_static("/runtime.v1.RuntimeService/ListPodSandbox");
const STATUS: PathAndQuery = PathAndQuery::from_static("/runtime.v1.RuntimeService/PodSandboxStatus");

/// Why the runtime didn't say.
#[derive(Debug, thiserror::Error)]
pub(super) enum CriError {
    /// The socket isn't there, or nobody listens on it.
    #[error("no container runtime answers on {}: {why}; correct `cri` in the agent's configuration, or start the runtime", path.display())]
    Away { path: PathBuf, why: String },
    /// It answered with an error.
    #[error("the container runtime refused {what}: {why}")]
    Refused { what: &'static str, why: String },
    /// What it says lacks what is needed.
    #[error("the container runtime says nothing usable of sandbox {id}: {why}")]
    Odd { id: String, why: String },
}

/// A sandbox that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sandbox {
    pub(super) id: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) labels: Labels,
    pub(super) annotations: Labels,
}

/// Where a sandbox is on the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The machine's own network.
    Host,
    /// A namespace of its own, with these addresses.
    Own { netns: PathBuf, ips: Vec<String> },
}

/// A connection to the runtime.
#[derive(Clone, Debug)]
pub(super) struct Runtime {
    path: PathBuf,
    channel: Channel,
}

impl Runtime {
    pub(super) fn new(path: &Path) -> Result<Self, CriError> {
        let away = |why: String| CriError::Away { path: path.to_owned(), why };
        let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()))
            .map_err(|error| away(format!("{error}: write an absolute path")))?;
        let channel = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE).connect_lazy();
        Ok(Self { path: path.to_owned(), channel })
    }

    async fn ask<Q, A>(&self, what: &'static str, method: PathAndQuery, question: Q) -> Result<A, CriError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut client = tonic::client::Grpc::new(self.channel.clone()).max_decoding_message_size(LONGEST);
        let away = |why: String| CriError::Away { path: self.path.clone(), why };
        client.ready().await.map_err(|error| away(crate::agent::control::chain(&error)))?;
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let asked = client.unary(tonic::Request::new(question), method, codec);
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) if status.code() == tonic::Code::Unavailable => {
                Err(away(status.message().to_owned()))
            }
            Ok(Err(status)) => Err(CriError::Refused { what, why: status.message().to_owned() }),
            Err(_) => Err(CriError::Refused { what, why: format!("no answer in {} s", PATIENCE.as_secs()) }),
        }
    }

    /// The sandboxes that run.
    pub(super) async fn sandboxes(&self) -> Result<Vec<Sandbox>, CriError> {
        let answer: proto::ListPodSandboxResponse =
            self.ask("a list of its sandboxes", LIST, proto::ListPodSandboxRequest {}).await?;
        let ready = answer.items.into_iter().filter(|item| item.state == 0);
        let found = ready.filter_map(|item| {
            let metadata = item.metadata?;
            Some(Sandbox {
                id: item.id,
                namespace: metadata.namespace,
                name: metadata.name,
                uid: metadata.uid,
                labels: sorted(item.labels),
                annotations: sorted(item.annotations),
            })
        });
        Ok(found.collect())
    }

    /// Where a sandbox is; `None` when it is gone by now.
    pub(super) async fn place(&self, id: &str) -> Result<Option<Place>, CriError> {
        let question = proto::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let answer: proto::PodSandboxStatusResponse =
            match self.ask("a sandbox's status", STATUS, question).await {
                Err(CriError::Refused { why, .. }) if why.contains("not found") => return Ok(None),
                answer => answer?,
            };
        place(id, answer)
    }
}

fn sorted(words: HashMap<String, String>) -> Labels {
    words.into_iter().collect::<BTreeMap<_, _>>()
}

fn place(id: &str, answer: proto::PodSandboxStatusResponse) -> Result<Option<Place>, CriError> {
    let odd = |why: &str| CriError::Odd { id: id.to_owned(), why: why.to_owned() };
    let status = answer.status.ok_or_else(|| odd("there is no status"))?;
    if status.state != 0 {
        return Ok(None);
    }
    let options = status.linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options);
    if options.is_some_and(|options| options.network == proto::NODE) {
        return Ok(Some(Place::Host));
    }
    // Runtimes agree on this key and on its being the runtime's specification.
    let info = answer.info.get("info").ok_or_else(|| odd("its verbose status has no `info`"))?;
    let info: Value =
        serde_json::from_str(info).map_err(|error| odd(&format!("`info` is no JSON: {error}")))?;
    let namespaces = info.pointer("/runtimeSpec/linux/namespaces").and_then(Value::as_array);
    let is_network = |one: &&Value| one.get("type").and_then(Value::as_str) == Some("network");
    let network = namespaces
        .and_then(|namespaces| namespaces.iter().find(is_network))
        .ok_or_else(|| odd("`runtimeSpec` lists no network namespace"))?;
    let named =
        network.get("path").and_then(Value::as_str).filter(|path| !path.is_empty()).map(PathBuf::from);
    let of_process = || {
        let pid = info.get("pid").and_then(Value::as_u64).filter(|pid| *pid > 1)?;
        Some(PathBuf::from(format!("/proc/{pid}/ns/net")))
    };
    let netns =
        named.or_else(of_process).ok_or_else(|| odd("neither a path of its network namespace nor a pid"))?;
    let network = status.network.unwrap_or_default();
    let ips = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|more| more.ip));
    Ok(Some(Place::Own { netns, ips: ips.filter(|ip| !ip.is_empty()).collect() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(network: i32, info: &str) -> proto::PodSandboxStatusResponse {
        let options = Some(proto::NamespaceOption { network });
        let linux = proto::LinuxPodSandboxStatus { namespaces: Some(proto::Namespace { options }) };
        let addresses = proto::PodSandboxNetworkStatus {
            ip: "10.0.0.9".to_owned(),
            additional_ips: vec![proto::PodIp { ip: "fd00::9".to_owned() }],
        };
        proto::PodSandboxStatusResponse {
            status: Some(proto::PodSandboxStatus { state: 0, network: Some(addresses), linux: Some(linux) }),
            info: HashMap::from([("info".to_owned(), info.to_owned())]),
        }
    }

    #[test]
    fn a_sandbox_is_found_by_path_or_by_process() {
        let spec = |namespace: &str| {
            format!(
                r#"{{"pid":42,"runtimeSpec":{{"linux":{{"namespaces":[{{"type":"pid"}},{namespace}]}}}}}}"#
            )
        };
        let ips = vec!["10.0.0.9".to_owned(), "fd00::9".to_owned()];
        let own = |netns: &str| Some(Place::Own { netns: netns.into(), ips: ips.clone() });
        let named = spec(r#"{"type":"network","path":"/run/netns/x"}"#);
        assert_eq!(place("a", answer(0, &named)).unwrap(), own("/run/netns/x"));
        let unnamed = spec(r#"{"type":"network"}"#);
        assert_eq!(place("a", answer(0, &unnamed)).unwrap(), own("/proc/42/ns/net"));
        assert_eq!(place("a", answer(proto::NODE, "?")).unwrap(), Some(Place::Host));
    }

    #[tokio::test]
    async fn a_runtime_that_is_away_or_talks_nonsense_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cri.sock");
        let runtime = Runtime::new(&path).unwrap();
        let error = runtime.sandboxes().await.unwrap_err().to_string();
        assert!(error.contains("cri.sock") && error.contains("correct `cri`"), "{error}");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let nonsense = async {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"SSH-2.0-x\r\n\r\n").await;
            }
        };
        let asked = async { runtime.sandboxes().await.unwrap_err().to_string() };
        let error = tokio::select! {
            error = asked => error,
            () = nonsense => String::new(),
        };
        assert!(error.contains("container runtime"), "{error}");
    }

    #[test]
    fn what_cannot_be_understood_is_said() {
        for info in ["", "{}", r#"{"runtimeSpec":{"linux":{"namespaces":[{"type":"network"}]}}}"#, "[1"] {
            let error = place("abc", answer(0, info)).unwrap_err().to_string();
            assert!(error.contains("abc"), "{error}");
        }
        assert!(place("a", proto::PodSandboxStatusResponse::default()).is_err());
    }
}
