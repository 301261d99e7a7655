//! The engine from outside: YAML in, canonical Envoy configuration out.

#[path = "engine/counting.rs"]
mod counting;
#[path = "engine/envoy.rs"]
mod envoy;
#[path = "engine/golden.rs"]
mod golden;
#[path = "engine/incremental.rs"]
mod incremental;
#[path = "engine/support.rs"]
mod support;
