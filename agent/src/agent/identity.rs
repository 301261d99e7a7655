//! A workload's identity: its key is made here and stays here; control signs, Envoy gets it by SDS.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::sync::watch;
use ursa_wire::identity::{IdentityClient, IssueRequest, IssuedIdentity};
use ursa_wire::resources::WorkloadIdentity;
use ursa_wire::sds::Secret;

use super::control::{Link, chain};
use super::node::{reason, request_for};
use super::retry::{Backoff, random_fraction, until};
use super::session::Registration;
use crate::relay::{
    Cache, Item, Kind, LastGood, LastGoodError, Reader, hex, item_from_encoded, value, write_atomic,
};

const META: &str = "leaf.json";
const DEADLINE: Duration = Duration::from_secs(10);

/// No identity could be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A key or request could not be made.
    #[error("can't make a key or certificate request: {0}")]
    Crypto(String),
    /// Control said no.
    #[error("control refused a certificate: {0}")]
    Refused(String),
    /// Control didn't answer.
    #[error("control gave no certificate within {} s", DEADLINE.as_secs())]
    Timeout,
    /// What control sent is no certificate for this workload.
    #[error("control sent an unusable certificate: {0}")]
    Unusable(String),
    /// It can't be kept for a restart.
    #[error("the certificate can't be kept for a restart")]
    Disk(#[source] LastGoodError),
    /// It can't be kept for a restart.
    #[error("can't write {}", path.display())]
    Meta {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What is known about a workload's certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leaf {
    /// The name under which Envoy asks for it.
    pub secret_name: String,
    /// The one URI SAN.
    pub spiffe_id: String,
    /// What control wanted when it was issued; a new value asks for a new certificate.
    pub generation: String,
    /// When it was issued, in Unix seconds by this node's clock. The certificate itself begins earlier, for peers
    /// whose clocks are behind.
    #[serde(alias = "notBefore")]
    pub issued_at: i64,
    /// When a new one is asked for, in Unix seconds. A file that lacks it asks at once.
    #[serde(default)]
    pub renew_at: i64,
    /// When it ends, in Unix seconds.
    pub not_after: i64,
}

impl Leaf {
    /// Whether its time is over.
    pub fn is_expired(&self) -> bool {
        now() >= self.not_after
    }

    /// Whether it should have been renewed.
    pub const fn is_overdue(&self, now: i64) -> bool {
        now >= self.renew_at
    }
}

/// Half of the time that is left, and a second at least, so that the shortest life doesn't become a loop.
pub(super) fn half_life(now: i64, not_after: i64) -> i64 {
    match (not_after - now) / 2 {
        left if left > 0 => left,
        _ => i64::from(not_after > now),
    }
}

/// At half of what is left from `now` on, or up to a tenth of that before it: workloads that started together
/// don't renew together.
fn renewal(now: i64, not_after: i64) -> i64 {
    let half = half_life(now, not_after);
    let early = Duration::from_secs(half.unsigned_abs()).mul_f64(random_fraction() / 10.0);
    now + half - i64::try_from(early.as_secs()).unwrap_or(0)
}

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// The state of a workload's identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdentityState {
    /// The present certificate, also if it has expired.
    pub leaf: Option<Leaf>,
    /// Why there is none, or why it isn't renewed.
    pub error: Option<String>,
}

/// Keeps one workload's certificate.
#[derive(Debug)]
pub struct IdentityKeeper {
    mesh: String,
    dataplane: String,
    dir: PathBuf,
    store: LastGood,
    cache: Arc<Cache>,
    state: watch::Sender<IdentityState>,
}

impl IdentityKeeper {
    /// A keeper whose files are in `dir`. What is there and still valid is served at once.
    pub fn open(
        mesh: &str,
        dataplane: &str,
        dir: PathBuf,
        reader: Option<Reader>,
        cache: Arc<Cache>,
    ) -> Self {
        let mut keeper = Self {
            mesh: mesh.to_owned(),
            dataplane: dataplane.to_owned(),
            store: LastGood::new(&dir).readable_by(reader),
            dir,
            cache,
            state: watch::Sender::new(IdentityState::default()),
        };
        keeper.load();
        keeper
    }

    /// The state as it changes.
    pub fn watch(&self) -> watch::Receiver<IdentityState> {
        self.state.subscribe()
    }

    fn load(&mut self) {
        let stored = match self.store.load() {
            Ok(stored) => stored,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the stored certificate can't be read; asking for a new one");
                return;
            }
        };
        let leaf =
            fs::read(self.dir.join(META)).ok().and_then(|text| serde_json::from_slice::<Leaf>(&text).ok());
        let Some(leaf) = leaf else { return };
        let Some((_, name, item)) = stored.into_iter().find(|(kind, name, item)| {
            *kind == Kind::Secret && *name == leaf.secret_name && is_pair(item, &leaf)
        }) else {
            return;
        };
        let error = leaf.is_expired().then(|| expired(&leaf));
        if error.is_none() {
            self.cache.put_local(Kind::Secret, &name, item);
        }
        self.state.send_replace(IdentityState { leaf: Some(leaf), error });
    }

    /// Keeps the certificate current until dropped: asks when control wants another identity, and at half life.
    pub async fn run(
        mut self,
        mut links: watch::Receiver<Option<Link>>,
        mut registration: watch::Receiver<Registration>,
    ) {
        let mut changes = self.cache.changes();
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
        let mut retry = tokio::time::Instant::now();
        loop {
            changes.mark_unchanged();
            let link = links.borrow_and_update().clone();
            let registered = *registration.borrow_and_update() == Registration::Registered;
            let wanted = self.wanted();
            let renewal = match (&wanted, registered, link) {
                (Some(wanted), true, Some(link)) => {
                    let due = self.due(wanted);
                    Some((wanted.clone(), link, due))
                }
                _ => None,
            };
            let (expiry, overdue) = self.deadlines(renewal.is_some());
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                changed = links.changed() => if changed.is_err() { return },
                changed = registration.changed() => {
                    if changed.is_err() { return }
                    // Another session, another chance.
                    retry = tokio::time::Instant::now();
                    backoff.reset();
                }
                () = at(expiry) => self.check_expiry(),
                () = at(overdue) => self.warn_overdue(&registration.borrow()),
                Some((wanted, link)) = due(renewal, retry) => {
                    match self.issue(&wanted, link).await {
                        Ok(()) => backoff.reset(),
                        Err(error) => {
                            let text = chain(&error);
                            tracing::warn!(dataplane = %self.dataplane, error = %text, "no certificate; trying again");
                            self.state.send_modify(|state| state.error = Some(text));
                            // Not waited for here: the end of the present one must be noticed meanwhile.
                            retry = tokio::time::Instant::now() + backoff.step();
                        }
                    }
                }
            }
        }
    }

    /// When the certificate ends, and when its renewal is overdue although nothing can be asked for now.
    fn deadlines(&self, can_renew: bool) -> (Option<i64>, Option<i64>) {
        let state = self.state.borrow();
        let Some(leaf) = state.leaf.as_ref().filter(|leaf| !leaf.is_expired()) else { return (None, None) };
        let silent = !can_renew && state.error.is_none();
        (Some(leaf.not_after), silent.then_some(leaf.renew_at))
    }

    /// Said once, long before the end: half of the life is left.
    fn warn_overdue(&self, registration: &Registration) {
        let why = match registration {
            Registration::Refused(why) => format!("control refuses the Dataplane: {why}"),
            _ => {
                "there is no session with control: check that ursa-control runs and can be reached".to_owned()
            }
        };
        self.state.send_if_modified(|state| {
            let Some(leaf) = &state.leaf else { return false };
            let error = format!(
                "the certificate {} can't be renewed, which is overdue since {}; it is valid until {}, then new connections are refused. {why}",
                leaf.spiffe_id,
                moment(leaf.renew_at),
                moment(leaf.not_after),
            );
            tracing::warn!(dataplane = %self.dataplane, %error, not_after = leaf.not_after, "the certificate isn't renewed");
            state.error = Some(error);
            true
        });
    }

    fn check_expiry(&self) {
        self.state.send_if_modified(|state| {
            let Some(leaf) = state.leaf.as_ref().filter(|leaf| leaf.is_expired()) else { return false };
            let error = expired(leaf);
            tracing::error!(dataplane = %self.dataplane, %error, cause = state.error, not_after = leaf.not_after,
                "the certificate has expired");
            // Peers refuse it anyway; an Envoy that starts now gets none and refuses by itself.
            self.cache.remove_local(Kind::Secret, &leaf.secret_name);
            state.error = Some(error);
            true
        });
    }

    /// What control wants this workload to be. There is at most one.
    fn wanted(&self) -> Option<WorkloadIdentity> {
        let (_, item) = self.cache.current(Kind::Identity).into_iter().next()?;
        WorkloadIdentity::decode(value(&item).ok()?).ok()
    }

    /// When to ask for it, in Unix seconds.
    fn due(&self, wanted: &WorkloadIdentity) -> i64 {
        match &self.state.borrow().leaf {
            Some(leaf)
                if leaf.generation == wanted.generation
                    && leaf.secret_name == wanted.secret_name
                    && leaf.spiffe_id == wanted.spiffe_id
                    && !leaf.is_expired() =>
            {
                leaf.renew_at
            }
            _ => 0,
        }
    }

    async fn issue(&mut self, wanted: &WorkloadIdentity, link: Link) -> Result<(), IdentityError> {
        // A new key each time: an old one that leaked is worth nothing after half a life.
        let key = KeyPair::generate().map_err(|error| IdentityError::Crypto(error.to_string()))?;
        let csr_der = request_for(&key).map_err(IdentityError::Crypto)?;
        let request = IssueRequest { mesh: self.mesh.clone(), dataplane: self.dataplane.clone(), csr_der };
        let mut client = IdentityClient::new(link.channel);
        let issued = tokio::time::timeout(DEADLINE, client.issue(request))
            .await
            .map_err(|_| IdentityError::Timeout)?
            .map_err(|status| IdentityError::Refused(reason(&status)))?;
        self.install(wanted, issued, &key)
    }

    fn install(
        &mut self,
        wanted: &WorkloadIdentity,
        issued: IssuedIdentity,
        key: &KeyPair,
    ) -> Result<(), IdentityError> {
        check_leaf(&issued, key).map_err(IdentityError::Unusable)?;
        let now = now();
        let leaf = Leaf {
            secret_name: issued.secret_name,
            spiffe_id: issued.spiffe_id,
            generation: wanted.generation.clone(),
            issued_at: now,
            renew_at: renewal(now, issued.not_after),
            not_after: issued.not_after,
        };
        if leaf.is_expired() {
            return Err(IdentityError::Unusable(format!(
                "it ended at {} by this machine's clock; set the clock, or lengthen `certificateParameters.expiry` of the MeshIdentity",
                moment(leaf.not_after)
            )));
        }
        let version = hex(&Sha256::digest(issued.chain_pem.as_bytes())[..8]);
        let encoded = Secret::certificate(&leaf.secret_name, &issued.chain_pem, &key.serialize_pem())
            .to_resource(&version);
        let (name, item) =
            item_from_encoded(encoded).map_err(|error| IdentityError::Unusable(error.to_string()))?;
        let former = self.state.borrow().leaf.as_ref().map(|leaf| leaf.secret_name.clone());
        self.cache.put_local(Kind::Secret, &name, item.clone());
        if let Some(former) = former.filter(|former| *former != name) {
            self.cache.remove_local(Kind::Secret, &former);
        }
        tracing::info!(dataplane = %self.dataplane, spiffe_id = %leaf.spiffe_id, "a new certificate");
        self.state.send_replace(IdentityState { leaf: Some(leaf.clone()), error: None });
        // Kept for a restart; when the disk is full, serving goes on and status says so.
        if let Err(error) = self.keep(&name, item, &leaf) {
            let text = chain(&error);
            tracing::warn!(dataplane = %self.dataplane, error = %text, "the certificate is served, but not kept");
            self.state.send_modify(|state| state.error = Some(text));
        }
        Ok(())
    }

    fn keep(&mut self, name: &str, item: Item, leaf: &Leaf) -> Result<(), IdentityError> {
        self.store.store(&[(Kind::Secret, name.to_owned(), item)]).map_err(IdentityError::Disk)?;
        let path = self.dir.join(META);
        let text =
            serde_json::to_vec_pretty(leaf).map_err(|error| IdentityError::Crypto(error.to_string()))?;
        write_atomic(&path, &text, 0o600, None).map_err(|source| IdentityError::Meta { path, source })
    }
}

async fn at(unix: Option<i64>) {
    match unix {
        None => std::future::pending().await,
        Some(unix) => until(unix).await,
    }
}

async fn due(
    renewal: Option<(WorkloadIdentity, Link, i64)>,
    retry: tokio::time::Instant,
) -> Option<(WorkloadIdentity, Link)> {
    let (wanted, link, unix) = renewal?;
    until(unix).await;
    tokio::time::sleep_until(retry).await;
    Some((wanted, link))
}

fn expired(leaf: &Leaf) -> String {
    format!(
        "the certificate {} expired at {} and control gave no new one; new connections are refused until it does: check that ursa-control runs and can be reached",
        leaf.spiffe_id,
        moment(leaf.not_after)
    )
}

/// A time for people, in UTC.
fn moment(unix: i64) -> String {
    use time::format_description::well_known::Rfc3339;
    let time = OffsetDateTime::from_unix_timestamp(unix).ok().and_then(|time| time.format(&Rfc3339).ok());
    time.unwrap_or_else(|| format!("{unix} (Unix time)"))
}

/// Whether the stored secret is the one that the leaf's description is about.
fn is_pair(item: &Item, leaf: &Leaf) -> bool {
    use ursa_wire::sds::SecretKind;
    let Ok(secret) = value(item).map(Secret::decode) else { return false };
    let Ok(Secret { kind: Some(SecretKind::TlsCertificate(pair)), .. }) = secret else { return false };
    let Some(chain) = pair.certificate_chain.and_then(|source| source.inline_bytes) else { return false };
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(&chain) else { return false };
    pem.parse_x509().is_ok_and(|certificate| certificate.validity().not_after.timestamp() == leaf.not_after)
}

/// The certificate must be about our key: anything else would break every handshake later, in words that help nobody.
fn check_leaf(issued: &IssuedIdentity, key: &KeyPair) -> Result<(), String> {
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(issued.chain_pem.as_bytes()).map_err(|error| error.to_string())?;
    let certificate = pem.parse_x509().map_err(|error| error.to_string())?;
    if *certificate.public_key().subject_public_key.data != *key.public_key_raw() {
        return Err("it is about another key".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_half_of_what_is_left_or_a_little_before() {
        const DAY: i64 = 86_400;
        for _ in 0..100 {
            let at = renewal(1000, 1000 + 2 * DAY);
            assert!((1000 + DAY * 9 / 10..=1000 + DAY).contains(&at), "{at}");
        }
        assert_eq!(renewal(1000, 900), 1000, "what has ended is renewed at once");
        assert_eq!(renewal(1000, 1001), 1001, "a second is waited for, or it would be asked for without end");
    }

    #[test]
    fn a_description_from_before_asks_at_once() {
        let leaf: Leaf = serde_json::from_str(
            r#"{"secretName":"s","spiffeId":"i","generation":"g","notBefore":5,"notAfter":9}"#,
        )
        .unwrap();
        assert_eq!((leaf.issued_at, leaf.renew_at, leaf.not_after), (5, 0, 9));
    }
}
