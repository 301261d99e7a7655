//! The verbs that are Ursa's own: tickets, joining, allowing.

use std::os::unix::process::CommandExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use ursa_model::Resource;

use crate::agent;
use crate::apply;
use crate::args::{AllowArgs, Global, JoinArgs, TicketArgs};
use crate::config::Session;
use crate::output::{self, put, say};

/// `ursa ticket create`
pub(crate) async fn ticket(global: &Global, args: TicketArgs) -> anyhow::Result<()> {
    let TicketArgs::Create(args) = args;
    crate::args::parse_duration(&args.valid_for).map_err(anyhow::Error::msg).context("--valid-for")?;
    let session = Session::open(global)?;
    let mut request = json!({"mesh": session.mesh(args.mesh.as_deref()), "workloads": args.workloads,
        "validFor": args.valid_for});
    if let (Some(uses), Value::Object(fields)) = (args.uses, &mut request) {
        fields.insert("uses".to_owned(), uses.into());
    }
    let answer = session.api.post("/tickets", &request).await.context("failed to create a ticket")?.json()?;
    let ticket = answer.get("ticket").and_then(Value::as_str).context("the answer holds no ticket")?;
    say!("{ticket}");
    Ok(())
}

/// `ursa allow`: a policy on the destination that admits exactly one SPIFFE id.
pub(crate) async fn allow(global: &Global, args: AllowArgs) -> anyhow::Result<()> {
    let session = Session::open(global)?;
    let mesh = session.mesh(args.mesh.as_deref());
    let trust_domain = trust_domain(&session, &mesh).await?;
    let caller = format!("spiffe://{trust_domain}/workload/{}", args.source);
    let policy = Resource::from_json(&json!({
        "type": "MeshTrafficPermission",
        "mesh": mesh,
        "name": format!("allow-{}-to-{}", args.source, args.destination),
        "spec": {
            "targetRef": {"kind": "Dataplane", "labels": {"kuma.io/workload": args.destination}},
            "rules": [{"default": {"allow": [{"spiffeID": {"type": "Exact", "value": caller}}]}}],
        },
    }))
    .map_err(|error| anyhow::anyhow!("{error}"))?;
    if args.dry_run {
        put!("{}", output::to_yaml(&apply::written(&policy))?);
        return Ok(());
    }
    apply::put(&session, &policy).await
}

/// The trust domain in which a mesh's workloads get their ids: what MeshTrust says, else the zone's default.
async fn trust_domain(session: &Session, mesh: &str) -> anyhow::Result<String> {
    let path = format!("/meshes/{}/meshtrusts", crate::resources::escape(mesh));
    let trusts = session.api.get(&path).await?;
    let mut domains: Vec<&str> = trusts
        .get("items")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|item| item.pointer("/spec/trustDomain")?.as_str())
        .collect();
    domains.sort_unstable();
    domains.dedup();
    match domains.as_slice() {
        [one] => return Ok((*one).to_owned()),
        [] => {}
        many => bail!(
            "mesh {mesh:?} trusts several domains ({}); write the MeshTrafficPermission yourself and name the one \
             you mean",
            many.join(", ")
        ),
    }
    let config = session.api.get("/config").await.context("mesh has no MeshTrust, and /config is refused")?;
    let zone = output::text(&config, "/multizone/zone/name");
    if zone.is_empty() {
        bail!("mesh {mesh:?} has no MeshTrust and the control plane names no zone: is its identity ready?");
    }
    Ok(format!("{mesh}.{zone}.mesh.local"))
}

/// `ursa join`: through the running agent, else by its program, which then keeps the certificate for its start.
pub(crate) async fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let ticket = if args.ticket == "-" {
        std::io::read_to_string(std::io::stdin()).context("cannot read the ticket from standard input")?
    } else {
        args.ticket.clone()
    };
    let ticket = ticket.trim();
    let socket = args.agent_socket.as_deref().unwrap_or_else(|| Path::new("/run/ursa/agent.sock"));
    // An agent with a configuration of its own has a socket of its own, which ursa-agent finds.
    let running = match &args.agent_config {
        Some(_) => None,
        None => tokio::net::UnixStream::connect(socket).await.ok(),
    };
    if let Some(stream) = running {
        let (read, mut write) = stream.into_split();
        let mut line = serde_json::to_vec(&json!({"cmd": "join", "ticket": ticket, "name": args.name}))?;
        line.push(b'\n');
        write.write_all(&line).await.context("the agent closed its socket")?;
        let mut answer = String::new();
        BufReader::new(read).read_line(&mut answer).await.context("the agent closed its socket")?;
        let answer: Value = serde_json::from_str(&answer).context("the agent's answer is not JSON")?;
        if let Some(error) = answer.get("error").and_then(Value::as_str) {
            bail!("the agent could not join: {error}");
        }
        let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or("?");
        say!("joined zone {} as node {}", text("zone"), text("nodeId"));
        Ok(())
    } else {
        let mut command = std::process::Command::new(agent::program());
        command.arg("join").arg("-").stdin(agent::hidden(ticket)?);
        if let Some(name) = &args.name {
            command.arg("--name").arg(name);
        }
        if let Some(config) = &args.agent_config {
            command.arg("--config").arg(config);
        }
        if args.agent_socket.is_some() {
            bail!("no agent answers at {}: is ursa-agent running there?", socket.display());
        }
        Err(command.exec()).with_context(|| {
            format!(
                "no agent answers at {} and ursa-agent could not be started: is it installed?",
                socket.display()
            )
        })
    }
}
