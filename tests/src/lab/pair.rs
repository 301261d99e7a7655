//! The smallest mesh: `web` calls `backend`, each on a node of its own; `stranger` is outside.

use std::time::Duration;

use super::daemon::Daemon;
use super::mesh::{Control, Node, PORT, Workload};
use super::net::Host;
use super::program::{self, Answer, Client};
use super::{Lab, Programs, wait};

/// Where `web` finds `backend`.
pub const URL: &str = "http://backend.svc.mesh.local:8080/orders";
/// Part of each answer of the lab's servers: what nobody between may read.
pub const PLAINTEXT: &str = "which nobody on the way may read";
/// Part of each request to [`URL`].
pub const REQUEST: &str = "GET /orders";
/// Long enough for anything that isn't broken.
pub const SOON: Duration = Duration::from_secs(15);

/// Both workloads, joined and ready. Fields are dropped in their order: programs before the lab.
#[derive(Debug)]
pub struct Pair {
    /// The control plane.
    pub control: Control,
    /// The node of `web`.
    pub node_a: Node,
    /// The node of `backend`.
    pub node_b: Node,
    /// The one that calls.
    pub web: Workload,
    /// The one that is called.
    pub backend: Workload,
    /// A host outside the mesh.
    pub stranger: Host,
    /// A program in `web`'s namespace.
    pub client: Client,
    /// `backend`'s program.
    pub server: Daemon,
    /// The ground under all this.
    pub lab: Lab,
}

impl Pair {
    /// Sets it up; nothing is allowed yet.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(|_| Ok(()))
    }

    /// As [`Pair::start`], with resources that are there before the workloads.
    pub fn start_with(prepare: impl FnOnce(&Control) -> anyhow::Result<()>) -> anyhow::Result<Self> {
        Self::set_up("http", prepare)
    }

    /// As [`Pair::start`], and what the mesh knows of `backend`'s port is this protocol.
    pub fn speaking(protocol: &str) -> anyhow::Result<Self> {
        Self::set_up(protocol, |_| Ok(()))
    }

    fn set_up(protocol: &str, prepare: impl FnOnce(&Control) -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let mut lab = Lab::new(&Programs::discover()?)?;
        match Parts::start(&mut lab, protocol, prepare) {
            Ok(parts) => Ok(Self {
                control: parts.control,
                node_a: parts.node_a,
                node_b: parts.node_b,
                web: parts.web,
                backend: parts.backend,
                stranger: parts.stranger,
                client: parts.client,
                server: parts.server,
                lab,
            }),
            Err(error) => Err(match lab.save_logs() {
                Some(logs) => error.context(format!("the lab's logs: {}", logs.display())),
                None => error,
            }),
        }
    }

    /// As [`Pair::start`], and `web` may call `backend`.
    pub fn allowed() -> anyhow::Result<Self> {
        Self::allowed_with(|_| Ok(()))
    }

    /// As [`Pair::allowed`], with resources that are there before the workloads.
    pub fn allowed_with(prepare: impl FnOnce(&Control) -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let mut pair = Self::start_with(prepare)?;
        pair.allow()?;
        Ok(pair)
    }

    /// Lets `web` call `backend`, and waits until it can.
    pub fn allow(&mut self) -> anyhow::Result<()> {
        self.control.ursa(&["allow", "web", "backend"])?;
        // Each of Envoy's workers must have heard of it.
        for _ in 0..20 {
            self.until_served()?;
        }
        Ok(())
    }

    /// Waits until `web`'s request succeeds.
    pub fn until_served(&mut self) -> anyhow::Result<Duration> {
        until(&mut self.client, URL, "web's request to succeed", Answer::ok)
    }

    /// Waits until `web`'s request is answered with this status.
    pub fn until_status(&mut self, status: u16) -> anyhow::Result<Duration> {
        let what = format!("web's request to get HTTP {status}");
        until(&mut self.client, URL, &what, |answer| answer.status == Some(status))
    }
}

/// Asks until the answer is as wanted.
pub fn until(
    client: &mut Client,
    url: &str,
    what: &str,
    wanted: impl Fn(&Answer) -> bool,
) -> anyhow::Result<Duration> {
    let ((), took) = wait::until(what, SOON, || match client.get(url) {
        Ok(answer) if wanted(&answer) => Ok(()),
        Ok(answer) => Err(answer.brief()),
        Err(error) => Err(error.to_string()),
    })?;
    Ok(took)
}

struct Parts {
    control: Control,
    node_a: Node,
    node_b: Node,
    web: Workload,
    backend: Workload,
    stranger: Host,
    client: Client,
    server: Daemon,
}

impl Parts {
    fn start(
        lab: &mut Lab,
        protocol: &str,
        prepare: impl FnOnce(&Control) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let control = Control::start(lab)?;
        prepare(&control)?;
        let (web, backend, stranger) =
            (lab.net.host("web")?, lab.net.host("backend")?, lab.net.host("stranger")?);
        let server = program::serve(lab, &backend, "backend", PORT)?;
        let tickets = (control.ticket(&["web"])?, control.ticket(&["backend"])?);
        let mut node_a = Node::join(lab, "node-a", &tickets.0)?;
        let mut node_b = Node::join(lab, "node-b", &tickets.1)?;
        let web = node_a.add("web", &web)?;
        let backend = node_b.add_with("backend", &backend, |file| {
            file["networking"]["inbound"][0]["protocol"] = protocol.into();
        })?;
        node_b.wait_ready("backend", SOON)?;
        node_a.wait_ready("web", SOON)?;
        let client = Client::start(lab, &web.host)?;
        Ok(Self { control, node_a, node_b, web, backend, stranger, client, server })
    }
}
