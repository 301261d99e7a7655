//! The proof that the way through the mesh is closed and works: the service calls itself by its mesh name, which goes out
//! by its Envoy and in again, and Envoy's own counters and configuration say by what.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::facts::Service;
use super::options::Protocol;
use super::record::{Apart, Record};
use super::{HostError, Result, join, system};
use crate::agent::config::AgentConfig;
use crate::agent::workload::inspect;

/// Where systemd makes the directories of sidecars.
pub(super) const RUN_DIR: &str = "/run/ursa-sidecar";
/// Names, endpoints and certificates take a moment to get here.
const DEADLINE: Duration = Duration::from_secs(45);
/// How long a connection may take, and then its answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Proves it; what was found, a line each.
pub(super) async fn run(config: &AgentConfig, record: &Record, app: &Service) -> Result<Vec<String>> {
    let settings = &record.settings;
    let dir = Path::new(RUN_DIR).join(&record.service);
    let domain = config.dns_domains.first().map_or("mesh.local", String::as_str);
    let target = format!("{}.svc.{domain}:{}", settings.workload, settings.port);
    let failed = |why: String| {
        HostError::new(format!(
            "the self-test failed: {why}; `ursa-agent status` tells what the agent knows, and the service is in the mesh as far \
             as the lines above say"
        ))
    };
    let status = join::status(config).await?;
    let workload = status.workloads.iter().find(|one| one.id == record.service);
    let id = workload
        .and_then(|workload| workload.certificate.as_ref())
        .map(|leaf| leaf.spiffe_id.clone())
        .ok_or_else(|| failed("its sidecar has no certificate".to_owned()))?;
    if !id.ends_with(&format!("/workload/{}", settings.workload)) {
        return Err(failed(format!("its certificate says {id}, which isn't workload {}", settings.workload)));
    }
    let before = counters(&dir).await.map_err(failed)?;
    let found = system::until(DEADLINE, async || {
        let said = call_as(record, app, &target).map_err(|error| error.to_string())?;
        let after = counters(&dir).await?;
        if after.refused > before.refused {
            return Err(format!("a certificate was refused when the service called {target}"));
        }
        if after.inbound > before.inbound && after.outbound > before.outbound {
            return Ok(Some((said, after.inbound - before.inbound)));
        }
        Err(format!("{target} was called ({said}), and no handshake was seen at port {}", settings.port))
    })
    .await;
    let (said, handshakes) = found.map_err(failed)?;
    let dump = inspect(&dir, "config-dump", &json!({})).await.map_err(failed)?;
    if !asks_for(&dump, &id) {
        return Err(failed(format!("no cluster of its Envoy asks for a server that is {id}")));
    }
    let mutual = format!(
        "{target} was called by the service itself: mutual TLS both ways through its Envoy ({handshakes} handshake{}), and the \
         other end is {id}; it answered: {said}",
        if handshakes == 1 { "" } else { "s" }
    );
    let plaintext = match strictness(&dump, settings.port) {
        Some(true) => format!(
            "plaintext to port {} is refused: whatever arrives there is asked for a certificate of the mesh",
            settings.port
        ),
        Some(false) => {
            format!("plaintext to port {} is let in as well: a MeshTLS policy says Permissive", settings.port)
        }
        None => return Err(failed(format!("its Envoy has no listener for port {}", settings.port))),
    };
    Ok(vec![mutual, plaintext])
}

/// Calls as the service would: as its user, in its slice or in its namespace.
fn call_as(record: &Record, app: &Service, target: &str) -> Result<String> {
    let program = std::env::current_exe()
        .map_err(|error| HostError::new(format!("this program can't find itself: {error}")))?;
    let program = program.display().to_string();
    let mut settings = Vec::new();
    match &record.settings.apart {
        Apart::Uid(uid) => settings.push(format!("User={uid}")),
        Apart::Slice(slice) => settings.push(format!("Slice={slice}")),
        Apart::Namespace(path) => settings.push(format!("NetworkNamespacePath={}", path.display())),
    }
    if matches!(record.settings.apart, Apart::Namespace(_)) && !app.user.is_empty() && !app.dynamic_user {
        settings.push(format!("User={}", app.user));
    }
    let mut args = vec!["--quiet", "--wait", "--pipe", "--collect", "--service-type=exec"];
    for setting in &settings {
        args.extend(["-p", setting]);
    }
    args.extend(["--", &program, "self-test-call", target]);
    if record.settings.protocol == Protocol::Http {
        args.push("--http");
    }
    Ok(system::run("systemd-run", &args)?.trim().to_owned())
}

/// The call itself, in the service's place: resolves `target` and connects to it; what it answered.
pub fn call(target: &str, http: bool) -> Result<String> {
    let failed =
        |what: &str, error: &dyn std::fmt::Display| HostError::new(format!("{target} {what}: {error}"));
    let address = target
        .to_socket_addrs()
        .map_err(|error| failed("doesn't resolve", &error))?
        .next()
        .ok_or_else(|| failed("doesn't resolve", &"no address"))?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)
        .map_err(|error| failed(&format!("({}) can't be reached", address.ip()), &error))?;
    let exchange = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        if http {
            let host = target.rsplit_once(':').map_or(target, |(host, _)| host);
            write!(
                stream,
                "GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: ursa-self-test\r\nConnection: close\r\n\r\n"
            )?;
        }
        let mut start = [0; 200];
        let read = stream.read(&mut start)?;
        Ok::<_, std::io::Error>(
            String::from_utf8_lossy(&start[..read]).lines().next().unwrap_or_default().to_owned(),
        )
    };
    Ok(match exchange(&mut stream) {
        Ok(line) if line.is_empty() => "it closed the connection".to_owned(),
        Ok(line) => line,
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
        {
            "nothing, and it keeps the connection open".to_owned()
        }
        Err(error) => error.to_string(),
    })
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    /// Handshakes of those who called.
    inbound: u64,
    /// Handshakes with those who were called.
    outbound: u64,
    /// Certificates that weren't believed.
    refused: u64,
}

async fn counters(dir: &Path) -> Result<Counters, String> {
    let stats = inspect(dir, "stats", &json!({})).await?;
    Ok(read_counters(stats.as_str().unwrap_or_default()))
}

fn read_counters(text: &str) -> Counters {
    let mut all = Counters::default();
    for (name, value) in text.lines().filter_map(|line| line.split_once(": ")) {
        let Ok(value) = value.parse::<u64>() else { continue };
        if name.ends_with(".ssl.handshake") {
            if name.starts_with("listener.") {
                all.inbound += value;
            } else if name.starts_with("cluster.") {
                all.outbound += value;
            }
        } else if name.contains(".ssl.fail_verify_") {
            all.refused += value;
        }
    }
    all
}

/// Whether a cluster demands exactly this id of whom it calls.
fn asks_for(dump: &Value, id: &str) -> bool {
    fn holds(value: &Value, id: &str) -> bool {
        match value {
            Value::Object(fields) => {
                fields.iter().any(|(key, value)| (key == "exact" && value == id) || holds(value, id))
            }
            Value::Array(items) => items.iter().any(|item| holds(item, id)),
            _ => false,
        }
    }
    configs(dump, "ClustersConfigDump").any(|clusters| holds(clusters, id))
}

/// Whether all that arrives at `port` must show a certificate; `None` when nothing takes what arrives there.
fn strictness(dump: &Value, port: u16) -> Option<bool> {
    let listeners = configs(dump, "ListenersConfigDump")
        .flat_map(|listeners| listeners["dynamic_listeners"].as_array().into_iter().flatten())
        .map(|dynamic| &dynamic["active_state"]["listener"])
        .filter(|listener| {
            listener["traffic_direction"] == "INBOUND"
                && listener.pointer("/address/socket_address/port_value").and_then(Value::as_u64)
                    == Some(port.into())
        });
    let chains: Vec<&Value> = listeners
        .flat_map(|listener| {
            let chains = listener["filter_chains"].as_array().into_iter().flatten();
            chains.chain(listener.get("default_filter_chain"))
        })
        .collect();
    let demands = |chain: &&Value| {
        chain.pointer("/transport_socket/typed_config/require_client_certificate") == Some(&Value::Bool(true))
    };
    (!chains.is_empty()).then(|| chains.iter().all(demands))
}

fn configs<'a>(dump: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    let all = dump["configs"].as_array().into_iter().flatten();
    all.filter(move |config| config["@type"].as_str().is_some_and(|found| found.ends_with(kind)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
    use super::*;

    #[test]
    fn handshakes_are_counted_by_direction() {
        let text = "cluster.web.ssl.handshake: 2\nlistener.self_inbound_dp_main.ssl.handshake: 3\n\
                    cluster.web.ssl.fail_verify_san: 1\nlistener.a.ssl.handshake_seconds: No recorded values\n";
        assert_eq!(read_counters(text), Counters { inbound: 3, outbound: 2, refused: 1 });
    }

    #[test]
    fn a_port_is_strict_if_each_chain_wants_a_certificate() {
        let tls = json!({"transport_socket": {"typed_config": {"require_client_certificate": true}}});
        let dump = |chains: Value| {
            json!({"configs": [{"@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump", "dynamic_listeners": [
                {"active_state": {"listener": {"traffic_direction": "INBOUND",
                    "address": {"socket_address": {"port_value": 8080}}, "filter_chains": chains}}}]}]})
        };
        assert_eq!(strictness(&dump(json!([tls])), 8080), Some(true));
        assert_eq!(strictness(&dump(json!([tls, {}])), 8080), Some(false));
        assert_eq!(strictness(&dump(json!([tls])), 8081), None);
        assert_eq!(strictness(&dump(json!([])), 8080), None);
    }

    #[test]
    fn the_other_end_is_who_the_cluster_asks_for() {
        let dump = json!({"configs": [{"@type": "x/envoy.admin.v3.ClustersConfigDump",
            "dynamic_active_clusters": [{"cluster": {"sans": [{"matcher": {"exact": "spiffe://m/workload/web"}}]}}]}]});
        assert!(asks_for(&dump, "spiffe://m/workload/web"));
        assert!(!asks_for(&dump, "spiffe://m/workload/we"));
    }

    #[test]
    fn a_call_says_what_it_found() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap().to_string();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut line = [0; 16];
            stream.read_exact(&mut line).unwrap();
            stream.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").unwrap();
        });
        assert_eq!(call(&target, true).unwrap(), "HTTP/1.1 403 Forbidden");
        thread.join().unwrap();
        assert!(call(&target, true).unwrap_err().to_string().contains("can't be reached"));
        assert!(call("x.invalid:1", false).unwrap_err().to_string().contains("doesn't resolve"));
    }
}
