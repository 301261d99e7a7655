//! `ursa node`, `ursa get nodes` and `ursa inspect nodes`: the machines that joined.

use anyhow::Context as _;
use serde_json::Value;

use crate::args::{Format, Global, NodeArgs};
use crate::config::Session;
use crate::output::{self, say, text};
use crate::resources::escape;

/// Whether a word of `get` or `inspect` means nodes, which are no resources.
pub(crate) fn is_meant(word: &str) -> bool {
    matches!(word.to_lowercase().as_str(), "node" | "nodes")
}

/// `ursa node revoke` and `ursa node restore`
pub(crate) async fn run(global: &Global, args: NodeArgs) -> anyhow::Result<()> {
    let session = Session::open(global)?;
    let (name, verb) = match &args {
        NodeArgs::Revoke { name } => (name, "_revoke"),
        NodeArgs::Restore { name } => (name, "_restore"),
    };
    let path = format!("/nodes/{}/{verb}", escape(name));
    let node = session
        .api
        .send("POST", &path, None)
        .await?
        .success()
        .with_context(|| format!("node {name:?}; `ursa get nodes` lists them"))?
        .json()?;
    let id = text(&node, "/id");
    match &args {
        NodeArgs::Revoke { .. } => {
            say!("revoked node {name} ({id}): its sessions have ended and it gets no certificate any more");
            say!(
                "certificates that its workloads hold stay good until they end (48 h by default); \
                 `ursa node restore {id}` or a join with a new ticket undoes this"
            );
        }
        NodeArgs::Restore { .. } => {
            say!("restored node {name} ({id}): its key is good again, and its agent comes back by itself");
        }
    }
    Ok(())
}

/// `ursa get nodes [NAME]` and `ursa inspect nodes [NAME]`, which also shows what they run.
pub(crate) async fn show(
    global: &Global,
    name: Option<&str>,
    format: Format,
    inspect: bool,
) -> anyhow::Result<()> {
    let session = Session::open(global)?;
    let path = name.map_or_else(|| "/nodes".to_owned(), |name| format!("/nodes/{}", escape(name)));
    let found = session.api.get(&path).await?;
    if format != Format::Table {
        return output::document(format, &found);
    }
    let one = std::slice::from_ref(&found);
    let nodes = found.get("items").and_then(Value::as_array).map_or(one, Vec::as_slice);
    let mut headers = vec!["NAME", "ID", "STATUS", "MESH", "WORKLOADS", "CERT EXPIRATION"];
    if inspect {
        headers.push("DATAPLANES");
    }
    let rows = nodes.iter().map(|node| {
        let list = |pointer: &str, field: &str| {
            let all = node.pointer(pointer).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            all.iter().map(|item| text(item, field)).collect::<Vec<_>>().join(",")
        };
        let is = |key: &str| node.get(key) == Some(&Value::Bool(true));
        let status = match () {
            () if is("revoked") => "Revoked",
            () if is("online") => "Online",
            () => "Offline",
        };
        let mut row = vec![
            text(node, "/name"),
            text(node, "/id"),
            status.to_owned(),
            text(node, "/grant/mesh"),
            list("/grant/workloads", ""),
            text(node, "/certificateExpirationTime"),
        ];
        if inspect {
            row.push(list("/dataplanes", "/name"));
        }
        row
    });
    output::table(&headers, rows);
    Ok(())
}
