//! What has been used of rules' limits. Its words change by atomic operations alone: packets on every CPU and the recount work on
//! them at the same time.

use aya_ebpf::{
    bindings::{BPF_NOEXIST, TC_ACT_UNSPEC},
    btf_maps::{Array, HashMap, LruHashMap},
    macros::btf_map,
};
use portfwd_common::{
    abi::{MAX_RULES, MAX_SOURCE_USAGE, Recount, Spender, Usage, UsageKey, UsageTask},
    datapath::UsageWords,
};

use crate::atomic;

#[btf_map]
static RULE_USAGE: HashMap<u32, Usage, { MAX_RULES as usize }> = HashMap::new();
#[btf_map]
static SOURCE_USAGE: LruHashMap<UsageKey, Usage, { MAX_SOURCE_USAGE as usize }> = LruHashMap::new();
#[btf_map]
static USAGE_TASK: Array<UsageTask, 1> = Array::new();
#[btf_map]
static RECOUNT: Array<Recount, 1> = Array::new();

/// An element of RULE_USAGE or SOURCE_USAGE. It stays in memory for the run of a program, whoever has it by then.
#[derive(Clone, Copy)]
pub struct UsageInMap(*mut Usage);

/// The element of a key.
#[inline(always)]
pub fn usage(spender: Spender, key: &UsageKey) -> Option<UsageInMap> {
    match spender {
        Spender::Rule => RULE_USAGE.get_ptr_mut(key.rule),
        Spender::Source => SOURCE_USAGE.get_ptr_mut(key),
    }
    .map(UsageInMap)
}

/// Makes the element of a key, if there is none.
#[inline(always)]
pub fn begin(spender: Spender, key: &UsageKey, usage: &Usage) {
    let flags = u64::from(BPF_NOEXIST);
    // Another CPU's is as good; without room there is none.
    let _ = match spender {
        Spender::Rule => RULE_USAGE.insert(key.rule, usage, flags),
        Spender::Source => SOURCE_USAGE.insert(key, usage, flags),
    };
}

/// When flows were last counted.
#[inline(always)]
pub fn recount() -> Recount {
    RECOUNT.get(0).copied().unwrap_or_default()
}

/// Corrects an element as the task says.
#[inline(always)]
pub fn carry_out() -> i32 {
    if let Some(task) = USAGE_TASK.get(0) {
        let spender = if task.is_source == 0 {
            Spender::Rule
        } else {
            Spender::Source
        };
        if let Some(words) = usage(spender, &task.key) {
            words.add_begun(task.begun);
            words.add_ended(task.ended);
        }
    }
    TC_ACT_UNSPEC
}

impl UsageInMap {
    #[inline(always)]
    fn begun_word(&self) -> *mut u64 {
        // SAFETY: the map gave out the element.
        unsafe { &raw mut (*self.0).begun }
    }

    #[inline(always)]
    fn ended_word(&self) -> *mut u64 {
        // SAFETY: as above.
        unsafe { &raw mut (*self.0).ended }
    }

    #[inline(always)]
    fn due_word(&self) -> *mut u64 {
        // SAFETY: as above.
        unsafe { &raw mut (*self.0).due }
    }
}

impl UsageWords for UsageInMap {
    #[inline(always)]
    fn due(&self) -> u64 {
        // SAFETY: the word is in a map's element.
        unsafe { atomic::load(self.due_word()) }
    }

    #[inline(always)]
    fn set_due(&self, from: u64, to: u64) -> Result<(), u64> {
        // SAFETY: as above.
        let found = unsafe { atomic::exchange(self.due_word(), from, to) };
        if found == from { Ok(()) } else { Err(found) }
    }

    #[inline(always)]
    fn begun(&self) -> u64 {
        // SAFETY: as above.
        unsafe { atomic::load(self.begun_word()) }
    }

    #[inline(always)]
    fn ended(&self) -> u64 {
        // SAFETY: as above.
        unsafe { atomic::load(self.ended_word()) }
    }

    #[inline(always)]
    fn add_begun(&self, flows: u64) -> u64 {
        // SAFETY: as above.
        unsafe { atomic::fetch_add(self.begun_word(), flows) }
    }

    #[inline(always)]
    fn add_ended(&self, flows: u64) {
        // SAFETY: as above.
        let _before = unsafe { atomic::fetch_add(self.ended_word(), flows) };
    }

    #[inline(always)]
    fn add_refused(&self, packets: u64) {
        // SAFETY: as above.
        let _before = unsafe { atomic::fetch_add(&raw mut (*self.0).refused, packets) };
    }
}
