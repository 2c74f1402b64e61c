//! What has been used of rules' limits, and of the rate of ICMP errors. The words change by atomic operations alone: packets on every CPU and the recount work on
//! them at the same time.

use aya_ebpf::{
    bindings::{BPF_NOEXIST, TC_ACT_UNSPEC},
    btf_maps::{Array, HashMap, LruHashMap},
    macros::btf_map,
};
use portfwd_common::{
    abi::{
        ERROR_BUDGETS, MAX_RULES, MAX_SOURCE_USAGE, Recount, Spender, Usage, UsageKey, UsageTask,
    },
    datapath::{RateWord, UsageWords},
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
#[btf_map]
static ERROR_BUDGET: Array<u64, { ERROR_BUDGETS as usize }> = Array::new();

/// An element of RULE_USAGE or SOURCE_USAGE. It stays in memory for the run of a program, whoever has it by then.
#[derive(Clone, Copy)]
pub struct UsageInMap(*mut Usage);

/// An element of ERROR_BUDGET.
#[derive(Clone, Copy)]
pub struct BudgetInMap(*mut u64);

/// The element of a slot.
#[inline(always)]
pub fn error_budget(slot: u32) -> Option<BudgetInMap> {
    ERROR_BUDGET.get_ptr_mut(slot).map(BudgetInMap)
}

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

impl RateWord for BudgetInMap {
    #[inline(always)]
    fn due(&self) -> u64 {
        // SAFETY: the word is a map's element.
        unsafe { atomic::load(self.0) }
    }

    #[inline(always)]
    fn set_due(&self, from: u64, to: u64) -> Result<(), u64> {
        // SAFETY: as above.
        let found = unsafe { atomic::exchange(self.0, from, to) };
        if found == from { Ok(()) } else { Err(found) }
    }
}

impl RateWord for UsageInMap {
    #[inline(always)]
    fn due(&self) -> u64 {
        BudgetInMap(self.due_word()).due()
    }

    #[inline(always)]
    fn set_due(&self, from: u64, to: u64) -> Result<(), u64> {
        BudgetInMap(self.due_word()).set_due(from, to)
    }
}

impl UsageWords for UsageInMap {
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
