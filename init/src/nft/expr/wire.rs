//! Instructions as netlink carries them, numbered as in `linux/netfilter/nf_tables.h`.

use super::{Base, Cmp, CtKey, Expr, MetaKey, Verdict};
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

const NFT_RETURN: u32 = u32::MAX - 4;
const NFT_GOTO: u32 = u32::MAX - 3;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NFT_CT_ZONE: u32 = 17;
const NFT_META_NFTRACE: u32 = 12;
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

    /// The type-specific attributes.
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
