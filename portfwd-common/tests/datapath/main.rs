//! The datapath on the host, by the model: every rule of NAT, without a kernel.
//!
//! What must come out is not worked out from what goes in: etherparse builds it anew from the translated endpoints, sums and
//! all, and the two are compared byte for byte.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

mod capacity;
mod conversation;
mod departures;
mod dmz;
mod echo;
mod errors;
mod extensions;
mod forwarding;
mod fragments;
mod fuzz;
mod gateway;
mod header_lengths;
mod hidden;
mod late;
mod lease;
mod lifetimes;
mod light;
mod light_agreement;
mod limits;
mod mappings;
mod mss;
mod pools;
mod random;
mod refusals;
mod resets;
mod reverse_path;
mod rules;
mod scattered;
mod sources;
mod speaking;
mod sums;
mod tcp;
mod transparency;
mod truncated;
mod untouched;
