//! A mesh from YAML.

use std::{path::PathBuf, sync::Arc};

use serde_json::Value;
use ursa_engine::{Change, Engine, EngineConfig, Outcome, ProxyKey};
use ursa_model::{Resource, ResourceKey};

pub(crate) fn testdata() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/testdata")
}

pub(crate) fn read(file: &str) -> String {
    let path = testdata().join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("can't read {}: {e}", path.display()))
}

pub(crate) fn objects(yaml: &str) -> Vec<Resource> {
    Resource::many_from_yaml(yaml).expect("resources")
}

pub(crate) fn put(resource: Resource) -> Change {
    Change::Put(Arc::new(resource))
}

pub(crate) fn puts(yaml: &str) -> Vec<Change> {
    objects(yaml).into_iter().map(put).collect()
}

pub(crate) fn delete(kind: &str, name: &str) -> Change {
    let kind = ursa_model::by_name(kind).expect("type").name;
    Change::Delete(ResourceKey { kind, mesh: "default".to_owned(), name: name.to_owned() })
}

pub(crate) fn proxy(name: &str) -> ProxyKey {
    ProxyKey { mesh: "default".to_owned(), name: name.to_owned() }
}

pub(crate) fn new_engine() -> Engine {
    Engine::new(EngineConfig { zone: "default".to_owned() })
}

/// An engine with the base mesh and more, with both proxies connected.
pub(crate) fn engine_with(more: &str) -> (Engine, Outcome) {
    let mut engine = new_engine();
    let mut changes = puts(&read("base.yaml"));
    changes.extend(puts(more));
    let outcome = engine.apply(changes);
    engine.connect(&proxy("web-1"));
    engine.connect(&proxy("backend-1"));
    (engine, outcome)
}

/// Resources of one kind, by the short end of their type.
pub(crate) fn kind<'a>(dump: &'a Value, short: &str) -> &'a Value {
    let object = dump.as_object().expect("a dump");
    object.iter().find(|(url, _)| url.ends_with(short)).map_or(&Value::Null, |(_, resources)| resources)
}
