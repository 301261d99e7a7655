//! One port of a workload, as its own proxy serves it.

use std::{collections::BTreeMap, net::IpAddr};

use ursa_model::Protocol;

use super::{cluster, filter, listener, part, rbac, route, tls, transparent::REFUSE_INBOUND};
use crate::envoy::types::{
    cluster::Cluster,
    listener::{FilterChain, FilterChainMatch, Listener},
    matching::StringMatcher,
    tls::TlsParameters,
    upstream_http::HttpProtocolOptions,
    xds_matching::Matcher,
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

/// Whom some rule allows, whatever is denied.
#[derive(Debug)]
pub(crate) enum Admitted {
    /// Nobody.
    Nobody,
    /// Peers with these SPIFFE ids.
    Ids(Vec<rbac::Text>),
    /// Rules that ids alone can't express: every peer of a trust domain is looked at.
    Trusted,
}

/// Who passes.
#[derive(Debug)]
pub(crate) struct Permission {
    /// What the handshake already decides for bytes.
    pub(crate) admitted: Admitted,
    /// Among peers with a certificate of the mesh.
    pub(crate) mesh: Matcher,
    /// What would be refused if shadow rules counted.
    pub(crate) shadow: Option<Matcher>,
    /// Among those without.
    pub(crate) plain: Matcher,
}

/// Cluster and listener of a port, open for policies.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) cluster: Cluster,
    pub(crate) upstream: Option<HttpProtocolOptions>,
    pub(crate) terminal: filter::Terminal,
    pub(crate) mode: Mode,
    pub(crate) tls: Option<TlsParameters>,
    pub(crate) permission: Permission,
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
            permission: Permission {
                admitted: Admitted::Nobody,
                mesh: rbac::matcher(&[]),
                shadow: None,
                plain: rbac::constant("default", false),
            },
        }
    }

    /// Without an identity of its own, or without anybody to trust, the port is there and refuses.
    pub(crate) fn finish(self, target: &Target<'_>) -> (Cluster, Listener) {
        let cluster = cluster::finish(self.cluster.clone(), self.upstream.as_ref());
        let identity = target.identity.filter(|_| !target.trust_domains.is_empty());
        let Some(identity) = identity else {
            let refuse = filter::Terminal::Tcp(Box::new(filter::tcp(target.name, REFUSE_INBOUND)));
            let chains = vec![listener::chain(vec![refuse.finish()])];
            return (
                cluster,
                listener::inbound(target.name, target.address, target.port, target.labels, chains),
            );
        };
        let (terminal, peers) = self.admission(target);
        let mesh = FilterChain {
            transport_socket: tls::downstream(identity, peers, self.tls.clone()),
            ..chain(target.name, terminal, &self.permission.mesh, self.permission.shadow.as_ref())
        };
        if self.mode == Mode::Strict {
            let chains = vec![mesh];
            return (
                cluster,
                listener::inbound(target.name, target.address, target.port, target.labels, chains),
            );
        }
        let plain = FilterChain {
            filter_chain_match: Some(matching("raw_buffer", None)),
            ..chain(target.name, self.terminal.clone(), &self.permission.plain, None)
        };
        // TLS that isn't the mesh's belongs to the application: its bytes pass as they are.
        let bytes = filter::Terminal::Tcp(Box::new(filter::tcp(target.name, target.name)));
        let foreign_tls = FilterChain {
            filter_chain_match: Some(matching("tls", None)),
            ..chain(target.name, bytes, &self.permission.plain, None)
        };
        let mesh = FilterChain { filter_chain_match: Some(matching("tls", Some(tls::ALPN))), ..mesh };
        let mut listener = listener::inbound(
            target.name,
            target.address,
            target.port,
            target.labels,
            vec![plain, foreign_tls, mesh],
        );
        listener.listener_filters.push(listener::tls_inspector());
        (cluster, listener)
    }

    /// Envoy asks the permissions of a connection at its first byte, but by then the workload may have spoken. So
    /// for bytes the handshake itself turns away whom no rule allows; requests are judged one by one anyway.
    fn admission(&self, target: &Target<'_>) -> (filter::Terminal, Vec<StringMatcher>) {
        let trusted = || {
            target.trust_domains.iter().map(|domain| part::prefix(format!("spiffe://{domain}/"))).collect()
        };
        match (&self.terminal, &self.permission.admitted) {
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

fn chain(name: &str, terminal: filter::Terminal, matcher: &Matcher, shadow: Option<&Matcher>) -> FilterChain {
    match terminal {
        filter::Terminal::Http(mut http) => {
            let config = rbac::http(matcher.clone(), shadow.cloned());
            http.filters.insert(0, filter::http_filter("envoy.filters.http.rbac", config));
            listener::chain(vec![filter::Terminal::Http(http).finish()])
        }
        tcp @ filter::Terminal::Tcp(_) => {
            let config = rbac::network(name, matcher.clone(), shadow.cloned());
            listener::chain(vec![filter::network("envoy.filters.network.rbac", config), tcp.finish()])
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
