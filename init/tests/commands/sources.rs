//! Where the redirect comes from: files, annotations, variables, flags, and kumactl's words.

use std::io::Write as _;

use crate::lab::{APP, Namespace, PROXY};
use crate::tool::{Done, init, init_in, ok, run, run_with};

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn flags_win_over_variables_over_annotations_over_files() {
    let document =
        file("proxyUids: [1]\ninbound: {port: 1}\noutbound: {port: 2}\ndns: {port: 3}\nproxyMark: 4\n");
    let pod = file(
        "kuma.io/transparent-proxying-inbound-port=\"11\"\nkuma.io/builtindnsport=\"12\"\n\
                    kuma.io/transparent-proxying-outbound-port=\"13\"\n",
    );
    let shown = ok(init()
        .args(["config", "--json", "--inbound-port", "31", "--config"])
        .arg(document.path())
        .args(["--config", "-", "--annotations"])
        .arg(pod.path())
        .env("URSA_INBOUND_PORT", "21")
        .env("URSA_OUTBOUND_PORT", "22")
        .env("URSA_EXCLUDE_OUTBOUND_PORTS", "5432,8000-8100")
        .stdin(std::process::Stdio::null()));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let said = |path: &str| {
        let value = path.split('.').fold(&shown["config"], |value, key| &value[key]);
        (value.to_string(), shown["sources"][path].as_str().unwrap().to_owned())
    };
    let annotations = format!("annotations in {}", pod.path().display());
    let document = document.path().display().to_string();
    assert_eq!(said("inbound.port"), ("31".to_owned(), "--inbound-port".to_owned()));
    assert_eq!(said("outbound.port"), ("22".to_owned(), "URSA_OUTBOUND_PORT".to_owned()));
    assert_eq!(said("dns.port"), ("12".to_owned(), annotations));
    assert_eq!(said("proxyMark"), ("4".to_owned(), document));
    assert_eq!(said("outbound.excludePorts").1, "URSA_EXCLUDE_OUTBOUND_PORTS");
    assert_eq!(said("ipv6"), ("true".to_owned(), "default".to_owned()));
}

#[test]
fn what_is_wrong_is_named_and_nothing_changes() {
    let ns = Namespace::new();
    let before = ns.network();
    let pod = file("traffic.kuma.io/exclude-outbound-ports=\"http\"\nkuma.io/sidecar-uid=\"envoy\"\n");
    let refused = |done: Done, words: &[&str]| {
        assert_eq!(done.code, 2, "{}", done.err);
        assert!(words.iter().all(|word| done.err.contains(word)), "{}", done.err);
    };
    let pod = pod.path().to_str().unwrap();
    let all = ["exclude-outbound-ports", "`http`", "sidecar-uid", "write the number"];
    refused(run(&mut init_in(&ns, &["apply", "--proxy-uid", "1", "--annotations", pod])), &all);
    refused(
        run_with(&mut init_in(&ns, &["apply", "-c", "-"]), "proxyUid: [1]"),
        &["standard input", "proxyUid"],
    );
    refused(run(&mut init_in(&ns, &["apply"])), &["proxyUids", "at least one"]);
    refused(run(init_in(&ns, &["apply"]).env("URSA_IPV4", "yes")), &["--ipv4", "true or false"]);
    refused(run(&mut init_in(&ns, &["transparent-proxy", "--ebpf-enabled"])), &["eBPF", "nftables"]);
    assert_eq!((ns.network(), ok(&mut init_in(&ns, &["show"]))), (before, String::new()));
}

#[test]
fn kumactls_words_make_a_redirect() {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15001, 15006]);
    stranger.listen(&[80, 5432]);
    let mut install = init_in(&web, &["transparent-proxy", "--exclude-outbound-ports-for-uids", "tcp:80:33"]);
    install.args(["--config", "{redirect: {outbound: {excludePorts: [5432]}}}", "--wait", "9"]);
    let done = run(install.env("KUMA_TRANSPARENT_PROXY_KUMA_DP_USER", PROXY.to_string()));
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.err.contains("warning: wait"), "{}", done.err);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    assert_eq!(web.tcp(APP, "10.77.0.2:5432"), Ok(5432));
    assert_eq!(web.tcp(33, "10.77.0.2:80"), Ok(80));
    assert_eq!(web.tcp(33, "10.77.0.2:5432"), Ok(5432));
    assert_eq!(web.tcp(PROXY, "10.77.0.2:80"), Ok(80));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:9999"), Ok(15006));
    let script = ok(&mut init_in(&web, &["transparent-proxy", "--kuma-dp-user", "7", "--dry-run"]));
    assert!(script.contains("meta skuid 7"), "{script}");
}
