//! Names of MeshServices, from the templates of HostnameGenerators.

use std::collections::HashMap;

use ursa_model::types::hostname_generator::HostnameGenerator;
use ursa_model::types::mesh_identity::Condition;
use ursa_model::types::mesh_service::{Address, HostnameGeneratorRef, HostnameGeneratorStatus, MeshService};
use ursa_model::{Meta, ResourceKey, ResourceSpec as _, hostname};

use crate::world::Index;

/// Who has which name: in a mesh, the first who asks for a name keeps it.
#[derive(Debug, Default)]
pub(super) struct Hostnames {
    owners: HashMap<(String, String), ResourceKey>,
    names: HashMap<ResourceKey, Vec<String>>,
}

impl Hostnames {
    /// What is held according to the services themselves.
    pub(super) fn load(index: &Index) -> Self {
        let mut all = Self::default();
        for service in index.list_all(MeshService::DESCRIPTOR.name) {
            let Ok(status) = service.status_as::<MeshService>() else { continue };
            for address in status.addresses {
                let _ = all.claim(&service.key(), address.hostname);
            }
        }
        all
    }

    /// The service is gone.
    pub(super) fn release(&mut self, service: &ResourceKey) {
        for name in self.names.remove(service).unwrap_or_default() {
            self.owners.remove(&(service.mesh.clone(), name));
        }
    }

    /// The names of a service, and what became of each generator that selects it.
    pub(super) fn of(
        &mut self,
        index: &Index,
        key: &ResourceKey,
        meta: &Meta,
        zone: &str,
    ) -> (Vec<Address>, Vec<HostnameGeneratorStatus>) {
        let mut addresses: Vec<Address> = Vec::new();
        let mut statuses = Vec::new();
        for generator in index.list_all(HostnameGenerator::DESCRIPTOR.name) {
            let Ok(spec) = generator.spec_as::<HostnameGenerator>() else { continue };
            if !spec.selector.mesh_service.as_ref().is_some_and(|selector| selector.matches(&meta.labels)) {
                continue;
            }
            let reference = Some(HostnameGeneratorRef { core_name: generator.meta.name.clone() });
            let outcome = hostname::evaluate(&spec.template, meta, zone)
                .map_err(|error| ("TemplateError", error.to_string()))
                .and_then(|name| self.claim(key, name).map_err(|why| ("Collision", why)));
            let condition = match outcome {
                Ok(hostname) => {
                    if addresses.iter().all(|address| address.hostname != hostname) {
                        addresses.push(Address {
                            hostname,
                            origin: "HostnameGenerator".to_owned(),
                            hostname_generator_ref: reference.clone(),
                        });
                    }
                    condition("True", "Generated", String::new())
                }
                Err((reason, message)) => condition("False", reason, message),
            };
            statuses.push(HostnameGeneratorStatus {
                hostname_generator_ref: reference,
                conditions: vec![condition],
            });
        }
        let current: Vec<String> = addresses.iter().map(|address| address.hostname.clone()).collect();
        for lost in self.names.insert(key.clone(), current.clone()).unwrap_or_default() {
            if !current.contains(&lost) {
                self.owners.remove(&(key.mesh.clone(), lost));
            }
        }
        (addresses, statuses)
    }

    fn claim(&mut self, key: &ResourceKey, hostname: String) -> Result<String, String> {
        let owner = self.owners.entry((key.mesh.clone(), hostname.clone())).or_insert_with(|| key.clone());
        if owner != key {
            return Err(format!("{owner} has the name {hostname:?}"));
        }
        let names = self.names.entry(key.clone()).or_default();
        if !names.contains(&hostname) {
            names.push(hostname.clone());
        }
        Ok(hostname)
    }
}

fn condition(status: &str, reason: &str, message: String) -> Condition {
    Condition {
        condition_type: "Generated".to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
    }
}
