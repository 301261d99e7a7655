//! The program `ursa` as it is typed, against a control plane that says what a test wants.

#![allow(clippy::unwrap_used, reason = "a test")]

mod contexts;
mod documentation;
mod documents;
mod support;
mod tables;
