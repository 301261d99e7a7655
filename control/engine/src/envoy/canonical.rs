//! One byte form for equal messages.
//!
//! Protobuf maps have no order on the wire and prost writes them in that of a randomly seeded hash map, so two
//! encodings of one resource differ although nothing changed. [`canonical`] rewrites encoded bytes with map
//! entries sorted, inside every nested message and every `Any`. What is unknown stays as it is.

use std::sync::OnceLock;

use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

static DESCRIPTORS: &[u8] = include_bytes!("descriptors.binpb");

/// Descriptors of every Envoy message that the engine uses.
pub(crate) fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| {
        DescriptorPool::decode(DESCRIPTORS).expect("invariant: the committed descriptors decode")
    })
}

/// The message type with this type URL.
pub(crate) fn message(type_url: &str) -> Option<MessageDescriptor> {
    pool().get_message_by_name(type_url.rsplit('/').next()?)
}

/// The message with map entries in order of their bytes. Bytes that don't parse come back unchanged.
pub(crate) fn canonical(descriptor: &MessageDescriptor, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    if rewrite(descriptor, bytes, &mut out).is_none() {
        out.clear();
        out.extend_from_slice(bytes);
    }
    out
}

const LENGTH_DELIMITED: u64 = 2;

/// `None` when the bytes are no encoding of a message.
fn rewrite(descriptor: &MessageDescriptor, mut bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
    if descriptor.full_name() == "google.protobuf.Any" {
        return rewrite_any(bytes, out);
    }
    // Entries of the map field that is being read; they stand together because prost writes them so.
    let mut entries: Vec<Vec<u8>> = Vec::new();
    let mut map_field = 0;
    while !bytes.is_empty() {
        let start = bytes;
        let tag = varint(&mut bytes)?;
        let number = u32::try_from(tag >> 3).ok()?;
        if map_field != 0 && number != map_field {
            flush(&mut entries, out);
            map_field = 0;
        }
        if tag & 7 != LENGTH_DELIMITED {
            skip(tag & 7, &mut bytes)?;
            out.extend_from_slice(&start[..start.len() - bytes.len()]);
            continue;
        }
        let content = take(&mut bytes)?;
        let Some(Kind::Message(nested)) = descriptor.get_field(number).as_ref().map(FieldDescriptor::kind)
        else {
            out.extend_from_slice(&start[..start.len() - bytes.len()]);
            continue;
        };
        let mut body = Vec::with_capacity(content.len());
        rewrite(&nested, content, &mut body)?;
        if nested.is_map_entry() {
            map_field = number;
            let mut entry = Vec::with_capacity(body.len() + 4);
            put_delimited(tag, &body, &mut entry);
            entries.push(entry);
        } else {
            put_delimited(tag, &body, out);
        }
    }
    flush(&mut entries, out);
    Some(())
}

/// An `Any` names its message; the canonical form reaches into it.
fn rewrite_any(mut bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut url = "";
    while !bytes.is_empty() {
        let start = bytes;
        let tag = varint(&mut bytes)?;
        if tag & 7 != LENGTH_DELIMITED {
            skip(tag & 7, &mut bytes)?;
            out.extend_from_slice(&start[..start.len() - bytes.len()]);
            continue;
        }
        let content = take(&mut bytes)?;
        match (tag >> 3, message(url)) {
            (2, Some(inner)) => put_delimited(tag, &canonical(&inner, content), out),
            (number, _) => {
                if number == 1 {
                    url = std::str::from_utf8(content).ok()?;
                }
                put_delimited(tag, content, out);
            }
        }
    }
    Some(())
}

fn flush(entries: &mut Vec<Vec<u8>>, out: &mut Vec<u8>) {
    entries.sort_unstable();
    for entry in entries.drain(..) {
        out.extend_from_slice(&entry);
    }
}

fn put_delimited(tag: u64, content: &[u8], out: &mut Vec<u8>) {
    prost::encoding::encode_varint(tag, out);
    prost::encoding::encode_varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(bytes).ok()
}

fn take<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(varint(bytes)?).ok()?;
    let (content, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(content)
}

fn skip(wire_type: u64, bytes: &mut &[u8]) -> Option<()> {
    let width = match wire_type {
        0 => return varint(bytes).map(|_| ()),
        1 => 8,
        5 => 4,
        _ => return None,
    };
    *bytes = bytes.split_at_checked(width)?.1;
    Some(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use prost::Message;

    use super::*;
    use crate::{
        envoy::{encode::any, types::listener::Listener},
        xds::part,
    };

    #[test]
    fn map_order_is_one_even_inside_any() {
        let labels: BTreeMap<String, String> =
            (0..20).map(|n| (format!("label-{n}"), n.to_string())).collect();
        let descriptor = message("type.googleapis.com/envoy.config.listener.v3.Listener").expect("known");
        let make = || {
            let inner = Listener { metadata: part::metadata("inner", &labels), ..Listener::default() };
            let mut outer = Listener { metadata: part::metadata("outer", &labels), ..Listener::default() };
            outer
                .filter_chains
                .push(crate::xds::listener::chain(vec![crate::xds::filter::network("f", any(&inner))]));
            outer.encode_to_vec()
        };
        let raw: BTreeSet<Vec<u8>> = (0..20).map(|_| make()).collect();
        assert!(raw.len() > 1, "the order on the wire is random");
        let same: BTreeSet<Vec<u8>> = raw.iter().map(|bytes| canonical(&descriptor, bytes)).collect();
        assert_eq!(same.len(), 1);
        let same = same.first().expect("one");
        let first = raw.first().expect("one");
        assert_eq!(same.len(), first.len());
        assert_eq!(Listener::decode(same.as_slice()).expect("decodes").name, "");
    }

    #[test]
    fn broken_bytes_come_back() {
        let descriptor = message("type.googleapis.com/envoy.config.listener.v3.Listener").expect("known");
        assert_eq!(canonical(&descriptor, &[0x0a, 0xff]), [0x0a, 0xff]);
    }
}
