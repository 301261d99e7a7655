//! Who may delete what a zone wrote: the zone, and not global.

use serde_json::{Value, json};
use ursa_model::{
    Resource, Violations,
    labels::{self, Context},
};

use super::{kubernetes_zone, universal_zone};

/// The case tells in words what is created where, and who deletes it.
pub(super) fn judge(case: &Value) -> Option<String> {
    let created = case["create"].as_str().unwrap_or_default();
    let context = match (word_after(created, "k8s zone"), word_after(created, "universal zone")) {
        (Some(zone), _) => kubernetes_zone(zone),
        (None, Some(zone)) => universal_zone(zone),
        (None, None) => return Some(format!("which zone creates it isn't said: {created:?}")),
    };
    let resource = Resource::from_json(&json!({
        "type": created.split(' ').next(),
        "name": "name-1",
        "mesh": "default",
        "labels": {labels::ORIGIN: word_after(&created.replace('=', " "), "origin").unwrap_or_default()},
        "spec": {"targetRef": {"kind": "Mesh"}, "to": [{"targetRef": {"kind": "Mesh"},
            "default": {"idleTimeout": "20s"}}]},
    }));
    let mut resource = match resource {
        Ok(resource) => resource,
        Err(error) => return Some(format!("the resource doesn't parse: {error}")),
    };
    // What the zone stores, and what its copy on global carries.
    match labels::compute(&resource, &context) {
        Ok(computed) => resource.meta.labels = computed,
        Err(found) => return Some(format!("expected the zone to accept it\nfound    {found}")),
    }
    let steps = case["then"].as_array().map_or(&[][..], Vec::as_slice);
    if steps.is_empty() {
        return Some("who deletes it isn't said".to_owned());
    }
    steps.iter().find_map(|step| judge_delete(&resource, &context, step))
}

fn judge_delete(resource: &Resource, zone: &Context, step: &Value) -> Option<String> {
    let place = step["on"].as_str().unwrap_or_default();
    let global = Context::global();
    let mut found = Violations::new();
    labels::validate_origin(resource, if place == "global" { &global } else { zone }, &mut found);
    match step["expectBodyContains"].as_str() {
        Some(wanted) => (!found.iter().any(|violation| violation.message.contains(wanted)))
            .then(|| format!("on {place}: expected {wanted:?}\nfound    {found}")),
        None => {
            (!found.is_empty()).then(|| format!("on {place}: expected it to be deleted\nfound    {found}"))
        }
    }
}

/// The word that follows `text`.
fn word_after<'a>(sentence: &'a str, text: &str) -> Option<&'a str> {
    let (_, rest) = sentence.split_once(&format!("{text} "))?;
    rest.split([' ', ',']).next()
}
