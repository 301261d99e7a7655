//! Who answers Envoy on the xDS socket: an attached agent, or the shim from the last-good directory.
//!
//! The listening socket never closes, so an Envoy that connects at any time waits for an answer rather than being
//! refused. An agent holds a copy of it for as long as its control connection lives.

use std::fmt::Debug;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::handover;
use super::protocol::XdsRole;

/// How long an agent has to attach before the shim answers itself. An Envoy that connects meanwhile waits in the
/// socket's queue, which costs it less than being served by the shim and then sent on to the agent.
const GRACE: Duration = Duration::from_millis(500);
/// How long connections that the shim served may take to close in order; after it they are cut.
const CLOSING: Duration = Duration::from_millis(200);
/// How long before a server that failed is started again.
const RETRY: Duration = Duration::from_secs(1);

/// Serves Envoy from what the agent left on disk.
pub trait Fallback: Send + Sync + Debug + 'static {
    /// Serves what is in the last-good directory: accepts on `listener` until `stop`, and then closes every
    /// connection.
    fn serve(
        &self,
        last_good: &Path,
        listener: tokio::net::UnixListener,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<(), Box<dyn std::error::Error + Send + Sync>>>;
}

/// Identifies a control connection.
pub(super) type Holder = u64;

/// The xDS socket and its role.
#[derive(Debug)]
pub(super) struct Xds {
    listener: UnixListener,
    holder: watch::Sender<Option<Holder>>,
    serving: watch::Sender<bool>,
}

impl Xds {
    pub(super) fn new(listener: UnixListener) -> Arc<Self> {
        Arc::new(Self { listener, holder: watch::Sender::new(None), serving: watch::Sender::new(false) })
    }

    /// Gives the role to a connection, from whoever held it, and returns a copy of the socket once the shim itself
    /// serves nobody any more.
    pub(super) async fn take(&self, holder: Holder) -> io::Result<UnixListener> {
        let copy = self.listener.try_clone()?;
        self.holder.send_replace(Some(holder));
        // It can't fail: this object holds the sender.
        let _ = self.serving.subscribe().wait_for(|serving| !serving).await;
        info!(holder, "an agent serves Envoy");
        Ok(copy)
    }

    /// Gives the role back, if this connection still holds it.
    pub(super) fn release(&self, holder: Holder) {
        let released = self.holder.send_if_modified(|current| {
            let held = *current == Some(holder);
            if held {
                *current = None;
            }
            held
        });
        if released {
            info!(holder, "the agent is gone; the shim will answer Envoy from the last good configuration");
        }
    }

    /// Returns once another connection than this one, which has taken the role, holds it.
    pub(super) async fn lost(&self, holder: Holder) {
        let _ = self.holder.subscribe().wait_for(|current| *current != Some(holder)).await;
    }

    /// Changes when the role does.
    pub(super) fn roles(&self) -> watch::Receiver<Option<Holder>> {
        self.holder.subscribe()
    }

    pub(super) fn role(&self) -> XdsRole {
        if self.holder.borrow().is_some() { XdsRole::Agent } else { XdsRole::LastGood }
    }

    /// The listening socket.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Serves whenever no agent does, once it is known from where. Never returns.
    pub(super) async fn run(
        &self,
        fallback: Arc<dyn Fallback>,
        mut last_good: watch::Receiver<Option<PathBuf>>,
    ) {
        let mut holder = self.holder.subscribe();
        loop {
            // It ends with the shim.
            let Ok(dir) = last_good.wait_for(Option::is_some).await.map(|dir| dir.clone()) else {
                return std::future::pending().await;
            };
            let Some(dir) = dir else { continue };
            let _ = holder.wait_for(Option::is_none).await;
            if timeout(GRACE, holder.wait_for(Option::is_some)).await.is_ok() {
                continue;
            }
            self.serving.send_replace(true);
            // Someone may have taken the role between the two lines above.
            if self.holder.borrow().is_none() {
                self.serve(Arc::clone(&fallback), dir).await;
            }
            self.serving.send_replace(false);
        }
    }

    async fn serve(&self, fallback: Arc<dyn Fallback>, last_good: PathBuf) {
        let mut holder = self.holder.subscribe();
        let attached = async { drop(holder.wait_for(Option::is_some).await) };
        tokio::pin!(attached);
        let stop = CancellationToken::new();
        // Also when this future is dropped: another program goes on then, and must be alone.
        let _ends = stop.clone().drop_guard();
        let (ended, end) = oneshot::channel();
        let started = self.listener.try_clone().and_then(|listener| {
            let (stop, span) = (stop.clone(), tracing::Span::current());
            std::thread::Builder::new().name("last-good".into()).spawn(move || {
                let _span = span.entered();
                // Signals are for the main thread, which knows when they must wait.
                let _ = handover::hold_signals();
                // The receiver lives as long as the shim.
                let _ = ended.send(serve_on_this_thread(&*fallback, &last_good, listener, &stop));
            })
        });
        let served = async {
            match started {
                Ok(_detached) => end.await.unwrap_or_else(|_| Err("its thread panicked".into())),
                Err(error) => Err(error.to_string()),
            }
        };
        let mut served = std::pin::pin!(served);
        tokio::select! {
            result = &mut served => {
                if let Err(reason) = result {
                    warn!(%reason, "the last good configuration cannot be served; an agent that attaches can");
                }
                let _ = timeout(RETRY, attached).await;
            }
            () = &mut attached => {
                stop.cancel();
                if let Err(reason) = served.await {
                    warn!(%reason, "serving the last good configuration ended");
                }
            }
        }
    }
}

/// Serves in an event loop of its own, so that whatever the server leaves running ends with it: an Envoy must not
/// keep a stream to us while the agent serves it.
fn serve_on_this_thread(
    fallback: &dyn Fallback,
    last_good: &Path,
    listener: UnixListener,
    stop: &CancellationToken,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start an event loop: {error}"))?;
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).map_err(|error| error.to_string())?;
        let late = async {
            stop.cancelled().await;
            sleep(CLOSING).await;
        };
        tokio::select! {
            served = fallback.serve(last_good, listener, stop.clone()) => served.map_err(|error| error.to_string()),
            () = late => Ok(()),
        }
    })
}
