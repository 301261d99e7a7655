//! What a MeshService is made of: its proxies, its status, the labels it takes over from them.

use std::collections::BTreeMap;

use crate::{
    identity,
    labels::Labels,
    meta::Meta,
    names,
    resource::Resource,
    types::{
        dataplane::{Dataplane, Inbound, State as InboundState},
        dataplane_insight::DataplaneInsight,
        mesh_service::{DataplaneProxies, MeshService, Port, Selector, State, TargetPort, TlsStatus},
        mesh_trust::MeshTrust,
    },
};

/// Whether an inbound takes traffic.
pub fn is_ready(inbound: &Inbound) -> bool {
    inbound.state.as_ref().is_none_or(|state| *state == InboundState::Ready)
}

/// Whether a proxy serves a service of its mesh. With `only_healthy` one of its inbounds must be ready.
pub fn selects(selector: &Selector, dataplane: &Meta, spec: &Dataplane, only_healthy: bool) -> bool {
    let named = match (&selector.dataplane_ref, &selector.dataplane_labels) {
        (Some(reference), _) => reference.name == dataplane.name,
        (None, Some(labels)) => labels.matches(&dataplane.labels),
        (None, None) => false,
    };
    named && inbounds(spec).iter().any(|inbound| !only_healthy || is_ready(inbound))
}

/// The proxies that serve a service, those of other meshes left out.
pub fn matched<'a>(
    service: &Meta,
    spec: &MeshService,
    dataplanes: impl IntoIterator<Item = (&'a Meta, &'a Dataplane)>,
    only_healthy: bool,
) -> Vec<(&'a Meta, &'a Dataplane)> {
    dataplanes
        .into_iter()
        .filter(|(meta, dataplane)| {
            meta.mesh == service.mesh && selects(&spec.selector, meta, dataplane, only_healthy)
        })
        .collect()
}

/// The inbounds of a proxy.
pub fn inbounds(dataplane: &Dataplane) -> &[Inbound] {
    dataplane.networking.as_ref().map(|networking| networking.inbound.as_slice()).unwrap_or_default()
}

/// Whether a service's port leads to an inbound.
pub fn leads_to(port: &Port, inbound: &Inbound) -> bool {
    match &port.target_port {
        None => port.port == inbound.port,
        Some(TargetPort::Number(number)) => *number == inbound.port,
        Some(TargetPort::Name(name)) => *name == inbound.name,
    }
}

/// Whether a control plane holds a connection of the proxy.
pub fn is_online(insight: &DataplaneInsight) -> bool {
    insight.subscriptions.last().is_some_and(|subscription| {
        subscription.connect_time.is_some() && subscription.disconnect_time.is_none()
    })
}

/// How many proxies a service has; a proxy is healthy when every inbound that the service leads to is ready.
pub fn count_proxies<'a>(
    spec: &MeshService,
    proxies: impl IntoIterator<Item = (&'a Dataplane, Option<&'a DataplaneInsight>)>,
) -> DataplaneProxies {
    let mut counts = DataplaneProxies::default();
    for (dataplane, insight) in proxies {
        counts.total += 1;
        counts.connected += u32::from(insight.is_some_and(is_online));
        let served: Vec<&Inbound> = inbounds(dataplane)
            .iter()
            .filter(|inbound| spec.ports.iter().any(|port| leads_to(port, inbound)))
            .collect();
        counts.healthy += u32::from(!served.is_empty() && served.into_iter().all(is_ready));
    }
    counts
}

/// Whether anybody serves the service.
pub fn state(counts: &DataplaneProxies) -> State {
    if counts.healthy > 0 { State::Available } else { State::Unavailable }
}

/// Whether every proxy of a service has an identity that the mesh trusts.
pub fn tls_status<'a>(
    mesh: &str,
    zone: &str,
    proxies: impl IntoIterator<Item = &'a Labels>,
    identities: &[Resource],
    trusts: &[Resource],
) -> TlsStatus {
    let identities = identity::typed(identities.iter().filter(|identity| identity.meta.mesh == mesh));
    let trusted: Vec<String> = trusts
        .iter()
        .filter(|trust| trust.meta.mesh == mesh)
        .filter_map(|trust| Some(trust.spec_as::<MeshTrust>().ok()?.trust_domain))
        .collect();
    let is_trusted = |labels: &Labels| {
        let Some((meta, chosen)) =
            identity::select(identities.iter().map(|(meta, spec, _)| (*meta, spec)), labels)
        else {
            return false;
        };
        let ready = identities
            .iter()
            .find(|(other, ..)| other.name == meta.name)
            .is_some_and(|(_, _, status)| identity::is_ready(status));
        ready
            && identity::trust_domain(chosen, mesh, zone)
                .is_ok_and(|domain| trusted.iter().any(|trusted| trusted == domain.as_str()))
    };
    let mut proxies = proxies.into_iter().peekable();
    let some = proxies.peek().is_some();
    if some && proxies.all(is_trusted) { TlsStatus::Ready } else { TlsStatus::NotReady }
}

/// Labels that a proxy hands on to the service made of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Propagated {
    /// Those handed on.
    pub labels: Labels,
    /// How many were dropped because they are no valid labels.
    pub invalid: usize,
}

/// The labels of one proxy that a service may take over: valid ones that the mesh doesn't own, of those allowed.
pub fn propagate(labels: &Labels, allowed: Option<&[String]>) -> Propagated {
    let mut out = Propagated::default();
    for (key, value) in labels {
        if is_reserved(key) || allowed.is_some_and(|allowed| !allowed.contains(key)) {
            continue;
        }
        if names::label_key(key).is_empty() && names::label_value(value).is_empty() {
            out.labels.insert(key.clone(), value.clone());
        } else {
            out.invalid += 1;
        }
    }
    out
}

/// Keys that the mesh owns: `kuma.io`, `k8s.kuma.io` and what is below them.
fn is_reserved(key: &str) -> bool {
    key.split_once('/').is_some_and(|(prefix, _)| prefix == "kuma.io" || prefix.ends_with(".kuma.io"))
}

/// The labels of a service whose proxies differ: per key the value of most; then that of the newest; then the smallest.
/// `created` is any measure of time that grows.
pub fn merge<'a>(proxies: impl IntoIterator<Item = (&'a Labels, i64)>) -> Labels {
    let mut votes: BTreeMap<&str, BTreeMap<&str, (usize, i64)>> = BTreeMap::new();
    for (labels, created) in proxies {
        for (key, value) in labels {
            let vote = votes.entry(key).or_default().entry(value).or_insert((0, i64::MIN));
            vote.0 += 1;
            vote.1 = vote.1.max(created);
        }
    }
    votes
        .into_iter()
        .filter_map(|(key, values)| {
            // Of equal maxima the last wins, so the smallest value is looked at last.
            let (value, _) = values.into_iter().rev().max_by_key(|(_, vote)| *vote)?;
            Some((key.to_owned(), value.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(value: &str) -> Labels {
        Labels::from([("v".to_owned(), value.to_owned())])
    }

    #[test]
    fn most_then_newest_then_smallest() {
        let (a, b) = (labels("a"), labels("b"));
        assert_eq!(merge([(&a, 0), (&a, 1), (&b, 9)]), a);
        assert_eq!(merge([(&a, 0), (&b, 9)]), b);
        assert_eq!(merge([(&b, 5), (&a, 5)]), a);
    }

    #[test]
    fn the_mesh_keeps_its_own_labels() {
        let mine = Labels::from([
            ("kuma.io/zone".to_owned(), "x".to_owned()),
            ("team".to_owned(), "web".to_owned()),
            ("bad!".to_owned(), "x".to_owned()),
        ]);
        let out = propagate(&mine, None);
        assert_eq!(out.labels.keys().collect::<Vec<_>>(), ["team"]);
        assert_eq!(out.invalid, 1);
    }
}
