//! Group 07: requests to the REST API and what it answers.
//!
//! Each case gets a store and an API of its own, in this process. Its initial resources are loaded
//! straight into the store. Requests carry the admin's token, since Ursa makes nobody admin for coming
//! from localhost; the cases about just that switch `localhostIsAdmin` on.

mod compare;
mod local_admin;
mod server;
mod token_cases;

use std::{fs, path::Path};

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::{Map, Value};
use ursa_control::api::{core_name, parse_kri};
use ursa_model::labels;

use super::GroupReport;
use server::{Answer, Server};

const GROUP: &str = "07-api-server";

/// Collections that come with later parts of the project; a request on them is about what isn't there.
const LATER_ENDPOINTS: [&str; 7] =
    ["/_rules", "/_layout", "/_policies", "/_routes", "/_config", "/_inbounds/", "/_outbounds/"];

/// Judges all cases of the group; `corpus` is the root of the corpus.
pub fn run(corpus: &Path) -> GroupReport {
    let mut report = GroupReport::new(GROUP);
    let folder = corpus.join(GROUP);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            report.judged(GROUP, Some(format!("no runtime: {error}")));
            return report;
        }
    };
    requests(&folder, &runtime, &mut report);
    local_admin::judge(&folder, &mut report);
    core_names(&folder, &mut report);
    token_cases::judge(&folder, &runtime, &mut report);
    report
}

/// Reads a list of cases.
fn read<T: for<'de> Deserialize<'de>>(folder: &Path, name: &str) -> anyhow::Result<T> {
    let path = folder.join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
    ursa_model::yaml::from_str(&text).with_context(|| format!("can't parse {}", path.display()))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    id: String,
    #[serde(default)]
    server: Map<String, Value>,
    initial_resources: Option<String>,
    requests: Vec<Exchange>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Exchange {
    method: String,
    path: String,
    request_body: Option<String>,
    inline_body: Option<Value>,
    client: Option<String>,
    status: u16,
    expected_body: Option<String>,
    expected_fields: Option<Map<String, Value>>,
    expected_body_shape: Option<Map<String, Value>>,
}

fn requests(folder: &Path, runtime: &tokio::runtime::Runtime, report: &mut GroupReport) {
    let cases: Vec<Value> = match read(folder, "cases.yaml") {
        Ok(cases) => cases,
        Err(error) => return report.judged("cases.yaml", Some(format!("{error:#}"))),
    };
    for case in &cases {
        let Some(case) = report.readable::<Case>(case) else { continue };
        if let Some(missing) = later(folder, &case) {
            report.unsupported(case.id, missing);
            continue;
        }
        let outcome = runtime.block_on(judge(folder, &case));
        let difference = outcome.unwrap_or_else(|error| Some(format!("{error:#}")));
        report.judged(case.id, difference);
    }
}

/// What of a case comes with later parts of the project.
fn later(folder: &Path, case: &Case) -> Option<String> {
    for request in &case.requests {
        let path = request.path.split('?').next().unwrap_or_default();
        if let Some(endpoint) = LATER_ENDPOINTS.iter().find(|endpoint| path.contains(*endpoint)) {
            return Some(format!("inspection endpoint {endpoint}"));
        }
        // A request on a collection of a type that doesn't exist yet.
        if let Some(collection) = unknown_collection(path) {
            return Some(format!("type of {collection}"));
        }
        if let Some(name) = &request.expected_body
            && let Ok(text) = fs::read_to_string(folder.join(name))
            && path.ends_with("resources")
            && let Some(missing) = types_missing(&text)
        {
            return Some(format!("types {missing}"));
        }
        if let Some(name) = &request.expected_body
            && path == "/policies"
            && let Ok(text) = fs::read_to_string(folder.join(name))
            && let Some(missing) = types_missing(&text)
        {
            return Some(format!("types {missing}"));
        }
    }
    let text = fs::read_to_string(folder.join(case.initial_resources.as_ref()?)).ok()?;
    let documents: Vec<Value> = ursa_model::yaml::from_documents(&text).ok()?;
    documents
        .iter()
        .filter_map(|document| document.get("type")?.as_str())
        .find(|name| ursa_model::by_name(name).is_none())
        .map(|name| format!("endpoints of stored {name}s"))
}

/// The collection in a path, if the peer has it and Ursa not yet.
fn unknown_collection(path: &str) -> Option<&str> {
    const LATER: [&str; 17] = [
        "meshaccesslogs",
        "meshcircuitbreakers",
        "meshfaultinjections",
        "meshhealthchecks",
        "meshloadbalancingstrategies",
        "meshmetrics",
        "meshpassthroughs",
        "meshproxypatches",
        "meshratelimits",
        "meshretries",
        "meshtraces",
        "meshexternalservices",
        "meshmultizoneservices",
        "meshzoneaddresses",
        "meshopentelemetrybackends",
        "mesh-insights",
        "service-insights-stored",
    ];
    path.split('/').find(|part| LATER.contains(part) && ursa_model::by_path(part).is_none())
}

/// The types in a list of all types that Ursa hasn't yet.
fn types_missing(text: &str) -> Option<String> {
    let value: Value = serde_json::from_str(text).ok()?;
    let items = value.get("resources").or_else(|| value.get("policies"))?.as_array()?;
    let missing: Vec<&str> = items
        .iter()
        .filter_map(|item| item.get("name")?.as_str())
        .filter(|name| ursa_model::by_name(name).is_none())
        .collect();
    (!missing.is_empty()).then(|| missing.join(", "))
}

async fn judge(folder: &Path, case: &Case) -> anyhow::Result<Option<String>> {
    let server = Server::start(&case.server).await?;
    if let Some(name) = &case.initial_resources {
        let path = folder.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
        server.load(&text).await?;
    }
    for request in &case.requests {
        let body = match (&request.request_body, &request.inline_body) {
            (Some(name), _) => fs::read(folder.join(name)).with_context(|| format!("can't read {name}"))?,
            (None, Some(value)) => serde_json::to_vec(value)?,
            (None, None) => Vec::new(),
        };
        let anonymous = request.client.is_some();
        let answer = server.send(&request.method, &request.path, body, anonymous).await?;
        if let Some(difference) = differs(folder, request, &answer)? {
            return Ok(Some(format!("{} {}: {difference}", request.method, request.path)));
        }
    }
    Ok(None)
}

fn differs(folder: &Path, expected: &Exchange, answer: &Answer) -> anyhow::Result<Option<String>> {
    if answer.status != expected.status {
        return Ok(Some(format!(
            "expected status {}, got {}: {}",
            expected.status, answer.status, answer.text
        )));
    }
    if let Some(name) = &expected.expected_body {
        let text = fs::read_to_string(folder.join(name)).with_context(|| format!("can't read {name}"))?;
        let wanted: Value = serde_json::from_str(&text).with_context(|| format!("{name} isn't JSON"))?;
        return Ok(compare::bodies(&wanted, &answer.json()));
    }
    if let Some(fields) = &expected.expected_fields {
        let body = answer.json();
        let found: Map<String, Value> =
            fields.keys().map(|key| (key.clone(), body.get(key).cloned().unwrap_or_default())).collect();
        return Ok(compare::bodies(&Value::Object(fields.clone()), &Value::Object(found)));
    }
    if let Some(shape) = &expected.expected_body_shape {
        return Ok(compare::shape(shape, &answer.json()));
    }
    Ok(None)
}

#[derive(Deserialize)]
struct CoreNames {
    cases: Vec<CoreName>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CoreName {
    description: String,
    kri: String,
    cp_mode: String,
    cp_zone: String,
    environment: String,
    system_namespace: String,
    #[serde(rename = "coreName")]
    expected: String,
}

fn core_names(folder: &Path, report: &mut GroupReport) {
    let list: CoreNames = match read(folder, "kri-core-name.yaml") {
        Ok(list) => list,
        Err(error) => return report.judged("kri-core-name.yaml", Some(format!("{error:#}"))),
    };
    for case in list.cases {
        let id = format!("kri-core-name/{}", case.description);
        let context = labels::Context {
            kubernetes: case.environment == "kubernetes",
            system_namespace: case.system_namespace.clone(),
            ..if case.cp_mode == "global" {
                labels::Context::global()
            } else {
                labels::Context::zone(&case.cp_zone)
            }
        };
        match parse_kri(&case.kri) {
            Ok((kri, _)) => {
                let found = core_name(&kri, &context);
                let difference =
                    (found != case.expected).then(|| format!("expected {}, got {found}", case.expected));
                report.judged(id, difference);
            }
            Err(error) => report.unsupported(id, error.detail),
        }
    }
}
