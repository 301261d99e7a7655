use super::*;
use clap::Parser;
use std::collections::BTreeSet;
use std::io::Write as _;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn parse(args: &[&str]) -> Result<Options, clap::Error> {
    Line::try_parse_from(["x"].iter().chain(args)).map(|line| line.options)
}

fn resolve(args: &[&str]) -> (RedirectIntent, Layers) {
    parse(args).unwrap().resolve().unwrap()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn path(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

#[test]
fn every_field_has_a_flag_and_a_variable() {
    let said: BTreeSet<_> = FIELDS.iter().map(|field| field.path).collect();
    for leaf in Layers::default().leaves().into_keys() {
        let whole = |said: &&str| {
            leaf == **said || (*said == "dns" && ["dns.enabled", "dns.capture"].contains(&&*leaf))
        };
        assert!(said.iter().any(whole), "{leaf} can't be said by a flag");
    }
    let names: BTreeSet<_> = FIELDS.iter().map(|field| field.variable).collect();
    assert_eq!(names.len(), FIELDS.len());
    assert!(names.iter().all(|name| name.starts_with("URSA_")));
}

/// A value for each flag that differs from the default.
const SAID: &[(&str, &str)] = &[
    ("proxy-uid", "5678,5679"),
    ("proxy-gid", "5678"),
    ("proxy-mark", "0x10"),
    ("inbound", "false"),
    ("inbound-port", "16006"),
    ("inbound-mode", "tproxy"),
    ("include-inbound-ports", "80,8000-8100"),
    ("exclude-inbound-ports", "22"),
    ("include-inbound-cidrs", "10.0.0.0/8"),
    ("exclude-inbound-cidrs", "fd00::/8"),
    ("probe-sources", "10.0.0.1"),
    ("probe-ports", "8081"),
    ("outbound", "false"),
    ("outbound-port", "16001"),
    ("include-outbound-ports", "443"),
    ("exclude-outbound-ports", "5432"),
    ("include-outbound-cidrs", "10.0.0.1"),
    ("exclude-outbound-cidrs", "10.9.0.0/16,fd00::1"),
    ("exclude-outbound-uids", "33,100-200"),
    ("exclude-outbound-owners", "tcp:22,80-88:1000;2000"),
    ("include-outbound-gids", "7"),
    ("exclude-outbound-gids", "8"),
    ("dns", "off"),
    ("dns-port", "5353"),
    ("dns-resolvers", "127.0.0.53"),
    ("dns-conntrack-zones", "false"),
    ("dns-honour-exclude-cidrs", "true"),
    ("ipv4", "false"),
    ("ipv6", "false"),
    ("vip-ranges", "245.0.0.0/8"),
    ("include-interfaces", "eth0"),
    ("exclude-interfaces", "br+"),
    ("bridges", "docker0:172.17.0.0/16"),
    ("workload", "{name: web, uids: [1000]}"),
    ("tproxy-mark", "7"),
    ("tproxy-route-table", "100"),
    ("drop-invalid", "true"),
    ("trace", "true"),
    ("position", "last"),
];

#[test]
fn each_flag_sets_its_field_and_no_other() {
    let defaults = Layers::default().leaves();
    for field in FIELDS {
        let (flag, value) = SAID.iter().find(|(flag, _)| *flag == field.flag).expect(field.flag);
        let (_, layers) = resolve(&[&format!("--{flag}"), value]);
        let changed: Vec<_> =
            layers.leaves().into_iter().filter(|(k, v)| defaults.get(k) != Some(v)).collect();
        let [(path, _)] = &changed[..] else { panic!("--{flag} {value}: {changed:?}") };
        assert!(path == field.path || (field.path == "dns" && path == "dns.enabled"), "--{flag}: {path}");
        assert_eq!(layers.source(path).to_string(), format!("--{flag}"));
    }
}

#[test]
fn one_precedence() {
    let first =
        file("proxyUids: [1]\noutbound: {port: 15101, excludePorts: [22, 8000-8100]}\ndns: {port: 1}\n");
    let second = file("outbound: {excludePorts: [5432]}\ndns: {port: 2}\n");
    let pod = file("traffic.kuma.io/exclude-inbound-ports=\"9000\"\nkuma.io/builtindnsport=\"3\"\n");
    let (intent, layers) = resolve(&[
        "--config",
        path(&first),
        "--config",
        path(&second),
        "--annotations",
        path(&pod),
        "--inbound-port",
        "16006",
    ]);
    assert_eq!((intent.proxy_uids, intent.outbound.port, intent.dns.port), (vec![1], 15101, 3));
    let ports: Vec<_> = intent.outbound.exclude_ports.iter().map(ToString::to_string).collect();
    assert_eq!(ports, ["5432"], "a later document's list replaces");
    let source = |path: &str| layers.source(path).to_string();
    assert_eq!(source("proxyUids"), path(&first));
    assert_eq!(source("outbound.excludePorts"), path(&second));
    assert_eq!(source("dns.port"), format!("annotations in {}", path(&pod)));
    assert_eq!(source("inbound.excludePorts"), format!("annotations in {}", path(&pod)));
    assert_eq!(source("inbound.port"), "--inbound-port");
    assert_eq!(source("ipv6"), "default");
    // What is shown is a document again.
    let shown: RedirectIntent = crate::yaml::from_str(&layers.annotated().join("\n")).unwrap();
    assert_eq!(shown, layers.intent().unwrap());
}

#[test]
fn mistakes_name_the_flag_and_the_fix() {
    for (args, words) in [
        (&["--inbound", "yes"][..], &["--inbound", "true or false"][..]),
        (&["--proxy-uid", "envoy"], &["--proxy-uid", "envoy", "id -u envoy"]),
        (&["--exclude-outbound-cidrs", "example.org"], &["example.org", "neither an address"]),
        (&["--exclude-outbound-owners", "http:1:1"], &["invalid or unsupported protocol"]),
        (&["--workload", "{nam: web}"], &["--workload", "nam"]),
        (&["--dns", "some"], &["all, resolvers, off"]),
        (&["--bridges", "docker0:x"], &["`x` is no network"]),
    ] {
        let error = parse(args).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
    }
    let wrong = file("outbond: {}\n");
    let error = parse(&["--config", path(&wrong)]).unwrap().resolve().unwrap_err();
    assert!(format!("{error:#}").contains("outbond"), "{error:#}");
}

#[test]
fn resolvers_come_from_resolv_conf() {
    let conf =
        file("# x\nnameserver 127.0.0.53\noptions edns0\nnameserver fd00::53\nnameserver fe80::1%eth0\n");
    let (intent, layers) = resolve(&["--dns", "resolvers", "--resolv-conf", path(&conf)]);
    assert_eq!(intent.dns.resolvers, ["127.0.0.53".parse::<IpAddr>().unwrap(), "fd00::53".parse().unwrap()]);
    assert_eq!(layers.source("dns.resolvers").to_string(), path(&conf));
    let empty = file("search x\n");
    let error = parse(&["--dns", "resolvers", "--resolv-conf", path(&empty)]).unwrap().resolve().unwrap_err();
    assert!(error.to_string().contains("names no resolver"), "{error}");
}

#[test]
fn annotations_of_a_manifest() {
    let pod = "kind: Pod\nmetadata: {annotations: {kuma.io/mesh: default, 'kuma.io/builtindnsport': '5'}}";
    assert_eq!(annotations(pod).unwrap().len(), 2);
    assert!(annotations("kind: Pod\nmetadata: {name: x}").unwrap().is_empty());
    assert!(annotations("no annotation at all").is_err());
}
