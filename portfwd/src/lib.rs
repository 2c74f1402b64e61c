//! portfwd: forwards ports in the kernel. Loader, daemon and command line around the datapath of
//! `portfwd-common`.
//!
//! ```text
//! cli ──HTTP over a unix socket──► control ──► ruleset ──lowered──► bpf (maps, pins, links)
//!  └──────────── no daemon: state + pins, read-only ───────────────► bpf
//! ```

pub mod bpf;
pub mod check_port;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod diagnose;
pub mod explain;
pub mod failure;
#[cfg(test)]
mod fuzz_tests;
pub mod gateway_ports;
pub mod instance;
pub mod netlink;
pub mod report;
pub mod resolve;
pub mod ruleset;
pub mod state;
pub mod transport;
