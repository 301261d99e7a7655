//! The little netlink that the redirect needs: attributes written and read, and a synchronous socket.
//!
//! Written here because most of nftables' expressions that a redirect uses (redir, ct, fib, reject, counter)
//! have no type in the netlink crates, and because a batch must be one datagram of exactly known bytes.

use std::io;

use netlink_sys::{Socket as Raw, SocketAddr};

pub(crate) const NLM_F_REQUEST: u16 = 0x001;
pub(crate) const NLM_F_ACK: u16 = 0x004;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x010;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_ACK_TLVS: u16 = 0x200;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLMSGERR_ATTR_MSG: u16 = 1;
const MSG_DONTWAIT: i32 = nix::libc::MSG_DONTWAIT;

/// Bytes are padded to four everywhere in netlink.
const fn align(len: usize) -> usize {
    (len + 3) & !3
}

/// Netlink's lengths are u16 and u32; ours are far below, and a wrong one must never be sent.
fn length<T: TryFrom<usize>>(len: usize) -> T {
    T::try_from(len)
        .unwrap_or_else(|_| unreachable!("invariant: netlink messages of the redirect stay small"))
}

/// Writes one or more messages into one datagram.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    messages: u32,
}

impl Writer {
    /// With room for so many bytes.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), messages: 0 }
    }

    /// Appends a message; `body` is its fixed part. Its sequence number is its position in the datagram.
    pub(crate) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.messages += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.messages.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(body);
        self.bytes.resize(start + align(self.bytes.len() - start), 0);
        attributes(&mut Attributes(&mut self.bytes));
        let len: u32 = length(self.bytes.len() - start);
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

/// Appends attributes.
#[derive(Debug)]
pub(crate) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let len: u16 = length(4 + value.len());
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(align(self.0.len()), 0);
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let len: u16 = length(4 + value.len() + 1);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self.0.resize(align(self.0.len()), 0);
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn nested(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        inner(&mut Attributes(self.0));
        let len: u16 = length(self.0.len() - start);
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }

    /// A nested attribute whose content is already encoded.
    pub(crate) fn nested_raw(&mut self, kind: u16, content: &[u8]) {
        self.bytes(kind | NLA_F_NESTED, content);
    }
}

/// Iterates over the attributes in `bytes`; stops at the first malformed one.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
        let kind = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]) & NLA_TYPE_MASK;
        let value = rest.get(4..len)?;
        rest = rest.get(align(len)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of a kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(k, value)| (k == kind).then_some(value))
}

pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

/// A message that the kernel sent, without its header.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) payload: Vec<u8>,
}

/// A refusal by the kernel: which message of the datagram (from 1), and why.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) message: u32,
    pub(crate) error: io::Error,
}

/// Everything that the kernel answered to one datagram.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) messages: Vec<Message>,
    pub(crate) refusals: Vec<Refusal>,
    /// Whether the kernel acknowledged a message.
    pub(crate) acknowledged: bool,
    /// Whether what was dumped changed meanwhile.
    pub(crate) interrupted: bool,
}

/// A synchronous netlink socket. The kernel answers inside the send, so that nothing here ever waits.
pub(crate) struct Socket {
    raw: Raw,
    buffer: Vec<u8>,
}

impl Socket {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut raw = Raw::new(protocol)?;
        raw.bind_auto()?;
        raw.connect(&SocketAddr::new(0, 0))?;
        // Both only improve error texts.
        let _ = raw.set_cap_ack(true);
        let _ = raw.set_ext_ack(true);
        Ok(Self { raw, buffer: vec![0; 1 << 16] })
    }

    /// Sends the datagram and takes every answer.
    pub(crate) fn ask(&mut self, writer: &Writer) -> io::Result<Answer> {
        self.raw.send(&writer.bytes, 0)?;
        let mut answer = Answer::default();
        loop {
            let received = match self.raw.recv(&mut &mut self.buffer[..], MSG_DONTWAIT) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(answer),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if received > self.buffer.len() {
                return Err(io::Error::other("an answer is longer than the buffer"));
            }
            if take(&self.buffer[..received], &mut answer)? {
                return Ok(answer);
            }
        }
    }
}

/// Takes the messages of one datagram; `true` when a dump is complete.
fn take(mut rest: &[u8], answer: &mut Answer) -> io::Result<bool> {
    let cut = || io::Error::new(io::ErrorKind::InvalidData, "a message is cut off");
    while rest.len() >= HEADER {
        let word = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let half = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
        let (len, kind, flags, seq) = (word(0) as usize, half(4), half(6), word(8));
        let payload = rest.get(HEADER..len).ok_or_else(cut)?;
        answer.interrupted |= flags & NLM_F_DUMP_INTR != 0;
        match kind {
            NLMSG_NOOP => {}
            NLMSG_DONE => {
                if let Some(error) = payload.first_chunk().map(|b| i32::from_ne_bytes(*b)).filter(|e| *e < 0)
                {
                    answer
                        .refusals
                        .push(Refusal { message: seq, error: io::Error::from_raw_os_error(-error) });
                }
                return Ok(true);
            }
            NLMSG_ERROR => {
                let errno = payload.first_chunk().map(|b| i32::from_ne_bytes(*b)).ok_or_else(cut)?;
                if errno == 0 {
                    answer.acknowledged = true;
                } else {
                    let words = (flags & NLM_F_ACK_TLVS != 0)
                        .then(|| {
                            payload.get(4 + HEADER..).and_then(|tlvs| attribute(tlvs, NLMSGERR_ATTR_MSG))
                        })
                        .flatten()
                        .map(text);
                    let error = io::Error::from_raw_os_error(-errno);
                    if let Some(words) = words {
                        tracing::debug!(errno, words, "the kernel explains");
                    }
                    answer.refusals.push(Refusal { message: seq, error });
                }
            }
            _ => answer.messages.push(Message { payload: payload.to_vec() }),
        }
        rest = rest.get(align(len)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_a_round_trip() {
        let mut writer = Writer::default();
        writer.message(7, 0, &[1, 2, 3, 4], |a| {
            a.text(1, "lo");
            a.nested(2, |a| a.be32(3, 9));
        });
        let body = &writer.bytes[HEADER + 4..];
        assert_eq!(attribute(body, 1).map(text).as_deref(), Some("lo"));
        assert_eq!(attribute(body, 2).and_then(|n| attribute(n, 3)).and_then(be32), Some(9));
        assert_eq!(writer.bytes.len() % 4, 0);
    }

    #[test]
    fn malformed_bytes_end_the_iteration() {
        for bytes in [&[][..], &[9], &[0, 0, 1, 0], &[200, 0, 1, 0, 5], &[3, 0, 1, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert!(take(&[255; 16], &mut Answer::default()).is_err());
    }
}
