//! The little of a resource that the relay reads: names and versions, never the configuration itself.

use bytes::Bytes;
use prost::Message;
use ursa_wire::discovery::Resource;

use super::Item;

/// A resource that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The bytes are no discovery `Resource`.
    #[error("not a discovery resource")]
    Malformed(#[source] prost::DecodeError),
    /// It has no name, so nobody can subscribe to it or remove it.
    #[error("a discovery resource without a name")]
    Nameless,
}

#[derive(Clone, PartialEq, Message)]
struct Cluster {
    #[prost(int32, optional, tag = "2")]
    discovery_type: Option<i32>,
    #[prost(message, optional, tag = "3")]
    eds: Option<EdsClusterConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct EdsClusterConfig {
    #[prost(string, tag = "2")]
    service_name: String,
}

/// Reads the name and version of an encoded discovery `Resource`.
pub fn item_from_encoded(bytes: Bytes) -> Result<(String, Item), ResourceError> {
    let head = Resource::parse(&bytes).map_err(ResourceError::Malformed)?;
    if head.name.is_empty() {
        return Err(ResourceError::Nameless);
    }
    Ok((head.name, Item { version: head.version, bytes }))
}

/// The message inside an encoded discovery `Resource`.
pub(crate) fn value(item: &Item) -> Result<Bytes, ResourceError> {
    Resource::parse(&item.bytes).map(|resource| resource.value()).map_err(ResourceError::Malformed)
}

/// The name under which a cluster asks for its endpoints, if it asks for them at all.
pub(super) fn endpoints_of_cluster(name: &str, encoded: &Bytes) -> Option<String> {
    /// `Cluster.DiscoveryType.EDS`
    const EDS: i32 = 3;
    let cluster = Cluster::decode(Resource::parse(encoded).ok()?.value()).ok()?;
    if cluster.discovery_type != Some(EDS) {
        return None;
    }
    let service_name = cluster.eds.map(|eds| eds.service_name).unwrap_or_default();
    Some(if service_name.is_empty() { name.to_owned() } else { service_name })
}
