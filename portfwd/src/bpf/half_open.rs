//! Room for flows that begin.
//!
//! They are in LRU tables of the kernel, which make room before they are full: every CPU takes free elements in batches and keeps them
//! at hand, where no other CPU finds them (`bpf_lru_pop_free`). So there are as many more as all CPUs may keep.

use anyhow::Result;

use super::cpus::possible_cpus;

/// Elements that a CPU takes at once (`LOCAL_FREE_TARGET`, kernel/bpf/bpf_lru_list.c).
const BATCH: u32 = 128;

/// Elements of a table for so many flows, of which each has two.
pub fn elements(flows: u32) -> Result<u32> {
    Ok(flows
        .saturating_mul(2)
        .saturating_add(BATCH * possible_cpus()?))
}

/// Flows that a table of so many elements has room for.
pub fn flows(elements: u32) -> Result<u32> {
    Ok(elements.saturating_sub(BATCH * possible_cpus()?) / 2)
}
