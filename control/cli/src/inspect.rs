//! `ursa inspect`: how proxies, zones, meshes and policies are doing.

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::args::{Format, Global, InspectArgs};
use crate::client::Answer;
use crate::config::Session;
use crate::output::{self, ago, put, say, text};
use crate::resources::{collection, escape, find, footer, paged};

/// `ursa inspect`
pub(crate) async fn run(global: &Global, args: InspectArgs) -> anyhow::Result<()> {
    let session = Session::open(global)?;
    let mesh = session.mesh(args.mesh.as_deref());
    match args.kind.as_str() {
        "dataplanes" => dataplanes(&session, &args, &mesh).await,
        "dataplane" => dataplane(&session, &args, &mesh).await,
        "zones" => zones(&session, &args).await,
        "services" => services(&session, &args, &mesh).await,
        "meshes" => meshes(&session, &args).await,
        _ => policy(&session, &args, &mesh).await,
    }
}

fn items(list: &Value) -> &[Value] {
    list.get("items").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

async fn dataplanes(session: &Session, args: &InspectArgs, mesh: &str) -> anyhow::Result<()> {
    let mut path = format!("/meshes/{}/dataplanes/_overview", escape(mesh));
    for (at, tag) in args.tags.iter().enumerate() {
        let (name, value) =
            tag.split_once('=').with_context(|| format!("tag {tag:?} must be formatted as name=value"))?;
        path.push_str(if at == 0 { "?tag=" } else { "&tag=" });
        path.push_str(&escape(&format!("{name}:{value}")));
    }
    let list = session.api.get(&path).await?;
    if args.output != Format::Table {
        return output::document(args.output, &list);
    }
    let headers = [
        "MESH",
        "NAME",
        "TAGS",
        "STATUS",
        "LAST CONNECTED AGO",
        "LAST UPDATED AGO",
        "TOTAL UPDATES",
        "TOTAL ERRORS",
        "CERT REGENERATED AGO",
        "CERT EXPIRATION",
        "CERT REGENERATIONS",
        "KUMA-DP VERSION",
        "ENVOY VERSION",
        "NOTES",
    ];
    let rows = items(&list).iter().map(|item| {
        let insight = item.get("dataplaneInsight").unwrap_or(&Value::Null);
        let subscription = last_subscription(insight);
        let total = |key: &str| total(insight, key);
        let rejected = insight.get("rejections").and_then(Value::as_array).map_or(0, Vec::len);
        let notes = if rejected == 0 {
            String::new()
        } else {
            format!("{rejected} refused by Envoy: ursa inspect dataplane {}", text(item, "/name"))
        };
        vec![
            text(item, "/mesh"),
            text(item, "/name"),
            output::labels(item),
            status(subscription).to_owned(),
            ago(subscription.get("connectTime")),
            ago(subscription.pointer("/status/lastUpdateTime")),
            total("responsesSent"),
            total("responsesRejected"),
            ago(insight.pointer("/mTLS/lastCertificateRegeneration")),
            text(insight, "/mTLS/certificateExpirationTime"),
            match text(insight, "/mTLS/certificateRegenerations") {
                count if count.is_empty() => "0".to_owned(),
                count => count,
            },
            text(subscription, "/version/kumaDp/version"),
            text(subscription, "/version/envoy/version"),
            notes,
        ]
    });
    output::table(&headers, rows);
    Ok(())
}

fn last_subscription(insight: &Value) -> &Value {
    insight.get("subscriptions").and_then(Value::as_array).and_then(|all| all.last()).unwrap_or(&Value::Null)
}

fn status(subscription: &Value) -> &'static str {
    let set = |key: &str| subscription.get(key).is_some_and(|time| !time.is_null());
    if set("connectTime") && !set("disconnectTime") { "Online" } else { "Offline" }
}

/// Sums a counter over all subscriptions; the API writes 64-bit counters as text.
fn total(insight: &Value, key: &str) -> String {
    let all = insight.get("subscriptions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let count = |subscription: &Value| match subscription.pointer(&format!("/status/total/{key}")) {
        Some(Value::String(text)) => text.parse().unwrap_or(0),
        Some(number) => number.as_u64().unwrap_or(0),
        None => 0,
    };
    all.iter().map(count).sum::<u64>().to_string()
}

async fn dataplane(session: &Session, args: &InspectArgs, mesh: &str) -> anyhow::Result<()> {
    let name = args.name.as_deref().context(
        "accepts 1 arg(s), received 0: name the data plane proxy, as `ursa inspect dataplanes` lists it",
    )?;
    let base = format!("/meshes/{}/dataplanes/{}", escape(mesh), escape(name));
    let dump = match args.what.as_deref() {
        None | Some("policies") => return policies(session, args, &base).await,
        Some("config") => {
            let mut query = vec![format!("shadow={}", args.shadow)];
            query.extend(args.include.iter().map(|include| format!("include={}", escape(include))));
            format!("{base}/_config?{}", query.join("&"))
        }
        Some("config-dump") if args.include_eds => format!("{base}/xds?include_eds=true"),
        Some("config-dump") => format!("{base}/xds"),
        Some(what) => format!("{base}/{what}"),
    };
    let answer = session.api.send("GET", &dump, None).await?;
    if args.what.as_deref() == Some("config") && is_unserved(&answer) {
        session.api.get(&format!("{base}/_overview")).await?;
        bail!(UNSERVED);
    }
    let answer = answer.success()?;
    if let Ok(value) = serde_json::from_slice::<Value>(&answer.body) {
        let format = if args.output == Format::Table { Format::Json } else { args.output };
        output::document(format, &value)
    } else {
        put!("{}", answer.text());
        Ok(())
    }
}

/// What a type says that the control plane has no endpoint for.
const UNSERVED: &str = "this control plane doesn't serve it yet; without --type the proxy's identity, certificate and \
                        state are shown, and --type config-dump shows what its Envoy runs";

fn is_unserved(answer: &Answer) -> bool {
    matches!(answer.status, http::StatusCode::NOT_FOUND | http::StatusCode::METHOD_NOT_ALLOWED)
}

/// The policies in force, then what Envoy refused: the first question of whoever looks at one proxy.
async fn policies(session: &Session, args: &InspectArgs, base: &str) -> anyhow::Result<()> {
    let overview = session.api.get(&format!("{base}/_overview")).await?;
    let rejections = overview.pointer("/dataplaneInsight/rejections").cloned();
    let answer = session.api.send("GET", &format!("{base}/_policies"), None).await?;
    // A control plane without this part of the inspect API still knows the rest, which is all that was asked
    // for without --type.
    let policies = match () {
        () if answer.status.is_success() => answer.json()?,
        () if !is_unserved(&answer) => return Err(answer.error()),
        () if args.what.is_some() => bail!(UNSERVED),
        () => Value::Null,
    };
    if args.output != Format::Table {
        let mut all = if policies.is_null() { serde_json::json!({"policies": []}) } else { policies };
        if let Value::Object(fields) = &mut all {
            if let Some(rejections) = rejections {
                fields.insert("rejections".to_owned(), rejections);
            }
            if let Some(insight) = overview.get("dataplaneInsight") {
                fields.insert("dataplaneInsight".to_owned(), insight.clone());
            }
        }
        return output::document(args.output, &all);
    }
    match overview.get("dataplaneInsight") {
        Some(insight) => connection(insight),
        None => say!("Offline: no agent has ever connected for it; `ursa-agent status` on its node says why"),
    }
    if let Some(policies) = policies.get("policies").and_then(Value::as_array) {
        say!("");
        let rows = policies.iter().map(|policy| {
            let origins = policy.get("origins").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let origins: Vec<String> = origins.iter().map(|origin| text(origin, "/kri")).collect();
            vec![text(policy, "/kind"), origins.join(",")]
        });
        output::table(&["Kind", "Origins"], rows);
    }
    if let Some(rejected) = rejections.as_ref().and_then(Value::as_array).filter(|all| !all.is_empty()) {
        say!("\nRefused by Envoy, which keeps its previous configuration:");
        let rows = rejected.iter().map(|one| {
            vec![text(one, "/name"), text(one, "/version"), text(one, "/message").replace('\n', " ")]
        });
        output::table(&["Resource", "Version", "Envoy says"], rows);
    }
    Ok(())
}

/// How the proxy is connected, and how far its Envoy has come with what it was sent.
fn connection(insight: &Value) {
    let last = last_subscription(insight);
    say!(
        "{}, connected {} ago, updated {} ago; agent {}, Envoy {}",
        status(last),
        ago(last.get("connectTime")),
        ago(last.pointer("/status/lastUpdateTime")),
        unless_empty(text(last, "/version/kumaDp/version")),
        unless_empty(text(last, "/version/envoy/version")),
    );
    let count = |key: &str| total(insight, key);
    say!(
        "responses: {} sent, {} acknowledged by Envoy, {} rejected",
        count("responsesSent"),
        count("responsesAcknowledged"),
        count("responsesRejected")
    );
    let identity = text(insight, "/mTLS/issuedBackend");
    if !identity.is_empty() {
        say!("identity: {identity}");
    }
    let expires = text(insight, "/mTLS/certificateExpirationTime");
    if !expires.is_empty() {
        say!(
            "certificate: issued {} ago, ends {expires}",
            ago(insight.pointer("/mTLS/lastCertificateRegeneration"))
        );
    }
    let Some(sync) = insight.get("sync").and_then(Value::as_array).filter(|all| !all.is_empty()) else {
        return;
    };
    say!("");
    if insight.get("envoyDisconnected") == Some(&Value::Bool(true)) {
        say!("No Envoy is connected to the agent: what it has will be taken when one starts.");
    }
    let rows = sync.iter().map(|of| {
        let number = |key: &str| of.get(key).and_then(Value::as_u64).unwrap_or(0);
        let (total, pending, refused) = (number("total"), number("pending"), number("refused"));
        let names = of.get("pendingNames").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let names: Vec<String> = names.iter().map(|name| text(name, "")).collect();
        let kind = text(of, "/typeUrl");
        vec![
            kind.rsplit('.').next().unwrap_or_default().to_owned(),
            total.saturating_sub(pending + refused).to_string(),
            pending.to_string(),
            refused.to_string(),
            names.join(","),
        ]
    });
    output::table(&["RESOURCES", "IN SYNC", "PENDING", "REFUSED", "WAITING FOR"], rows);
}

fn unless_empty(text: String) -> String {
    if text.is_empty() { "unknown".to_owned() } else { text }
}

async fn zones(session: &Session, args: &InspectArgs) -> anyhow::Result<()> {
    let list = session.api.get("/zones/_overview").await?;
    if args.output != Format::Table {
        return output::document(args.output, &list);
    }
    let headers = [
        "NAME",
        "STATUS",
        "LAST CONNECTED AGO",
        "LAST UPDATED AGO",
        "TOTAL UPDATES",
        "TOTAL ERRORS",
        "ZONE-CP VERSION",
        "BACKEND",
    ];
    let rows = items(&list).iter().map(|item| {
        let insight = item.get("zoneInsight").unwrap_or(&Value::Null);
        let subscription = last_subscription(insight);
        let config: Value = serde_json::from_str(&text(subscription, "/config")).unwrap_or(Value::Null);
        vec![
            text(item, "/name"),
            status(subscription).to_owned(),
            ago(subscription.get("connectTime")),
            ago(subscription.pointer("/status/lastUpdateTime")),
            total(insight, "responsesSent"),
            total(insight, "responsesRejected"),
            text(subscription, "/version/kumaCp/version"),
            text(&config, "/store/type"),
        ]
    });
    output::table(&headers, rows);
    Ok(())
}

async fn meshes(session: &Session, args: &InspectArgs) -> anyhow::Result<()> {
    let list = session.api.get("/mesh-insights").await?;
    if args.output != Format::Table {
        return output::document(args.output, &list);
    }
    let rows = items(&list).iter().map(|item| {
        let count =
            |key: &str| item.pointer(&format!("/dataplanes/{key}")).and_then(Value::as_u64).unwrap_or(0);
        vec![text(item, "/name"), format!("{}/{}", count("online"), count("total"))]
    });
    output::table(&["MESH", "DATAPLANES"], rows);
    Ok(())
}

/// The MeshServices of a mesh: who serves them, and where.
async fn services(session: &Session, args: &InspectArgs, mesh: &str) -> anyhow::Result<()> {
    let path = format!("/meshes/{}/meshservices", escape(mesh));
    let list = session.api.get(&paged(&path, args.size, args.offset.as_deref())).await?;
    if args.output != Format::Table {
        return output::document(args.output, &list);
    }
    let rows = items(&list).iter().map(|item| {
        let proxies = |key: &str| {
            item.pointer(&format!("/status/dataplaneProxies/{key}")).and_then(Value::as_u64).unwrap_or(0)
        };
        let all = |pointer: &str, field: &str| {
            let all = item.pointer(pointer).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            all.iter().map(|one| text(one, field)).collect::<Vec<_>>().join(" ")
        };
        vec![
            text(item, "/mesh"),
            text(item, "/name"),
            text(item, "/spec/state"),
            format!("{}/{}", proxies("healthy"), proxies("total")),
            all("/status/vips", "/ip"),
            all("/status/addresses", "/hostname"),
        ]
    });
    output::table(&["MESH", "NAME", "STATE", "HEALTHY", "VIPS", "HOSTNAMES"], rows);
    footer(&list);
    Ok(())
}

/// Which proxies a policy reaches.
async fn policy(session: &Session, args: &InspectArgs, mesh: &str) -> anyhow::Result<()> {
    let kind = find(&args.kind)?;
    let Some(name) = args.name.as_deref().filter(|_| !kind.plural) else {
        bail!(
            "inspect wants dataplanes, dataplane NAME, services, zones, meshes, or the type and the name of a policy, as in \
             `ursa inspect meshtimeout NAME`"
        );
    };
    let path = format!("{}/{}/_resources/dataplanes", collection(kind.descriptor, mesh), escape(name));
    let list = session.api.get(&paged(&path, args.size, args.offset.as_deref())).await?;
    if args.output != Format::Table {
        return output::document(args.output, &list);
    }
    let rows =
        items(&list).iter().map(|item| vec![text(item, "/type"), text(item, "/mesh"), text(item, "/name")]);
    output::table(&["Type", "Mesh", "Name"], rows);
    say!("\nTotal: {}", text(&list, "/total"));
    footer(&list);
    Ok(())
}
