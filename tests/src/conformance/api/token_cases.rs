//! Token endpoints, and the lives of keys and tokens.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use time::{Duration, OffsetDateTime};
use ursa_control::{
    ControlPlane,
    config::Config,
    store::{Store, StoreOptions},
    tokens::{TokenKind, Tokens},
};
use ursa_model::{GoDuration, Meta, Resource};

use super::{compare, server::Server};
use crate::conformance::GroupReport;

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    requests: Vec<RequestCase>,
    #[serde(default)]
    lifecycle: Vec<Lifecycle>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RequestCase {
    id: String,
    #[serde(default)]
    server: Map<String, Value>,
    request: TokenRequest,
    status: u16,
    expected_body: Option<String>,
    expected_text: Option<String>,
    #[serde(default)]
    claims: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenRequest {
    method: String,
    path: String,
    #[serde(default)]
    r#as: String,
    body: Option<Value>,
    raw_body: Option<String>,
}

#[derive(Deserialize)]
struct Lifecycle {
    id: String,
    steps: Vec<Step>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Step {
    r#do: String,
    kid: Option<String>,
    r#as: String,
    valid_for: String,
    token: String,
    valid: bool,
    message_contains: String,
    by: String,
    data: String,
    header: Value,
    payload: Value,
    signature: String,
}

pub(super) fn judge(folder: &Path, runtime: &tokio::runtime::Runtime, report: &mut GroupReport) {
    let folder = folder.join("tokens");
    let list: List = match super::read(&folder, "cases.yaml") {
        Ok(list) => list,
        Err(error) => return report.judged("tokens/cases.yaml", Some(format!("{error:#}"))),
    };
    if list.requests.is_empty() || list.lifecycle.is_empty() {
        report.judged("tokens/cases.yaml", Some(super::NO_CASES.to_owned()));
    }
    for case in list.requests {
        let difference =
            runtime.block_on(request(&folder, &case)).unwrap_or_else(|error| Some(format!("{error:#}")));
        report.judged(format!("tokens/{}", case.id), difference);
    }
    for case in list.lifecycle {
        let difference = runtime.block_on(live(&case)).unwrap_or_else(|error| Some(format!("{error:#}")));
        report.judged(format!("tokens/lifecycle/{}", case.id), difference);
    }
}

async fn request(folder: &Path, case: &RequestCase) -> anyhow::Result<Option<String>> {
    let server = Server::start(&format!("tokens/{}", case.id), &case.server).await?;
    server.prepare_tokens("default").await?;
    let body = match (&case.request.raw_body, &case.request.body) {
        (Some(raw), _) => raw.clone().into_bytes(),
        (None, Some(body)) => serde_json::to_vec(body)?,
        (None, None) => Vec::new(),
    };
    let anonymous = case.request.r#as != "admin";
    let answer = server.send(&case.request.method, &case.request.path, body, anonymous).await?;
    if answer.status != case.status {
        return Ok(Some(format!("expected status {}, got {}: {}", case.status, answer.status, answer.text)));
    }
    if let Some(name) = &case.expected_body {
        let text = fs::read_to_string(folder.join(name)).with_context(|| format!("can't read {name}"))?;
        return Ok(compare::bodies(&serde_json::from_str(&text)?, &answer.json()));
    }
    if case.expected_text.as_deref() == Some("jwt") {
        let payload = answer.text.split('.').nth(1).context("the answer is no JWT")?;
        let payload: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?;
        for (claim, wanted) in &case.claims {
            if payload.get(claim) != Some(wanted) {
                return Ok(Some(format!("claim {claim}: expected {wanted}, got {:?}", payload.get(claim))));
            }
        }
    }
    Ok(None)
}

/// User tokens by a clock that can be moved.
struct Life {
    tokens: Tokens,
    store: Store,
    moved: Arc<Mutex<Duration>>,
    issued: BTreeMap<String, String>,
    _folder: tempfile::TempDir,
}

impl Life {
    fn begin() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let store = Store::open(&StoreOptions::in_dir(folder.path()))?;
        let moved = Arc::new(Mutex::new(Duration::ZERO));
        let clock = {
            let moved = moved.clone();
            Arc::new(move || {
                OffsetDateTime::now_utc() + *moved.lock().unwrap_or_else(PoisonError::into_inner)
            })
        };
        let tokens = ControlPlane::new(Config::default(), store.clone()).tokens.with_clock(clock);
        Ok(Self { tokens, store, moved, issued: BTreeMap::new(), _folder: folder })
    }

    async fn step(&mut self, step: &Step) -> anyhow::Result<Option<String>> {
        let serial = || -> anyhow::Result<u32> { Ok(step.kid.as_deref().unwrap_or("1").parse()?) };
        match step.r#do.as_str() {
            "createDefaultSigningKey" => self.tokens.ensure_signing_key(&TokenKind::User).await?,
            "createSigningKey" => self.tokens.create_signing_key(&TokenKind::User, serial()?).await?,
            "deleteSigningKey" => self.tokens.delete_signing_key(&TokenKind::User, serial()?).await?,
            "issue" => {
                let token = self.tokens.user_token("john", &[], duration(&step.valid_for)?).await?;
                self.issued.insert(step.r#as.clone(), token);
            }
            "validate" => return self.validate(step).await,
            "moveClock" => *self.moved.lock().unwrap_or_else(PoisonError::into_inner) += duration(&step.by)?,
            "createRevocationSecret" => self.revoke(&step.data).await?,
            other => anyhow::bail!("the runner doesn't know the step {other:?}"),
        }
        Ok(None)
    }

    async fn validate(&self, step: &Step) -> anyhow::Result<Option<String>> {
        let token = match self.issued.get(&step.token) {
            Some(token) => token.clone(),
            None => format!(
                "{}.{}.{}",
                URL_SAFE_NO_PAD.encode(step.header.to_string()),
                URL_SAFE_NO_PAD.encode(step.payload.to_string()),
                step.signature
            ),
        };
        let refused = self.tokens.verify_user(&token).await.err().map(|error| error.to_string());
        Ok(match refused {
            None if step.valid => None,
            None => Some("expected the token to be refused, it was accepted".into()),
            Some(reason) if step.valid => Some(format!("expected the token to be accepted: {reason}")),
            Some(reason) if reason.contains(&step.message_contains) => None,
            Some(reason) => {
                Some(format!("expected a message with {:?}, got {reason:?}", step.message_contains))
            }
        })
    }

    /// Creates the secret with revoked ids; `<jti of NAME>` stands for a token's id.
    async fn revoke(&self, data: &str) -> anyhow::Result<()> {
        let mut list = data.to_owned();
        for (name, token) in &self.issued {
            let jti = self.tokens.verify_user(token).await?.registered.jti;
            list = list.replace(&format!("<jti of {name}>"), &jti);
        }
        let descriptor = ursa_model::by_name("GlobalSecret").context("no type GlobalSecret")?;
        let resource = Resource {
            descriptor,
            meta: Meta::new("", "user-token-revocations"),
            spec: json!({ "data": STANDARD.encode(list) }),
            status: None,
            ignored: Vec::new(),
        };
        self.store.create(resource).await?;
        Ok(())
    }
}

async fn live(case: &Lifecycle) -> anyhow::Result<Option<String>> {
    let mut life = Life::begin()?;
    for (i, step) in case.steps.iter().enumerate() {
        if let Some(difference) = life.step(step).await? {
            return Ok(Some(format!("step {} ({}): {difference}", i + 1, step.r#do)));
        }
    }
    Ok(None)
}

fn duration(text: &str) -> anyhow::Result<Duration> {
    Ok(Duration::nanoseconds(text.parse::<GoDuration>()?.nanos()))
}
