//! Workloads, one per value of the label `kuma.io/workload`; and Dataplanes whose node never came back.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use ursa_model::types::dataplane::Dataplane;
use ursa_model::types::dataplane_insight::DataplaneInsight;
use ursa_model::types::mesh_service::{DataplaneProxies, MeshService, Port};
use ursa_model::types::workload::{Workload, WorkloadStatus};
use ursa_model::{Meta, Resource, ResourceKey, ResourceSpec as _, labels, services};

use super::{Generators, OFFLINE_FOR, Outcome};
use crate::world::Index;

const MANAGED: &str = "workload-generator";

impl Generators {
    /// Makes a Workload where there are Dataplanes of it, and removes it where there are none.
    pub(super) async fn workload(&self, key: &ResourceKey) -> Outcome {
        let counts = self.world.read(|index| count(index, &key.mesh, &key.name));
        let empty = counts.total == 0;
        let status = WorkloadStatus { dataplane_proxies: Some(counts) };
        match self.store.get(key).await? {
            None if empty => {}
            None => {
                let mut meta = Meta::new(&key.mesh, &key.name);
                meta.labels.insert(labels::MANAGED_BY.into(), MANAGED.into());
                self.create(Resource::new(meta, &Workload::default()).with_status(&status)).await?;
            }
            Some(current) if empty && current.meta.label(labels::MANAGED_BY) == Some(MANAGED) => {
                self.delete(&current).await?;
            }
            Some(current) => {
                let next = Resource::clone(&current).with_status(&status);
                if next.status != current.status {
                    self.store.update(next).await?;
                }
            }
        }
        Ok(None)
    }

    /// Removes a Dataplane that has been offline for long.
    pub(super) async fn offline(&self, key: &ResourceKey) -> Outcome {
        let Some(resource) = self.store.get(key).await? else { return Ok(None) };
        let Ok(insight) = resource.spec_as::<DataplaneInsight>() else { return Ok(None) };
        let left = insight.subscriptions.last().and_then(|last| last.disconnect_time.as_deref());
        let Some(left) = left.and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok()) else {
            return Ok(None);
        };
        let due = left + OFFLINE_FOR;
        if OffsetDateTime::now_utc() < due {
            return Ok(Some(due));
        }
        let dataplane = ResourceKey::new(Dataplane::DESCRIPTOR, &key.mesh, &key.name);
        if let Some(dataplane) = self.store.get(&dataplane).await? {
            self.delete(&dataplane).await?;
        }
        self.delete(&resource).await?;
        Ok(None)
    }
}

/// How many Dataplanes a workload has: all, connected, with every inbound ready.
fn count(index: &Index, mesh: &str, workload: &str) -> DataplaneProxies {
    let dataplanes: Vec<_> = index
        .dataplanes_of(mesh, workload)
        .filter_map(|resource| {
            Some((resource.spec_as::<Dataplane>().ok()?, insight_of(index, &resource.key())))
        })
        .collect();
    let ports = dataplanes
        .iter()
        .flat_map(|(dataplane, _)| services::inbounds(dataplane))
        .map(|inbound| Port { port: inbound.port, ..Port::default() })
        .collect();
    let everything = MeshService { ports, ..MeshService::default() };
    services::count_proxies(
        &everything,
        dataplanes.iter().map(|(dataplane, insight)| (dataplane, insight.as_ref())),
    )
}

/// What is known of a Dataplane at run time.
pub(super) fn insight_of(index: &Index, dataplane: &ResourceKey) -> Option<DataplaneInsight> {
    let key = ResourceKey::new(DataplaneInsight::DESCRIPTOR, &dataplane.mesh, &dataplane.name);
    index.get(&key).and_then(|insight| insight.spec_as().ok())
}
