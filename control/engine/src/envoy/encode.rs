//! From a message to an [`Encoded`] resource, and back to JSON for people.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use prost::{Message, encoding};
use prost_reflect::DynamicMessage;
use twox_hash::XxHash3_128;

use super::{canonical, types::Any};
use crate::encoded::{Encoded, TypeUrl};

/// Wraps a message in `Any`.
pub(crate) fn any<M: Message + prost::Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

/// Encodes a resource once: canonical bytes, their hash as the version, and the discovery message around them.
pub(crate) fn resource<M: Message>(kind: TypeUrl, name: &str, message: &M) -> Arc<Encoded> {
    let mut body = message.encode_to_vec();
    canonical::sort(kind.as_str(), &mut body);
    let version: Arc<str> = format!("{:032x}", XxHash3_128::oneshot(&body)).into();
    wrap(kind, name.into(), version, &body)
}

/// `envoy.service.discovery.v3.Resource`: version = 1, resource (`Any`) = 2, name = 3. Written by hand so that
/// the resource itself is a slice of the whole.
fn wrap(kind: TypeUrl, name: Arc<str>, version: Arc<str>, body: &[u8]) -> Arc<Encoded> {
    let url = kind.as_str();
    let any_length = string_length(url.len()) + string_length(body.len());
    let mut out = BytesMut::with_capacity(any_length + name.len() + version.len() + 24);
    put(1, version.as_bytes(), &mut out);
    encoding::encode_key(2, encoding::WireType::LengthDelimited, &mut out);
    encoding::encode_varint(any_length as u64, &mut out);
    put(1, url.as_bytes(), &mut out);
    put(2, body, &mut out);
    let end = out.len();
    put(3, name.as_bytes(), &mut out);
    let bytes: Bytes = out.freeze();
    let any_value = bytes.slice(end - body.len()..end);
    Arc::new(Encoded { name, version, bytes, any_value })
}

fn string_length(content: usize) -> usize {
    1 + encoding::encoded_len_varint(content as u64) + content
}

fn put(number: u32, content: &[u8], out: &mut BytesMut) {
    encoding::encode_key(number, encoding::WireType::LengthDelimited, out);
    encoding::encode_varint(content.len() as u64, out);
    out.put_slice(content);
}

/// A resource as canonical proto JSON, `Any` expanded. `None` for what is not a message of Envoy.
pub(crate) fn json(kind: TypeUrl, resource: &Encoded) -> Option<serde_json::Value> {
    let descriptor = canonical::message(kind.as_str())?;
    let message = DynamicMessage::decode(descriptor, resource.any_value.clone()).ok()?;
    serde_json::to_value(message).ok()
}
