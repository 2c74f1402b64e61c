//! Diagnostics for the daemon's log: what the slow path refused. Never on the hot path; below the level that the loader sets
//! in `AYA_LOG_LEVEL`, which is read-only data by then, the verifier takes the calls out.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE},
};
use aya_log_ebpf::{
    debug,
    macro_support::{AYA_LOGS, Level, level_enabled},
};
use portfwd_common::datapath::{Event, Verdict};

use crate::maps::count_reason;

/// Bytes of the buffer that no message begins in: `debug!` says nothing of one that does not fit. A message takes 256 at most, so
/// this has room for those of 128 CPUs that have all found the buffer not yet full.
const KEPT: u64 = 1 << 15;

/// Tells the daemon's log of a drop, by its element of REASONS. What the log has no room for is counted.
#[inline(always)]
pub fn report<C: EbpfContext>(ctx: &C, verdict: &Verdict) {
    let (Verdict::Drop(reason) | Verdict::Refuse(reason)) = verdict else {
        return;
    };
    if !level_enabled(Level::Debug) {
        return;
    }
    let (unread, size) = (
        AYA_LOGS.query(u64::from(BPF_RB_AVAIL_DATA)),
        AYA_LOGS.query(u64::from(BPF_RB_RING_SIZE)),
    );
    if unread + KEPT > size {
        count_reason(Event::LogLost.index());
    } else {
        debug!(ctx, "dropped, reason {}", reason.index());
    }
}
