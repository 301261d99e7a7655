//! MeshTimeout: how long connections, requests and streams may take.

use serde_json::Value;
use ursa_model::{
    GoDuration, Resource,
    types::mesh_timeout::{Conf, Http, MeshTimeout as Spec},
};

use super::{Effect, parse};
use crate::{
    envoy::types::{
        cluster::Cluster,
        core::HttpProtocolOptions as CommonOptions,
        hcm::HttpConnectionManager,
        route::{RouteConfiguration, route::Action},
        upstream_http::HttpProtocolOptions,
    },
    policy::merge::{Item, defaults},
    xds::{cluster::CONNECT_TIMEOUT, filter::Terminal, inbound::Inbound, outbound::Outbound, part},
};

const IDLE: GoDuration = GoDuration::from_secs(3600);
const REQUEST: GoDuration = GoDuration::from_secs(15);
const STREAM_IDLE: GoDuration = GoDuration::from_secs(30 * 60);
/// Of inbound streams, whatever policies say: the caller's proxy is the one to give up first.
const INBOUND_STREAM_IDLE: GoDuration = GoDuration::from_secs(3600);
const NONE: GoDuration = GoDuration::from_secs(0);

pub(super) struct MeshTimeout;

impl Effect for MeshTimeout {
    fn kind(&self) -> &'static str {
        "MeshTimeout"
    }

    fn check(&self, resource: &Resource) -> Result<(), String> {
        resource.spec_as::<Spec>().map(drop).map_err(|e| e.to_string())
    }

    fn outbound(&self, conf: Option<&Value>, port: &mut Outbound) -> Result<(), String> {
        let conf: Conf = conf.map(parse).transpose()?.unwrap_or_default();
        let http = conf.http.clone().unwrap_or_default();
        upstream(&conf, &http, &mut port.cluster, Some(&mut port.upstream));
        terminal(&conf, &http, &mut port.terminal);
        Ok(())
    }

    fn inbound(&self, rules: &[Item<'_>], port: &mut Inbound) -> Result<(), String> {
        let conf: Conf = defaults(rules).as_ref().map(parse).transpose()?.unwrap_or_default();
        let http = conf.http.clone().unwrap_or_default();
        upstream(&conf, &http, &mut port.cluster, port.upstream.as_mut());
        terminal(&conf, &http, &mut port.terminal);
        if let Terminal::Http(http) = &mut port.terminal {
            http.manager.stream_idle_timeout = part::duration(INBOUND_STREAM_IDLE);
        }
        Ok(())
    }
}

fn upstream(conf: &Conf, http: &Http, cluster: &mut Cluster, options: Option<&mut HttpProtocolOptions>) {
    cluster.connect_timeout = part::duration(conf.connection_timeout.unwrap_or(CONNECT_TIMEOUT));
    if let Some(options) = options {
        options.common_http_protocol_options = Some(CommonOptions {
            idle_timeout: part::duration(conf.idle_timeout.unwrap_or(IDLE)),
            max_connection_duration: part::duration(http.max_connection_duration.unwrap_or(NONE)),
            max_stream_duration: part::duration(http.max_stream_duration.unwrap_or(NONE)),
            ..CommonOptions::default()
        });
    }
}

fn terminal(conf: &Conf, http: &Http, terminal: &mut Terminal) {
    match terminal {
        Terminal::Tcp(proxy) => proxy.idle_timeout = part::duration(conf.idle_timeout.unwrap_or(IDLE)),
        Terminal::Http(parts) => {
            requests(http, &mut parts.routes);
            headers(http, &mut parts.manager);
        }
    }
}

fn requests(http: &Http, routes: &mut RouteConfiguration) {
    let routes = routes.virtual_hosts.iter_mut().flat_map(|host| &mut host.routes);
    for route in routes {
        if let Some(Action::Route(action)) = &mut route.action {
            action.timeout = part::duration(http.request_timeout.unwrap_or(REQUEST));
            action.idle_timeout = part::duration(http.stream_idle_timeout.unwrap_or(STREAM_IDLE));
        }
    }
}

fn headers(http: &Http, manager: &mut HttpConnectionManager) {
    if let Some(timeout) = http.request_headers_timeout {
        manager.request_headers_timeout = part::duration(timeout);
    }
}
