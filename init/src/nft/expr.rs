//! nftables expressions: the kernel's little instructions.
//!
//! * `wire`: as netlink carries them, written and read.
//! * `line`: as one line in nft's words.

mod line;
mod wire;

use crate::plan::Family;

pub(crate) use line::line;

/// `NF_CT_STATE_INVALID_BIT`.
pub(super) const CT_STATE_INVALID: u32 = 1;
/// `IPS_CONFIRMED`: tracked since an earlier packet.
pub(super) const CT_CONFIRMED: u32 = 1 << 3;
/// `IPS_CONFIRMED` and `IPS_DST_NAT`, the second of a connection whose destination is rewritten.
pub(super) const CT_CONFIRMED_DNAT: u32 = CT_CONFIRMED | 1 << 5;
/// Where a TCP header has its flags.
pub(super) const TCP_FLAGS: u32 = 13;
/// The flag SYN alone.
pub(super) const SYN: u8 = 0x02;
/// The flags SYN and ACK.
pub(super) const SYN_ACK: u8 = 0x12;

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
    /// What connection tracking has done with it: one bit each.
    Status = 2,
    /// The connection's mark.
    Mark = 3,
}

impl CtKey {
    const ALL: [Self; 3] = [Self::State, Self::Status, Self::Mark];
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

impl Expr {
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
}
