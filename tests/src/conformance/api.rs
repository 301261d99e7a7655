//! Group 07: requests to the REST API and what it answers.
//!
//! Each case gets a store and an API of its own, in this process. Its initial resources are loaded
//! straight into the store. What a case is given beyond its own text is in
//! [`ARRANGEMENTS`](super::deviations::ARRANGEMENTS).

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
/// What a list says that judges nothing.
const NO_CASES: &str = "expected cases; found none";

/// Endpoints that come with later parts of the project; a request on them is about what isn't there.
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
    if cases.is_empty() {
        report.judged("cases.yaml", Some(NO_CASES.to_owned()));
    }
    for case in &cases {
        let Some(case) = report.readable::<Case>(case) else { continue };
        if let Some(missing) = later(&case) {
            report.unsupported(case.id, missing);
            continue;
        }
        let outcome = runtime.block_on(judge(folder, &case));
        let difference = outcome.unwrap_or_else(|error| Some(format!("{error:#}")));
        report.judged(case.id, difference);
    }
}

/// What of a case comes with later parts of the project.
fn later(case: &Case) -> Option<String> {
    let mut paths = case.requests.iter().map(|request| request.path.split('?').next().unwrap_or_default());
    let endpoint = paths.find_map(|path| LATER_ENDPOINTS.iter().find(|endpoint| path.contains(*endpoint)))?;
    Some(format!("inspection endpoint {endpoint}"))
}

async fn judge(folder: &Path, case: &Case) -> anyhow::Result<Option<String>> {
    let server = Server::start(&case.id, &case.server).await?;
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
    if list.cases.is_empty() {
        report.judged("kri-core-name.yaml", Some(NO_CASES.to_owned()));
    }
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
            Err(error) => {
                report.judged(id, Some(format!("expected {}, got {}", case.expected, error.detail)));
            }
        }
    }
}
