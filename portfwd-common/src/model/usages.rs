//! What has been used of rules' limits, in plain collections.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use crate::{
    abi::{ERROR_BUDGETS, Spender, Usage, UsageKey},
    datapath::{RateWord, UsageWords},
};

/// A [`Usage`] whose words change one by one.
#[derive(Clone, Debug, Default)]
pub struct UsageCells(Rc<Cell<Usage>>);

/// A word of ERROR_BUDGET.
#[derive(Clone, Copy, Debug)]
pub struct BudgetCell<'a>(&'a Cell<u64>);

/// ERROR_BUDGET.
#[derive(Debug)]
pub struct ErrorBudgets(Vec<Cell<u64>>);

impl RateWord for BudgetCell<'_> {
    fn due(&self) -> u64 {
        self.0.get()
    }

    fn set_due(&self, from: u64, to: u64) -> Result<(), u64> {
        match self.0.get() {
            due if due == from => {
                self.0.set(to);
                Ok(())
            }
            due => Err(due),
        }
    }
}

impl Default for ErrorBudgets {
    fn default() -> Self {
        Self(vec![Cell::new(0); ERROR_BUDGETS as usize])
    }
}

impl ErrorBudgets {
    /// Has every word say the same.
    pub fn fill(&mut self, due: u64) {
        self.0.fill(Cell::new(due));
    }

    pub(super) fn word(&self, slot: u32) -> Option<BudgetCell<'_>> {
        self.0.get(slot as usize).map(BudgetCell)
    }
}

/// RULE_USAGE and SOURCE_USAGE.
#[derive(Debug, Default)]
pub struct Usages {
    rules: RefCell<HashMap<u32, UsageCells>>,
    sources: RefCell<HashMap<UsageKey, UsageCells>>,
}

impl UsageCells {
    fn change<R>(&self, change: impl FnOnce(&mut Usage) -> R) -> R {
        let mut usage = self.0.get();
        let result = change(&mut usage);
        self.0.set(usage);
        result
    }
}

impl RateWord for UsageCells {
    fn due(&self) -> u64 {
        self.0.get().due
    }

    fn set_due(&self, from: u64, to: u64) -> Result<(), u64> {
        self.change(|usage| {
            if usage.due == from {
                usage.due = to;
                Ok(())
            } else {
                Err(usage.due)
            }
        })
    }
}

impl UsageWords for UsageCells {
    fn begun(&self) -> u64 {
        self.0.get().begun
    }

    fn ended(&self) -> u64 {
        self.0.get().ended
    }

    fn add_begun(&self, flows: u64) -> u64 {
        self.change(|usage| {
            let before = usage.begun;
            usage.begun = before.wrapping_add(flows);
            before
        })
    }

    fn add_ended(&self, flows: u64) {
        self.change(|usage| usage.ended = usage.ended.wrapping_add(flows));
    }

    fn add_refused(&self, packets: u64) {
        self.change(|usage| usage.refused = usage.refused.wrapping_add(packets));
    }
}

impl Usages {
    /// RULE_USAGE as it is.
    pub fn rules(&self) -> HashMap<u32, Usage> {
        let rules = self.rules.borrow();
        rules
            .iter()
            .map(|(id, cells)| (*id, cells.0.get()))
            .collect()
    }

    /// SOURCE_USAGE as it is.
    pub fn sources(&self) -> HashMap<UsageKey, Usage> {
        let sources = self.sources.borrow();
        sources
            .iter()
            .map(|(key, cells)| (*key, cells.0.get()))
            .collect()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.rules.get_mut().clear();
        self.sources.get_mut().clear();
    }

    /// Makes every rate's word older.
    pub fn age(&mut self, ticks: crate::abi::Ticks) {
        let rules = self.rules.get_mut().values();
        for cells in rules.chain(self.sources.get_mut().values()) {
            cells.change(|usage| usage.due = usage.due.wrapping_sub(u64::from(ticks.0) << 32));
        }
    }

    pub(super) fn usage(&self, spender: Spender, key: &UsageKey) -> Option<UsageCells> {
        match spender {
            Spender::Rule => self.rules.borrow().get(&key.rule).cloned(),
            Spender::Source => self.sources.borrow().get(key).cloned(),
        }
    }

    pub(super) fn begin(&self, spender: Spender, key: &UsageKey, usage: &Usage) {
        let cells = UsageCells(Rc::new(Cell::new(*usage)));
        match spender {
            Spender::Rule => drop(self.rules.borrow_mut().entry(key.rule).or_insert(cells)),
            Spender::Source => drop(self.sources.borrow_mut().entry(*key).or_insert(cells)),
        }
    }
}
