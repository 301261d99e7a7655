//! Whatever happened on the way: the result is that of starting anew, and the dirty sets said what changed.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::Value;
use ursa_engine::{Change, Engine, ProxyKey, TypeUrl};
use ursa_model::Resource;

use crate::support::{new_engine, objects, proxy, put, read};

/// Objects that appear and disappear, several variants of each.
fn pool() -> Vec<Resource> {
    let mut pool = objects(&read("base.yaml"));
    for case in ["permission", "permissive", "timeout", "http-route", "tcp-route"] {
        pool.extend(objects(&read(&format!("{case}.input.yaml"))));
    }
    let mut variants = Vec::new();
    for object in &pool {
        let mut variant = object.clone();
        match object.descriptor.name {
            "Dataplane" => variant.spec["networking"]["address"] = Value::from("10.9.9.9"),
            "MeshService" => variant.spec["identities"] = Value::Array(Vec::new()),
            "MeshTrust" => variant.spec["trustDomain"] = Value::from("other.mesh.local"),
            _ => {
                variant.meta.labels.insert("kuma.io/origin".to_owned(), "global".to_owned());
            }
        }
        variants.push(variant);
        let mut moved = object.clone();
        moved.meta.labels.insert("kuma.io/workload".to_owned(), "web".to_owned());
        moved.meta.labels.insert("kuma.io/display-name".to_owned(), "canary".to_owned());
        variants.push(moved);
    }
    pool.extend(variants);
    pool
}

#[derive(Clone, Debug)]
enum Step {
    Put(prop::sample::Index),
    Delete(prop::sample::Index),
    Liveness(bool, bool),
    Connect(bool),
    Disconnect(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => any::<prop::sample::Index>().prop_map(Step::Put),
        2 => any::<prop::sample::Index>().prop_map(Step::Delete),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(which, online)| Step::Liveness(which, online)),
        1 => any::<bool>().prop_map(Step::Connect),
        1 => any::<bool>().prop_map(Step::Disconnect),
    ]
}

fn one_of(which: bool) -> ProxyKey {
    proxy(if which { "web-1" } else { "backend-1" })
}

type Seen = BTreeMap<(TypeUrl, String), String>;

fn seen(engine: &Engine, key: &ProxyKey) -> Seen {
    let Some(snapshot) = engine.snapshot(key) else { return Seen::new() };
    TypeUrl::ALL
        .into_iter()
        .flat_map(|kind| {
            snapshot
                .iter(kind)
                .map(move |r| ((kind, r.name.to_string()), r.version.to_string()))
                .collect::<Vec<_>>()
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_starting_anew(batches in prop::collection::vec(prop::collection::vec(step(), 1..5), 1..12)) {
        let pool = pool();
        let mut engine = new_engine();
        let mut world: BTreeMap<_, Resource> = BTreeMap::new();
        let mut offline: BTreeMap<ProxyKey, bool> = BTreeMap::new();
        let mut connected: BTreeMap<ProxyKey, Seen> = BTreeMap::new();
        for batch in batches {
            let mut changes = Vec::new();
            for step in batch {
                match step {
                    Step::Put(index) => {
                        let object = index.get(&pool).clone();
                        world.insert(object.key(), object.clone());
                        changes.push(put(object));
                    }
                    Step::Delete(index) => {
                        let key = index.get(&pool).key();
                        world.remove(&key);
                        changes.push(Change::Delete(key));
                    }
                    Step::Liveness(which, online) => {
                        offline.insert(one_of(which), !online);
                        changes.push(Change::Liveness { proxy: one_of(which), online });
                    }
                    Step::Connect(which) => {
                        engine.connect(&one_of(which));
                        let now = seen(&engine, &one_of(which));
                        connected.entry(one_of(which)).or_insert(now);
                    }
                    Step::Disconnect(which) => {
                        engine.disconnect(&one_of(which));
                        connected.remove(&one_of(which));
                    }
                }
            }
            let outcome = engine.apply(changes);
            let mut fresh = new_engine();
            let mut all: Vec<Change> = world.values().cloned().map(put).collect();
            all.extend(offline.iter().map(|(key, gone)| Change::Liveness { proxy: key.clone(), online: !gone }));
            fresh.apply(all);
            let dirty: BTreeMap<_, _> = outcome.dirty.into_iter().collect();
            for (key, had) in &mut connected {
                fresh.connect(key);
                let has = seen(&engine, key);
                prop_assert_eq!(&has, &seen(&fresh, key), "{} differs from starting anew", key.name);
                // The dirty set names exactly what differs from before.
                let mut differs: Vec<(TypeUrl, String)> = had.iter().filter(|(name, version)| has.get(name) != Some(version))
                    .map(|(name, _)| name.clone())
                    .chain(has.keys().filter(|name| !had.contains_key(name)).cloned())
                    .collect();
                let mut said: Vec<(TypeUrl, String)> =
                    dirty.get(key).into_iter().flatten().map(|(kind, name)| (*kind, name.to_string())).collect();
                differs.sort();
                said.sort();
                prop_assert_eq!(said, differs, "dirty set of {}", key.name);
                *had = has;
            }
        }
    }
}
