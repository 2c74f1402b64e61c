//! The clock: jiffies, which cost nothing to read.

use aya_ebpf::{
    bindings::TC_ACT_UNSPEC,
    helpers::{bpf_ktime_get_ns, generated::bpf_jiffies64},
};
use portfwd_common::abi::{ClockReading, Instant};

use crate::maps::CLOCK;

/// Now.
#[inline(always)]
pub fn now() -> Instant {
    // SAFETY: the helper takes no argument and only reads a counter.
    Instant::from_ticks(unsafe { bpf_jiffies64() })
}

/// Stores both clocks side by side.
#[inline(always)]
pub fn read_clocks() -> i32 {
    if let Some(reading) = CLOCK.get_ptr_mut(0) {
        // SAFETY: the map gave out the element; the helpers only read clocks.
        unsafe {
            *reading = ClockReading {
                ticks: bpf_jiffies64(),
                ns: bpf_ktime_get_ns(),
            }
        };
    }
    TC_ACT_UNSPEC
}
