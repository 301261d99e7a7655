//! One byte form for equal messages.
//!
//! Protobuf maps have no order on the wire and prost writes them in that of a randomly seeded hash map, so two
//! encodings of one resource differ although nothing changed. [`sort`] orders map entries by their bytes, inside
//! every nested message and every `Any`. Order is all that changes, so it works in place; and it walks only into
//! messages that can hold a map or an `Any`, which a [`Shapes`] table knows. What is unknown stays as it is.

use std::{collections::HashMap, ops::Range, sync::OnceLock};

use prost_reflect::{DescriptorPool, Kind, MessageDescriptor};

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
    pool().get_message_by_name(name_of(type_url))
}

/// Orders the map entries of an encoded message of this type URL. Bytes that don't parse stay as they are.
pub(crate) fn sort(type_url: &str, bytes: &mut [u8]) {
    let shapes = Shapes::get();
    if let Some(shape) = shapes.named(type_url) {
        // What doesn't parse is left where it stands; its parts may be in order already.
        let _ = shapes.sort(shape, bytes);
    }
}

fn name_of(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or_default()
}

/// What matters of a message type: where to look for maps.
#[derive(Debug, Default)]
struct Shape {
    is_any: bool,
    is_map_entry: bool,
    /// Whether a map or an `Any` can be anywhere inside.
    is_worth_a_look: bool,
    /// Message fields that are worth a look or are maps: number and index of the shape, by number.
    fields: Vec<(u64, usize)>,
}

/// Shapes of all messages. Looking a field up in it is a search in a short list, where descriptors cost several
/// hash lookups.
#[derive(Debug)]
struct Shapes {
    by_name: HashMap<String, usize>,
    all: Vec<Shape>,
}

const LENGTH_DELIMITED: u64 = 2;

impl Shapes {
    fn get() -> &'static Self {
        static SHAPES: OnceLock<Shapes> = OnceLock::new();
        SHAPES.get_or_init(|| Self::of(pool()))
    }

    fn of(pool: &DescriptorPool) -> Self {
        let messages: Vec<MessageDescriptor> = pool.all_messages().collect();
        let by_name: HashMap<String, usize> =
            messages.iter().enumerate().map(|(at, message)| (message.full_name().to_owned(), at)).collect();
        let mut all: Vec<Shape> = messages
            .iter()
            .map(|message| {
                let mut fields: Vec<(u64, usize)> = message
                    .fields()
                    .filter_map(|field| match field.kind() {
                        Kind::Message(nested) => {
                            Some((u64::from(field.number()), *by_name.get(nested.full_name())?))
                        }
                        _ => None,
                    })
                    .collect();
                fields.sort_unstable();
                let is_any = message.full_name() == "google.protobuf.Any";
                Shape { is_any, is_map_entry: message.is_map_entry(), is_worth_a_look: is_any, fields }
            })
            .collect();
        // Messages nest in circles: go round until nothing is added.
        loop {
            let more: Vec<usize> = (0..all.len())
                .filter(|at| !all[*at].is_worth_a_look)
                .filter(|at| {
                    let mut nested = all[*at].fields.iter().map(|(_, nested)| &all[*nested]);
                    nested.any(|nested| nested.is_map_entry || nested.is_worth_a_look)
                })
                .collect();
            if more.is_empty() {
                break;
            }
            for at in more {
                all[at].is_worth_a_look = true;
            }
        }
        let tells: Vec<bool> = all.iter().map(|shape| shape.is_worth_a_look || shape.is_map_entry).collect();
        for shape in &mut all {
            shape.fields.retain(|(_, nested)| tells[*nested]);
        }
        Self { by_name, all }
    }

    fn named(&self, type_url: &str) -> Option<&Shape> {
        self.by_name.get(name_of(type_url)).map(|at| &self.all[*at])
    }

    fn field(&self, shape: &Shape, number: u64) -> Option<&Shape> {
        shape.fields.iter().find(|(known, _)| *known == number).map(|(_, at)| &self.all[*at])
    }

    /// `None` when the bytes are no encoding of a message.
    fn sort(&self, shape: &Shape, bytes: &mut [u8]) -> Option<()> {
        if shape.is_any {
            return self.sort_any(bytes);
        }
        if !shape.is_worth_a_look {
            return Some(());
        }
        // Entries of the map field that is being read; they stand together because prost writes them so.
        let mut entries: Vec<Range<usize>> = Vec::new();
        let mut map_field = 0;
        let mut at = 0;
        while at < bytes.len() {
            let (tag, content) = next_field(bytes, at)?;
            let number = tag >> 3;
            if number != map_field {
                order(&mut entries, bytes);
                map_field = 0;
            }
            if tag & 7 == LENGTH_DELIMITED
                && let Some(nested) = self.field(shape, number)
            {
                self.sort(nested, &mut bytes[content.clone()])?;
                if nested.is_map_entry {
                    map_field = number;
                    entries.push(at..content.end);
                }
            }
            at = content.end;
        }
        order(&mut entries, bytes);
        Some(())
    }

    /// An `Any` names its message (field 1) and holds it (field 2).
    fn sort_any(&self, bytes: &mut [u8]) -> Option<()> {
        let mut shape = None;
        let mut at = 0;
        while at < bytes.len() {
            let (tag, content) = next_field(bytes, at)?;
            at = content.end;
            match (tag >> 3, shape) {
                (1, _) => shape = self.named(std::str::from_utf8(&bytes[content]).ok()?),
                (2, Some(shape)) => self.sort(shape, &mut bytes[content])?,
                _ => {}
            }
        }
        Some(())
    }
}

/// Puts neighbouring entries in order of their bytes.
fn order(entries: &mut Vec<Range<usize>>, bytes: &mut [u8]) {
    if let [first, .., last] = entries.as_slice() {
        let whole = first.start..last.end;
        let mut parts: Vec<&[u8]> = entries.iter().map(|entry| &bytes[entry.clone()]).collect();
        parts.sort_unstable();
        let sorted = parts.concat();
        bytes[whole].copy_from_slice(&sorted);
    }
    entries.clear();
}

/// Tag and content of the field that begins at `at`; a number's content is its bytes.
fn next_field(bytes: &[u8], at: usize) -> Option<(u64, Range<usize>)> {
    let mut rest = &bytes[at..];
    let tag = varint(&mut rest)?;
    let start = bytes.len() - rest.len();
    let (start, length) = match tag & 7 {
        0 => {
            varint(&mut rest)?;
            (start, bytes.len() - rest.len() - start)
        }
        1 => (start, 8),
        LENGTH_DELIMITED => {
            let length = usize::try_from(varint(&mut rest)?).ok()?;
            (bytes.len() - rest.len(), length)
        }
        5 => (start, 4),
        _ => return None,
    };
    let end = start.checked_add(length).filter(|end| *end <= bytes.len())?;
    Some((tag, start..end))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(bytes).ok()
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

    const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";

    #[test]
    fn map_order_is_one_even_inside_any() {
        let labels: BTreeMap<String, String> =
            (0..20).map(|n| (format!("label-{n}"), n.to_string())).collect();
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
        let sorted = |bytes: &Vec<u8>| {
            let mut bytes = bytes.clone();
            sort(LISTENER, &mut bytes);
            bytes
        };
        let same: BTreeSet<Vec<u8>> = raw.iter().map(sorted).collect();
        assert_eq!(same.len(), 1);
        let same = same.first().expect("one");
        let first = raw.first().expect("one");
        assert_eq!(same.len(), first.len());
        assert_eq!(Listener::decode(same.as_slice()).expect("decodes").name, "");
    }

    #[test]
    fn broken_bytes_stay() {
        for broken in [&[0x0a, 0xff][..], &[0x0a, 0x05, 0x01], &[0x0f], &[0x09, 1, 2]] {
            let mut bytes = broken.to_vec();
            sort(LISTENER, &mut bytes);
            assert_eq!(bytes, broken);
        }
    }
}
