//! Who shares a network namespace: its rules must tell everybody's traffic apart.

use std::collections::BTreeMap;

use crate::agent::status::BrokenFile;
use crate::agent::workload::{Origin, Place, WorkloadSpec, place_of, redirect_of};

/// Of those who can't share their namespace, keeps what is there already, or else the first. One that runs goes on as
/// it is, because its traffic would be open without it; one that is new doesn't start.
pub(super) fn refuse_ambiguous(
    desired: &mut BTreeMap<String, WorkloadSpec>,
    former: &BTreeMap<String, WorkloadSpec>,
    broken: &mut Vec<BrokenFile>,
) {
    let mut order: Vec<&String> = desired.keys().collect();
    order.sort_by_key(|id| (former.get(*id) != desired.get(*id), !former.contains_key(*id)));
    let mut kept: BTreeMap<String, WorkloadSpec> = BTreeMap::new();
    // Looked up once: nodes have hundreds of pods, and each lives in a namespace of its own.
    let mut places: BTreeMap<String, Place> = BTreeMap::new();
    for id in order.into_iter().cloned().collect::<Vec<_>>() {
        let Some(spec) = desired.remove(&id) else { continue };
        let Err(why) = fits(&kept, &places, &spec) else {
            places.insert(id.clone(), place_of(&spec));
            kept.insert(id, spec);
            continue;
        };
        let running = former.get(&id).filter(|former| fits(&kept, &places, former).is_ok());
        let error = if let Some(running) = running {
            places.insert(id.clone(), place_of(running));
            kept.insert(id, running.clone());
            format!("ursa.redirect: {why}. It runs on as it was")
        } else {
            format!("ursa.redirect: {why}. Until then it isn't started, and its traffic is NOT in the mesh")
        };
        if let Origin::File(path) = spec.origin {
            broken.push(BrokenFile { path, error, running: running.is_some() });
        }
    }
    *desired = kept;
}

/// Whether the rules of its namespace can be written with the workload among them.
fn fits(
    kept: &BTreeMap<String, WorkloadSpec>,
    places: &BTreeMap<String, Place>,
    spec: &WorkloadSpec,
) -> Result<(), String> {
    if spec.redirect.is_none() {
        return Ok(());
    }
    let here = place_of(spec);
    let is_neighbour = |(id, other): &(&String, &WorkloadSpec)| {
        other.redirect.is_some() && places.get(*id).is_some_and(|place| *place == here)
    };
    let neighbours = kept.iter().filter(is_neighbour).map(|(_, other)| other);
    let all: Vec<&WorkloadSpec> = neighbours.chain([spec]).collect();
    if all.len() == 1 { Ok(()) } else { redirect_of(&all).map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::AgentConfig;

    fn workload(name: &str, local: &str) -> (String, WorkloadSpec) {
        let text = format!(
            "type: Dataplane\nmesh: default\nname: {name}\nnetworking: {{address: 10.0.0.1, inbound: [{{port: 80}}]}}\n\
             ursa: {{netns: /run/netns/shared, {local}}}\n"
        );
        let origin = Origin::File(format!("/w/{name}.yaml"));
        let spec = WorkloadSpec::from_yaml(&text, origin, &AgentConfig::default()).unwrap();
        (spec.id(), spec)
    }

    fn own(name: &str, n: u32) -> (String, WorkloadSpec) {
        let local = format!(
            "proxyUid: {}, uids: [{}], redirect: {{inbound: {{port: 15{n}06, includePorts: [8{n}80]}}, outbound: {{port: \
             15{n}01}}, dns: {{port: 15{n}53}}}}",
            5700 + n,
            2000 + n
        );
        workload(name, &local)
    }

    #[test]
    fn those_who_can_be_told_apart_share() {
        let mut desired = BTreeMap::from([own("a", 1), own("b", 2)]);
        let all = desired.clone();
        let mut broken = Vec::new();
        refuse_ambiguous(&mut desired, &BTreeMap::new(), &mut broken);
        assert_eq!((desired, broken.len()), (all, 0));
    }

    #[test]
    fn who_came_first_stays() {
        for (running, refused) in [("a", "/w/b.yaml"), ("b", "/w/a.yaml")] {
            let mut desired = BTreeMap::from([workload("a", "proxyUid: 7"), workload("b", "proxyUid: 8")]);
            let former = BTreeMap::from([desired.remove_entry(&format!("default.{running}")).unwrap()]);
            desired.extend(former.clone());
            let mut broken = Vec::new();
            refuse_ambiguous(&mut desired, &former, &mut broken);
            assert_eq!(desired, former);
            assert_eq!((broken[0].path.as_str(), broken[0].running), (refused, false));
            assert!(broken[0].error.contains("ursa.uids"), "{}", broken[0].error);
        }
    }

    #[test]
    fn what_runs_keeps_its_former_rules() {
        let former = BTreeMap::from([own("a", 1), own("b", 2)]);
        let mut desired = BTreeMap::from([own("a", 2), own("b", 2)]);
        let mut broken = Vec::new();
        refuse_ambiguous(&mut desired, &former, &mut broken);
        assert_eq!(desired, former);
        assert_eq!((broken[0].path.as_str(), broken[0].running), ("/w/a.yaml", true));
    }
}
