//! One port of a workload, as its own proxy serves it.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU32, sync::Arc};

use ursa_model::Protocol;

use super::{
    cluster, filter, listener, part,
    permission::{self, Admitted, Peers, Permission},
    rbac, route, tls,
    transparent::REFUSE_INBOUND,
};
use crate::{
    encoded::{Encoded, TypeUrl},
    envoy::{
        encode,
        types::{
            cluster::Cluster,
            listener::{FilterChain, FilterChainMatch, Listener},
            matching::StringMatcher,
            tls::TlsParameters,
            upstream_http::HttpProtocolOptions,
        },
    },
};

/// What is known of a port before policies.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    /// `self_inbound_dp_<section>`: name of all its resources.
    pub(crate) name: &'a str,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) service_address: IpAddr,
    pub(crate) service_port: u16,
    /// The workload sees the client's address; what is sent with it has this mark.
    pub(crate) client_mark: Option<NonZeroU32>,
    pub(crate) protocol: &'a Protocol,
    pub(crate) labels: &'a BTreeMap<String, String>,
    /// The SDS name of the proxy's certificate.
    pub(crate) identity: Option<&'a str>,
    /// Whose certificates are looked at, at all.
    pub(crate) trust_domains: &'a [String],
}

/// Whether connections without mesh TLS are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Strict,
    Permissive,
}

/// Cluster and listener of a port, open for policies.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) cluster: Cluster,
    pub(crate) upstream: Option<HttpProtocolOptions>,
    pub(crate) terminal: filter::Terminal,
    pub(crate) mode: Mode,
    pub(crate) tls: Option<TlsParameters>,
}

/// The finished pair, and what it takes of the permission.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) cluster: Arc<Encoded>,
    pub(crate) listener: Arc<Encoded>,
    pub(crate) use_of: Use,
}

/// Which part of the permission a listener holds itself, and which it asks for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It refuses everybody.
    Nothing,
    /// Requests of the mesh: all is asked for.
    Discovered,
    /// The same, and plaintext: the answer to foreign TLS is in the listener.
    DiscoveredButForeignTls,
    /// Bytes: all is in the listener.
    Inline,
}

impl Use {
    /// The resources that the listener asks for.
    pub(crate) fn discovers(self) -> &'static [Peers] {
        match self {
            Self::Nothing | Self::Inline => &[],
            Self::Discovered => &[Peers::Mesh],
            Self::DiscoveredButForeignTls => &[Peers::Mesh, Peers::Plain],
        }
    }
}

impl Inbound {
    pub(crate) fn new(target: &Target<'_>) -> Self {
        let terminal = if target.protocol.is_http_based() {
            let mut routes = route::configuration(target.name, vec![route::catch_all(target.name)]);
            routes.request_headers_to_remove.push("x-kuma-tags".to_owned());
            let mut http = filter::http(target.name, routes);
            filter::forward_peer(&mut http.manager);
            filter::Terminal::Http(Box::new(http))
        } else {
            filter::Terminal::Tcp(Box::new(filter::tcp(target.name, target.name)))
        };
        Self {
            cluster: cluster::local(target.name, target.service_address, target.service_port),
            upstream: cluster::http_options(target.protocol),
            terminal,
            mode: Mode::Strict,
            tls: None,
        }
    }

    /// Without an identity of its own, or without anybody to trust, the port is there and refuses.
    pub(crate) fn finish(self, target: &Target<'_>, permission: &Permission) -> Finished {
        let cluster = cluster::finish(self.cluster.clone(), self.upstream.as_ref());
        let (use_of, listener) = self.listener(target, permission);
        Finished {
            cluster: encode::resource(TypeUrl::Cluster, target.name, &cluster),
            listener: encode::resource(TypeUrl::Listener, target.name, &listener),
            use_of,
        }
    }

    fn listener(self, target: &Target<'_>, permission: &Permission) -> (Use, Listener) {
        let with = |chains| Listener {
            listener_filters: target.client_mark.map(listener::original_source).into_iter().collect(),
            ..listener::inbound(target.name, target.address, target.port, target.labels, chains)
        };
        let identity = target.identity.filter(|_| !target.trust_domains.is_empty());
        let Some(identity) = identity else {
            let refuse = filter::Terminal::Tcp(Box::new(filter::tcp(target.name, REFUSE_INBOUND)));
            return (Use::Nothing, with(vec![listener::chain(vec![refuse.finish()])]));
        };
        let (terminal, peers) = self.admission(target, permission);
        let mesh = FilterChain {
            transport_socket: tls::downstream(identity, peers, self.tls.clone()),
            ..chain(target.name, terminal, permission, Peers::Mesh)
        };
        let is_http = matches!(self.terminal, filter::Terminal::Http(_));
        if self.mode == Mode::Strict {
            return (if is_http { Use::Discovered } else { Use::Inline }, with(vec![mesh]));
        }
        let plain = FilterChain {
            filter_chain_match: Some(matching("raw_buffer", None)),
            ..chain(target.name, self.terminal, permission, Peers::Plain)
        };
        // TLS that isn't the mesh's belongs to the application: its bytes pass as they are.
        let bytes = filter::Terminal::Tcp(Box::new(filter::tcp(target.name, target.name)));
        let foreign_tls = FilterChain {
            filter_chain_match: Some(matching("tls", None)),
            ..chain(target.name, bytes, permission, Peers::Plain)
        };
        let mesh = FilterChain { filter_chain_match: Some(matching("tls", Some(tls::ALPN))), ..mesh };
        let mut listener = with(vec![plain, foreign_tls, mesh]);
        listener.listener_filters.push(listener::tls_inspector());
        (if is_http { Use::DiscoveredButForeignTls } else { Use::Inline }, listener)
    }

    /// Envoy asks the permissions of a connection at its first byte, but by then the workload may have spoken. So
    /// for bytes the handshake itself turns away whom no rule allows; requests are judged one by one anyway.
    fn admission(
        &self,
        target: &Target<'_>,
        permission: &Permission,
    ) -> (filter::Terminal, Vec<StringMatcher>) {
        let trusted = || {
            target.trust_domains.iter().map(|domain| part::prefix(format!("spiffe://{domain}/"))).collect()
        };
        match (&self.terminal, &permission.admitted) {
            (filter::Terminal::Http(_), _) | (_, Admitted::Trusted) => (self.terminal.clone(), trusted()),
            (filter::Terminal::Tcp(_), Admitted::Nobody) => {
                let refuse = filter::tcp(target.name, REFUSE_INBOUND);
                (filter::Terminal::Tcp(Box::new(refuse)), trusted())
            }
            (filter::Terminal::Tcp(_), Admitted::Ids(ids)) => {
                let matcher = |id: &rbac::Text| match id {
                    rbac::Text::Exact(id) => part::exact(id),
                    rbac::Text::Prefix(id) => part::prefix(id),
                };
                (self.terminal.clone(), ids.iter().map(matcher).collect())
            }
        }
    }
}

fn chain(name: &str, terminal: filter::Terminal, permission: &Permission, peers: Peers) -> FilterChain {
    match terminal {
        filter::Terminal::Http(mut http) => {
            http.filters.insert(0, permission::http_filter(&permission::name(name, peers)));
            listener::chain(vec![filter::Terminal::Http(http).finish()])
        }
        tcp @ filter::Terminal::Tcp(_) => {
            listener::chain(vec![permission.network_filter(name, peers), tcp.finish()])
        }
    }
}

fn matching(transport: &str, alpn: Option<&str>) -> FilterChainMatch {
    FilterChainMatch {
        transport_protocol: transport.to_owned(),
        application_protocols: alpn.map(str::to_owned).into_iter().collect(),
        ..FilterChainMatch::default()
    }
}
