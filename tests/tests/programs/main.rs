//! The kernel's programs, run on single frames (`BPF_PROG_TEST_RUN`) among real interfaces, routes and neighbours.
//!
//! - [`verdicts`]: what becomes of a frame, row by row
//! - [`races`]: first packets of one flow on several CPUs
//! - [`opening`]: how many flows that begin the kernel keeps before it makes room
//! - [`agreement`]: the same frames through the model of `portfwd-common` give the same verdicts, bytes, flows and counters
//! - [`dmz`]: what the gateway's own sockets, and what it has sent, keep from a rule for everything else
//! - [`whole_sums`]: the sum over the whole packet that a network card hands in (`CHECKSUM_COMPLETE`) stays right
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

mod agreement;
mod corpus;
mod dmz;
mod fragments;
mod kernel;
mod opening;
mod races;
mod refusals;
mod rows;
mod speaking;
mod surroundings;
mod test_run;
mod traffic;
mod tunnel;
mod twins;
mod verdicts;
mod whole_sums;
