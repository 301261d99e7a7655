//! Questions to nodes: control asks over the node's session, the agent asks the workload's Envoy.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use ursa_wire::session::{ControlEvent, ControlMessage, ControlRequest};

/// How long an answer is waited for; the agent itself gives Envoy 5 s.
const DEADLINE: Duration = Duration::from_secs(10);

/// Questions that one node may have open: dumps are large.
const OPEN: usize = 4;

/// Where a session's messages to its node go.
pub(super) type Outgoing = mpsc::Sender<Result<ControlMessage, Status>>;

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Nobody to ask.
    #[error("its node is not connected to this control plane; see `ursa inspect nodes`")]
    NotConnected,
    /// Too many at once.
    #[error("its node is busy with {OPEN} such requests; try again")]
    Busy,
    /// It takes too long.
    #[error("its node gave no answer within {} s; see `ursa-agent status` there", DEADLINE.as_secs())]
    Timeout,
    /// The agent could not answer.
    #[error("its agent says: {0}")]
    Agent(String),
}

/// Open sessions and open questions.
#[derive(Debug, Default)]
pub struct Requests {
    next: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By node: its sessions, the newest last.
    sessions: HashMap<String, Vec<(u64, Outgoing)>>,
    open: HashMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    node: String,
    answer: oneshot::Sender<Value>,
}

impl Requests {
    /// A node opened a session.
    pub(super) fn opened(&self, node: &str, session: u64, outgoing: Outgoing) {
        self.lock().sessions.entry(node.to_owned()).or_default().push((session, outgoing));
    }

    /// A node's session ended; what it was asked gets no answer.
    pub(super) fn closed(&self, node: &str, session: u64) {
        let mut state = self.lock();
        let Some(sessions) = state.sessions.get_mut(node) else { return };
        sessions.retain(|(number, _)| *number != session);
        if sessions.is_empty() {
            state.sessions.remove(node);
            state.open.retain(|_, open| open.node != node);
        }
    }

    /// Whether a node has an open session here.
    pub fn is_connected(&self, node: &str) -> bool {
        self.lock().sessions.contains_key(node)
    }

    /// A node answered. Only its own questions are its to answer.
    pub(super) fn replied(&self, node: &str, id: u64, json: &str) {
        let mut state = self.lock();
        if state.open.get(&id).is_none_or(|open| open.node != node) {
            return;
        }
        let open = state.open.remove(&id);
        drop(state);
        let answer = serde_json::from_str(json).unwrap_or_else(
            |error| serde_json::json!({ "error": format!("the answer is no JSON: {error}") }),
        );
        if let Some(open) = open {
            // Whoever asked may have gone.
            let _ = open.answer.send(answer);
        }
    }

    /// Asks a node. Safe to drop at any time.
    pub async fn ask(&self, node: &str, kind: &str, parameters: &Value) -> Result<Value, AskError> {
        self.ask_within(DEADLINE, node, kind, parameters).await
    }

    async fn ask_within(
        &self,
        deadline: Duration,
        node: &str,
        kind: &str,
        parameters: &Value,
    ) -> Result<Value, AskError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        let outgoing = {
            let mut state = self.lock();
            let session = state.sessions.get(node).and_then(|sessions| sessions.last());
            let outgoing = session.ok_or(AskError::NotConnected)?.1.clone();
            if state.open.values().filter(|open| open.node == node).count() >= OPEN {
                return Err(AskError::Busy);
            }
            state.open.insert(id, Open { node: node.to_owned(), answer: sender });
            outgoing
        };
        let _forget = Forget { requests: self, id };
        let request = ControlRequest { id, kind: kind.to_owned(), json: parameters.to_string() };
        let exchange = async {
            outgoing
                .send(Ok(ControlEvent::Request(request).into()))
                .await
                .map_err(|_| AskError::NotConnected)?;
            answer.await.map_err(|_| AskError::NotConnected)
        };
        let mut answer = tokio::time::timeout(deadline, exchange).await.map_err(|_| AskError::Timeout)??;
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(AskError::Agent(error.to_owned())),
            None => Ok(answer.get_mut("result").map(Value::take).unwrap_or_default()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets a question when whoever asked has an answer, or has lost patience.
struct Forget<'a> {
    requests: &'a Requests,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.requests.lock().open.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static NOTHING: Value = Value::Null;

    fn id_of(message: Option<Result<ControlMessage, Status>>) -> u64 {
        match message.unwrap().unwrap().event {
            Some(ControlEvent::Request(request)) => request.id,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_node_answers_its_own_questions_only() {
        let requests = Requests::default();
        assert_eq!(requests.ask("a", "stats", &NOTHING).await, Err(AskError::NotConnected));
        let (sender, mut receiver) = mpsc::channel(8);
        requests.opened("a", 1, sender);
        let answering = async {
            let id = id_of(receiver.recv().await);
            requests.replied("b", id, r#"{"result": "forged"}"#);
            requests.replied("a", id, r#"{"result": "x: 1"}"#);
        };
        let (answer, ()) = tokio::join!(requests.ask("a", "stats", &NOTHING), answering);
        assert_eq!(answer, Ok("x: 1".into()));
        let failing = async {
            let id = id_of(receiver.recv().await);
            requests.replied("a", id, r#"{"error": "no Envoy"}"#);
        };
        let (answer, ()) = tokio::join!(requests.ask("a", "stats", &NOTHING), failing);
        assert_eq!(answer, Err(AskError::Agent("no Envoy".into())));
        assert!(requests.lock().open.is_empty());
    }

    #[tokio::test]
    async fn nobody_waits_for_ever_and_few_wait_at_once() {
        let requests = Requests::default();
        let (sender, _receiver) = mpsc::channel(8);
        requests.opened("a", 1, sender);
        let ask = || requests.ask_within(Duration::from_millis(10), "a", "stats", &NOTHING);
        let (one, two, three, four, five) = tokio::join!(ask(), ask(), ask(), ask(), ask());
        assert_eq!([one, two, three, four], [const { Err(AskError::Timeout) }; 4]);
        assert_eq!(five, Err(AskError::Busy));
        assert!(requests.lock().open.is_empty());
    }
}
