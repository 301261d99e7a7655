//! The iptables backend of both kinds, with real packets and foreign rules.

use std::io::ErrorKind::ConnectionRefused;
use std::net::IpAddr;

use ursa_init::backend::Backend;
use ursa_init::intent::{Cgroup, InboundMode, Interface, Position, RedirectIntent, Workload};
use ursa_init::{Plan, iptables, nft};

use crate::lab::{APP, Namespace, PROXY};
use crate::support::{BACKENDS, EXCLUDED, IPTABLES, intent, moved, plan};

const VIP4: &str = "241.0.0.7:80";
const VIP6: &str = "[fd75:7273:6100::f100:7]:80";
/// What Docker leaves, with what is hard to quote.
const DOCKER: &str = r#"
for kind in iptables-nft iptables-legacy; do
  $kind -w -t nat -N DOCKER
  $kind -w -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
  $kind -w -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -m comment --comment "a \"quoted\" -j URSA_X back\\slash it's" -j DOCKER
  $kind -w -t nat -A DOCKER -i docker0 -j RETURN
  $kind -w -t filter -A OUTPUT -p tcp --dport 4711 -j DROP
  $kind -w -t raw -A PREROUTING -p udp --dport 4712 -j DROP
  $kind -w -t nat -N MY_URSA_CHAIN
done"#;

fn meshed(intent: &RedirectIntent, backend: Backend) -> (Namespace, Namespace) {
    let (web, stranger) = Namespace::pair();
    let loopbacks: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    web.listen(&[15001, 15006, 8080, 22, 9000]);
    web.serve_dns(&loopbacks, 15053);
    stranger.listen(&[80, 5432, 8080]);
    stranger.serve_dns(&["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()], 53);
    stranger.ip("addr add 10.88.0.1/32 dev lo");
    web.apply(&plan(intent), backend).unwrap();
    (web, stranger)
}

/// An intent that uses every match and every action of a plan.
fn everything() -> RedirectIntent {
    serde_json::from_value(serde_json::json!({
        "proxyGids": [77], "proxyMark": 99, "dropInvalid": true, "trace": true,
        "interfaces": {"exclude": ["wlan+"], "include": ["eth0"]},
        "vipRanges": ["241.0.0.0/8", "fd75:7273:6100::/64"],
        "workloads": [
            {"name": "web\n-A \"x' \\", "uids": ["1000-1999"], "proxyUids": [5678],
             "inbound": {"mode": "tproxy", "includePorts": [80, "8080-8090"], "includeCidrs": ["10.0.0.0/8", "fd77::/64"],
                         "excludeCidrs": ["10.9.0.0/16"], "probes": {"sources": ["10.77.0.9"], "ports": [80]}},
             "outbound": {"excludeOwners": [{"uids": [1001], "protocol": "udp", "ports": [53]}],
                          "includeGids": ["1000-2000", 7], "excludeGids": [9], "excludePorts": ["1-9"]}},
            {"name": "db", "uids": [2000], "proxyUids": [5679],
             "inbound": {"port": 16006, "includePorts": [5432]},
             "outbound": {"port": 16001, "includeCidrs": ["10.0.0.0/8"], "includePorts": [5432]},
             "dns": {"port": 16053, "capture": "resolvers", "resolvers": ["10.0.0.53", "fd77::53"]}}
        ]
    }))
    .unwrap()
}

#[test]
fn packets_land_as_with_nftables() {
    for backend in IPTABLES {
        let (web, stranger) = meshed(&intent(), backend);
        for to in ["10.77.0.2:80", "[fd77::2]:80", VIP4, VIP6] {
            assert_eq!(web.tcp(APP, to), Ok(15001), "{backend}: {to}");
        }
        assert_eq!(web.tcp(APP, "10.77.0.2:5432"), Ok(5432));
        assert_eq!(web.tcp(APP, "10.88.0.1:8080"), Ok(8080));
        assert_eq!(web.tcp(EXCLUDED, "10.77.0.2:80"), Ok(80));
        assert_eq!(web.tcp(EXCLUDED, VIP4), Err(ConnectionRefused));
        assert_eq!(web.tcp(EXCLUDED, VIP6), Err(ConnectionRefused));
        for proxy in [PROXY, PROXY + 1] {
            assert_eq!(web.tcp(proxy, "10.77.0.2:80"), Ok(80));
            assert_eq!(web.tcp(proxy, "10.77.0.1:8080"), Ok(15006), "hairpin");
        }
        for resolver in ["10.77.0.2:53", "[fd77::2]:53"] {
            assert_eq!(web.udp(PROXY, 40053, resolver), Ok(53), "{backend}: {resolver}");
            assert_eq!(web.udp(APP, 40053, resolver), Ok(15053), "{backend}: {resolver}");
            assert_eq!(web.tcp(APP, resolver), Ok(15053), "{backend}: {resolver}");
        }
        assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006));
        assert_eq!(stranger.tcp(APP, "[fd77::1]:8080"), Ok(15006));
    }
}

#[test]
fn applied_twice_is_applied_once_and_removed_is_gone() {
    for backend in IPTABLES {
        for intent in [intent(), everything()] {
            let web = Namespace::alone();
            let before = web.network();
            let plan = plan(&intent);
            assert!(web.apply(&plan, backend).unwrap().rules_changed, "{backend}");
            let first = web.saved();
            assert_eq!(web.diff(&plan, backend), Vec::<String>::new(), "{backend}");
            assert!(!web.apply(&plan, backend).unwrap().changed(), "{backend}");
            assert_eq!(web.saved(), first);
            assert!(web.run(ursa_init::show).unwrap().iter().any(|line| line.contains("URSA_OUTPUT")));
            assert!(web.run(ursa_init::remove).unwrap());
            assert!(!web.saved().contains("URSA"), "{}", web.saved());
            assert_eq!(web.network(), before);
            assert!(!web.run(ursa_init::remove).unwrap());
        }
    }
}

#[test]
fn what_render_shows_is_what_restore_takes() {
    for intent in [intent(), everything()] {
        let plan = plan(&intent);
        for (kind, backend) in [("nft", Backend::IptablesNft), ("legacy", Backend::IptablesLegacy)] {
            let web = Namespace::alone();
            for (family, table, text) in iptables::render(&plan).unwrap() {
                let word = if family == ursa_init::plan::Family::V4 { "iptables" } else { "ip6tables" };
                web.sh(&format!("{word}-{kind}-restore --noflush <<'END'\n{text}END"));
                assert!(text.starts_with(&format!("*{table}\n")));
            }
            let differences = web.diff(&plan, backend);
            let routes = differences.iter().all(|line| !line.contains("tables"));
            assert!(routes, "{backend}: {differences:#?}");
        }
    }
}

#[test]
fn rules_of_others_stay_as_they_are() {
    for backend in BACKENDS {
        for position in [Position::First, Position::Last] {
            let web = Namespace::alone();
            web.sh(DOCKER);
            let before = web.saved();
            let of_others = |web: &Namespace| {
                let ours = |line: &&str| {
                    line.contains("quoted") || !(line.contains(" URSA_") || line.starts_with(":URSA_"))
                };
                web.saved().lines().filter(ours).map(str::to_owned).collect::<Vec<_>>().join("\n")
            };
            for by in [0, 100] {
                let plan = plan(&RedirectIntent { position, ..moved(by) });
                web.apply(&plan, backend).unwrap();
                for line in before.lines().filter(|line| !line.starts_with('#')) {
                    assert!(of_others(&web).contains(line), "{backend}: {line}\n{}", web.saved());
                }
                assert!(web.diff(&plan, backend).is_empty());
            }
            web.run(ursa_init::remove).unwrap();
            let lines = |text: &str| {
                text.lines().filter(|l| l.starts_with("-A")).map(str::to_owned).collect::<Vec<_>>()
            };
            assert_eq!(lines(&web.saved()), lines(&before), "{backend}");
        }
    }
}

#[test]
fn the_position_among_others_is_kept() {
    for backend in IPTABLES {
        let kind = backend.to_string();
        let web = Namespace::alone();
        web.sh(DOCKER);
        let nat = || {
            web.sh(&format!("{kind} -w -t nat -S OUTPUT"))
                .lines()
                .skip(1)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let first = plan(&intent());
        web.apply(&first, backend).unwrap();
        assert!(nat()[0].contains("URSA_OUT"), "{:?}", nat());
        let last = plan(&RedirectIntent { position: Position::Last, ..intent() });
        assert!(!web.diff(&last, backend).is_empty());
        web.apply(&last, backend).unwrap();
        assert!(nat()[1].contains("URSA_OUT"), "{:?}", nat());
        // A guard that others got before is no guard.
        web.sh(&format!("{kind} -w -t filter -I OUTPUT -j ACCEPT"));
        assert!(!web.diff(&last, backend).is_empty());
        assert!(web.apply(&last, backend).unwrap().rules_changed);
        assert!(web.sh(&format!("{kind} -w -t filter -S OUTPUT 1")).contains("URSA_OUT"));
        // The order of rules counts as well.
        let swapped = web
            .sh(&format!("{kind}-save -t nat"))
            .replace("COMMIT", "-D URSA_PROXY 1\n-A URSA_PROXY -j RETURN\nCOMMIT");
        let flushed = swapped.lines().filter(|l| !l.starts_with("-A") || l.ends_with("URSA_PROXY -j RETURN"));
        let only = flushed.filter(|l| !l.starts_with(':')).collect::<Vec<_>>().join("\n");
        web.sh(&format!("{kind}-restore --noflush <<'END'\n{only}\nEND"));
        assert!(!web.diff(&last, backend).is_empty());
        assert!(web.apply(&last, backend).unwrap().rules_changed);
    }
}

#[test]
fn from_one_backend_to_another_nothing_is_left_and_nothing_opens() {
    let (web, _stranger) = meshed(&intent(), Backend::Nftables);
    web.listen(&[15101]);
    let mut previous = Backend::Nftables;
    let ways = [
        Backend::IptablesNft,
        Backend::IptablesLegacy,
        Backend::Nftables,
        Backend::IptablesLegacy,
        Backend::IptablesNft,
        Backend::Auto,
    ];
    for (i, backend) in ways.into_iter().enumerate() {
        let (by, port) = if i % 2 == 0 { (100, 15101) } else { (0, 15001) };
        let plan: Plan = plan(&moved(by));
        assert!(web.apply(&plan, backend).unwrap().rules_changed);
        assert_eq!(web.tcp(APP, VIP4), Ok(port), "{previous} to {backend}");
        let kinds = web.saved();
        let (nft, legacy) = kinds.split_once("# iptables-legacy").unwrap();
        let there =
            [nft.contains("URSA_"), legacy.contains("URSA_"), web.run(nft::read_back).unwrap().is_some()];
        let wanted = match backend {
            Backend::IptablesNft => [true, false, false],
            Backend::IptablesLegacy => [false, true, false],
            _ => [false, false, true],
        };
        assert_eq!(there, wanted, "{previous} to {backend}");
        assert!(!web.apply(&plan, backend).unwrap().changed());
        assert_eq!(web.diff(&plan, backend), Vec::<String>::new());
        previous = backend;
    }
}

#[test]
fn the_kind_that_the_host_uses_is_chosen() {
    let kinds = |web: &Namespace| {
        let saved = web.saved();
        let (nft, legacy) = saved.split_once("# iptables-legacy").unwrap();
        (nft.contains("URSA_"), legacy.contains("URSA_"))
    };
    let plan = plan(&intent());
    for (before, wanted) in [
        ("true", (true, false)),
        ("iptables-legacy -w -A OUTPUT -p tcp --dport 1 -j DROP", (false, true)),
        ("iptables-nft -w -A OUTPUT -p tcp --dport 1 -j DROP", (true, false)),
        (
            "ip6tables-legacy -w -A OUTPUT -p tcp --dport 1 -j DROP; iptables-nft -A OUTPUT -j RETURN",
            (true, false),
        ),
    ] {
        let web = Namespace::alone();
        web.sh(before);
        web.apply(&plan, Backend::Iptables).unwrap();
        assert_eq!(kinds(&web), wanted, "{before}");
        assert!(!web.apply(&plan, Backend::Iptables).unwrap().changed());
    }
}

/// A cgroup that is removed and made again under its name is another one: the rule stops matching, and reads the
/// same. Ours don't.
#[test]
fn a_slice_that_was_made_again_is_a_difference() {
    let Some(root) = cgroup2() else { panic!("no cgroup2 is mounted") };
    for backend in BACKENDS {
        let name = format!("ursa-test-{}-{backend}.slice", std::process::id());
        let path = root.join(&name);
        std::fs::create_dir(&path).unwrap();
        let web = Namespace::alone();
        let cgroup: Cgroup = name.parse().unwrap();
        let workload = Workload {
            name: "web".to_owned(),
            slices: vec![cgroup],
            proxy_uids: vec![PROXY],
            inbound: ursa_init::intent::Inbound { enabled: false, ..Default::default() },
            ..Workload::default()
        };
        let plan = plan(&RedirectIntent { workloads: vec![workload], ..RedirectIntent::default() });
        web.apply(&plan, backend).unwrap();
        assert!(!web.apply(&plan, backend).unwrap().changed());
        std::fs::remove_dir(&path).unwrap();
        // The same number must not come again by chance.
        let other = path.with_extension("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::create_dir(&path).unwrap();
        let differences = web.diff(&plan, backend);
        let changed = web.apply(&plan, backend).map(|applied| applied.rules_changed);
        let after = web.diff(&plan, backend);
        std::fs::remove_dir(&path).unwrap();
        std::fs::remove_dir(&other).unwrap();
        assert!(!differences.is_empty(), "{backend}");
        assert!(changed.unwrap() && after.is_empty(), "{backend}: {after:?}");
    }
}

fn cgroup2() -> Option<std::path::PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find(|l| l.contains(" - cgroup2 "))?.split(' ').nth(4).map(Into::into)
}

#[test]
fn what_iptables_cannot_say_is_an_error_that_says_so() {
    let mut plan = plan(&RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() });
    plan.chains.last_mut().unwrap().hook.as_mut().unwrap().kind = ursa_init::plan::HookKind::Nat;
    let error = iptables::render(&plan).unwrap_err().to_string();
    assert!(error.contains("use the backend nftables"), "{error}");
}

#[test]
fn interfaces_and_transparent_workloads_have_rules() {
    let mut intent = intent();
    intent.inbound.mode = InboundMode::Tproxy;
    intent.bridges = vec![ursa_init::intent::Bridge {
        interface: "br+".parse::<Interface>().unwrap(),
        local_cidrs: vec!["172.16.0.0/12".parse().unwrap()],
    }];
    for backend in IPTABLES {
        let web = Namespace::alone();
        web.apply(&plan(&intent), backend).unwrap();
        let saved = web.saved();
        assert!(saved.contains("-i br+") && saved.contains("-j TPROXY --on-port 15006"), "{saved}");
        assert_eq!(web.diff(&plan(&intent), backend), Vec::<String>::new());
    }
}
