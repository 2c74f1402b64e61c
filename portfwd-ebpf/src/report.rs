//! Diagnostics for the daemon's log: what the slow path refused. Never on the hot path; below the level that the loader sets
//! in `AYA_LOG_LEVEL`, which is read-only data by then, the verifier takes the calls out.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;
use portfwd_common::datapath::Verdict;

/// Tells the daemon's log of a drop, by its element of REASONS.
#[inline(always)]
pub fn report<C: EbpfContext>(ctx: &C, verdict: &Verdict) {
    if let Verdict::Drop(reason) | Verdict::Refuse(reason) = verdict {
        debug!(ctx, "dropped, reason {}", reason.index());
    }
}
