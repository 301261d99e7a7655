//! Pods, as the CNI plugin describes them.

mod config;
mod decisions;

use serde_json::{Value, json};
use ursa_cni_protocol::Call;
use ursa_model::injection::Membership;
use ursa_model::labels;

pub use self::config::CniConfig;
pub use self::decisions::Decisions;
use super::config::{AgentConfig, LauncherKind};
use super::workload::{Origin, POD_UIDS, WorkloadSpec};

/// The workload of a container. The plugin has put the redirect in place.
pub(crate) fn spec(call: &Call, who: Membership, config: &AgentConfig) -> Result<WorkloadSpec, String> {
    if call.container_id.is_empty() {
        return Err("field `container_id` is missing".to_owned());
    }
    let mut dataplane = dataplane(call, who)?;
    // The redirect exempts this user or group, so shim and Envoy must run as it.
    let redirect = call.config.redirect.as_ref();
    let uid = redirect.and_then(|intent| intent.proxy_uids.first().copied()).unwrap_or(*POD_UIDS.start());
    let gid = redirect.and_then(|intent| intent.proxy_gids.first().copied());
    // Envoy and the shim listen where the redirect leads to.
    let redirect = redirect.cloned().unwrap_or_default();
    dataplane["ursa"] =
        json!({ "netns": call.netns, "proxyUid": uid, "proxyGid": gid, "redirect": redirect });
    let origin = Origin::Cni(call.container_id.clone());
    let mut spec = WorkloadSpec::from_value(dataplane, origin, config).map_err(|error| error.to_string())?;
    // As it is in place: kept there, and put back at the next start if somebody took it away meanwhile. An agent without
    // rights leaves that to others.
    spec.redirect = call.config.redirect.clone().filter(|_| config.launcher() == LauncherKind::Fork);
    Ok(spec)
}

fn dataplane(call: &Call, who: Membership) -> Result<Value, String> {
    let given = &call.config.workload;
    let address = call
        .ips
        .first()
        .and_then(|address| address.split('/').next())
        .ok_or("`ips` is empty; the plugin must be chained after one that assigns an address")?;
    let annotation = |key: &str| call.annotations.as_ref()?.get(key).map(String::as_str);
    let ports = annotation("ursa.io/ports").or(given.ports.as_deref()).unwrap_or_default();
    let mut labels = given.labels.clone();
    labels.insert(labels::WORKLOAD.to_owned(), who.workload);
    Ok(json!({
        "type": "Dataplane",
        "mesh": who.mesh,
        "name": who.dataplane,
        "labels": labels,
        "networking": { "address": address, "inbound": inbounds(ports)? }
    }))
}

fn inbounds(ports: &str) -> Result<Vec<Value>, String> {
    ports
        .split(',')
        .map(str::trim)
        .filter(|port| !port.is_empty())
        .map(|port| {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let number: u16 = number
                .parse()
                .map_err(|_| format!("`{port}` is no port; write ports as in `8080/http,9090`"))?;
            Ok(json!({ "name": number.to_string(), "port": number, "protocol": protocol }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(request: Value) -> Result<WorkloadSpec, String> {
        let add: Call = serde_json::from_value(request).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = AgentConfig {
            state_dir: dir.path().to_owned(),
            launcher: LauncherKind::Fork,
            ..AgentConfig::default()
        };
        Decisions::open(&config).spec(&add, &config)
    }

    #[test]
    fn a_pod_becomes_a_dataplane() {
        let spec = pod(json!({
            "container_id": "c1", "netns": "/run/netns/x", "ifname": "eth0",
            "args": {"K8S_POD_NAME": "web-0", "K8S_POD_NAMESPACE": "shop"},
            "annotations": {"kuma.io/workload": "web", "ursa.io/ports": "8080/http, 9090"},
            "ips": ["10.0.0.9"], "type": "ursa-cni",
            "config": {"redirect": {"proxyUids": [77], "inbound": {"port": 15106}, "dns": {"port": 15153}}}
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.mesh.as_str(), spec.uid), ("web-0.shop", "default", 77));
        assert_eq!(spec.cluster(), "web");
        assert_eq!(spec.dataplane["networking"]["inbound"].as_array().unwrap().len(), 2);
        assert_eq!(spec.redirect.unwrap().proxy_uids, [77], "as the plugin has applied it");
        let inbound = spec.dataplane.pointer("/networking/transparentProxying/redirectPortInbound");
        assert_eq!((inbound, spec.dns_port), (Some(&15106.into()), 15153), "where the redirect leads to");
    }

    #[test]
    fn a_pod_redirected_by_tproxy_gets_a_transparent_envoy() {
        let spec = pod(json!({
            "container_id": "c1", "netns": "/run/netns/x", "args": {"K8S_POD_NAME": "web-0"}, "ips": ["10.0.0.9"],
            "config": {"redirect": {"proxyUids": [77], "inbound": {"mode": "tproxy"}, "tproxy": {"mark": 99}}}
        }));
        let spec = spec.unwrap();
        let mark = spec.dataplane.pointer("/networking/transparentProxying/tproxyMark");
        assert_eq!((mark, spec.is_transparent()), (Some(&99.into()), true));
    }

    #[test]
    fn a_pod_that_says_nothing_has_a_valid_workload() {
        let spec = pod(json!({
            "container_id": "c1", "netns": "/run/netns/x", "ips": ["10.0.0.9"],
            "args": {"K8S_POD_NAME": "web-0", "K8S_POD_NAMESPACE": "shop"},
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.cluster().as_str()), ("web-0.shop", "web-0-shop"));
    }

    #[test]
    fn the_operator_says_who_a_pod_is() {
        let add = |workload: Value| {
            pod(json!({
                "container_id": "c1", "netns": "/run/netns/x",
                "args": {"K8S_POD_NAME": "web-0"}, "ips": ["10.0.0.9"],
                "annotations": {"kuma.io/workload": "bank", "kuma.io/mesh": "money"},
                "config": {"workload": workload}
            }))
            .unwrap()
        };
        let spec = add(json!({"mesh": "shops", "labels": {"kuma.io/workload": "web"}}));
        assert_eq!((spec.mesh.as_str(), spec.cluster().as_str()), ("shops", "web"));
        let spec = add(json!({}));
        assert_eq!((spec.mesh.as_str(), spec.cluster().as_str()), ("money", "bank"), "the habit");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = pod(json!({"container_id": "c1", "netns": "/n"})).unwrap_err();
        assert!(error.contains("K8S_POD_NAME"), "{error}");
        let error = pod(json!({"container_id": "c1", "args": {"K8S_POD_NAME": "a"}})).unwrap_err();
        assert!(error.contains("ips"), "{error}");
    }
}
