//! nftables expressions: the kernel's little instructions, written, read and shown.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::{Attributes, attribute, attributes, be32, text};
use crate::plan::Family;

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// The register that verdicts are written to.
const VERDICT: u32 = 0;
/// The one register that we use: each value is loaded and consumed at once.
const REG: u32 = 1;

/// What `meta` loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MetaKey {
    /// The packet's mark.
    Mark = 3,
    /// The input interface's name.
    Iifname = 6,
    /// The output interface's name.
    Oifname = 7,
    /// The socket's user id.
    Skuid = 10,
    /// The socket's group id.
    Skgid = 11,
    /// The network protocol.
    Nfproto = 15,
    /// The transport protocol.
    L4proto = 16,
}

impl MetaKey {
    const ALL: [Self; 7] =
        [Self::Mark, Self::Iifname, Self::Oifname, Self::Skuid, Self::Skgid, Self::Nfproto, Self::L4proto];

    const fn name(self) -> &'static str {
        match self {
            Self::Mark => "meta mark",
            Self::Iifname => "iifname",
            Self::Oifname => "oifname",
            Self::Skuid => "meta skuid",
            Self::Skgid => "meta skgid",
            Self::Nfproto => "meta nfproto",
            Self::L4proto => "meta l4proto",
        }
    }
}

/// What `ct` loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CtKey {
    /// Whether the packet is new, established, related, invalid: one bit each.
    State = 0,
    /// The connection's mark.
    Mark = 3,
}

impl CtKey {
    const ALL: [Self; 2] = [Self::State, Self::Mark];
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Cmp {
    /// Equal.
    Eq = 0,
    /// Not equal.
    Neq = 1,
    /// Less or equal.
    Lte = 3,
    /// Greater or equal.
    Gte = 5,
}

impl Cmp {
    const ALL: [Self; 4] = [Self::Eq, Self::Neq, Self::Lte, Self::Gte];

    const fn sign(self) -> &'static str {
        match self {
            Self::Eq => "",
            Self::Neq => "!= ",
            Self::Lte => "<= ",
            Self::Gte => ">= ",
        }
    }
}

/// The header that a payload is loaded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Base {
    /// The IP header.
    Network = 1,
    /// The TCP or UDP header.
    Transport = 2,
}

/// What ends a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Leave the chain.
    Return,
    /// Discard.
    Drop,
    /// Let pass, as far as this hook is concerned.
    Accept,
    /// Continue in another chain.
    Goto(String),
}

/// One instruction. Those that Ursa writes have a variant; any other is kept as the kernel named it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Load a property of the packet.
    Meta(MetaKey),
    /// Load bytes of a header.
    Payload {
        /// Which header.
        base: Base,
        /// First byte.
        offset: u32,
        /// Number of bytes.
        len: u32,
    },
    /// Keep only the bits of the mask.
    Mask(Vec<u8>),
    /// Go on only if the loaded value compares so.
    Cmp(Cmp, Vec<u8>),
    /// Load the kind of the destination address.
    DestinationType,
    /// Load a constant.
    Load(Vec<u8>),
    /// Load a property of the packet's connection.
    Ct(CtKey),
    /// Load the number of the sending socket's cgroup, so many levels below the root.
    SocketCgroup {
        /// The level; the root is 0.
        level: u32,
    },
    /// Turn the loaded number into network byte order.
    ToNetworkOrder,
    /// Go on only if the loaded number, in network byte order, lies in the range (or outside of it).
    Range {
        /// Inside or outside.
        inside: bool,
        /// The first number.
        first: [u8; 4],
        /// The last number.
        last: [u8; 4],
    },
    /// Set the conntrack zone from the loaded value.
    SetZone,
    /// Set the connection's mark from the loaded value.
    SetConnectionMark,
    /// Set the packet's mark from the loaded value.
    SetMark,
    /// Trace the packet if the loaded value says so.
    SetTrace,
    /// Hand over to the transparent socket on the loaded port; in a table of one family it names that.
    Tproxy(Option<Family>),
    /// Redirect to the loaded port.
    Redirect,
    /// Answer with a TCP reset.
    RejectTcp,
    /// Answer with 'port unreachable' of the packet's family; in a table of one family it names that.
    RejectIcmp(Option<Family>),
    /// Count.
    Counter,
    /// End.
    Verdict(Verdict),
    /// An instruction that isn't ours.
    Foreign(String, Vec<u8>),
}

const NFT_RETURN: u32 = u32::MAX - 4;
const NFT_GOTO: u32 = u32::MAX - 3;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NFT_CT_ZONE: u32 = 17;
const NFT_META_NFTRACE: u32 = 12;
/// `NF_CT_STATE_INVALID_BIT`.
pub(super) const CT_STATE_INVALID: u32 = 1;
/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
pub(super) const CT_STATE_NEW: u32 = 8;
const SOCKET_CGROUPV2: u32 = 3;
const HOST_TO_NETWORK: u32 = 1;
const FIB_ADDRTYPE: u32 = 3;
const FIB_DADDR: u32 = 2;
const NFPROTO_IPV4: u32 = 2;
const NFPROTO_IPV6: u32 = 10;
const REJECT_ICMP: u32 = 0;
const ICMP_PORT_UNREACH: u8 = 3;
const ICMPV6_PORT_UNREACH: u8 = 4;
const REJECT_TCP_RST: u32 = 1;
const REJECT_ICMPX: u32 = 2;
const ICMPX_PORT_UNREACH: u8 = 1;

impl Expr {
    /// Appends the instruction to a rule's list.
    pub(crate) fn encode(&self, list: &mut Attributes<'_>) {
        list.nested(NFTA_LIST_ELEM, |a| {
            a.text(NFTA_EXPR_NAME, self.name());
            if let Self::Foreign(_, data) = self {
                a.nested_raw(NFTA_EXPR_DATA, data);
            } else {
                a.nested(NFTA_EXPR_DATA, |a| self.data(a));
            }
        });
    }

    fn name(&self) -> &str {
        match self {
            Self::Meta(_) | Self::SetMark | Self::SetTrace => "meta",
            Self::Payload { .. } => "payload",
            Self::Mask(_) => "bitwise",
            Self::Cmp(..) => "cmp",
            Self::DestinationType => "fib",
            Self::Load(_) | Self::Verdict(_) => "immediate",
            Self::SetZone | Self::SetConnectionMark | Self::Ct(_) => "ct",
            Self::SocketCgroup { .. } => "socket",
            Self::ToNetworkOrder => "byteorder",
            Self::Range { .. } => "range",
            Self::Tproxy(_) => "tproxy",
            Self::Redirect => "redir",
            Self::RejectTcp | Self::RejectIcmp(_) => "reject",
            Self::Counter => "counter",
            Self::Foreign(name, _) => name,
        }
    }

    /// The kernel module that the instruction lives in, where it isn't nf_tables itself.
    pub(crate) const fn module(&self) -> Option<&'static str> {
        match self {
            Self::DestinationType => Some("nft_fib_inet"),
            Self::Ct(_) | Self::SetZone | Self::SetConnectionMark => Some("nft_ct"),
            Self::SocketCgroup { .. } => Some("nft_socket"),
            Self::Redirect => Some("nft_redir"),
            Self::RejectTcp | Self::RejectIcmp(_) => Some("nft_reject_inet"),
            Self::Tproxy(_) => Some("nft_tproxy"),
            _ => None,
        }
    }

    /// The type-specific attributes, numbered as in `linux/netfilter/nf_tables.h`.
    fn data(&self, a: &mut Attributes<'_>) {
        let value =
            |a: &mut Attributes<'_>, kind, bytes: &[u8]| a.nested(kind, |a| a.bytes(NFTA_DATA_VALUE, bytes));
        match self {
            Self::Meta(key) => {
                a.be32(1, REG);
                a.be32(2, *key as u32);
            }
            Self::Payload { base, offset, len } => {
                a.be32(1, REG);
                a.be32(2, *base as u32);
                a.be32(3, *offset);
                a.be32(4, *len);
            }
            Self::Mask(mask) => {
                a.be32(1, REG);
                a.be32(2, REG);
                a.be32(3, u32::try_from(mask.len()).unwrap_or(u32::MAX));
                value(a, 4, mask);
                value(a, 5, &vec![0; mask.len()]);
            }
            Self::Cmp(op, bytes) => {
                a.be32(1, REG);
                a.be32(2, *op as u32);
                value(a, 3, bytes);
            }
            Self::DestinationType => {
                a.be32(1, REG);
                a.be32(2, FIB_ADDRTYPE);
                a.be32(3, FIB_DADDR);
            }
            Self::Load(bytes) => {
                a.be32(1, REG);
                value(a, 2, bytes);
            }
            Self::Ct(key) => {
                a.be32(1, REG);
                a.be32(2, *key as u32);
            }
            Self::SocketCgroup { level } => {
                a.be32(1, SOCKET_CGROUPV2);
                a.be32(2, REG);
                a.be32(3, *level);
            }
            Self::ToNetworkOrder => {
                a.be32(1, REG);
                a.be32(2, REG);
                a.be32(3, HOST_TO_NETWORK);
                a.be32(4, 4);
                a.be32(5, 4);
            }
            Self::Range { inside, first, last } => {
                a.be32(1, REG);
                a.be32(2, u32::from(!inside));
                value(a, 3, first);
                value(a, 4, last);
            }
            Self::SetZone => {
                a.be32(2, NFT_CT_ZONE);
                a.be32(4, REG);
            }
            Self::SetConnectionMark => {
                a.be32(2, CtKey::Mark as u32);
                a.be32(4, REG);
            }
            Self::SetMark => {
                a.be32(2, MetaKey::Mark as u32);
                a.be32(3, REG);
            }
            Self::SetTrace => {
                a.be32(2, NFT_META_NFTRACE);
                a.be32(3, REG);
            }
            Self::Tproxy(family) => {
                a.be32(
                    1,
                    family.map_or(0, |family| match family {
                        Family::V4 => NFPROTO_IPV4,
                        Family::V6 => NFPROTO_IPV6,
                    }),
                );
                a.be32(3, REG);
            }
            Self::Redirect => a.be32(1, REG),
            Self::RejectTcp => {
                a.be32(1, REJECT_TCP_RST);
                a.bytes(2, &[0]);
            }
            Self::RejectIcmp(family) => {
                let (kind, code) = match family {
                    None => (REJECT_ICMPX, ICMPX_PORT_UNREACH),
                    Some(Family::V4) => (REJECT_ICMP, ICMP_PORT_UNREACH),
                    Some(Family::V6) => (REJECT_ICMP, ICMPV6_PORT_UNREACH),
                };
                a.be32(1, kind);
                a.bytes(2, &[code]);
            }
            Self::Counter => {
                a.bytes(1, &[0; 8]);
                a.bytes(2, &[0; 8]);
            }
            Self::Verdict(verdict) => {
                a.be32(1, VERDICT);
                a.nested(2, |a| {
                    a.nested(NFTA_DATA_VERDICT, |a| match verdict {
                        Verdict::Return => a.be32(NFTA_VERDICT_CODE, NFT_RETURN),
                        Verdict::Drop => a.be32(NFTA_VERDICT_CODE, NF_DROP),
                        Verdict::Accept => a.be32(NFTA_VERDICT_CODE, NF_ACCEPT),
                        Verdict::Goto(chain) => {
                            a.be32(NFTA_VERDICT_CODE, NFT_GOTO);
                            a.text(NFTA_VERDICT_CHAIN, chain);
                        }
                    });
                });
            }
            Self::Foreign(..) => {}
        }
    }

    /// Reads one instruction as the kernel dumps it. What isn't exactly as we write it is foreign.
    fn decode(name: &str, data: &[u8]) -> Self {
        Self::decode_own(name, data).unwrap_or_else(|| Self::Foreign(name.to_owned(), data.to_vec()))
    }

    fn decode_own(name: &str, data: &[u8]) -> Option<Self> {
        let number = |kind| attribute(data, kind).and_then(be32);
        let value =
            |kind| attribute(data, kind).and_then(|d| attribute(d, NFTA_DATA_VALUE)).map(<[u8]>::to_vec);
        let is = |kind, wanted| (number(kind) == Some(wanted)).then_some(());
        match name {
            "meta" if attribute(data, 3).is_some() => {
                is(3, REG)?;
                match number(2)? {
                    NFT_META_NFTRACE => Some(Self::SetTrace),
                    key => (key == MetaKey::Mark as u32).then_some(Self::SetMark),
                }
            }
            "meta" => {
                is(1, REG)?;
                let key = number(2)?;
                MetaKey::ALL.into_iter().find(|k| *k as u32 == key).map(Self::Meta)
            }
            "payload" => {
                is(1, REG)?;
                let base = number(2)?;
                let base = [Base::Network, Base::Transport].into_iter().find(|b| *b as u32 == base)?;
                Some(Self::Payload { base, offset: number(3)?, len: number(4)? })
            }
            "bitwise" => {
                is(1, REG)?;
                is(2, REG)?;
                // Other operations than 'mask and xor' (attribute 6) aren't ours.
                (number(6).unwrap_or(0) == 0 && value(5)?.iter().all(|b| *b == 0)).then_some(())?;
                value(4).map(Self::Mask)
            }
            "cmp" => {
                is(1, REG)?;
                let op = number(2)?;
                Some(Self::Cmp(Cmp::ALL.into_iter().find(|c| *c as u32 == op)?, value(3)?))
            }
            "fib" => {
                is(1, REG)?;
                is(2, FIB_ADDRTYPE)?;
                is(3, FIB_DADDR)?;
                Some(Self::DestinationType)
            }
            "immediate" if number(1)? == VERDICT => {
                let verdict = attribute(data, 2).and_then(|d| attribute(d, NFTA_DATA_VERDICT))?;
                let verdict = match attribute(verdict, NFTA_VERDICT_CODE).and_then(be32)? {
                    NFT_RETURN => Verdict::Return,
                    NF_DROP => Verdict::Drop,
                    NF_ACCEPT => Verdict::Accept,
                    NFT_GOTO => Verdict::Goto(text(attribute(verdict, NFTA_VERDICT_CHAIN)?)),
                    _ => return None,
                };
                Some(Self::Verdict(verdict))
            }
            "immediate" => {
                is(1, REG)?;
                value(2).map(Self::Load)
            }
            "ct" if attribute(data, 4).is_some() => {
                is(4, REG)?;
                match number(2)? {
                    NFT_CT_ZONE => Some(Self::SetZone),
                    key => (key == CtKey::Mark as u32).then_some(Self::SetConnectionMark),
                }
            }
            "ct" => {
                is(1, REG)?;
                let key = number(2)?;
                CtKey::ALL.into_iter().find(|k| *k as u32 == key).map(Self::Ct)
            }
            "socket" => {
                is(1, SOCKET_CGROUPV2)?;
                is(2, REG)?;
                Some(Self::SocketCgroup { level: number(3)? })
            }
            "byteorder" => {
                for (kind, wanted) in [(1, REG), (2, REG), (3, HOST_TO_NETWORK), (4, 4), (5, 4)] {
                    is(kind, wanted)?;
                }
                Some(Self::ToNetworkOrder)
            }
            "range" => {
                is(1, REG)?;
                let bounds = |kind| value(kind).and_then(|v| v.try_into().ok());
                let inside = match number(2)? {
                    0 => true,
                    1 => false,
                    _ => return None,
                };
                Some(Self::Range { inside, first: bounds(3)?, last: bounds(4)? })
            }
            "tproxy" => {
                is(3, REG)?;
                match number(1)? {
                    0 => Some(Self::Tproxy(None)),
                    NFPROTO_IPV4 => Some(Self::Tproxy(Some(Family::V4))),
                    NFPROTO_IPV6 => Some(Self::Tproxy(Some(Family::V6))),
                    _ => None,
                }
            }
            "redir" => {
                is(1, REG)?;
                // The kernel fills in the end of the range (2) and flags (3).
                (number(2).is_none_or(|r| r == REG) && number(3).unwrap_or(0) & !2 == 0)
                    .then_some(Self::Redirect)
            }
            "reject" => match (number(1)?, attribute(data, 2)) {
                (REJECT_TCP_RST, _) => Some(Self::RejectTcp),
                (REJECT_ICMPX, Some([ICMPX_PORT_UNREACH])) => Some(Self::RejectIcmp(None)),
                (REJECT_ICMP, Some([ICMP_PORT_UNREACH])) => Some(Self::RejectIcmp(Some(Family::V4))),
                (REJECT_ICMP, Some([ICMPV6_PORT_UNREACH])) => Some(Self::RejectIcmp(Some(Family::V6))),
                _ => None,
            },
            "counter" => Some(Self::Counter),
            _ => None,
        }
    }

    /// Reads a rule's list; the second value is the packets that it counted.
    pub(crate) fn decode_list(list: &[u8]) -> (Vec<Self>, u64) {
        let mut packets = 0;
        let exprs = attributes(list)
            .map(|(_, element)| {
                let name = attribute(element, NFTA_EXPR_NAME).map(text).unwrap_or_default();
                let data = attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
                if name == "counter" {
                    packets =
                        attribute(data, 2).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
                }
                Self::decode(&name, data)
            })
            .collect();
        (exprs, packets)
    }
}

/// The instructions as one line in nft's words.
pub(crate) fn line(exprs: &[Expr]) -> String {
    let mut out = String::new();
    let mut loaded = Loaded::Nothing;
    for expr in exprs {
        if !out.is_empty() && !out.ends_with(' ') {
            out.push(' ');
        }
        match expr {
            Expr::Meta(key) => loaded = Loaded::Meta(*key),
            Expr::Payload { base, offset, len } => loaded = Loaded::Payload(*base, *offset, *len, None),
            Expr::Mask(mask) => match &mut loaded {
                Loaded::Payload(.., prefix) => *prefix = Some(mask.iter().map(|b| b.count_ones()).sum()),
                Loaded::Ct(_, bits) => *bits = mask.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b)),
                _ => {}
            },
            Expr::DestinationType => loaded = Loaded::DestinationType,
            Expr::Load(bytes) => loaded = Loaded::Constant(bytes.clone()),
            Expr::Cmp(op, bytes) => {
                let _ = write!(out, "{}", loaded.compare(*op, bytes));
            }
            Expr::Ct(key) => loaded = Loaded::Ct(*key, 0),
            Expr::SocketCgroup { level } => loaded = Loaded::Cgroup(*level),
            Expr::ToNetworkOrder => {}
            Expr::Range { inside, first, last } => {
                let sign = if *inside { "" } else { "!= " };
                let (first, last) = (u32::from_be_bytes(*first), u32::from_be_bytes(*last));
                let _ = write!(out, "{} {sign}{first}-{last}", loaded.name());
            }
            Expr::SetConnectionMark => out.push_str("ct mark set meta mark"),
            Expr::SetMark => out.push_str("meta mark set ct mark"),
            Expr::SetTrace => out.push_str("meta nftrace set 1"),
            Expr::Tproxy(_) => {
                let port = loaded.constant().first_chunk().map_or(0, |b| u16::from_be_bytes(*b));
                let _ = write!(out, "tproxy to :{port}");
            }
            Expr::SetZone => {
                let zone = loaded.constant().first_chunk().map_or(0, |b| u16::from_ne_bytes(*b));
                let _ = write!(out, "ct zone set {zone}");
            }
            Expr::Redirect => {
                let port = loaded.constant().first_chunk().map_or(0, |b| u16::from_be_bytes(*b));
                let _ = write!(out, "redirect to :{port}");
            }
            Expr::RejectTcp => out.push_str("reject with tcp reset"),
            Expr::RejectIcmp(None) => out.push_str("reject with icmpx port-unreachable"),
            Expr::RejectIcmp(Some(Family::V4)) => out.push_str("reject with icmp port-unreachable"),
            Expr::RejectIcmp(Some(Family::V6)) => out.push_str("reject with icmpv6 port-unreachable"),
            Expr::Counter => out.push_str("counter"),
            Expr::Verdict(Verdict::Return) => out.push_str("return"),
            Expr::Verdict(Verdict::Drop) => out.push_str("drop"),
            Expr::Verdict(Verdict::Accept) => out.push_str("accept"),
            Expr::Verdict(Verdict::Goto(chain)) => {
                let _ = write!(out, "goto {chain}");
            }
            Expr::Foreign(name, data) => {
                let _ = write!(out, "<{name} {data:02x?}>");
            }
        }
    }
    out.trim_end().to_owned()
}

/// What the register holds while a line is written.
enum Loaded {
    Nothing,
    Meta(MetaKey),
    Payload(Base, u32, u32, Option<u32>),
    DestinationType,
    Constant(Vec<u8>),
    Ct(CtKey, u32),
    Cgroup(u32),
}

impl Loaded {
    /// What a range is compared with.
    const fn name(&self) -> &'static str {
        if let Self::Meta(key) = self { key.name() } else { "?" }
    }

    fn constant(&self) -> &[u8] {
        if let Self::Constant(bytes) = self { bytes } else { &[] }
    }

    fn compare(&self, op: Cmp, bytes: &[u8]) -> String {
        let sign = op.sign();
        let host = bytes.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
        match self {
            Self::Meta(key) => {
                let name = key.name();
                match (key, bytes) {
                    (MetaKey::Iifname | MetaKey::Oifname, _) => {
                        let star = if bytes.contains(&0) { "" } else { "*" };
                        format!("{name} {sign}\"{}{star}\"", text(bytes))
                    }
                    (MetaKey::Nfproto, [2]) => format!("{name} {sign}ipv4"),
                    (MetaKey::Nfproto, [10]) => format!("{name} {sign}ipv6"),
                    (MetaKey::L4proto, [6]) => format!("{name} {sign}tcp"),
                    (MetaKey::L4proto, [17]) => format!("{name} {sign}udp"),
                    (MetaKey::L4proto, [1]) => format!("{name} {sign}icmp"),
                    (MetaKey::L4proto, [58]) => format!("{name} {sign}ipv6-icmp"),
                    (MetaKey::Mark, _) => format!("{name} {sign}{host:#x}"),
                    (MetaKey::Skuid | MetaKey::Skgid, _) => format!("{name} {sign}{host}"),
                    _ => format!("{name} {sign}{bytes:02x?}"),
                }
            }
            Self::Payload(Base::Transport, offset @ (0 | 2), 2, _) => {
                let side = if *offset == 0 { "sport" } else { "dport" };
                let port = bytes.first_chunk().map_or(0, |b| u16::from_be_bytes(*b));
                format!("th {side} {sign}{port}")
            }
            Self::Payload(Base::Network, offset @ (12 | 16 | 8 | 24), len, mask) => {
                let (name, side, size) = match offset {
                    12 => ("ip", "saddr", 4),
                    16 => ("ip", "daddr", 4),
                    8 => ("ip6", "saddr", 16),
                    _ => ("ip6", "daddr", 16),
                };
                let mut full = [0; 16];
                let shown = bytes.len().min(16);
                full[..shown].copy_from_slice(&bytes[..shown]);
                let [a, b, c, d, ..] = full;
                let address: IpAddr =
                    if size == 4 { Ipv4Addr::new(a, b, c, d).into() } else { Ipv6Addr::from(full).into() };
                let prefix = mask.unwrap_or(len * 8);
                if prefix == size * 8 {
                    format!("{name} {side} {sign}{address}")
                } else {
                    format!("{name} {side} {sign}{address}/{prefix}")
                }
            }
            Self::Payload(_, offset, len, _) => format!("@{offset},{len} {sign}{bytes:02x?}"),
            Self::Ct(CtKey::Mark, _) => format!("ct mark {sign}{host:#x}"),
            // Loaded and masked: only 'any of these bits' is ever asked.
            Self::Ct(CtKey::State, CT_STATE_INVALID) => "ct state invalid".to_owned(),
            Self::Ct(CtKey::State, CT_STATE_NEW) => "ct state new".to_owned(),
            Self::Ct(CtKey::State, bits) => format!("ct state & {bits:#x} {sign}{host:#x}"),
            Self::Cgroup(level) => {
                let id = bytes.first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
                format!("socket cgroupv2 level {level} {sign}{id}")
            }
            Self::DestinationType if host == 2 => format!("fib daddr type {sign}local"),
            Self::DestinationType => format!("fib daddr type {sign}{host}"),
            Self::Constant(_) | Self::Nothing => format!("? {sign}{bytes:02x?}"),
        }
    }
}
