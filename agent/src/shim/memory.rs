//! How much memory a sidecar may use, and what Envoy does when it comes near that.
//!
//! Without a word about its limit Envoy takes what it needs until the kernel kills it, which ends every connection.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Says the limit where no cgroup does: bytes, or with K, M or G as systemd's `MemoryMax=`.
pub const VARIABLE: &str = "URSA_MEMORY_MAX";

const MIB: u64 = 1 << 20;
/// For the shim, its page tables, kernel buffers of sockets, and what of Envoy isn't heap.
const RESERVE: u64 = 32 * MIB;
/// An Envoy with an average configuration needs that much; a smaller share would refuse all traffic from the start.
const LEAST: u64 = 64 * MIB;

/// Bytes that this process and its children may use together: the least that its cgroups (each version) and
/// [`VARIABLE`] say, if any does.
pub fn limit() -> Option<u64> {
    let told = std::env::var(VARIABLE).ok().and_then(|text| parse(&text));
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let found = of_cgroups(&cgroups, Path::new("/sys/fs/cgroup"));
    told.into_iter().chain(found).min()
}

/// What goes over Envoy's bootstrap: its overload manager for a cgroup that may use `limit` bytes.
///
/// The heap of one Envoy gets half of what remains after [`RESERVE`], because two of them run side by side while one
/// replaces the other. Thresholds are those of Envoy's guide to edge proxies, with the heap shrunk first and whole
/// connections refused last: a request that is refused can be tried elsewhere at once.
pub(super) fn overload_manager(limit: u64) -> Value {
    let monitor = "envoy.resource_monitors.fixed_heap";
    let action = |name: &str, threshold: f64| {
        json!({
            "name": format!("envoy.overload_actions.{name}"),
            "triggers": [{ "name": monitor, "threshold": { "value": threshold } }]
        })
    };
    json!({ "overload_manager": {
        "refresh_interval": "0.25s",
        "resource_monitors": [{
            "name": monitor,
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                // As text, as 64-bit numbers are in proto's JSON.
                "max_heap_size_bytes": heap(limit).to_string()
            }
        }],
        "actions": [
            action("shrink_heap", 0.9),
            action("disable_http_keepalive", 0.92),
            action("stop_accepting_requests", 0.95),
            action("stop_accepting_connections", 0.98)
        ]
    } })
}

/// What one Envoy's heap may use.
fn heap(limit: u64) -> u64 {
    let shared = limit.saturating_sub(RESERVE.min(limit / 4));
    (shared / 2).max(LEAST).min(shared)
}

/// What the lines of `/proc/<pid>/cgroup` lead to: in version 2 each group's limit holds for those below it, too.
fn of_cgroups(lines: &str, root: &Path) -> Option<u64> {
    lines
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let (bases, file): (&[PathBuf], _) = if controllers.is_empty() {
                (&[root.to_owned(), root.join("unified")], "memory.max")
            } else if controllers.split(',').any(|controller| controller == "memory") {
                (&[root.join("memory")], "memory.limit_in_bytes")
            } else {
                return None;
            };
            bases.iter().filter_map(|base| least_on_the_way(base, path, file)).min()
        })
        .min()
}

fn least_on_the_way(base: &Path, path: &str, file: &str) -> Option<u64> {
    Path::new(path.trim_start_matches('/'))
        .ancestors()
        .filter_map(|group| {
            let text = fs::read_to_string(base.join(group).join(file)).ok()?;
            // Version 2 says "max", version 1 a number that no machine has.
            text.trim().parse().ok().filter(|limit| *limit < 1 << 60)
        })
        .min()
}

fn parse(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => MIB,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|limit| *limit > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_least_limit_on_the_way_counts() {
        let root = root(&[
            ("ursa.slice/memory.max", "300000000\n"),
            ("ursa.slice/ursa-sidecar@web.service/memory.max", "max\n"),
            ("tight.slice/memory.max", "300000000\n"),
            ("tight.slice/a.service/memory.max", "200000000\n"),
            ("memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/a/b/memory.limit_in_bytes", "150000000\n"),
            ("unified/c/memory.max", "123\n"),
        ]);
        let of = |lines: &str| of_cgroups(lines, root.path());
        assert_eq!(of("0::/ursa.slice/ursa-sidecar@web.service\n"), Some(300_000_000));
        assert_eq!(of("0::/tight.slice/a.service\n"), Some(200_000_000));
        assert_eq!(of("4:memory:/a/b\n1:cpu:/\n0::/\n"), Some(150_000_000));
        assert_eq!(of("4:memory:/a\n0::/nowhere\n"), None);
        assert_eq!(of("0::/c\n"), Some(123));
        assert_eq!(of(""), None);
    }

    #[test]
    fn a_limit_reads_as_systemd_writes_it() {
        assert_eq!(parse("512M\n"), Some(512 * MIB));
        assert_eq!(parse("1G"), Some(1 << 30));
        assert_eq!(parse("1000"), Some(1000));
        for none in ["", "infinity", "10%", "0", "99999999999999T", "-1M"] {
            assert_eq!(parse(none), None, "{none:?}");
        }
    }

    #[test]
    fn two_envoys_fit_unless_not_even_one_does() {
        assert_eq!(heap(512 * MIB), 240 * MIB);
        assert_eq!(heap(160 * MIB), 64 * MIB);
        assert_eq!(heap(100 * MIB), 64 * MIB);
        assert_eq!(heap(40 * MIB), 30 * MIB);
        let text = overload_manager(512 * MIB).to_string();
        assert!(text.contains(r#""max_heap_size_bytes":"251658240""#), "{text}");
    }
}
