//! The tables, and which targets were met, in Markdown.

mod redirect;

use std::fmt::Write as _;
use std::time::Duration;

use super::cni::Cni;
use super::connection::Passage;
use super::machine::Machine;
use super::rules::Rules;
use super::{Connected, Results};

/// One line of the table.
struct Row {
    what: String,
    ursa: String,
    bare: String,
    target: String,
    /// None: there is no target.
    met: Option<bool>,
}

/// What was measured; what is absent is left out.
#[derive(Debug, Default)]
pub struct Measured {
    /// Configuration on its way to proxies.
    pub control: Option<Results>,
    /// What a machine pays.
    pub machine: Option<Machine>,
    /// The redirect's rules.
    pub rules: Option<Rules>,
    /// The CNI plugin.
    pub cni: Option<Cni>,
    /// Redirected connections.
    pub connections: Option<Vec<Passage>>,
}

/// The whole page.
pub fn page(measured: &Measured, on: &str) -> String {
    let mut page = format!(
        "# Performance\n\nWritten by `make bench`; a run of it replaces this page.\n\nMachine: {on}.\n"
    );
    let mut missed = Vec::new();
    let mut table = |page: &mut String, title: &str, words: &str, beside: &str, rows: Vec<Row>| {
        let _ = write!(
            page,
            "\n## {title}\n\n{words}\n\n| what | Ursa | {beside} | target | |\n| --- | --- | --- | --- | --- |\n"
        );
        for row in &rows {
            let met = row.met.map_or("", |met| if met { "met" } else { "**missed**" });
            let _ = writeln!(page, "| {} | {} | {} | {} | {met} |", row.what, row.ursa, row.bare, row.target);
        }
        missed.extend(rows.into_iter().filter(|row| row.met == Some(false)));
    };
    if let Some(results) = &measured.control {
        let size = results.size;
        let words = format!(
            "{} services with {} endpoints, {} proxies with a delta stream each over a TLS connection of its own, {} backends per \
             proxy. Release builds, embedded store on disk (every write synced), loopback; the server has the first processor and the load the second. \"Bare\" \
             is a tonic server of the same crates and TLS in a process of its own that pushes the same number of shared \
             bytes to the same number of streams and does nothing else; it has no store and no write to wait for.",
            size.services,
            size.proxies / size.services.max(1),
            size.proxies,
            super::node::BACKENDS.min(size.services - 1),
        );
        table(&mut page, "Configuration", &words, "bare", control_rows(results));
    }
    if let Some(machine) = &measured.machine {
        let words = "Two workloads with agent, shim and Envoy.";
        table(&mut page, "A machine of the mesh", words, "", machine_rows(machine));
    }
    if let Some(rules) = &measured.rules {
        let beside = "the same rules otherwise";
        table(&mut page, "The redirect", &redirect::rules_words(rules), beside, redirect::rules_rows(rules));
    }
    if let Some(cni) = &measured.cni {
        table(&mut page, "CNI", &redirect::cni_words(cni), "beside it", redirect::cni_rows(cni));
    }
    if let Some(passages) = &measured.connections {
        page.push_str(&redirect::connections(passages));
    }
    if missed.is_empty() {
        page.push_str("\nEvery target was met in this run.\n");
    } else {
        page.push_str("\nMissed in this run:\n\n");
        for row in missed {
            let value = if row.ursa.is_empty() { &row.bare } else { &row.ursa };
            let _ = writeln!(page, "- {}: {value}; wanted: {}.", row.what, row.target);
        }
    }
    page
}

fn control_rows(results: &Results) -> Vec<Row> {
    let (endpoint, wide, irrelevant) = (&results.endpoint, &results.wide, &results.irrelevant);
    let floor = results.floor.as_ref();
    let bare = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
    let ratio = |ours: Duration, theirs: Option<Duration>| {
        bare(theirs.map(|theirs| {
            format!("{} ({:.1}×)", time(theirs), ours.as_secs_f64() / theirs.as_secs_f64().max(1e-9))
        }))
    };
    let mut rows = Vec::new();
    let mut row = |what: &str, ursa: String, bare: String, target: &str, met: Option<bool>| {
        rows.push(Row { what: what.to_owned(), ursa, bare, target: target.to_owned(), met });
    };

    let what = format!(
        "one endpoint changes, {} of {} proxies call it: write → receipt",
        endpoint.affected, results.size.proxies
    );
    for (name, quantile, limit) in [("p50", 0.5, 5), ("p99", 0.99, 15)] {
        let ours = endpoint.receipt(quantile);
        row(
            &format!("{what}, {name}"),
            time(ours),
            ratio(ours, floor.map(|floor| floor.endpoint.receipt(quantile))),
            &format!("{limit} ms"),
            Some(ours <= Duration::from_millis(limit)),
        );
    }
    row(
        "– of that the write itself, until its answer, p50 / p99",
        format!("{} / {}", time(endpoint.write(0.5)), time(endpoint.write(0.99))),
        "–".into(),
        "",
        None,
    );
    let exact = endpoint.tally.pushes == endpoint.changes * endpoint.affected && endpoint.tally.strays == 0;
    row(
        "– pushes per change (to anybody else)",
        format!("{:.1} ({})", endpoint.pushes_per_change(), endpoint.tally.strays),
        String::new(),
        &format!("{} (0)", endpoint.affected),
        Some(exact),
    );
    row("– bytes per change", bytes(endpoint.bytes_per_change()), String::new(), "", None);
    row(
        "– server CPU per pushed proxy",
        time(endpoint.cpu_per_push()),
        ratio(endpoint.cpu_per_push(), floor.map(|floor| floor.endpoint.cpu_per_push())),
        "",
        None,
    );

    row(
        "an irrelevant write: pushes",
        irrelevant.tally.pushes.to_string(),
        String::new(),
        "0",
        Some(irrelevant.tally.pushes == 0),
    );

    row(
        &format!("one permission changes for all {} proxies: server CPU per proxy", wide.affected),
        time(wide.cpu_per_push()),
        ratio(wide.cpu_per_push(), floor.map(|floor| floor.wide.cpu_per_push())),
        "28 µs",
        Some(wide.cpu_per_push() <= Duration::from_micros(28)),
    );
    for (name, quantile) in [("p50", 0.5), ("p99", 0.99), ("last", 1.0)] {
        let ours = wide.receipt(quantile);
        row(
            &format!("– write → receipt, {name}"),
            time(ours),
            ratio(ours, floor.map(|floor| floor.wide.receipt(quantile))),
            "",
            None,
        );
    }
    row(
        "– pushes and bytes per change",
        format!("{:.0}, {}", wide.pushes_per_change(), bytes(wide.bytes_per_change())),
        String::new(),
        "",
        None,
    );

    let memory = |connected: &Connected| per_proxy(connected, results.size.proxies);
    let ours = memory(&results.again);
    row(
        "memory per connected proxy, from a fresh process, all else included",
        format!("{ours:.0} KiB"),
        bare(
            floor
                .map(|floor| memory(&floor.connected))
                .map(|kib| format!("{kib:.0} KiB ({:.1}×)", ours / kib)),
        ),
        "45 KiB",
        Some(ours <= 45.0),
    );
    row(
        "– of a process that has registered and answered before",
        format!("{:.0} KiB", memory(&results.first)),
        String::new(),
        "",
        None,
    );
    row(
        "– the whole process with all proxies",
        format!("{} MiB", results.again.memory.1 / 1024),
        String::new(),
        "",
        None,
    );

    let again = &results.again;
    let proxies = u32::try_from(results.size.proxies).unwrap_or(u32::MAX);
    // 6 s for 10,000.
    let allowed = Duration::from_micros(600) * proxies;
    let total = again.starting + again.registering + again.streaming;
    row(
        &format!("control plane killed and started: until all {proxies} proxies are synced"),
        time(total),
        String::new(),
        &format!("{} (6 s for 10,000)", time(allowed)),
        Some(total <= allowed),
    );
    row(
        "– start, registering, streams",
        format!("{}, {}, {}", time(again.starting), time(again.registering), time(again.streaming)),
        bare(floor.map(|floor| format!("{} for the streams", time(floor.connected.streaming)))),
        "",
        None,
    );
    row(
        "– resources sent again",
        again.resources.to_string(),
        String::new(),
        "0",
        Some(again.resources == 0),
    );
    row(
        "– server CPU per stream",
        time(again.cpu / proxies),
        bare(
            floor.map(|floor| {
                format!("{} (with the initial state pushed)", time(floor.connected.cpu / proxies))
            }),
        ),
        "",
        None,
    );
    row(
        "first connection of all: streams, resources, bytes, server CPU per stream",
        format!(
            "{}, {}, {}, {}",
            time(results.first.streaming),
            results.first.resources,
            bytes(to_float(results.first.bytes)),
            time(results.first.cpu / proxies)
        ),
        String::new(),
        "",
        None,
    );
    rows
}

fn machine_rows(machine: &Machine) -> Vec<Row> {
    let row = |what: &str, ursa: String, target: &str, met: Option<bool>| Row {
        what: what.to_owned(),
        ursa,
        bare: String::new(),
        target: target.to_owned(),
        met,
    };
    let mib = |kib: u64| format!("{:.1} MiB", to_float(kib) / 1024.0);
    vec![
        row(
            "DNS answers of the shim, one core",
            format!("{}/s ({}/s of its CPU time)", machine.dns, machine.dns_per_cpu),
            "180000/s",
            Some(machine.dns_per_cpu >= 180_000),
        ),
        row(
            "agent with one workload (PSS)",
            mib(machine.agent),
            "12.2 MiB",
            Some(machine.agent <= 12 * 1024 + 205),
        ),
        row("shim (PSS)", mib(machine.shim), "4 MiB", Some(machine.shim <= 4 * 1024)),
    ]
}

#[allow(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^52")]
fn to_float(number: u64) -> f64 {
    number as f64
}

fn per_proxy(connected: &Connected, proxies: usize) -> f64 {
    let (before, after) = connected.memory;
    to_float(after.saturating_sub(before)) / to_float(proxies.max(1) as u64)
}

/// A time with three digits or so.
fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 1.0 {
        format!("{seconds:.2} s")
    } else if seconds >= 1e-3 {
        format!("{:.2} ms", seconds * 1e3)
    } else {
        format!("{:.1} µs", seconds * 1e6)
    }
}

fn bytes(bytes: f64) -> String {
    if bytes >= 1e6 { format!("{:.1} MB", bytes / 1e6) } else { format!("{:.1} kB", bytes / 1e3) }
}
