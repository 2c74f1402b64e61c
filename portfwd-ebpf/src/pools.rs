//! Pools of ports that stand for clients. Their words change by atomic operations alone: packets on every CPU and the sweep
//! work on them at the same time.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, TC_ACT_UNSPEC},
    btf_maps::{Array, HashMap},
    macros::btf_map,
};
use portfwd_common::{
    abi::{
        MAX_POOLS, Pool, PoolKey, PoolTask,
        pool::{FULL_WORDS, POOL_WORDS},
    },
    datapath::{PoolWords, pool},
};

use crate::atomic;

/// Made by user space only, and eight kilobytes each: not preallocated.
#[btf_map]
static POOLS: HashMap<PoolKey, Pool, { MAX_POOLS as usize }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
#[btf_map]
static POOL_TASK: Array<PoolTask, 1> = Array::new();

/// An element of POOLS.
#[derive(Clone, Copy)]
pub struct PoolInMap(*mut Pool);

/// The pool of a key.
#[inline(always)]
pub fn pool(key: &PoolKey) -> Option<PoolInMap> {
    POOLS.get_ptr_mut(key).map(PoolInMap)
}

/// Changes a word as the task says.
#[inline(always)]
pub fn carry_out() -> i32 {
    if let Some(task) = POOL_TASK.get(0)
        && let Some(words) = pool(&task.pool)
    {
        pool::change(
            words,
            task.word as usize & (POOL_WORDS - 1),
            task.take,
            task.give,
        );
    }
    TC_ACT_UNSPEC
}

/// The low bits of an index, for an array of 2^n elements. Opaque to LLVM, which would otherwise apply the mask to the parts that
/// an index is made of and leave it out where it knows better ("invalid access to map value, value_size=8320 off=8396864",
/// kernel 6.18, LLVM 22).
#[inline(always)]
fn below<const LENGTH: usize>(index: usize) -> usize {
    let mut masked = index;
    // SAFETY: a conjunction of a register and a number.
    unsafe {
        core::arch::asm!("{0} &= {1}", inout(reg) masked, const LENGTH - 1, options(pure, nomem, nostack));
    }
    masked
}

impl PoolInMap {
    #[inline(always)]
    fn taken_word(self, word: usize) -> *mut u64 {
        // SAFETY: the pool is an element that the map gave out; `below` keeps the index inside of its array, whose length is a power of two.
        unsafe {
            (&raw mut (*self.0).taken)
                .cast::<u64>()
                .add(below::<POOL_WORDS>(word))
        }
    }

    #[inline(always)]
    fn full_word(self, word: usize) -> *mut u64 {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*self.0).full)
                .cast::<u64>()
                .add(below::<FULL_WORDS>(word))
        }
    }
}

impl PoolWords for PoolInMap {
    #[inline(always)]
    fn taken(self, word: usize) -> u64 {
        // SAFETY: the word is in a map's element.
        unsafe { atomic::load(self.taken_word(word)) }
    }

    #[inline(always)]
    fn take(self, word: usize, bits: u64) -> u64 {
        // SAFETY: as above.
        unsafe { atomic::fetch_or(self.taken_word(word), bits) }
    }

    #[inline(always)]
    fn give(self, word: usize, bits: u64) {
        // SAFETY: as above.
        unsafe { atomic::fetch_and(self.taken_word(word), !bits) };
    }

    #[inline(always)]
    fn full(self, word: usize) -> u64 {
        // SAFETY: as above.
        unsafe { atomic::load(self.full_word(word)) }
    }

    #[inline(always)]
    fn set_full(self, word: usize, bit: u64) {
        // SAFETY: as above.
        unsafe { atomic::fetch_or(self.full_word(word), bit) };
    }

    #[inline(always)]
    fn clear_full(self, word: usize, bit: u64) {
        // SAFETY: as above.
        unsafe { atomic::fetch_and(self.full_word(word), !bit) };
    }
}
