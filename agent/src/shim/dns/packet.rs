//! Queries in, answers out, without allocating: the part that decides how many names per second a core answers.
//!
//! Only plain questions are taken apart here. What is forwarded is passed on byte for byte.

use super::table::{Addresses, Found, Table};

/// What we offer and accept over UDP: the size that survives any path (DNS flag day 2020).
const UDP_LIMIT: usize = 1232;
/// What a client without EDNS accepts over UDP.
const PLAIN_UDP_LIMIT: usize = 512;
const HEADER: usize = 12;
const MAX_NAME: usize = 255;
const OPT_RECORD: usize = 11;

const A: u16 = 1;
const AAAA: u16 = 28;
const OPT: u16 = 41;
const ANY: u16 = 255;
const CLASS_IN: u16 = 1;

const FORMERR: u16 = 1;
const SERVFAIL: u16 = 2;
const NXDOMAIN: u16 = 3;
const NOTIMP: u16 = 4;
const REFUSED: u16 = 5;
/// As an extended code: its upper bits stand in the OPT record.
const BADVERS: u16 = 16;

/// What carries the answer, which decides how long it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Datagrams: longer answers are truncated, and the client asks again over TCP.
    Udp,
    /// Up to 64 KiB.
    Tcp,
}

/// What to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Send what was written.
    Answer,
    /// Send what was written: the question made no sense.
    Refusal,
    /// Ask the workload's resolver.
    Forward,
    /// Stay silent: it is no query.
    Drop,
}

/// The part of a query that decides the answer.
#[derive(Debug)]
struct Query {
    name: [u8; MAX_NAME],
    name_length: usize,
    kind: u16,
    class: u16,
    question_end: usize,
    edns: Option<Edns>,
}

#[derive(Debug, Clone, Copy)]
struct Edns {
    size: usize,
    version: u8,
}

/// Answers `packet` from `table` into `out`, which is overwritten.
pub fn answer(table: &Table, packet: &[u8], transport: Transport, out: &mut Vec<u8>) -> Outcome {
    out.clear();
    // A response must never be answered, or two servers could talk for ever.
    if packet.len() < HEADER || packet[2] & 0x80 != 0 {
        return Outcome::Drop;
    }
    let query = match parse(packet) {
        Ok(query) => query,
        Err(code) => {
            refuse(packet, code, out);
            return Outcome::Refusal;
        }
    };
    if query.edns.is_some_and(|edns| edns.version != 0) {
        respond(packet, &query, BADVERS, table, None, transport, out);
        return Outcome::Refusal;
    }
    let (code, addresses) = match table.find(&query.name[..query.name_length]) {
        Found::Foreign => return Outcome::Forward,
        // Our names are nobody else's business in any class.
        _ if query.class != CLASS_IN => (REFUSED, None),
        Found::Addresses(addresses) => (0, Some(addresses)),
        Found::Empty => (0, None),
        Found::Missing => (NXDOMAIN, None),
        Found::Unknown => (SERVFAIL, None),
    };
    respond(packet, &query, code, table, addresses, transport, out);
    Outcome::Answer
}

/// Writes SERVFAIL for a query that could not be forwarded.
pub fn server_failure(packet: &[u8], out: &mut Vec<u8>) {
    out.clear();
    match parse(packet) {
        Ok(query) => {
            header(packet, SERVFAIL, 0, out);
            out.extend_from_slice(&packet[HEADER..query.question_end]);
            set_count(out, 4, 1);
        }
        Err(code) => refuse(packet, code, out),
    }
}

/// Whether `response` answers the question of `query` (ids are compared by the caller, who chose one).
pub fn answers(query: &[u8], response: &[u8]) -> bool {
    if response.len() < HEADER || response[2] & 0x80 == 0 {
        return false;
    }
    let Ok(question) = parse(query) else { return false };
    // An error without a question (some servers' FORMERR) still is an answer.
    if response[4..6] == [0, 0] {
        return response[3] & 0x0f != 0;
    }
    response
        .get(HEADER..question.question_end)
        .is_some_and(|echoed| echoed.eq_ignore_ascii_case(&query[HEADER..question.question_end]))
}

fn parse(packet: &[u8]) -> Result<Query, u16> {
    let short = packet.get(..HEADER).ok_or(FORMERR)?;
    if short[2] & 0x78 != 0 {
        return Err(NOTIMP);
    }
    let count = |at: usize| u16::from_be_bytes([short[at], short[at + 1]]);
    if count(4) != 1 || count(6) != 0 || count(8) != 0 {
        return Err(FORMERR);
    }
    let mut name = [0; MAX_NAME];
    let mut length = 0;
    let mut at = HEADER;
    loop {
        let label = usize::from(*packet.get(at).ok_or(FORMERR)?);
        // 64 and above are compression pointers, which can point nowhere in a first name.
        if label > 63 || length + label + 1 > MAX_NAME {
            return Err(FORMERR);
        }
        let bytes = packet.get(at..=at + label).ok_or(FORMERR)?;
        name[length] = bytes[0];
        for (to, from) in name[length + 1..].iter_mut().zip(&bytes[1..]) {
            *to = from.to_ascii_lowercase();
        }
        length += 1 + label;
        at += 1 + label;
        if label == 0 {
            break;
        }
    }
    let tail = packet.get(at..at + 4).ok_or(FORMERR)?;
    let question_end = at + 4;
    Ok(Query {
        name,
        name_length: length,
        kind: u16::from_be_bytes([tail[0], tail[1]]),
        class: u16::from_be_bytes([tail[2], tail[3]]),
        question_end,
        edns: edns(packet, question_end, count(10))?,
    })
}

/// Finds the OPT record among the `count` additional records that start at `at`.
fn edns(packet: &[u8], mut at: usize, count: u16) -> Result<Option<Edns>, u16> {
    let mut found = None;
    for _ in 0..count {
        let root = *packet.get(at).ok_or(FORMERR)? == 0;
        loop {
            let label = usize::from(*packet.get(at).ok_or(FORMERR)?);
            at += 1;
            match label {
                0 => break,
                1..64 => at += label,
                192.. => {
                    at += 1;
                    break;
                }
                _ => return Err(FORMERR),
            }
        }
        let fixed = packet.get(at..at + 10).ok_or(FORMERR)?;
        let kind = u16::from_be_bytes([fixed[0], fixed[1]]);
        if kind == OPT {
            if !root || found.is_some() {
                return Err(FORMERR);
            }
            let size = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
            found = Some(Edns { size, version: fixed[5] });
        }
        at += 10 + usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        if at > packet.len() {
            return Err(FORMERR);
        }
    }
    Ok(found)
}

fn respond(
    packet: &[u8],
    query: &Query,
    code: u16,
    table: &Table,
    addresses: Option<&Addresses>,
    transport: Transport,
    out: &mut Vec<u8>,
) {
    let limit = match (transport, query.edns) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, Some(edns)) => edns.size.clamp(PLAIN_UDP_LIMIT, UDP_LIMIT),
        (Transport::Udp, None) => PLAIN_UDP_LIMIT,
    };
    header(packet, code, 0x04, out);
    out.extend_from_slice(&packet[HEADER..query.question_end]);
    let question_end = out.len();
    let mut count: u16 = 0;
    if let Some(addresses) = addresses {
        let ttl = table.ttl().to_be_bytes();
        if matches!(query.kind, A | ANY) {
            for address in &addresses.v4 {
                record(A, ttl, address, out);
            }
            count += u16::try_from(addresses.v4.len()).unwrap_or(u16::MAX);
        }
        if matches!(query.kind, AAAA | ANY) {
            for address in &addresses.v6 {
                record(AAAA, ttl, address, out);
            }
            count = count.saturating_add(u16::try_from(addresses.v6.len()).unwrap_or(u16::MAX));
        }
    }
    let tail = if query.edns.is_some() { OPT_RECORD } else { 0 };
    if out.len() + tail > limit {
        out.truncate(question_end);
        out[2] |= 0x02;
        count = 0;
    }
    set_count(out, 4, 1);
    set_count(out, 6, count);
    if query.edns.is_some() {
        let size = u16::try_from(UDP_LIMIT).unwrap_or(u16::MAX).to_be_bytes();
        let extended = u8::try_from(code >> 4).unwrap_or(0);
        out.extend_from_slice(&[0, 0, 41, size[0], size[1], extended, 0, 0, 0, 0, 0]);
        set_count(out, 10, 1);
    }
}

/// A record about the name in the question.
fn record(kind: u16, ttl: [u8; 4], address: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xc0, 0x0c]);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    out.extend_from_slice(&ttl);
    // An address has 4 or 16 bytes.
    out.extend_from_slice(&[0, u8::try_from(address.len()).unwrap_or(0)]);
    out.extend_from_slice(address);
}

/// A response header without counts: the query's id, RD and CD; QR, RA and `flags` (AA is 0x04).
fn header(packet: &[u8], code: u16, flags: u8, out: &mut Vec<u8>) {
    let code = u8::try_from(code & 0x0f).unwrap_or(0);
    out.extend_from_slice(&[
        packet[0],
        packet[1],
        0x80 | (packet[2] & 0x79) | flags,
        0x80 | (packet[3] & 0x10) | code,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]);
}

/// An answer that echoes nothing but the header.
fn refuse(packet: &[u8], code: u16, out: &mut Vec<u8>) {
    if packet.len() >= HEADER {
        header(packet, code, 0, out);
    }
}

fn set_count(out: &mut [u8], at: usize, count: u16) {
    out[at..at + 2].copy_from_slice(&count.to_be_bytes());
}

#[cfg(test)]
mod tests;
