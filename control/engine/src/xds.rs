//! Envoy resources: what each looks like before policies touch it.
//!
//! `cluster`, `listener`, `filter`, `tls`, `rbac`, `route`, `endpoint` and `secret` build single messages; `outbound` and
//! `inbound` join them for one port of a service and one port of a workload, and stay open for policies until
//! they are finished; `permission` is who may talk to the latter; `transparent` holds the catch-all listeners of the redirect.

pub(crate) mod cluster;
pub(crate) mod endpoint;
pub(crate) mod filter;
pub(crate) mod inbound;
pub(crate) mod listener;
pub(crate) mod outbound;
pub(crate) mod part;
pub(crate) mod permission;
pub(crate) mod rbac;
pub(crate) mod route;
pub(crate) mod secret;
pub(crate) mod tls;
pub(crate) mod transparent;
