//! Overviews: a resource together with what was seen of it.

use serde_json::{Map, Value};
use ursa_model::{Form, Resource};

/// The insight type of a type, and the names of the two in an overview.
pub(super) fn insight_of(kind: &str) -> Option<(&'static str, &'static str, &'static str)> {
    match kind {
        "Dataplane" => Some(("DataplaneInsight", "dataplane", "dataplaneInsight")),
        "Zone" => Some(("ZoneInsight", "zone", "zoneInsight")),
        _ => None,
    }
}

/// The collection under which a type's overviews were served before.
pub(super) fn legacy_path(kind: &str) -> Option<&'static str> {
    match kind {
        "Dataplane" => Some("dataplanes+insights"),
        "Zone" => Some("zones+insights"),
        _ => None,
    }
}

/// A resource as it is shown. Tags of inbounds are read from old files and mean nothing any more, so
/// nobody is shown them.
pub(super) fn plain(resource: &Resource) -> Value {
    let mut body = resource.to_json();
    if resource.descriptor.name == "Dataplane"
        && let Some(inbounds) = body.pointer_mut("/networking/inbound").and_then(Value::as_array_mut)
    {
        for inbound in inbounds.iter_mut().filter_map(Value::as_object_mut) {
            inbound.remove("tags");
        }
    }
    body
}

/// The overview of a resource; without an insight that part is absent.
pub(super) fn of(resource: &Resource, insight: Option<&Resource>) -> Value {
    let mut body = plain(resource);
    let Some((_, own, seen)) = insight_of(resource.descriptor.name) else { return body };
    if let Some(object) = body.as_object_mut() {
        object.insert("type".into(), format!("{}Overview", resource.descriptor.name).into());
        let spec = match resource.descriptor.form {
            Form::Inline => {
                // What was inlined moves below the type's own name.
                let names: Vec<String> = resource
                    .spec
                    .as_object()
                    .map(|fields| fields.keys().cloned().collect())
                    .unwrap_or_default();
                let moved: Map<String, Value> =
                    names.into_iter().filter_map(|name| object.remove_entry(&name)).collect();
                Value::Object(moved)
            }
            Form::Spec => object.remove("spec").unwrap_or(Value::Object(Map::new())),
        };
        object.insert(own.into(), spec);
        if let Some(insight) = insight {
            object.insert(seen.into(), insight.spec.clone());
        }
    }
    body
}

/// Whether the last connection of an insight is open.
pub(super) fn is_online(insight: &Resource) -> bool {
    insight.spec.get("subscriptions").and_then(Value::as_array).and_then(|all| all.last()).is_some_and(
        |last| {
            last.get("connectTime").is_some_and(|time| !time.is_null())
                && last.get("disconnectTime").is_none_or(Value::is_null)
        },
    )
}
