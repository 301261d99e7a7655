use std::fmt::Write as _;

use bytes::Bytes;
use prost::Message;
use ursa_wire::discovery::Resource;

use super::*;

/// `Cluster { type: EDS }`, as Envoy encodes it.
const EDS_CLUSTER: &[u8] = &[0x10, 0x03];

fn item(kind: Kind, name: &str, version: &str) -> (String, Item) {
    let value = if kind == Kind::Cluster { Bytes::from_static(EDS_CLUSTER) } else { Bytes::new() };
    let bytes = Resource::new(kind.type_url(), name, version, value).encode_to_vec().into();
    (name.to_owned(), Item { version: version.to_owned(), bytes })
}

/// An Envoy on one side and control on the other.
struct Table {
    cache: Cache,
    stream: Downstream,
}

impl Table {
    fn new() -> Self {
        Self { cache: Cache::new(), stream: Downstream::new() }
    }

    fn control(&self, kind: Kind, added: &[(&str, &str)], removed: &[&str]) {
        let added = added.iter().map(|(name, version)| item(kind, name, version)).collect();
        self.cache.update(kind, added, removed.iter().map(|name| (*name).to_owned()).collect());
    }

    fn synced(&self) {
        for kind in Kind::ALL {
            self.cache.synced(kind);
        }
    }

    fn subscribe(&mut self, kind: Kind, names: &[&str]) {
        self.request(kind, |request| {
            request.subscribe = names.iter().map(|name| (*name).to_owned()).collect();
        });
    }

    fn request(&mut self, kind: Kind, fill: impl FnOnce(&mut Request)) {
        let mut request = Request { type_url: kind.type_url().to_owned(), ..Request::default() };
        fill(&mut request);
        self.stream.on_request(&request, &self.cache);
    }

    /// Everything that may be sent now, as `kind +name@version -name`.
    fn sent(&mut self) -> Vec<(String, Response)> {
        let mut all = Vec::new();
        while let Some(response) = self.stream.next(&self.cache) {
            let mut text = response.kind.to_string();
            for (name, item) in &response.items {
                write!(text, " +{name}@{}", item.version).unwrap();
            }
            for name in &response.removed {
                write!(text, " -{name}").unwrap();
            }
            all.push((text, response));
        }
        all
    }

    #[track_caller]
    fn expect(&mut self, expected: &[&str]) -> Vec<Response> {
        let sent = self.sent();
        let texts: Vec<_> = sent.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(texts, expected);
        sent.into_iter().map(|(_, response)| response).collect()
    }

    fn ack(&mut self, response: &Response) {
        self.request(response.kind, |request| request.nonce.clone_from(&response.nonce));
    }

    fn nack(&mut self, response: &Response, words: &str) {
        self.request(response.kind, |request| {
            request.nonce.clone_from(&response.nonce);
            request.error = Some(words.to_owned());
        });
    }

    #[track_caller]
    fn expect_and_ack(&mut self, expected: &[&str]) {
        for response in self.expect(expected) {
            self.ack(&response);
        }
    }
}

#[test]
fn clusters_then_endpoints_then_listeners() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "1")], &[]);
    table.control(Kind::Cluster, &[("c", "1")], &[]);
    table.control(Kind::Endpoint, &[("c", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Cluster, &[]);
    table.subscribe(Kind::Listener, &["*"]);
    let clusters = table.expect(&["clusters +c@1"]);
    table.subscribe(Kind::Endpoint, &["c"]);
    table.expect_and_ack(&["endpoints +c@1"]);
    table.ack(&clusters[0]); // warm
    table.expect_and_ack(&["listeners +l@1"]);
    table.expect(&[]);
}

#[test]
fn removals_go_the_other_way_round() {
    let mut table = Table::new();
    table.control(Kind::Cluster, &[("c", "1")], &[]);
    table.control(Kind::Listener, &[("l", "1"), ("m", "1")], &[]);
    table.synced();
    for (kind, names) in [(Kind::Cluster, vec!["c"]), (Kind::Listener, vec!["l", "m"])] {
        table.request(kind, |request| {
            request.initial_versions =
                names.into_iter().map(|name| (name.to_owned(), "1".to_owned())).collect();
        });
    }
    table.expect_and_ack(&["clusters"]);
    table.expect_and_ack(&["listeners"]);
    table.control(Kind::Cluster, &[], &["c"]);
    table.control(Kind::Listener, &[("m", "2")], &["l"]);
    table.expect_and_ack(&["listeners +m@2"]);
    table.expect_and_ack(&["listeners -l"]);
    table.expect_and_ack(&["clusters -c"]);
    table.expect(&[]);
}

#[test]
fn a_filter_configuration_goes_before_its_listener_and_leaves_after_it() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "1")], &[]);
    table.control(Kind::Extension, &[("e", "1"), ("nobody-asks", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Listener, &["*"]);
    let listeners = table.expect(&["listeners +l@1"]);
    // Envoy asks while the listener warms.
    table.subscribe(Kind::Extension, &["e"]);
    table.expect_and_ack(&["extensions +e@1"]);
    table.ack(&listeners[0]);
    // A change of the permission is one resource.
    table.control(Kind::Extension, &[("e", "2")], &[]);
    table.expect_and_ack(&["extensions +e@2"]);
    // A change of both: the listener waits until the other is in force.
    table.control(Kind::Listener, &[("l", "2")], &[]);
    table.control(Kind::Extension, &[("e", "3")], &[]);
    table.expect_and_ack(&["extensions +e@3"]);
    table.expect_and_ack(&["listeners +l@2"]);
    table.control(Kind::Extension, &[], &["e"]);
    table.control(Kind::Listener, &[("m", "1")], &["l"]);
    table.expect_and_ack(&["listeners +m@1"]);
    table.expect_and_ack(&["listeners -l"]);
    table.expect_and_ack(&["extensions -e"]);
    table.expect(&[]);
}

#[test]
fn a_refused_filter_configuration_is_pinned_by_name() {
    let mut table = Table::new();
    table.control(Kind::Extension, &[("e", "1"), ("f", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Extension, &["e", "f"]);
    table.expect_and_ack(&["extensions +e@1 +f@1"]);
    table.control(Kind::Extension, &[("e", "2"), ("f", "2")], &[]);
    let both = table.expect(&["extensions +e@2 +f@2"]);
    table.nack(&both[0], "one of them");
    let single = table.expect(&["extensions +e@2"]);
    table.nack(&single[0], "no such matcher");
    table.expect_and_ack(&["extensions +f@2"]);
    table.expect(&[]);
    let rejections = table.cache.rejections();
    assert_eq!(rejections.len(), 1);
    assert_eq!((rejections[0].name.as_str(), rejections[0].version.as_str()), ("e", "2"));
    assert_eq!(rejections[0].type_url, Kind::Extension.type_url());

    // The last good one is what is kept on disk and what the next Envoy gets.
    let good = table.cache.good();
    let versions: Vec<_> =
        good.iter().map(|(_, name, item)| (name.as_str(), item.version.as_str())).collect();
    assert_eq!(versions, [("e", "1"), ("f", "2")]);
    let mut other = Table { cache: table.cache, stream: Downstream::new() };
    other.subscribe(Kind::Extension, &["e", "f"]);
    other.expect_and_ack(&["extensions +e@1 +f@2"]);
}

#[test]
fn nothing_is_removed_before_control_has_told_everything() {
    let mut table = Table::new();
    table.cache.load(vec![(Kind::Cluster, "old".to_owned(), item(Kind::Cluster, "old", "1").1)]);
    table.request(Kind::Cluster, |request| {
        // `damaged` is missing on disk, but Envoy has it.
        for name in ["old", "damaged"] {
            request.initial_versions.insert(name.to_owned(), "1".to_owned());
        }
    });
    table.expect_and_ack(&["clusters"]);
    table.cache.begin_sync();
    table.control(Kind::Cluster, &[("new", "1")], &["old"]);
    table.expect_and_ack(&["clusters +new@1"]);
    table.synced();
    table.expect_and_ack(&["clusters -damaged -old"]);
}

#[test]
fn a_reconnect_resends_nothing() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "7"), ("m", "1")], &[]);
    table.synced();
    table.request(Kind::Listener, |request| {
        request.subscribe = vec!["*".to_owned()];
        request.initial_versions.insert("l".to_owned(), "7".to_owned());
    });
    table.expect_and_ack(&["listeners +m@1"]);
    assert_eq!(table.cache.accepted(Kind::Listener).len(), 2);
}

#[test]
fn an_empty_world_is_an_answer_once_it_is_known_to_be_empty() {
    let mut table = Table::new();
    table.subscribe(Kind::Cluster, &[]);
    table.subscribe(Kind::Endpoint, &["nobody"]);
    table.expect(&[]);
    table.synced();
    table.expect_and_ack(&["clusters"]);
    table.expect(&[]); // an unknown name stays pending
    table.control(Kind::Endpoint, &[("nobody", "1")], &[]);
    table.expect_and_ack(&["endpoints +nobody@1"]);
}

#[test]
fn one_response_per_type_is_on_its_way_and_the_latest_wins() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Listener, &["*"]);
    let first = table.expect(&["listeners +l@1"]);
    table.control(Kind::Listener, &[("l", "2")], &[]);
    table.control(Kind::Listener, &[("l", "3")], &[]);
    table.expect(&[]);
    table.ack(&first[0]);
    table.expect_and_ack(&["listeners +l@3"]);
}

#[test]
fn a_nonce_of_another_stream_answers_nothing() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Listener, &["*"]);
    let sent = table.expect(&["listeners +l@1"]);
    table.request(Kind::Listener, |request| request.nonce = "stale".to_owned());
    assert!(table.cache.accepted(Kind::Listener).is_empty());
    table.ack(&sent[0]);
    assert_eq!(table.cache.accepted(Kind::Listener).len(), 1);
}

#[test]
fn a_refused_resource_is_found_and_pinned_and_its_neighbours_arrive() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("a", "1"), ("b", "1"), ("c", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Listener, &["*"]);
    table.expect_and_ack(&["listeners +a@1 +b@1 +c@1"]);
    table.control(Kind::Listener, &[("a", "2"), ("b", "2"), ("c", "2")], &[]);
    let all = table.expect(&["listeners +a@2 +b@2 +c@2"]);
    table.nack(&all[0], "something in there");
    for (name, good) in [("a", true), ("b", false), ("c", true)] {
        let single = table.expect(&[&format!("listeners +{name}@2")]);
        if good {
            table.ack(&single[0]);
        } else {
            table.nack(&single[0], "no such filter");
        }
    }
    table.expect(&[]); // Envoy still has b@1
    let rejections = table.cache.rejections();
    assert_eq!(rejections.len(), 1);
    assert_eq!((rejections[0].name.as_str(), rejections[0].message.as_str()), ("b", "no such filter"));
    assert_eq!(table.cache.accepted(Kind::Listener)["b"], "1");

    // A new Envoy gets the version that worked.
    let mut other = Table { cache: table.cache, stream: Downstream::new() };
    other.subscribe(Kind::Listener, &["*"]);
    other.expect_and_ack(&["listeners +a@2 +b@1 +c@2"]);

    // A corrected version is tried at once, and clears the report.
    other.control(Kind::Listener, &[("b", "3")], &[]);
    other.expect_and_ack(&["listeners +b@3"]);
    assert!(other.cache.rejections().is_empty());
}

#[test]
fn what_never_worked_is_tried_again_by_a_new_envoy() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Listener, &["*"]);
    let sent = table.expect(&["listeners +l@1"]);
    table.nack(&sent[0], "address in use");
    table.expect(&[]);
    let mut other = Table { cache: table.cache, stream: Downstream::new() };
    other.subscribe(Kind::Listener, &["*"]);
    other.expect_and_ack(&["listeners +l@1"]);
    assert!(other.cache.rejections().is_empty());
}

#[test]
fn an_updated_cluster_gets_its_endpoints_again() {
    let mut table = Table::new();
    table.control(Kind::Cluster, &[("c", "1")], &[]);
    table.control(Kind::Endpoint, &[("c", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Cluster, &[]);
    table.expect_and_ack(&["clusters +c@1"]);
    table.subscribe(Kind::Endpoint, &["c"]);
    table.expect_and_ack(&["endpoints +c@1"]);
    table.control(Kind::Cluster, &[("c", "2")], &[]);
    // Both before the acknowledgement, which Envoy withholds until the cluster is warm.
    for response in table.expect(&["clusters +c@2", "endpoints +c@1"]).iter().rev() {
        table.ack(response);
    }
    table.expect(&[]);
}

#[test]
fn a_subscription_is_always_answered_and_an_unsubscription_respected() {
    let mut table = Table::new();
    table.control(Kind::Secret, &[("s", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Secret, &["s"]);
    table.expect_and_ack(&["secrets +s@1"]);
    table.subscribe(Kind::Secret, &["s"]);
    table.expect_and_ack(&["secrets +s@1"]);
    table.request(Kind::Secret, |request| request.unsubscribe = vec!["s".to_owned()]);
    table.control(Kind::Secret, &[("s", "2")], &[]);
    table.expect(&[]);
}

#[test]
fn the_agents_own_secret_is_out_of_controls_reach() {
    let mut table = Table::new();
    table.cache.put_local(Kind::Secret, "leaf", item(Kind::Secret, "leaf", "mine").1);
    table.control(Kind::Secret, &[("leaf", "theirs")], &[]);
    table.synced();
    table.control(Kind::Secret, &[], &["leaf"]);
    table.subscribe(Kind::Secret, &["leaf"]);
    table.expect_and_ack(&["secrets +leaf@mine"]);
    assert!(table.cache.good().is_empty(), "its key is not kept with the relayed configuration");
    assert!(table.cache.held_versions(Kind::Secret).is_empty());
}

/// What control is told of one type: `-` without an Envoy, then what is pending and `!` what is refused.
fn told(table: &Table, kind: Kind) -> String {
    let unapplied = table.cache.unapplied(kind);
    let mut words: Vec<String> = unapplied.no_envoy.then(|| "-".to_owned()).into_iter().collect();
    words.extend(unapplied.pending);
    words.extend(
        unapplied.refused.into_iter().map(|refused| format!("!{}@{}", refused.name, refused.version)),
    );
    words.join(" ")
}

#[test]
fn control_is_told_what_envoy_acknowledged_and_not_what_is_stored() {
    let mut table = Table::new();
    table.control(Kind::Cluster, &[("c", "1"), ("d", "1")], &[]);
    table.synced();
    assert_eq!(told(&table, Kind::Cluster), "-");
    table.subscribe(Kind::Cluster, &[]);
    assert_eq!(told(&table, Kind::Cluster), "c d");
    table.expect_and_ack(&["clusters +c@1 +d@1"]);
    assert_eq!(told(&table, Kind::Cluster), "");
    table.control(Kind::Cluster, &[("c", "2")], &[]);
    assert_eq!(told(&table, Kind::Cluster), "c");
    table.expect_and_ack(&["clusters +c@2"]);
    assert_eq!(told(&table, Kind::Cluster), "");
    // Envoy dies: whatever it ran, nothing runs now.
    table.stream.close(&table.cache);
    assert_eq!(told(&table, Kind::Cluster), "-");
    // An Envoy that lived on through an agent's restart says what it has.
    table.stream = Downstream::new();
    table.request(Kind::Cluster, |request| {
        request.initial_versions =
            [("c".to_owned(), "2".to_owned()), ("d".to_owned(), "0".to_owned())].into();
    });
    assert_eq!(told(&table, Kind::Cluster), "d");
}

#[test]
fn an_older_envoys_end_and_acknowledgements_say_nothing_about_the_newer() {
    let mut table = Table::new();
    table.control(Kind::Cluster, &[("c", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Cluster, &[]);
    let response = table.expect(&["clusters +c@1"]).remove(0);
    let mut older = std::mem::take(&mut table.stream);
    table.subscribe(Kind::Cluster, &[]);
    let ack = Request {
        type_url: Kind::Cluster.type_url().to_owned(),
        nonce: response.nonce,
        ..Request::default()
    };
    older.on_request(&ack, &table.cache);
    assert_eq!(told(&table, Kind::Cluster), "c");
    older.close(&table.cache);
    table.expect_and_ack(&["clusters +c@1"]);
    assert_eq!(told(&table, Kind::Cluster), "");
}

#[test]
fn what_envoy_does_not_ask_for_waits_for_nobody() {
    let mut table = Table::new();
    table.control(Kind::Cluster, &[("c", "1")], &[]);
    table.control(Kind::Secret, &[("s", "1"), ("t", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Cluster, &[]);
    table.subscribe(Kind::Listener, &["*"]);
    table.subscribe(Kind::Secret, &["s"]);
    let sent = table.expect(&["clusters +c@1", "secrets +s@1"]);
    assert_eq!(told(&table, Kind::Secret), "s t");
    for response in &sent {
        table.ack(response);
    }
    table.expect_and_ack(&["listeners"]);
    table.expect(&[]);
    assert_eq!(told(&table, Kind::Secret), "");
}

#[test]
fn a_refusal_stands_for_a_new_envoy_and_ends_with_the_next_version() {
    let mut table = Table::new();
    table.control(Kind::Listener, &[("l", "1")], &[]);
    table.synced();
    table.subscribe(Kind::Cluster, &[]);
    table.expect_and_ack(&["clusters"]);
    table.subscribe(Kind::Listener, &["*"]);
    table.expect_and_ack(&["listeners +l@1"]);
    table.control(Kind::Listener, &[("l", "2")], &[]);
    let bad = table.expect(&["listeners +l@2"]).remove(0);
    table.nack(&bad, "no such filter");
    assert_eq!(told(&table, Kind::Listener), "!l@2");
    table.stream.close(&table.cache);
    assert_eq!(told(&table, Kind::Listener), "- !l@2");
    // A new Envoy gets the last good version.
    table.stream = Downstream::new();
    table.subscribe(Kind::Cluster, &[]);
    table.expect_and_ack(&["clusters"]);
    table.subscribe(Kind::Listener, &["*"]);
    table.expect_and_ack(&["listeners +l@1"]);
    assert_eq!(told(&table, Kind::Listener), "!l@2");
    table.control(Kind::Listener, &[("l", "3")], &[]);
    table.expect_and_ack(&["listeners +l@3"]);
    assert_eq!(told(&table, Kind::Listener), "");
}
