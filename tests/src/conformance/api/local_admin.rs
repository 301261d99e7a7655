//! Which requests are the local admin's when `apiServer.authn.localhostIsAdmin` is on.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::Deserialize;
use serde_json::json;
use ursa_control::{
    access::{Access, Peer},
    config::Config,
};

use crate::conformance::{
    GroupReport,
    deviations::{self, Does},
};

#[derive(Deserialize)]
struct List {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    description: String,
    remote_addr: String,
    host: String,
    #[serde(default)]
    origin: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    admin: bool,
}

pub(super) fn judge(folder: &Path, report: &mut GroupReport) {
    let list: List = match super::read(folder, "localhost-admin.yaml") {
        Ok(list) => list,
        Err(error) => return report.judged("localhost-admin.yaml", Some(format!("{error:#}"))),
    };
    if list.cases.is_empty() {
        report.judged("localhost-admin.yaml", Some(super::NO_CASES.to_owned()));
    }
    for case in list.cases {
        let id = format!("localhost-admin/{}", case.description);
        let difference = match asked(&id, &case) {
            Ok(admin) if admin == case.admin => None,
            Ok(admin) => Some(format!("expected admin: {}, got {admin}", case.admin)),
            Err(error) => Some(format!("{error:#}")),
        };
        report.judged(id, difference);
    }
}

fn asked(id: &str, case: &Case) -> anyhow::Result<bool> {
    let switches: Vec<_> = deviations::arranged(super::GROUP, id)
        .filter_map(|does| match does {
            Does::SwitchesOn(name) => Some((name.to_owned(), json!(true))),
            Does::AdminToken | Does::Flag(..) => None,
        })
        .collect();
    let access = Access::new(Arc::new(Config::default().with(&switches)?));
    let mut headers = HeaderMap::new();
    headers.insert(header::HOST, HeaderValue::from_str(&case.host)?);
    if !case.origin.is_empty() {
        headers.insert(header::ORIGIN, HeaderValue::from_str(&case.origin)?);
    }
    for (name, value) in &case.headers {
        headers.insert(HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_str(value)?);
    }
    Ok(access.is_operator(Peer::Tcp(case.remote_addr.parse()?), &headers, None))
}
