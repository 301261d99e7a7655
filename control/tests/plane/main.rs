//! The control plane by its public interfaces: real listeners, real TLS, nodes that join and subscribe.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod insight;
mod keys;
mod misuse;
mod nodes;
mod server;
mod support;
