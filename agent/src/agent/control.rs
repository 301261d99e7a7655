//! The node's one connection to control, replaced when the node's certificate is renewed.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::node::{NodeError, NodeIdentity};
use super::retry::{Backoff, random_fraction, until};

/// The node as it is now, and the channel that its certificate opens.
#[derive(Clone, Debug)]
pub struct Link {
    /// The node.
    pub node: Arc<NodeIdentity>,
    /// One HTTP/2 connection, shared by everything; it reconnects by itself.
    pub channel: Channel,
}

/// Owns the node's identity: renews it, and hands out the channel. `None` until the node has joined.
#[derive(Debug)]
pub struct Control {
    dir: PathBuf,
    address: Mutex<Option<String>>,
    link: watch::Sender<Option<Link>>,
}

impl Control {
    /// Reads the node's identity from `dir`. `address` overrides the one from the ticket.
    pub fn open(dir: PathBuf, address: Option<String>) -> Result<Self, NodeError> {
        let control = Self { dir, address: Mutex::new(address), link: watch::Sender::new(None) };
        if let Some(node) = NodeIdentity::load(&control.dir)? {
            control.install(node)?;
        }
        Ok(control)
    }

    fn install(&self, node: NodeIdentity) -> Result<(), NodeError> {
        let channel = node.channel(self.told_address().as_deref())?;
        self.link.send_replace(Some(Link { node: Arc::new(node), channel }));
        Ok(())
    }

    /// Goes to another address from now on; `None` is that of the ticket.
    pub fn move_to(&self, address: Option<&str>) -> Result<(), NodeError> {
        let address = address.map(str::to_owned);
        if self.told_address() == address {
            return Ok(());
        }
        // The channel first: an address that is none changes nothing.
        let node = self.link.borrow().as_ref().map(|link| Arc::clone(&link.node));
        let link = node.map(|node| node.channel(address.as_deref()).map(|channel| Link { node, channel }));
        let link = link.transpose()?;
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
        if link.is_some() {
            self.link.send_replace(link);
        }
        Ok(())
    }

    fn told_address(&self) -> Option<String> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The link as it changes.
    pub fn watch(&self) -> watch::Receiver<Option<Link>> {
        self.link.subscribe()
    }

    /// Where control is, if that is known.
    pub fn address(&self) -> Option<String> {
        self.told_address().or_else(|| self.link.borrow().as_ref().map(|link| link.node.address.clone()))
    }

    /// Joins by a ticket and uses the new identity at once.
    pub async fn join(&self, ticket: &str, name: &str) -> Result<Arc<NodeIdentity>, NodeError> {
        let node = NodeIdentity::join(&self.dir, ticket, name).await?;
        self.install(node.clone())?;
        Ok(Arc::new(node))
    }

    /// Renews the node's certificate at half of its life until `stop`.
    pub async fn renew(&self, stop: CancellationToken) {
        let mut links = self.link.subscribe();
        let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(600));
        loop {
            let link = links.borrow_and_update().clone();
            let due = link.as_ref().map(|link| early(link.node.renew_at));
            tokio::select! {
                () = stop.cancelled() => return,
                changed = links.changed() => {
                    if changed.is_err() { return }
                }
                Some(()) = reached(due) => {
                    let Some(link) = link else { continue };
                    match link.node.renew(&self.dir, link.channel).await.and_then(|node| self.install(node)) {
                        Ok(()) => {
                            backoff.reset();
                            tracing::info!("the node's certificate is renewed");
                        }
                        Err(error) => {
                            tracing::warn!(error = %chain(&error), "the node's certificate can't be renewed; trying again");
                            tokio::select! {
                                () = stop.cancelled() => return,
                                () = backoff.wait() => {}
                            }
                        }
                    }
                }
            }
        }
    }
}

async fn reached(unix: Option<i64>) -> Option<()> {
    until(unix?).await;
    Some(())
}

/// Up to a tenth of the time until a moment before it, so that nodes that joined together don't renew together.
fn early(unix: i64) -> i64 {
    let left = u64::try_from(unix - OffsetDateTime::now_utc().unix_timestamp()).unwrap_or(0);
    let early = Duration::from_secs(left).mul_f64(random_fraction() / 10.0);
    unix - i64::try_from(early.as_secs()).unwrap_or(0)
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
