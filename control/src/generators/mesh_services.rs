//! MeshServices: made of workloads, and completed with addresses, names, identities and state.

use std::collections::BTreeSet;
use std::sync::Arc;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use ursa_model::types::dataplane::Dataplane;
use ursa_model::types::mesh_service::{
    Identity, IdentityType, MeshService, MeshServiceStatus, Port, Selector, TargetPort, Tls, TlsStatus,
};
use ursa_model::types::mesh_trust::MeshTrust;
use ursa_model::{Meta, Protocol, Resource, ResourceKey, ResourceSpec as _, labels, names, policy, services};

use super::hostnames::Hostnames;
use super::vips::Vips;
use super::workloads::insight_of;
use super::{Generators, Outcome};
use crate::identity::naming;
use crate::world::Index;

const MANAGED: &str = "meshservice-generator";
const GRACE_STARTED: &str = "kuma.io/deletion-grace-period-started-at";

/// Whether control made the service, and keeps its ports.
pub(super) fn is_managed(service: &Resource) -> bool {
    service.meta.label(labels::MANAGED_BY) == Some(MANAGED)
}

type Proxies = Vec<(Arc<Resource>, Dataplane)>;

impl Generators {
    /// Brings a service up to date in one write: ports, addresses, names, identities, state.
    pub(super) async fn service(
        &self,
        key: &ResourceKey,
        vips: &mut Vips,
        hostnames: &mut Hostnames,
    ) -> Outcome {
        let current = self.store.get(key).await?;
        let of_workload: Proxies =
            self.world.read(|index| index.dataplanes_of(&key.mesh, &key.name).filter_map(typed).collect());
        let mut again = None;
        let mut next = match &current {
            None => {
                let Some(ports) = agreed_ports(key, &of_workload, &[]) else {
                    vips.release(key);
                    hostnames.release(key);
                    return Ok(None);
                };
                let faults = names::dns_1035_label(&key.name);
                if !faults.is_empty() {
                    tracing::warn!("no {key} is made of the workload: {}", faults.join("; "));
                    return Ok(None);
                }
                made_of_workload(key, ports)
            }
            Some(current) if is_managed(current) => {
                let mut next = Resource::clone(current);
                let spec: MeshService = current.spec_as().unwrap_or_default();
                if let Some(ports) = agreed_ports(key, &of_workload, &spec.ports) {
                    next.meta.labels.remove(GRACE_STARTED);
                    if ports != spec.ports {
                        next.spec = serde_json::to_value(MeshService { ports, ..spec }).unwrap_or_default();
                    }
                } else {
                    let started = grace_started(current).unwrap_or_else(OffsetDateTime::now_utc);
                    let due = started + self.deletion_grace;
                    if OffsetDateTime::now_utc() >= due {
                        self.delete(current).await?;
                        vips.release(key);
                        hostnames.release(key);
                        return Ok(None);
                    }
                    again = Some(due);
                    let started = label_time(started);
                    next.meta.labels.entry(GRACE_STARTED.into()).or_insert(started);
                }
                next
            }
            Some(current) => Resource::clone(current),
        };
        self.label(&mut next);
        self.world.read(|index| complete(index, &self.zone, key, &mut next, vips, hostnames));
        match current {
            None => {
                self.store.create(next).await?;
                tracing::info!("made {key}");
            }
            Some(current)
                if current.spec == next.spec
                    && current.status == next.status
                    && current.meta.labels == next.meta.labels => {}
            Some(_) => {
                self.store.update(next).await?;
            }
        }
        Ok(again)
    }
}

fn made_of_workload(key: &ResourceKey, ports: Vec<Port>) -> Resource {
    let match_labels = [(labels::WORKLOAD.to_owned(), key.name.clone())].into();
    let selector =
        Selector { dataplane_labels: Some(policy::LabelSelector { match_labels }), ..Selector::default() };
    let mut meta = Meta::new(&key.mesh, &key.name);
    meta.labels.insert(labels::MANAGED_BY.into(), MANAGED.into());
    Resource::new(meta, &MeshService { selector, ports, ..MeshService::default() })
}

fn typed(resource: &Arc<Resource>) -> Option<(Arc<Resource>, Dataplane)> {
    Some((Arc::clone(resource), resource.spec_as().ok()?))
}

/// The ports of a workload: those that the service has, as long as one Dataplane agrees, or else those of the
/// first. None if no Dataplane offers any.
fn agreed_ports(key: &ResourceKey, proxies: &Proxies, current: &[Port]) -> Option<Vec<Port>> {
    let offers: Vec<(&str, Vec<Port>)> = proxies
        .iter()
        .map(|(resource, spec)| (resource.meta.name.as_str(), ports_of(spec)))
        .filter(|(_, ports)| !ports.is_empty())
        .collect();
    let chosen = offers.iter().find(|(_, ports)| ports == current).or_else(|| offers.first())?.1.clone();
    let others: Vec<&str> =
        offers.iter().filter(|(_, ports)| *ports != chosen).map(|(name, _)| *name).collect();
    if !others.is_empty() {
        tracing::warn!(
            dataplanes = others.join(", "),
            "{key}: these Dataplanes have other ports than the rest of their workload; all of a workload must have the same"
        );
    }
    Some(chosen)
}

fn ports_of(dataplane: &Dataplane) -> Vec<Port> {
    services::inbounds(dataplane)
        .iter()
        .map(|inbound| Port {
            name: Some(if inbound.name.is_empty() { inbound.port.to_string() } else { inbound.name.clone() }),
            port: inbound.port,
            target_port: Some(TargetPort::Number(inbound.port)),
            app_protocol: Some(protocol_of(&inbound.protocol)),
        })
        .collect()
}

fn protocol_of(text: &str) -> Protocol {
    let protocol = Protocol::from(text);
    if protocol.is_known() { protocol } else { Protocol::Tcp }
}

/// Label values hold no colons, so the time stands there in Unix seconds.
fn label_time(time: OffsetDateTime) -> String {
    time.unix_timestamp().to_string()
}

fn grace_started(service: &Resource) -> Option<OffsetDateTime> {
    let text = service.meta.label(GRACE_STARTED)?;
    let seconds = text.parse().ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    seconds.or_else(|| OffsetDateTime::parse(text, &Rfc3339).ok())
}

/// Fills in what follows from the rest of the world.
fn complete(
    index: &Index,
    zone: &str,
    key: &ResourceKey,
    service: &mut Resource,
    vips: &mut Vips,
    hostnames: &mut Hostnames,
) {
    let Ok(mut spec) = service.spec_as::<MeshService>() else { return };
    let proxies = proxies_of_service(index, key, &spec);
    let (identities, tls) = identities_of(index, zone, &key.mesh, &proxies);
    let insights: Vec<_> = proxies.iter().map(|(resource, _)| insight_of(index, &resource.key())).collect();
    let counts = services::count_proxies(
        &spec,
        proxies.iter().zip(&insights).map(|((_, spec), insight)| (spec, insight.as_ref())),
    );
    spec.state = Some(services::state(&counts));
    spec.identities = identities;
    let (addresses, hostname_generators) = hostnames.of(index, key, &service.meta, zone);
    let status = MeshServiceStatus {
        addresses,
        vips: vips.of(key),
        tls: Some(Tls { status: tls }),
        hostname_generators,
        dataplane_proxies: Some(counts),
    };
    service.spec = serde_json::to_value(&spec).unwrap_or_default();
    service.status = serde_json::to_value(&status).ok();
}

fn proxies_of_service(index: &Index, key: &ResourceKey, spec: &MeshService) -> Proxies {
    let workload = spec
        .selector
        .dataplane_labels
        .as_ref()
        .and_then(|selector| selector.match_labels.get(labels::WORKLOAD));
    let selected = |(resource, dataplane): &(Arc<Resource>, Dataplane)| {
        services::selects(&spec.selector, &resource.meta, dataplane, false)
    };
    match workload {
        Some(workload) => {
            index.dataplanes_of(&key.mesh, workload).filter_map(typed).filter(selected).collect()
        }
        None => {
            index.list(Dataplane::DESCRIPTOR.name, &key.mesh).filter_map(typed).filter(selected).collect()
        }
    }
}

/// The SPIFFE ids under which a client may meet the service, and whether all its proxies have one.
fn identities_of(index: &Index, zone: &str, mesh: &str, proxies: &Proxies) -> (Vec<Identity>, TlsStatus) {
    let trusted: BTreeSet<String> = index
        .list(MeshTrust::DESCRIPTOR.name, mesh)
        .filter_map(|trust| Some(trust.spec_as::<MeshTrust>().ok()?.trust_domain))
        .collect();
    let mut ids = BTreeSet::new();
    let mut ready = !proxies.is_empty();
    for (dataplane, _) in proxies {
        let identity = naming::select(index, dataplane);
        match identity.as_ref().map(|identity| (identity, identity.spiffe_id(dataplane, zone))) {
            Some((identity, Ok(id))) => {
                ready &= identity.is_ready() && trusted.contains(id.trust_domain().as_str());
                ids.insert(id.to_string());
            }
            Some((_, Err(_))) | None => ready = false,
        }
    }
    let spiffe = |value| Identity { identity_type: IdentityType::SpiffeId, value };
    let status = if ready { TlsStatus::Ready } else { TlsStatus::NotReady };
    (ids.into_iter().map(spiffe).collect(), status)
}
