//! What is written to the maps on behalf of the rules.

use portfwd_common::abi::{self, PortSlot};

use super::{prefix::Entry, sources::SourceEntry};

/// One write to one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Zeroes elements of COUNTERS.
    ClearCounters {
        /// First element.
        first: u32,
        /// How many.
        count: u32,
    },
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
    /// Begins or ends to remember what leaves by the WAN.
    Remember(Remembering),
    /// Has packets ask first for rules with light tracking, or no longer.
    Light(Lighting),
    /// Sets or removes a key of SOURCES.
    Source(SourceEntry),
    /// Sets consecutive elements of PORTS.
    Ports {
        /// First element.
        first_index: u32,
        /// New values.
        words: Vec<PortSlot>,
    },
    /// Makes every flow look at rule and route again.
    BumpGeneration,
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
