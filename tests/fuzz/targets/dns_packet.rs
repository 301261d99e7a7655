//! What a workload's resolver, or anybody on loopback, sends to the shim's DNS port.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use ursa_agent::shim::dns::packet::{Outcome, Transport, answer, answers, server_failure};
use ursa_agent::shim::dns::table::Table;
use ursa_agent::shim::protocol::DnsTable;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let names = [("backend.svc.mesh.local", vec!["241.0.0.2", "fd75:7273:6100::2"]), ("web.svc.mesh.local", vec!["241.0.0.3"])];
    let table = DnsTable {
        names: names
            .into_iter()
            .map(|(name, ips)| (name.to_owned(), ips.into_iter().map(|ip| ip.parse().expect("an address")).collect()))
            .collect(),
        domains: vec!["mesh.local".to_owned()],
        ttl: 30,
    };
    Table::compile(&table).expect("a table")
});

fuzz_target!(|packet: &[u8]| {
    let mut out = Vec::new();
    for transport in [Transport::Udp, Transport::Tcp] {
        let outcome = answer(&TABLE, packet, transport, &mut out);
        assert_eq!(matches!(outcome, Outcome::Drop | Outcome::Forward), out.is_empty());
        if transport == Transport::Udp {
            assert!(out.len() <= 1232, "an answer longer than a datagram may be");
        }
    }
    server_failure(packet, &mut out);
    assert!(!answers(packet, packet), "a query is no answer to itself");
});
