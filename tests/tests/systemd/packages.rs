//! Packages: what is in them, and what a machine is like before, with and after them, for both formats.

mod content;
mod daemons;
mod joined;
mod life;
