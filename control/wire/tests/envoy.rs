//! What we write is what Envoy reads, and the other way round; and nothing that arrives makes us panic.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::collections::HashMap;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as envoy_tls;
use envoy_types::pb::envoy::service::discovery::v3 as envoy;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::rpc::Status;
use proptest::prelude::*;
use prost::Message;
use ursa_wire::discovery::{
    ControlPlane, DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail, Node, Rejection, Resource,
};
use ursa_wire::ticket::Ticket;
use ursa_wire::{identity, join, resources, sds, session, type_url};

#[test]
fn responses_are_envoys() {
    let resource = Resource::new(type_url::CLUSTER, "backend", "v1", Bytes::from_static(b"\x0a\x01x"));
    let ours = DeltaDiscoveryResponse {
        system_version_info: "synced".into(),
        resources: vec![resource.encoded(), resource.encoded()],
        type_url: type_url::CLUSTER.into(),
        nonce: "7".into(),
        removed_resources: vec!["gone".into()],
        control_plane: Some(ControlPlane { identifier: "ursa".into() }),
    };
    let theirs_resource = envoy::Resource {
        name: "backend".into(),
        version: "v1".into(),
        resource: Some(Any { type_url: type_url::CLUSTER.into(), value: b"\x0a\x01x".to_vec() }),
        ..envoy::Resource::default()
    };
    let theirs = envoy::DeltaDiscoveryResponse {
        system_version_info: "synced".into(),
        resources: vec![theirs_resource.clone(), theirs_resource],
        type_url: type_url::CLUSTER.into(),
        nonce: "7".into(),
        removed_resources: vec!["gone".into()],
        control_plane: Some(core::ControlPlane { identifier: "ursa".into() }),
        ..envoy::DeltaDiscoveryResponse::default()
    };
    let bytes = ours.encode_to_vec();
    assert_eq!(envoy::DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap(), theirs);
    assert_eq!(DeltaDiscoveryResponse::decode(theirs.encode_to_vec().as_slice()).unwrap(), ours);
    assert_eq!(Resource::parse(&ours.resources[0]).unwrap(), resource);
}

#[test]
fn requests_are_envoys() {
    let versions = HashMap::from([("a".to_owned(), "1".to_owned())]);
    let theirs = envoy::DeltaDiscoveryRequest {
        node: Some(core::Node {
            id: "default.web-1".into(),
            cluster: "web".into(),
            user_agent_name: "envoy".into(),
            ..core::Node::default()
        }),
        type_url: type_url::LISTENER.into(),
        resource_names_subscribe: vec!["*".into()],
        resource_names_unsubscribe: vec!["b".into()],
        initial_resource_versions: versions.clone(),
        response_nonce: "3".into(),
        error_detail: Some(Status { code: 13, message: "no".into(), details: Vec::new() }),
        ..envoy::DeltaDiscoveryRequest::default()
    };
    let ours = DeltaDiscoveryRequest::decode(theirs.encode_to_vec().as_slice()).unwrap();
    assert_eq!(
        ours,
        DeltaDiscoveryRequest {
            node: Some(Node {
                id: "default.web-1".into(),
                cluster: "web".into(),
                user_agent_name: "envoy".into(),
                ..Node::default()
            }),
            type_url: type_url::LISTENER.into(),
            resource_names_subscribe: vec!["*".into()],
            resource_names_unsubscribe: vec!["b".into()],
            initial_resource_versions: versions,
            response_nonce: "3".into(),
            error_detail: Some(ErrorDetail { code: 13, message: "no".into() }),
            applied: None,
        }
    );
    assert_eq!(envoy::DeltaDiscoveryRequest::decode(ours.encode_to_vec().as_slice()).unwrap(), theirs);
}

#[test]
fn a_real_nodes_metadata_and_version_do_not_disturb() {
    let theirs = core::Node {
        id: "default.web-1".into(),
        user_agent_version_type: Some(core::node::UserAgentVersionType::UserAgentBuildVersion(
            core::BuildVersion::default(),
        )),
        metadata: Some(envoy_types::pb::google::protobuf::Struct::default()),
        ..core::Node::default()
    };
    let ours = Node::decode(theirs.encode_to_vec().as_slice()).unwrap();
    assert_eq!(ours.id, "default.web-1");
}

#[test]
fn a_certificate_secret_is_envoys() {
    let ours = sds::Secret::certificate("kri_mid_default_default__identity_", "CHAIN", "KEY");
    let theirs = envoy_tls::Secret::decode(ours.encode_to_vec().as_slice()).unwrap();
    assert_eq!(theirs.name, "kri_mid_default_default__identity_");
    let Some(envoy_tls::secret::Type::TlsCertificate(certificate)) = theirs.r#type else {
        panic!("another kind of secret");
    };
    let inline = |source: Option<core::DataSource>| match source.unwrap().specifier.unwrap() {
        core::data_source::Specifier::InlineBytes(bytes) => bytes,
        other => panic!("{other:?}"),
    };
    assert_eq!(inline(certificate.certificate_chain), b"CHAIN");
    assert_eq!(inline(certificate.private_key), b"KEY");
}

#[test]
fn rejections_survive_their_text_form() {
    let rejection = Rejection { name: "a".into(), version: "1".into(), message: "no".into() };
    let text = Rejection::encode_all(std::slice::from_ref(&rejection));
    assert_eq!(Rejection::decode_all(&text), [rejection]);
    assert_eq!(Rejection::decode_all("plain words")[0].message, "plain words");
}

#[test]
fn tickets_survive_their_text_form_and_hide_their_secret() {
    let ticket =
        Ticket { address: "cp:5678".into(), fingerprint: "ab".into(), secret: "s3cret".into(), expires: 9 };
    assert_eq!(ticket.to_string().parse::<Ticket>().unwrap(), ticket);
    assert!(!format!("{ticket:?}").contains("s3cret"));
    for broken in ["", "ursa1.", "ursa1.!!!", "eyJhbGciOi"] {
        assert!(broken.parse::<Ticket>().is_err(), "{broken}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let shared = Bytes::from(bytes);
        let _ = Resource::parse(&shared);
        let _ = DeltaDiscoveryRequest::decode(shared.clone());
        let _ = DeltaDiscoveryResponse::decode(shared.clone());
        let _ = session::NodeMessage::decode(shared.clone());
        let _ = session::ControlMessage::decode(shared.clone());
        let _ = join::JoinRequest::decode(shared.clone());
        let _ = identity::IssueRequest::decode(shared.clone());
        let _ = resources::Name::decode(shared.clone());
        let _ = resources::WorkloadIdentity::decode(shared.clone());
        let _ = sds::Secret::decode(shared.clone());
        let text = String::from_utf8_lossy(&shared);
        let _ = text.parse::<Ticket>();
        let _ = Rejection::decode_all(&text);
    }

    #[test]
    fn resources_survive(name in ".{0,40}", version in ".{0,20}", value in prop::collection::vec(any::<u8>(), 0..256)) {
        let resource = Resource::new(type_url::CLUSTER, &name, &version, value.into());
        let response = DeltaDiscoveryResponse { resources: vec![resource.encoded()], ..DeltaDiscoveryResponse::default() };
        let again = DeltaDiscoveryResponse::decode(response.encode_to_vec().as_slice()).unwrap();
        prop_assert_eq!(Resource::parse(&again.resources[0]).unwrap(), resource);
    }
}
