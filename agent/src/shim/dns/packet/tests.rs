//! hickory judges what the fast path writes.

use std::net::IpAddr;

use hickory_proto::op::{Edns as HickoryEdns, Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::shim::protocol::DnsTable;

fn table() -> Table {
    let many = (0..100).map(|n| IpAddr::from([241, 0, 1, n])).collect();
    Table::compile(&DnsTable {
        names: [
            (
                "backend.svc.mesh.local.".to_owned(),
                vec!["241.0.0.1".parse().unwrap(), "fd75::1".parse().unwrap()],
            ),
            ("only4.svc.mesh.local".to_owned(), vec!["241.0.0.2".parse().unwrap()]),
            ("many.svc.mesh.local".to_owned(), many),
        ]
        .into(),
        domains: vec!["mesh.local".into(), "mesh".into()],
        ttl: 30,
    })
    .unwrap()
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask(message: &Message, transport: Transport) -> (Outcome, Message) {
    let mut out = Vec::new();
    let outcome = answer(&table(), &message.to_vec().unwrap(), transport, &mut out);
    (outcome, Message::from_vec(&out).unwrap())
}

#[rstest]
#[case("backend.svc.mesh.local.", RecordType::A, ResponseCode::NoError, &["241.0.0.1"])]
#[case("BACKEND.svc.Mesh.Local.", RecordType::AAAA, ResponseCode::NoError, &["fd75::1"])]
#[case("backend.svc.mesh.local.", RecordType::ANY, ResponseCode::NoError, &["241.0.0.1", "fd75::1"])]
#[case("backend.svc.mesh.local.", RecordType::MX, ResponseCode::NoError, &[])]
#[case("backend.svc.mesh.local.", RecordType::HTTPS, ResponseCode::NoError, &[])]
#[case("only4.svc.mesh.local.", RecordType::AAAA, ResponseCode::NoError, &[])]
#[case("svc.mesh.local.", RecordType::A, ResponseCode::NoError, &[])]
#[case("mesh.local.", RecordType::A, ResponseCode::NoError, &[])]
#[case("nobody.svc.mesh.local.", RecordType::A, ResponseCode::NXDomain, &[])]
#[case("x.mesh.", RecordType::AAAA, ResponseCode::NXDomain, &[])]
fn answers_as_the_table_says(
    #[case] name: &str,
    #[case] kind: RecordType,
    #[case] code: ResponseCode,
    #[case] addresses: &[&str],
) {
    let (outcome, response) = ask(&question(name, kind), Transport::Udp);
    assert_eq!(outcome, Outcome::Answer);
    assert_eq!(response.metadata.id, 4711);
    assert_eq!(response.metadata.response_code, code);
    assert!(response.metadata.authoritative && response.metadata.recursion_desired);
    assert!(response.metadata.recursion_available && !response.metadata.truncation);
    assert_eq!(response.queries[0].name().to_ascii(), name, "the question's case is echoed");
    let found: Vec<_> = response
        .answers
        .iter()
        .map(|record| {
            assert_eq!(record.ttl, 30);
            assert!(record.name.eq_ignore_root(&Name::from_ascii(name).unwrap()));
            match &record.data {
                RData::A(a) => a.0.to_string(),
                RData::AAAA(aaaa) => aaaa.0.to_string(),
                other => panic!("unexpected {other:?}"),
            }
        })
        .collect();
    assert_eq!(found, addresses);
}

#[test]
fn other_names_and_classes_are_forwarded() {
    let mut out = Vec::new();
    let mut chaos = question("version.bind.", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    for message in [question("debian.org.", RecordType::A), question(".", RecordType::NS), chaos] {
        let outcome = answer(&table(), &message.to_vec().unwrap(), Transport::Udp, &mut out);
        assert_eq!(outcome, Outcome::Forward);
    }
    let mut ours = question("backend.svc.mesh.local.", RecordType::TXT);
    ours.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(ask(&ours, Transport::Udp).1.metadata.response_code, ResponseCode::Refused);
}

#[test]
fn long_answers_are_truncated_over_udp_only() {
    let mut message = question("many.svc.mesh.local.", RecordType::A);
    let (_, response) = ask(&message, Transport::Udp);
    assert!(response.metadata.truncation && response.answers.is_empty());
    let (_, response) = ask(&message, Transport::Tcp);
    assert!(!response.metadata.truncation);
    assert_eq!(response.answers.len(), 100);
    let mut edns = HickoryEdns::new();
    edns.set_max_payload(4096);
    message.edns = Some(edns);
    let (_, response) = ask(&message, Transport::Udp);
    assert!(response.metadata.truncation, "never above what survives any path");
    assert_eq!(response.edns.unwrap().max_payload(), 1232);
}

#[test]
fn edns_of_a_later_version_is_refused() {
    let mut message = question("backend.svc.mesh.local.", RecordType::A);
    let mut edns = HickoryEdns::new();
    edns.set_version(1);
    message.edns = Some(edns);
    let (outcome, response) = ask(&message, Transport::Udp);
    assert_eq!(outcome, Outcome::Refusal);
    // 16 is BADVERS here and BADSIG elsewhere; hickory knows one name for it.
    assert_eq!(u16::from(response.metadata.response_code), BADVERS);
}

#[test]
fn what_is_no_question_gets_an_error_or_nothing() {
    let mut out = Vec::new();
    let good = question("backend.svc.mesh.local.", RecordType::A).to_vec().unwrap();
    let mut response = good.clone();
    response[2] |= 0x80;
    assert_eq!(answer(&table(), &response, Transport::Udp, &mut out), Outcome::Drop);
    assert_eq!(answer(&table(), &good[..11], Transport::Udp, &mut out), Outcome::Drop);
    for (at, value, code) in
        [(2, 0x28, ResponseCode::NotImp), (5, 2, ResponseCode::FormErr), (12, 0xc0, ResponseCode::FormErr)]
    {
        let mut bad = good.clone();
        bad[at] = value;
        assert_eq!(answer(&table(), &bad, Transport::Udp, &mut out), Outcome::Refusal);
        assert_eq!(Message::from_vec(&out).unwrap().metadata.response_code, code);
    }
    for length in 12..good.len() {
        assert_eq!(answer(&table(), &good[..length], Transport::Udp, &mut out), Outcome::Refusal);
    }
}

#[test]
fn a_response_must_echo_the_question() {
    let asked = question("debian.org.", RecordType::A);
    let query = asked.to_vec().unwrap();
    let mut response = asked.clone();
    response.metadata.message_type = MessageType::Response;
    assert!(answers(&query, &response.to_vec().unwrap()));
    assert!(!answers(&query, &query));
    let mut other = question("debian.com.", RecordType::A);
    other.metadata.message_type = MessageType::Response;
    assert!(!answers(&query, &other.to_vec().unwrap()));
}

proptest! {
    #[test]
    fn arbitrary_packets_never_panic(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut out = Vec::new();
        for transport in [Transport::Udp, Transport::Tcp] {
            let outcome = answer(&table(), &packet, transport, &mut out);
            prop_assert_eq!(outcome == Outcome::Drop || outcome == Outcome::Forward, out.is_empty());
        }
        server_failure(&packet, &mut out);
        answers(&packet, &packet);
    }

    #[test]
    fn damaged_questions_never_panic_and_answers_always_parse(
        damage in proptest::collection::vec((0_usize..64, any::<u8>()), 0..4),
        cut in 12_usize..64,
        edns in any::<bool>(),
    ) {
        let mut message = question("backend.svc.mesh.local.", RecordType::A);
        if edns {
            message.edns = Some(HickoryEdns::new());
        }
        let mut packet = message.to_vec().unwrap();
        for (at, value) in damage {
            if let Some(byte) = packet.get_mut(at) {
                *byte = value;
            }
        }
        packet.truncate(cut.max(12));
        let mut out = Vec::new();
        let outcome = answer(&table(), &packet, Transport::Udp, &mut out);
        if matches!(outcome, Outcome::Answer | Outcome::Refusal) {
            let length = out.len();
            prop_assert!(length <= UDP_LIMIT);
            prop_assert!(Message::from_vec(&out).is_ok());
        }
    }
}
