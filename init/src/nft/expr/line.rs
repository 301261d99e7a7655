//! Instructions as one line in nft's words.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    Base, CT_CONFIRMED, CT_CONFIRMED_DNAT, CT_STATE_INVALID, Cmp, CtKey, Expr, MetaKey, SYN, SYN_ACK,
    TCP_FLAGS, Verdict,
};
use crate::netlink::text;
use crate::plan::Family;

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
                Loaded::Payload(.., bits) => *bits = Some(mask.clone()),
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
    /// Header, first byte, number of bytes, and the bits of them that count.
    Payload(Base, u32, u32, Option<Vec<u8>>),
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
            Self::Payload(Base::Transport, TCP_FLAGS, 1, Some(mask))
                if *mask == [SYN_ACK] && *bytes == [SYN] =>
            {
                format!("tcp flags & (syn | ack) {}syn", if op == Cmp::Eq { "== " } else { sign })
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
                let prefix = mask.as_ref().map_or(len * 8, |m| m.iter().map(|b| b.count_ones()).sum());
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
            Self::Ct(CtKey::State, bits) => format!("ct state & {bits:#x} {sign}{host:#x}"),
            Self::Ct(CtKey::Status, CT_CONFIRMED_DNAT) if host == CT_CONFIRMED && op == Cmp::Eq => {
                "ct status & (confirmed | dnat) == confirmed".to_owned()
            }
            Self::Ct(CtKey::Status, bits) => format!("ct status & {bits:#x} {sign}{host:#x}"),
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
