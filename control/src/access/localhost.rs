//! When a request over TCP comes from a person or program on this machine itself, and from no web
//! page and through no proxy. Only asked when `apiServer.authn.localhostIsAdmin` is on.

use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;

/// Set by proxies, whose clients may be anywhere.
const PROXY_HEADERS: [&str; 3] = ["forwarded", "x-forwarded-for", "x-real-ip"];

/// Whether a request is local. `authority` is the request's target host where the `Host` header is
/// absent, as in HTTP/2.
pub fn is_local(remote: SocketAddr, headers: &HeaderMap, authority: Option<&str>) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    if !remote.ip().to_canonical().is_loopback()
        || PROXY_HEADERS.iter().any(|name| headers.contains_key(*name))
    {
        return false;
    }
    let Some(host) = text("host").or(authority).and_then(HostPort::parse).filter(HostPort::is_loopback)
    else {
        return false;
    };
    // A browser says where a request comes from; other clients don't.
    if !matches!(text("sec-fetch-site").unwrap_or_default(), "" | "same-origin" | "none") {
        return false;
    }
    match text("origin").unwrap_or_default() {
        "" => true,
        origin => same_origin(origin, &host),
    }
}

struct HostPort {
    host: String,
    port: Option<u16>,
}

impl HostPort {
    fn parse(text: &str) -> Option<Self> {
        let (host, rest) = match text.strip_prefix('[') {
            Some(inner) => {
                let (host, rest) = inner.split_once(']')?;
                host.parse::<std::net::Ipv6Addr>().ok()?;
                (host, rest)
            }
            None => text.split_at(text.find(':').unwrap_or(text.len())),
        };
        let port = match rest.strip_prefix(':') {
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => Some(digits.parse().ok()?),
            None if rest.is_empty() => None,
            _ => return None,
        };
        let host = host.to_ascii_lowercase();
        (!host.is_empty()).then_some(Self { host, port })
    }

    fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self.host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
    }
}

/// Whether a browser's `Origin` is this very server. The request's own scheme isn't known here (TLS
/// may end before us), so a host without a port takes the origin's default.
fn same_origin(origin: &str, host: &HostPort) -> bool {
    let Some((scheme, rest)) = origin.split_once("://") else { return false };
    let default = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return false,
    };
    let Some(origin) = HostPort::parse(rest) else { return false };
    origin.host == host.host
        && origin.port.unwrap_or(default) == host.port.unwrap_or(default)
        && origin.is_loopback()
}
