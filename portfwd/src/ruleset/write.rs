//! What is written to the maps on behalf of the rules.

use portfwd_common::abi::{self, Bank, PortSlot};

use super::{prefix::Entry, sources::SourceEntry};

/// One write to a bank of the rule tables. A change is written to one bank after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleWrite {
    /// Sets an element of RULES.
    Rule {
        /// The element.
        slot: u16,
        /// Its new value.
        rule: abi::Rule,
    },
    /// Sets or removes a key of LISTENS.
    Listen(Entry),
    /// Sets or removes a key of TARGETS; slot 0 stands for several rules.
    Target(Entry),
    /// Sets or removes a key of RESTS; slot 0 leaves ports to the gateway.
    Rest(Entry),
    /// Sets consecutive elements of PORTS.
    Ports {
        /// First element.
        first_index: u32,
        /// New values.
        words: Vec<PortSlot>,
    },
}

/// One write to what is there once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Zeroes elements of COUNTERS.
    ClearCounters {
        /// First element.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Begins or ends to remember what leaves by the WAN.
    Remember(Remembering),
    /// Has packets ask first for rules with light tracking, or no longer.
    Light(Lighting),
    /// Sets or removes a key of SOURCES.
    Source(SourceEntry),
}

/// Whether it is remembered what leaves by the WAN, for rules for everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remembering {
    /// From here on, and what is under way already.
    On,
    /// No longer.
    Off,
}

/// Whether packets ask first for rules with light tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lighting {
    /// They do: there are some.
    On,
    /// There is none.
    Off,
}

/// All writes of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Before packets find any of it: what those need that will.
    pub ahead: Vec<Write>,
    /// To both banks, each time in this order.
    pub rules: Vec<RuleWrite>,
    /// Whether flows are to look at their rule again.
    pub asks_flows: bool,
    /// When no packet finds any more what was before.
    pub behind: Vec<Write>,
}

/// A step on the way of a change into the maps.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// A write to what is there once.
    Once(&'a Write),
    /// A write to a bank.
    In(Bank, &'a RuleWrite),
    /// Packets look at this bank from here on. The moment of the change.
    Turn {
        /// The bank.
        to: Bank,
        /// Whether flows look at their rule again, from the same moment on.
        asks_flows: bool,
    },
}

impl Writes {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        let Self {
            ahead,
            rules,
            asks_flows,
            behind,
        } = self;
        ahead.is_empty() && rules.is_empty() && behind.is_empty() && !asks_flows
    }

    /// All steps in their order, while packets look at `bank`.
    ///
    /// The bank that they do not look at is written first. Once they look at it, the other one is made the same. A packet that was
    /// under way at that moment may still look at the other one: the order of the writes sees to it that it finds what held before
    /// or what holds after.
    ///
    /// The steps of a change that is undone may follow after any step of the change itself.
    pub fn steps(&self, bank: Bank) -> impl Iterator<Item = Step<'_>> {
        let to = if self.rules.is_empty() {
            bank
        } else {
            bank.other()
        };
        let turn = (to != bank || self.asks_flows).then_some(Step::Turn {
            to,
            asks_flows: self.asks_flows,
        });
        let rules_in = |bank| self.rules.iter().map(move |write| Step::In(bank, write));
        self.ahead
            .iter()
            .map(Step::Once)
            .chain(rules_in(bank.other()))
            .chain(turn)
            .chain(rules_in(bank))
            .chain(self.behind.iter().map(Step::Once))
    }
}
