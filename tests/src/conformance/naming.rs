//! Group 08: names, labels and small algorithms.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};
use ursa_model::{
    Kri, Meta, Protocol, Resource, by_name,
    dataplane_token::{self, DataplaneClaims},
    hostname, identity,
    labels::{self, Context, Labels},
    policy::LabelSelector,
    services, sni,
    types::{
        dataplane::{Dataplane, Inbound, Networking, State},
        dataplane_insight::{DataplaneInsight, Subscription},
        mesh_identity::{
            Condition, MeshIdentity, MeshIdentityStatus, Selector as IdentitySelector, SpiffeIdTemplate,
        },
        mesh_service::{DataplaneRef, MeshService, Port, Selector, TargetPort},
        mesh_trust::MeshTrust,
    },
};

use super::{GroupReport, listed, read_list};

/// Judges all cases of the group; `corpus` is the root of the corpus.
pub fn run(corpus: &Path) -> GroupReport {
    let mut report = GroupReport::new("08-naming-and-labels");
    let root = corpus.join("08-naming-and-labels");
    judge_all(&root, "sni", "cases", judge_sni, &mut report);
    judge_all(&root, "labels", "policyRole", judge_role, &mut report);
    judge_all(&root, "labels", "computedLabels", judge_computed, &mut report);
    judge_all(&root, "hostname-template", "cases", judge_hostname, &mut report);
    judge_all(&root, "common-protocol", "cases", judge_protocol, &mut report);
    judge_all(&root, "meshservice-selects-dataplane", "cases", judge_selection, &mut report);
    judge_all(&root, "meshservice-status", "cases", judge_status, &mut report);
    judge_all(&root, "meshservice-label-propagation", "cases", judge_propagation, &mut report);
    let tokens = read_list(&root.join("dataplane-token-auth.yaml"), &mut report);
    for case in listed(&tokens, "cases", "dataplane-token-auth.yaml", &mut report) {
        let id = format!("dataplane-token-auth/{}", text(case, "description"));
        report.judged(id, judge_token(&tokens["dataplanes"], case));
    }
    report
}

fn judge_all(
    root: &Path,
    file: &str,
    list: &str,
    judge: fn(&Value) -> Option<String>,
    report: &mut GroupReport,
) {
    let content = read_list(&root.join(format!("{file}.yaml")), report);
    for (i, case) in listed(&content, list, &format!("{file}.yaml"), report).iter().enumerate() {
        let id = match (case.get("id"), case.get("description")) {
            (Some(Value::String(id)), _) if id.starts_with(file) || file == "sni" => id.clone(),
            (Some(Value::String(name)), _) | (None, Some(Value::String(name))) => format!("{file}/{name}"),
            _ => format!("{file}-{:02}", i + 1),
        };
        report.judged(id, judge(case));
    }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn map(value: &Value) -> Labels {
    serde_json::from_value(value.clone()).unwrap_or_default()
}

fn differs<T: PartialEq + std::fmt::Debug>(expected: &T, found: &T) -> Option<String> {
    (expected != found).then(|| format!("expected {expected:?}\nfound    {found:?}"))
}

fn judge_sni(case: &Value) -> Option<String> {
    let kri = &case["kri"];
    let Some(descriptor) = by_name(text(kri, "resourceType")) else {
        return Some(format!("there is no type {}", kri["resourceType"]));
    };
    let part = |field: &str| text(kri, field).to_owned();
    let kri = Kri {
        short_name: descriptor.short_name.to_owned(),
        mesh: part("mesh"),
        zone: part("zone"),
        namespace: part("namespace"),
        name: part("name"),
        section: part("sectionName"),
    };
    let encoded = sni::encode(&kri);
    if let Some(wanted) = case["errorContains"].as_array() {
        let Err(error) = encoded else {
            return Some(format!("expected to be refused\nfound    {encoded:?}"));
        };
        let error = error.to_string();
        let fits = wanted.iter().filter_map(Value::as_str).all(|wanted| error.contains(wanted));
        return (!fits).then(|| format!("expected {wanted:?}\nfound    {error}"));
    }
    let expected = text(case, "sni");
    if encoded.as_deref() != Ok(expected) {
        return Some(format!("expected {expected}\nfound    {encoded:?}"));
    }
    // Without a zone the namespace isn't part of an SNI, so it can't come back.
    let back = if kri.zone.is_empty() { Kri { namespace: String::new(), ..kri } } else { kri };
    differs(&Ok(back), &sni::decode(expected))
}

fn with_meta(resource: &Value) -> Value {
    let mut object = resource.clone();
    for (field, value) in [("name", "name-1"), ("mesh", "default")] {
        if let Some(object) = object.as_object_mut() {
            object.entry(field).or_insert_with(|| json!(value));
        }
    }
    object
}

fn judge_role(case: &Value) -> Option<String> {
    let policy = match Resource::from_json(&with_meta(&case["policy"])) {
        Ok(policy) => policy,
        Err(error) => return Some(error.to_string()),
    };
    let namespace = text(case, "namespace");
    let system = namespace.starts_with("kuma-system") || namespace.is_empty();
    let found = labels::policy_role(&policy, (!system).then_some(namespace));
    match (case["error"].as_str(), found) {
        (Some(wanted), Err(found)) if found.to_string().contains(wanted) => None,
        (Some(wanted), found) => Some(format!("expected {wanted}\nfound    {found:?}")),
        (None, Ok(role)) => differs(&text(case, "role"), &role.as_str()),
        (None, Err(found)) => Some(format!("expected {}\nfound    {found}", text(case, "role"))),
    }
}

fn judge_computed(case: &Value) -> Option<String> {
    let plane = &case["cp"];
    let base =
        if text(plane, "mode") == "global" { Context::global() } else { Context::zone(text(plane, "zone")) };
    let context = Context {
        kubernetes: plane["kubernetes"].as_bool().unwrap_or_default(),
        system_namespace: text(plane, "systemNamespace").to_owned(),
        namespace: text(case, "namespace").to_owned(),
        privileged: plane["privilegedWrite"].as_bool().unwrap_or_default(),
        ..base
    };
    let resource = match Resource::from_json(&with_meta(&case["resource"])) {
        Ok(resource) => resource,
        Err(error) => return Some(error.to_string()),
    };
    match labels::compute(&resource, &context) {
        Ok(found) => differs(&map(&case["labels"]), &found),
        Err(found) => Some(format!("expected labels\nfound    {found}")),
    }
}

fn judge_hostname(case: &Value) -> Option<String> {
    let mut meta = Meta::new(text(&case["meta"], "Mesh"), text(&case["meta"], "Name"));
    meta.labels = map(&case["meta"]["Labels"]);
    let found = hostname::evaluate(text(case, "template"), &meta, text(case, "localZone"));
    match (case["errMsg"].as_str(), found) {
        (Some(wanted), Err(error)) if error.to_string().contains(wanted) => None,
        (Some(wanted), found) => Some(format!("expected {wanted}\nfound    {found:?}")),
        (None, found) => differs(&Ok(text(case, "expected").to_owned()), &found),
    }
}

fn judge_protocol(case: &Value) -> Option<String> {
    let common = Protocol::from(text(case, "one")).common(&Protocol::from(text(case, "another")));
    differs(&text(case, "expected"), &common.as_str())
}

/// Steps of a builder: name and arguments, in order.
fn steps(built: &Value) -> (String, Vec<(String, Value)>) {
    if let Value::String(name) = built {
        return (name.trim_end_matches("()").to_owned(), Vec::new());
    }
    let Some((name, list)) = built.as_object().and_then(|object| object.iter().next()) else {
        return (String::new(), Vec::new());
    };
    let steps = list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|step| step.as_object()?.iter().next())
        .map(|(name, argument)| (name.clone(), argument.clone()))
        .collect();
    (name.clone(), steps)
}

/// First argument as text, be it in a list or alone.
fn argument(value: &Value) -> String {
    let first = value.as_array().and_then(|list| list.first()).unwrap_or(value);
    first.as_str().unwrap_or_default().to_owned()
}

fn add_inbound(networking: &mut Networking) {
    let n = u32::try_from(networking.inbound.len()).unwrap_or_default();
    networking.inbound.push(Inbound { port: 80 + n, service_port: 8080 + n, ..Inbound::default() });
}

fn build_dataplane(built: &Value) -> (Meta, Dataplane) {
    let (kind, steps) = steps(built);
    let mut meta = Meta::new("default", "dp-1");
    let mut networking = Networking { address: "127.0.0.1".to_owned(), ..Networking::default() };
    if kind == "DataplaneBackendBuilder" {
        "192.168.0.1".clone_into(&mut networking.address);
        meta.labels.insert(labels::WORKLOAD.to_owned(), "backend".to_owned());
        add_inbound(&mut networking);
    }
    for (step, value) in steps {
        match step.as_str() {
            "WithName" => meta.name = argument(&value),
            "WithMesh" => meta.mesh = argument(&value),
            "WithLabels" => meta.labels = map(&value),
            "With" => {
                let count = if meta.name == "dp-no-inbounds-healthy" { 2 } else { 1 };
                for inbound in networking.inbound.iter_mut().take(count) {
                    inbound.state = Some(State::NotReady);
                }
            }
            name if name.contains("InboundOfTags") => add_inbound(&mut networking),
            _ => {}
        }
    }
    (meta, Dataplane { networking: Some(networking), ..Dataplane::default() })
}

fn build_service(built: &Value) -> (Meta, MeshService) {
    let (kind, steps) = steps(built);
    let mut meta = Meta::new("default", "backend");
    let mut service = MeshService::default();
    if kind == "MeshServiceBackendBuilder" {
        service.ports.push(Port { port: 80, target_port: Some(TargetPort::Number(80)), ..Port::default() });
        let match_labels = Labels::from([(labels::WORKLOAD.to_owned(), "backend".to_owned())]);
        service.selector.dataplane_labels = Some(LabelSelector { match_labels });
    }
    let selector = |match_labels| Selector {
        dataplane_labels: Some(LabelSelector { match_labels }),
        ..Selector::default()
    };
    for (step, value) in steps {
        match step.as_str() {
            "WithName" => meta.name = argument(&value),
            "WithMesh" => meta.mesh = argument(&value),
            "WithDataplaneRefNameSelector" => {
                let dataplane_ref = Some(DataplaneRef { name: argument(&value) });
                service.selector = Selector { dataplane_ref, ..Selector::default() };
            }
            "WithDataplaneLabelsSelector" => service.selector = selector(map(&value)),
            "WithDataplaneLabelsSelectorKV" => {
                let pairs: Vec<String> = serde_json::from_value(value).unwrap_or_default();
                service.selector =
                    selector(pairs.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect());
            }
            "AddIntPort" => {
                let number =
                    |i: usize| u32::try_from(value[i].as_u64().unwrap_or_default()).unwrap_or_default();
                let target_port = Some(TargetPort::Number(number(1)));
                service.ports.push(Port { port: number(0), target_port, ..Port::default() });
            }
            _ => {}
        }
    }
    (meta, service)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn judge_selection(case: &Value) -> Option<String> {
    let dataplanes: Vec<(Meta, Dataplane)> = list(&case["dpps"]).map(build_dataplane).collect();
    let only_healthy = case["matchOnlyHealthy"].as_bool().unwrap_or_default();
    let key = |value: &Value| (text(value, "Mesh").to_owned(), text(value, "Name").to_owned());
    let mut found = BTreeMap::new();
    for (meta, service) in list(&case["meshServices"]).map(build_service) {
        let all = dataplanes.iter().map(|(meta, dataplane)| (meta, dataplane));
        let mut matched: Vec<(String, String)> = services::matched(&meta, &service, all, only_healthy)
            .into_iter()
            .map(|(meta, _)| (meta.mesh.clone(), meta.name.clone()))
            .collect();
        matched.sort();
        found.insert((meta.mesh, meta.name), matched);
    }
    let expected: BTreeMap<_, _> = list(&case["expectedSummary"])
        .map(|entry| {
            let mut names: Vec<_> = list(&entry["value"]).map(key).collect();
            names.sort();
            (key(&entry["key"]), names)
        })
        .collect();
    differs(&expected, &found)
}

fn judge_status(case: &Value) -> Option<String> {
    let arguments = &case["args"][0];
    if text(case, "suite") == "mTLS updater" { judge_tls(arguments) } else { judge_proxies(arguments) }
}

/// The mesh and zone of the status suites; only that they are the same for all matters.
const STATUS_MESH: &str = "test";
const STATUS_ZONE: &str = "east";

fn judge_tls(arguments: &Value) -> Option<String> {
    let identities: Vec<Resource> = list(&arguments["meshIdentities"]).map(build_identity).collect();
    let trusts: Vec<Resource> = list(&arguments["meshTrusts"]).map(build_trust).collect();
    let labels = map(&arguments["dppLabels"]);
    let found = services::tls_status(STATUS_MESH, STATUS_ZONE, [&labels], &identities, &trusts);
    differs(&text(arguments, "expectedTLSStatus"), &found.as_str())
}

fn build_identity(built: &Value) -> Resource {
    let mut identity = MeshIdentity {
        selector: Some(IdentitySelector { dataplane: Some(LabelSelector::default()) }),
        ..MeshIdentity::default()
    };
    let mut status = MeshIdentityStatus::default();
    for (step, value) in steps(built).1 {
        match step.as_str() {
            "WithSelector" => {
                let match_labels = map(&value["matchLabels"]);
                identity.selector =
                    Some(IdentitySelector { dataplane: Some(LabelSelector { match_labels }) });
            }
            "WithSpiffeID" => {
                let part = |i: usize| value[i].as_str().filter(|part| !part.is_empty()).map(str::to_owned);
                identity.spiffe_id = Some(SpiffeIdTemplate { trust_domain: part(0), path: part(1) });
            }
            "WithInitializedStatus" => status.conditions.push(Condition {
                condition_type: "Ready".to_owned(),
                status: "True".to_owned(),
                ..Condition::default()
            }),
            _ => {}
        }
    }
    Resource::new(Meta::new(STATUS_MESH, "identity"), &identity).with_status(&status)
}

fn build_trust(built: &Value) -> Resource {
    let mut trust = MeshTrust::default();
    for (step, value) in steps(built).1 {
        if step == "WithTrustDomain" {
            trust.trust_domain = argument(&value);
        }
    }
    Resource::new(Meta::new(STATUS_MESH, "trust"), &trust)
}

fn judge_proxies(arguments: &Value) -> Option<String> {
    let (meta, service) = build_service(&arguments["meshService"]);
    let dataplanes: Vec<(Meta, Dataplane)> = list(&arguments["dpps"]).map(build_dataplane).collect();
    let insights: BTreeMap<String, DataplaneInsight> =
        list(&arguments["insights"]).map(build_insight).collect();
    let all = dataplanes.iter().map(|(meta, dataplane)| (meta, dataplane));
    let matched = services::matched(&meta, &service, all, false);
    let counts = services::count_proxies(
        &service,
        matched.into_iter().map(|(meta, dataplane)| (dataplane, insights.get(&meta.name))),
    );
    let expected = &arguments["expectedDpProxies"];
    let number =
        |field: &str| u32::try_from(expected[field].as_u64().unwrap_or_default()).unwrap_or_default();
    differs(
        &(number("connected"), number("healthy"), number("total"), text(arguments, "expectedState")),
        &(counts.connected, counts.healthy, counts.total, services::state(&counts).as_str()),
    )
}

fn build_insight(built: &Value) -> (String, DataplaneInsight) {
    let mut name = String::new();
    let mut insight = DataplaneInsight::default();
    for (step, value) in steps(built).1 {
        match step.as_str() {
            "WithName" => name = argument(&value),
            "AddSubscription" => {
                let time = |field: &str| value.get(field).map(|_| "2026-01-01T00:00:00Z".to_owned());
                insight.subscriptions.push(Subscription {
                    connect_time: time("connectTime"),
                    disconnect_time: time("disconnectTime"),
                    ..Subscription::default()
                });
            }
            _ => {}
        }
    }
    (name, insight)
}

fn judge_propagation(case: &Value) -> Option<String> {
    if text(case, "kind") == "one-dataplane" {
        let allowed: Option<Vec<String>> =
            serde_json::from_value(case["allowedLabelKeys"].clone()).unwrap_or_default();
        let found = services::propagate(&map(&case["dataplaneLabels"]), allowed.as_deref());
        let invalid = case["expectedDropCounts"]["invalid"].as_u64().unwrap_or_default();
        return differs(&(map(&case["expected"]), invalid), &(found.labels, found.invalid as u64));
    }
    let proxies: Vec<(Labels, i64)> = list(&case["dataplanes"])
        .filter(|dataplane| !dataplane.is_null())
        .map(|dataplane| {
            (map(&dataplane["labels"]), dataplane["createdUnixSeconds"].as_i64().unwrap_or_default())
        })
        .collect();
    let mut found = services::merge(proxies.iter().map(|(labels, created)| (labels, *created)));
    let considered = text(case, "considerLabel");
    if !considered.starts_with('(') {
        found.retain(|key, _| key == considered);
    }
    differs(&map(&case["expected"]), &found)
}

fn judge_token(dataplanes: &Value, case: &Value) -> Option<String> {
    let dataplane = &dataplanes[text(case, "dataplane")];
    let mut meta = Meta::new(text(dataplane, "mesh"), text(dataplane, "name"));
    meta.labels = map(&dataplane["labels"]);
    let token = &case["token"];
    let claims = DataplaneClaims {
        name: text(token, "name").to_owned(),
        mesh: text(token, "mesh").to_owned(),
        tags: serde_json::from_value(token["tags"].clone()).unwrap_or_default(),
        workload: text(token, "workload").to_owned(),
        ..DataplaneClaims::default()
    };
    let mut mesh_identity = MeshIdentity {
        selector: Some(IdentitySelector { dataplane: Some(LabelSelector::default()) }),
        ..MeshIdentity::default()
    };
    let from_workload = match case["meshIdentityPath"].as_str() {
        None => false,
        Some("default") => identity::path_uses_workload(&mesh_identity, false),
        Some(_) => {
            let path = Some("/fixed".to_owned());
            mesh_identity.spiffe_id = Some(SpiffeIdTemplate { path, ..SpiffeIdTemplate::default() });
            identity::path_uses_workload(&mesh_identity, false)
        }
    };
    let found = dataplane_token::authorize(&claims, &meta, from_workload);
    let accepted = case["accepted"].as_bool().unwrap_or_default();
    (accepted != found.is_ok()).then(|| format!("expected accepted = {accepted}\nfound    {found:?}"))
}
