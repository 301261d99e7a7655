//! An API for one case: a store in a folder of its own, and requests without a network.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use http::{Request, header};
use http_body_util::BodyExt as _;
use serde_json::{Map, Value, json};
use tower::ServiceExt as _;
use ursa_control::{
    ControlPlane,
    access::Peer,
    api::{self, ApiState},
    config::Config,
    store::{Store, StoreOptions},
    tokens::TokenKind,
};
use ursa_model::Resource;

use crate::conformance::deviations::{self, Does};

/// The address that stands for `{{address}}`.
pub(super) const ADDRESS: &str = "api.example:5681";

/// What came back.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) text: String,
}

impl Answer {
    /// The body as JSON; null if it isn't.
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }
}

/// The admin's token and the key that proves it. They come from a control plane beside those of the
/// cases, so that they are not among a case's resources.
async fn issuer() -> anyhow::Result<(String, String)> {
    static ISSUER: tokio::sync::OnceCell<(String, String)> = tokio::sync::OnceCell::const_new();
    let made = ISSUER.get_or_try_init(|| async {
        let folder = tempfile::tempdir().context("no temporary folder")?;
        let store = Store::open(&StoreOptions::in_dir(folder.path()))?;
        let tokens = ControlPlane::new(Config::default(), store).tokens;
        tokens.ensure_signing_key(&TokenKind::User).await?;
        let groups = ["mesh-system:admin".to_owned()];
        let token = tokens.user_token("mesh-system:admin", &groups, time::Duration::days(1)).await?;
        anyhow::Ok((token, tokens.public_key(&TokenKind::User).await?))
    });
    Ok(made.await?.clone())
}

pub(super) struct Server {
    router: api::Router,
    store: Store,
    control: Arc<ControlPlane>,
    /// The admin's token, where the table has requests carry it.
    admin: Option<String>,
    _folder: tempfile::TempDir,
}

impl Server {
    pub(super) async fn start(id: &str, settings: &Map<String, Value>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("no temporary folder")?;
        let (token, public) = issuer().await?;
        let mut all = vec![(
            "apiServer.authn.tokens.validator.publicKeys".to_owned(),
            json!([{ "kid": "1", "key": public, "keyFile": "", "mesh": "" }]),
        )];
        all.extend(translate(settings));
        let mut admin = None;
        for does in deviations::arranged(super::GROUP, id) {
            match does {
                Does::AdminToken => admin = Some(token.clone()),
                Does::Flag(..) => {}
                Does::SwitchesOn(name) => all.push((name.to_owned(), json!(true))),
            }
        }
        let config = Config::default().with(&all)?;
        let store = Store::open(&StoreOptions::in_dir(folder.path().join("store")))?;
        let control = Arc::new(ControlPlane::new(config, store.clone()));
        Ok(Self {
            router: api::router(ApiState::new(control.clone())),
            store,
            control,
            admin,
            _folder: folder,
        })
    }

    /// Makes a mesh and the keys that tokens are signed with.
    pub(super) async fn prepare_tokens(&self, mesh: &str) -> anyhow::Result<()> {
        self.load(&format!("type: Mesh\nname: {mesh}\n")).await?;
        let tokens = &self.control.tokens;
        tokens.ensure_signing_key(&TokenKind::User).await?;
        tokens.ensure_signing_key(&TokenKind::Zone).await?;
        Ok(tokens.ensure_signing_key(&TokenKind::Dataplane { mesh: mesh.to_owned() }).await?)
    }

    /// Loads a stream of resources as they are written.
    pub(super) async fn load(&self, text: &str) -> anyhow::Result<()> {
        for mut resource in Resource::many_from_yaml(text)? {
            if resource.meta.creation_time.is_none() {
                resource.meta.creation_time = Some(time::OffsetDateTime::UNIX_EPOCH);
            }
            resource.meta.modification_time = resource.meta.modification_time.or(resource.meta.creation_time);
            self.store.import(resource).await?;
        }
        Ok(())
    }

    pub(super) async fn send(
        &self,
        method: &str,
        path: &str,
        body: Vec<u8>,
        anonymous: bool,
    ) -> anyhow::Result<Answer> {
        let remote = if anonymous { "203.0.113.1:40000" } else { "127.0.0.1:40000" };
        let path = path.replace('[', "%5B").replace(']', "%5D").replace(' ', "%20");
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, ADDRESS)
            .extension(Peer::Tcp(remote.parse::<SocketAddr>()?));
        if let Some(admin) = self.admin.as_ref().filter(|_| !anonymous) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {admin}"));
        }
        let request = request.body(http_body_util::Full::from(body))?;
        let response = self.router.clone().oneshot(request.map(api::Body::new)).await?;
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await?.to_bytes();
        Ok(Answer { status, text: String::from_utf8_lossy(&bytes).into_owned() })
    }
}

/// The settings of a case by the paths of Ursa's configuration.
fn translate(settings: &Map<String, Value>) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for (key, value) in settings {
        match key.as_str() {
            "mode" => all.push(("mode".into(), value.clone())),
            "zone" if value.is_string() => all.push(("multizone.zone.name".into(), value.clone())),
            "federated" if value == true => {
                all.push(("multizone.zone.globalAddress".into(), json!("grpcs://global.example:5685")));
            }
            "zone" | "federated" => {}
            key if key.starts_with("gui.") => all.push((format!("apiServer.{key}"), value.clone())),
            key => all.push((key.to_owned(), value.clone())),
        }
    }
    all
}
