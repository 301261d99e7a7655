//! Nodes that join by ticket and register their Dataplanes in a session, as agents do.

use anyhow::{Context as _, bail};
use rcgen::{CertificateParams, KeyPair};
use rustls::ClientConfig;
use rustls::client::Resumption;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use ursa_wire::join::{JoinClient, JoinRequest};
use ursa_wire::session::{ControlEvent, NodeEvent, NodeMessage, Register, SessionClient};
use ursa_wire::ticket::Ticket;
use ursa_wire::tls;

/// Backends of each proxy.
pub const BACKENDS: usize = 20;

/// How many of what there are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Services; each has the same number of endpoints.
    pub services: usize,
    /// Proxies; each is an endpoint of one service.
    pub proxies: usize,
}

impl Size {
    /// The service that a proxy serves.
    pub fn service(self, proxy: usize) -> usize {
        proxy % self.services
    }

    /// The services that a proxy calls: those that follow its own.
    fn backends(self, proxy: usize) -> impl Iterator<Item = usize> {
        let own = self.service(proxy);
        (1..=BACKENDS.min(self.services - 1)).map(move |step| (own + step) % self.services)
    }

    /// The proxies that call a service.
    pub fn callers(self, service: usize) -> Vec<usize> {
        (0..self.proxies).filter(|proxy| self.backends(*proxy).any(|backend| backend == service)).collect()
    }

    /// A proxy's Dataplane, its inbound in this state.
    pub fn dataplane(self, proxy: usize, ready: bool) -> Value {
        let refs: Vec<Value> = self
            .backends(proxy)
            .map(|service| json!({"kind": "MeshService", "name": service_name(service)}))
            .collect();
        let mut inbound = json!({"name": "http", "port": 8080, "protocol": "http"});
        if !ready {
            inbound["state"] = json!("NotReady");
        }
        json!({
            "type": "Dataplane", "mesh": "default", "name": proxy_name(proxy),
            "labels": {"kuma.io/workload": service_name(self.service(proxy))},
            "networking": {
                "address": format!("10.{}.{}.{}", proxy >> 16 & 255, proxy >> 8 & 255, proxy & 255),
                "inbound": [inbound],
                "transparentProxying": {"reachableBackends": {"refs": refs}},
            },
        })
    }
}

/// The name of a service and of its workload.
pub fn service_name(service: usize) -> String {
    format!("service-{service:05}")
}

/// The name of a proxy's Dataplane.
pub fn proxy_name(proxy: usize) -> String {
    format!("proxy-{proxy:05}")
}

/// A joined node.
#[derive(Debug)]
pub struct Node {
    address: String,
    config: ClientConfig,
}

/// A node's open session; its Dataplanes are there as long as it is.
#[derive(Debug)]
pub struct Session {
    _messages: mpsc::Sender<NodeMessage>,
    _channel: Channel,
}

impl Node {
    /// Exchanges a ticket for a node certificate.
    pub async fn join(ticket: &Ticket, name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let csr_der = CertificateParams::default().serialize_request(&key)?.der().to_vec();
        let channel = tls::channel(&ticket.address, tls::joining_config(&ticket.fingerprint)?)?;
        let request = JoinRequest { ticket: ticket.secret.clone(), csr_der, node_name: name.to_owned() };
        let certificate = JoinClient::new(channel).join(request).await.context("the node can't join")?;
        Self::new(&ticket.address, &certificate.ca_pem, &certificate.chain_pem, &key.serialize_pem())
    }

    /// A node that has its certificate.
    pub fn new(address: &str, ca_pem: &str, chain_pem: &str, key_pem: &str) -> anyhow::Result<Self> {
        let mut config = tls::node_config(ca_pem, chain_pem, key_pem)?;
        // Connections stand for machines of their own, which know nothing of each other's TLS sessions.
        config.resumption = Resumption::disabled();
        Ok(Self { address: address.to_owned(), config })
    }

    /// A connection of its own.
    pub fn channel(&self) -> anyhow::Result<Channel> {
        Ok(tls::channel(&self.address, self.config.clone())?)
    }

    /// Opens the session and registers these Dataplanes.
    pub async fn register(&self, dataplanes: Vec<Value>) -> anyhow::Result<Session> {
        let channel = self.channel()?;
        let (messages, receiver) = mpsc::channel::<NodeMessage>(64);
        let mut answers =
            SessionClient::new(channel.clone()).open(ReceiverStream::new(receiver)).await?.into_inner();
        let wanted = dataplanes.len();
        let sender = messages.clone();
        let sending = tokio::spawn(async move {
            for dataplane in dataplanes {
                let register = Register { dataplane_json: dataplane.to_string(), token: String::new() };
                // A closed session shows on its other half.
                let _ = sender.send(NodeEvent::Register(register).into()).await;
            }
        });
        for _ in 0..wanted {
            let message = answers.next().await.context("the session ended")??;
            match message.event {
                Some(ControlEvent::Registered(_)) => {}
                other => bail!("a Dataplane was not registered: {other:?}"),
            }
        }
        sending.await?;
        // Nothing more is said to this node until the connection ends.
        tokio::spawn(async move { while let Some(Ok(_)) = answers.next().await {} });
        Ok(Session { _messages: messages, _channel: channel })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_service_has_its_callers() {
        let size = Size { services: 1000, proxies: 2000 };
        assert_eq!(size.callers(7).len(), 2 * BACKENDS);
        assert!(!size.callers(7).contains(&7));
        let size = Size { services: 10, proxies: 20 };
        assert_eq!(size.callers(0).len(), 18);
    }
}
