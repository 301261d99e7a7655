//! Whose user is whose: with one user, each of two proxies could take the other's key.

use std::collections::BTreeMap;

use crate::agent::status::BrokenFile;
use crate::agent::workload::{Origin, POD_UIDS, WorkloadSpec};

/// The user of a new pod's proxy: the one that the plugin's configuration names, or a free one. `taken` are those
/// of all that live here or are still on their way out.
pub(super) fn user_of_pod(wanted: u32, taken: &BTreeMap<u32, String>) -> Result<u32, String> {
    if POD_UIDS.contains(&wanted) {
        return POD_UIDS
            .into_iter()
            .find(|uid| !taken.contains_key(uid))
            .ok_or_else(|| "no user is free for its proxy: too many pods".to_owned());
    }
    match taken.get(&wanted) {
        None => Ok(wanted),
        Some(other) => Err(format!(
            "{wanted} is the user of {other}'s proxy already, and with one user each could take the other's key; take \
             proxyUids out of the plugin's redirect, and each proxy gets a user of its own"
        )),
    }
}

/// Of those who share a user, keeps the one that already has it, or else the first. Another that runs goes on as it
/// is, because its traffic would be open without it; one that is new doesn't start.
pub(super) fn refuse_shared_users(
    desired: &mut BTreeMap<String, WorkloadSpec>,
    former: &BTreeMap<String, WorkloadSpec>,
    broken: &mut Vec<BrokenFile>,
) {
    let settled = |id: &str, uid: u32| former.get(id).is_some_and(|spec| spec.uid == uid);
    let mut order: Vec<(String, u32)> = desired.iter().map(|(id, spec)| (id.clone(), spec.uid)).collect();
    order.sort_by_key(|(id, uid)| {
        // A pod's user was found free when it came.
        let is_file = desired.get(id).is_some_and(|spec| matches!(spec.origin, Origin::File(_)));
        (!settled(id, *uid), !former.contains_key(id), is_file)
    });
    let mut users: BTreeMap<u32, String> = BTreeMap::new();
    for (id, uid) in order {
        let Some(other) = users.get(&uid).cloned() else {
            users.insert(uid, id);
            continue;
        };
        let shared = format!(
            "ursa.proxyUid: {uid} is the user of {other}'s proxy already, and with one user each could take the \
             other's key; name a user of its own"
        );
        let refused = desired.remove(&id);
        let running = former.get(&id);
        let error = if let Some(running) = running {
            tracing::error!(workload = %id, uid, %other,
                "two proxies have one user and could take each other's keys; both go on, give one a user of its own");
            users.entry(running.uid).or_insert_with(|| id.clone());
            desired.insert(id, running.clone());
            format!("{shared}. It runs on as it was, and is not safe from {other} until then")
        } else {
            format!("{shared}. Until then it isn't started, and its traffic is NOT in the mesh")
        };
        if let Some(WorkloadSpec { origin: Origin::File(path), .. }) = refused {
            broken.push(BrokenFile { path, error, running: running.is_some() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::AgentConfig;

    fn workload(name: &str, uid: u32) -> (String, WorkloadSpec) {
        let text = format!(
            "type: Dataplane\nmesh: default\nname: {name}\nnetworking: {{address: 10.0.0.1, inbound: [{{port: 80}}]}}\n\
             ursa: {{proxyUid: {uid}}}\n"
        );
        let origin = Origin::File(format!("/w/{name}.yaml"));
        let spec = WorkloadSpec::from_yaml(&text, origin, &AgentConfig::default()).unwrap();
        (spec.id(), spec)
    }

    fn ids(desired: &BTreeMap<String, WorkloadSpec>) -> Vec<&str> {
        desired.keys().map(String::as_str).collect()
    }

    #[test]
    fn of_two_proxies_with_one_user_the_running_one_stays() {
        for (running, refused) in [("a", "/w/b.yaml"), ("b", "/w/a.yaml")] {
            let mut desired = BTreeMap::from([workload("a", 7), workload("b", 7), workload("c", 8)]);
            let mut broken = Vec::new();
            refuse_shared_users(&mut desired, &BTreeMap::from([workload(running, 7)]), &mut broken);
            assert_eq!(ids(&desired), [format!("default.{running}").as_str(), "default.c"]);
            assert_eq!(broken.len(), 1);
            assert_eq!((broken[0].path.as_str(), broken[0].running), (refused, false));
            assert!(broken[0].error.contains("NOT in the mesh"), "{}", broken[0].error);
        }
    }

    #[test]
    fn what_runs_is_never_taken_away() {
        let both = BTreeMap::from([workload("a", 7), workload("b", 7)]);
        let mut desired = both.clone();
        let mut broken = Vec::new();
        refuse_shared_users(&mut desired, &both, &mut broken);
        assert_eq!(desired, both);
        assert_eq!((broken.len(), broken[0].running), (1, true));

        // One that changes to another's user stays with its own.
        let former = BTreeMap::from([workload("a", 7), workload("b", 8)]);
        let mut desired = BTreeMap::from([workload("a", 8), workload("b", 8), workload("aa", 7)]);
        broken.clear();
        refuse_shared_users(&mut desired, &former, &mut broken);
        assert_eq!(desired, former);
        let refused: Vec<_> = broken.iter().map(|file| (file.path.as_str(), file.running)).collect();
        assert_eq!(refused, [("/w/a.yaml", true), ("/w/aa.yaml", false)]);
    }

    #[test]
    fn a_new_pod_gets_a_user_that_nobody_has() {
        let first = *POD_UIDS.start();
        let taken = BTreeMap::from([(first, "default.leaving".to_owned()), (77, "default.x".to_owned())]);
        assert_eq!(user_of_pod(first, &taken), Ok(first + 1));
        assert_eq!(user_of_pod(78, &taken), Ok(78));
        assert!(user_of_pod(77, &taken).unwrap_err().contains("default.x"));
    }
}
