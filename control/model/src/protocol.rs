//! Application protocols of ports.

use crate::open_enum;

open_enum! {
    /// What a port speaks. Kuma writes an unknown one as `<unknown>`.
    pub enum Protocol {
        Tcp = "tcp",
        Tls = "tls",
        Http = "http",
        Http2 = "http2",
        Grpc = "grpc",
    }
}

impl Protocol {
    /// Protocols from the most specific to TCP, for a protocol that is known.
    fn stack(&self) -> &'static [Protocol] {
        match self {
            Protocol::Tls => &[Protocol::Tls, Protocol::Tcp],
            Protocol::Grpc => &[Protocol::Grpc, Protocol::Http2, Protocol::Tcp],
            Protocol::Http2 => &[Protocol::Http2, Protocol::Tcp],
            Protocol::Http => &[Protocol::Http, Protocol::Tcp],
            Protocol::Tcp => &[Protocol::Tcp],
            Protocol::Unknown(_) => &[],
        }
    }

    /// Whether Envoy reads requests of this protocol (and not only bytes).
    pub fn is_http_based(&self) -> bool {
        matches!(self, Protocol::Http | Protocol::Http2 | Protocol::Grpc)
    }

    /// What both sides speak: the most specific protocol that both stacks hold.
    #[must_use]
    pub fn common(&self, other: &Protocol) -> Protocol {
        self.stack()
            .iter()
            .find(|candidate| other.stack().contains(candidate))
            .cloned()
            .unwrap_or_else(|| Protocol::Unknown("<unknown>".to_owned()))
    }
}
