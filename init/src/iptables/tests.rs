//! The words of iptables, without a kernel.

use std::borrow::Cow;

use super::compile::{self, Jump, Place, Rules, Table};
use super::rule::{self, Matching};
use super::save::{self, Comments, Saved, canonical};
use super::text;
use crate::cgroup::Cgroups;
use crate::intent::{Ids, Ports, RedirectIntent};
use crate::plan::{Action, Family, Match, Plan, Protocol, Rule};

fn lines(matches: Vec<Match>, action: Action, table: Table, family: Family) -> Vec<String> {
    let rule = Rule { matches, action, reason: Cow::Borrowed("why") };
    let Some(matching) = Matching::of(&rule.matches, family).unwrap() else { return Vec::new() };
    let lines = rule::lines(&rule, &matching, table, family, &Cgroups::default()).unwrap();
    lines.into_iter().map(|line| line.replace("-m comment --comment \"why\" ", "")).collect()
}

fn net(text: &str) -> ipnet::IpNet {
    text.parse().unwrap()
}

#[test]
fn what_must_hold_together_is_said_once() {
    let port = |first, last| Match::DestinationPort(Ports { first, last });
    let tcp = Match::Protocol(Protocol::Tcp);
    let said = |matches| lines(matches, Action::Return, Table::Nat, Family::V4);
    let both = vec![
        Match::Destination(net("10.0.0.0/8")),
        tcp.clone(),
        port(1, 100),
        Match::Destination(net("10.7.0.0/16")),
        port(50, 200),
        Match::NotProtocol(Protocol::Udp),
        Match::InInterface("br+".parse().unwrap()),
        Match::InInterface("br0".parse().unwrap()),
    ];
    assert_eq!(said(both), ["-d 10.7.0.0/16 -i br0 -p tcp -m tcp --dport 50:100 -j RETURN"]);
    // What can't be is no rule.
    for never in [
        vec![tcp.clone(), Match::NotProtocol(Protocol::Tcp)],
        vec![tcp.clone(), Match::Protocol(Protocol::Udp)],
        vec![tcp.clone(), port(1, 2), port(3, 4)],
        vec![Match::Source(net("10.0.0.0/8")), Match::Source(net("11.0.0.0/8"))],
        vec![Match::Family(Family::V6)],
        vec![Match::Source(net("fd00::/8"))],
        vec![Match::Mark(1), Match::Mark(2)],
        vec![Match::Uid(Ids::one(u32::MAX))],
    ] {
        assert_eq!(said(never), Vec::<String>::new());
    }
    // Everything of a family is no condition.
    assert_eq!(said(vec![Match::Source(net("0.0.0.0/0"))]), ["-j RETURN"]);
    assert!(Matching::of(&[port(1, 2)], Family::V4).is_err(), "a port of no protocol");
}

#[test]
fn owners_are_numbers_and_nobody_is_no_other() {
    let groups = vec![Match::NotGid(Ids { first: 5, last: 9 }), Match::NotGid(Ids::one(12))];
    assert_eq!(
        lines(groups, Action::Return, Table::Raw, Family::V6),
        [
            "-m owner --socket-exists -m owner ! --gid-owner 5-9 -m owner --socket-exists -m owner ! --gid-owner 12 \
          -j RETURN"
        ]
    );
    let all = vec![Match::Uid(Ids { first: 7, last: u32::MAX })];
    assert_eq!(
        lines(all, Action::Return, Table::Raw, Family::V4),
        ["-m owner --uid-owner 7-4294967294 -j RETURN"]
    );
}

#[test]
fn a_refusal_is_an_answer_where_iptables_can_answer() {
    let vip = || vec![Match::Destination(net("241.0.0.0/8"))];
    assert_eq!(
        lines(vip(), Action::Reject, Table::Filter, Family::V4),
        [
            "-d 241.0.0.0/8 -p tcp -j REJECT --reject-with tcp-reset",
            "-d 241.0.0.0/8 -j REJECT --reject-with icmp-port-unreachable"
        ]
    );
    assert_eq!(lines(vip(), Action::Reject, Table::Raw, Family::V4), ["-d 241.0.0.0/8 -j DROP"]);
}

#[test]
fn a_name_can_hold_no_command() {
    let reason = Cow::Owned(format!("workload a\nCOMMIT\n*filter\n:INPUT DROP\n\"\\ ü {}", "x".repeat(300)));
    let rule = Rule { matches: Vec::new(), action: Action::Return, reason };
    let matching = Matching::of(&[], Family::V4).unwrap().unwrap();
    let lines = rule::lines(&rule, &matching, Table::Nat, Family::V4, &Cgroups::default()).unwrap();
    assert!(lines.len() == 1 && !lines[0].contains('\n') && lines[0].is_ascii(), "{lines:?}");
    let rules = Rules { chains: vec![("URSA_X".to_owned(), lines)], jumps: Vec::new() };
    let bare = text::without_comments(&rules);
    assert_eq!(bare.chains[0].1, ["-j RETURN"]);
}

#[test]
fn a_rule_means_the_same_however_it_is_printed() {
    let same =
        |a: &str, b: &str| assert_eq!(canonical(a, Comments::Compare), canonical(b, Comments::Compare));
    same("-p tcp -d 10.0.0.1 -m tcp --dport 80 -j RETURN", "-d 10.0.0.1/32 -p 6 -m tcp --dport 80 -j RETURN");
    same("-p 58 -s ::1 -j DROP", "-s ::1/128 -p ipv6-icmp -j DROP");
    same("-m mark --mark 0x539 -j X", "-m mark --mark 0x539/0xffffffff -j X");
    same("-j CONNMARK --save-mark", "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff");
    same(
        "-p tcp -j TPROXY --on-port 1 --tproxy-mark 0x0/0x0",
        "-p tcp -j TPROXY --on-port 1 --on-ip 0.0.0.0 --tproxy-mark 0x0/0x0",
    );
    same(r#"-m comment --comment "it's -j here" -j DROP"#, r#"-m comment --comment "it\'s -j here" -j DROP"#);
    let differ =
        |a: &str, b: &str| assert_ne!(canonical(a, Comments::Compare), canonical(b, Comments::Compare));
    differ("! -p tcp -j DROP", "-p tcp -j DROP");
    differ("-m tcp ! --tcp-flags SYN,ACK SYN -m socket -j DROP", "-m tcp ! --tcp-flags SYN,ACK SYN -j DROP");
    differ("-m tcp --tcp-flags SYN,ACK SYN -j DROP", "-m tcp ! --tcp-flags SYN,ACK SYN -j DROP");
    differ(
        "-m conntrack ! --ctstate DNAT --ctstatus CONFIRMED -j DROP",
        "-m conntrack --ctstate DNAT --ctstatus CONFIRMED -j DROP",
    );
    differ("-m tcp --tcp-flags SYN,ACK SYN -j DROP", "-m tcp --tcp-flags SYN,ACK SYN,ACK -j DROP");
    differ("-m comment --comment a -j DROP", "-m comment --comment b -j DROP");
    differ("-g URSA_X", "-j URSA_X");
    assert_eq!(
        canonical("-m comment --comment a -j DROP", Comments::Ignore),
        canonical("-j DROP", Comments::Ignore)
    );
}

const SAVED: &str = r#"# Generated by iptables-save
*nat
:PREROUTING ACCEPT [1:2]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:URSA_OUT - [0:0]
:URSA_OLD - [0:0]
-A OUTPUT -m comment --comment "-j URSA_OUT" -j DOCKER
-A OUTPUT -j URSA_OUT
-A DOCKER -j RETURN
-A URSA_OUT -p tcp -j REDIRECT --to-ports 1
COMMIT
# Table `weird' is incompatible, use 'nft' tool.
"#;

#[test]
fn only_ours_is_taken_away_and_all_of_it() {
    let saved = Saved::parse(SAVED);
    let ours = saved.ours(Table::Nat);
    assert_eq!(ours.chains.len(), 2);
    assert_eq!(ours.jumps.iter().map(|j| j.rule.as_str()).collect::<Vec<_>>(), ["-j URSA_OUT"]);
    assert!(saved.has_foreign() && saved.has_ours());
    assert_eq!(
        text::table(Table::Nat, &saved, &Rules::default()),
        "*nat\n:URSA_OLD - [0:0]\n:URSA_OUT - [0:0]\n-D OUTPUT -j URSA_OUT\n-X URSA_OLD\n-X URSA_OUT\nCOMMIT\n"
    );
    let new = Rules {
        chains: vec![("URSA_OUT".to_owned(), vec!["-p tcp -j REDIRECT --to-ports 2".to_owned()])],
        jumps: vec![Jump { base: "OUTPUT".to_owned(), rule: "-j URSA_OUT".to_owned(), place: Place::First }],
    };
    assert!(!saved.holds(Table::Nat, &new, true));
    assert!(saved.holds(Table::Nat, &ours, true));
    // Both at once: the new first, and each rule once.
    let both = save::union(&new, &ours);
    assert_eq!(
        both.chains,
        [
            (
                "URSA_OUT".to_owned(),
                vec![
                    "-p tcp -j REDIRECT --to-ports 2".to_owned(),
                    "-p tcp -j REDIRECT --to-ports 1".to_owned()
                ]
            ),
            ("URSA_OLD".to_owned(), Vec::new())
        ]
    );
    assert_eq!(both.jumps.len(), 1);
}

#[test]
fn the_same_chain_serves_both_hooks_and_names_fit() {
    let intent = RedirectIntent { proxy_uids: vec![5678], ..RedirectIntent::default() };
    let plan = Plan::compile(&intent).unwrap();
    for family in [Family::V4, Family::V6] {
        let tables = compile::tables(&plan, family, &Cgroups::default()).unwrap();
        let names: Vec<_> = tables.iter().map(|(table, _)| *table).collect();
        assert_eq!(names, [Table::Raw, Table::Mangle, Table::Filter, Table::Nat]);
        for (_, rules) in &tables {
            assert!(rules.chains.iter().all(|(name, _)| name.len() <= 28));
            let targets =
                rules.chains.iter().flat_map(|(_, rules)| rules).filter_map(|r| r.split_once("-g "));
            for (_, target) in targets {
                assert!(rules.chains.iter().any(|(name, _)| name == target), "{target}");
            }
        }
    }
}
