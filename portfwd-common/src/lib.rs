//! The pure core of portfwd.
//!
//! Everything that decides what happens to a packet is in this crate: no helper call, no clock, no randomness, no I/O.
//! Time is a parameter ([`abi::Instant`]), the tables are a trait ([`datapath::Tables`]), the packet is a trait
//! ([`net::PacketBuf`]). It compiles for BPF, where the hooks of `portfwd-ebpf` supply kernel maps and packet memory, and
//! for the host, where tests supply a model; both must give the same bytes.
//!
//! - [`abi`]: keys and values of the maps, shared with user space
//! - [`net`]: addresses, wire-order integers, header layouts, checksums
//! - [`datapath`]: classify → flow → decide → track → route → apply
#![cfg_attr(not(any(test, feature = "model")), no_std)]
#![deny(unsafe_code)]

pub mod abi;
pub mod datapath;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod net;
