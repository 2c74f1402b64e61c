//! How many flows a rule takes, and how many new ones in a time: what is allowed, and what has been used.

use bytemuck::{Pod, Zeroable};

use super::{Instant, Ticks};
use crate::net::{Address, Ipv6};

/// New flows in a time. All zeroes is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Rate {
    /// So many flows, 0 for any number; at most [`Rate::MOST`].
    pub flows: u32,
    /// In so many seconds, at most 3,600.
    pub seconds: u32,
    /// So many may begin at once after a time without any; at least 1, at most [`Rate::MOST`], and no more than come back in
    /// [`Rate::LONGEST`] seconds.
    pub burst: u32,
}

/// What a rule allows. All zeroes is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Limits {
    /// New flows of all sources together.
    pub rate: Rate,
    /// New flows of each source.
    pub source_rate: Rate,
    /// Flows at the same time, 0 for any number.
    pub flows: u32,
    /// Flows of each source at the same time, 0 for any number.
    pub source_flows: u32,
    /// Sources with the same first bits are one.
    pub source_bits: u32,
}

/// Who uses up a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spender {
    /// All of a rule's sources: an element of RULE_USAGE.
    Rule,
    /// One of them: an element of SOURCE_USAGE.
    Source,
}

/// Key of SOURCE_USAGE; its first word is that of RULE_USAGE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct UsageKey {
    /// The rule's number for the operator, which no other rule ever has. A rule of both protocols is one here.
    pub rule: u32,
    /// The first bits of the source's address ([`Address::widen`]); the others are zero.
    pub source: Ipv6,
}

/// What has been used up. Every word changes by atomic operations alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Usage {
    /// When everything that the rate allows is there again: kernel ticks in the upper half, their fractions in the lower.
    pub due: u64,
    /// Flows that have begun.
    pub begun: u64,
    /// Flows of those that have ended. The recount corrects both.
    pub ended: u64,
    /// Of a rule: packets that one of its limits has refused.
    pub refused: u64,
}

/// The only element of USAGE_TASK: a correction of [`Usage`], among packets that change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct UsageTask {
    /// Whose.
    pub key: UsageKey,
    /// 1 for the source, 0 for the rule.
    pub is_source: u32,
    /// Added to [`Usage::begun`].
    pub begun: u64,
    /// Added to [`Usage::ended`].
    pub ended: u64,
}

/// The only element of RECOUNT, written by the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Recount {
    /// When flows were last counted in the tables.
    pub at: Instant,
    /// For how long that keeps [`Usage::begun`] and [`Usage::ended`] right: of a flow that ends in silence nobody but the
    /// recount hears. 0 for ever.
    pub trust: Ticks,
}

impl Rate {
    /// No limit.
    pub const NONE: Self = Self {
        flows: 0,
        seconds: 0,
        burst: 0,
    };
    /// Flows, at once or in a time, at most.
    pub const MOST: u32 = 1_000_000;
    /// Seconds in which all of a burst has come back, at most.
    pub const LONGEST: u64 = 10 * 24 * 3_600;
}

impl Limits {
    /// No limit.
    pub const NONE: Self = Self {
        rate: Rate::NONE,
        source_rate: Rate::NONE,
        flows: 0,
        source_flows: 0,
        source_bits: 0,
    };

    /// Whether there is one for all sources together.
    #[inline(always)]
    pub const fn bind_rule(&self) -> bool {
        self.rate.flows | self.flows != 0
    }

    /// Whether there is one for each source.
    #[inline(always)]
    pub const fn bind_sources(&self) -> bool {
        self.source_rate.flows | self.source_flows != 0
    }

    /// Whether there is one.
    #[inline(always)]
    pub const fn bind(&self) -> bool {
        self.bind_rule() || self.bind_sources()
    }

    /// Whether flows are counted.
    #[inline(always)]
    pub const fn count_flows(&self) -> bool {
        self.flows | self.source_flows != 0
    }
}

impl UsageKey {
    /// The key of a rule's sources that begin like an address for some bits.
    #[inline(always)]
    pub fn new<A: Address>(rule: u32, source: A, bits: u32) -> Self {
        Self {
            rule,
            source: source.widen().first_bits(bits),
        }
    }
}

impl Usage {
    /// Nothing used, at an instant.
    #[inline(always)]
    pub const fn unused(now: Instant) -> Self {
        Self {
            due: (now.ticks() as u64) << 32,
            begun: 0,
            ended: 0,
            refused: 0,
        }
    }

    /// Flows that go on, as far as is known.
    #[inline(always)]
    pub const fn flows(&self) -> u64 {
        flows(self.begun, self.ended)
    }
}

/// Flows that go on, of those that have begun and those that have ended. A flow that began uncounted and ends counted may make
/// it less than none.
#[inline(always)]
pub const fn flows(begun: u64, ended: u64) -> u64 {
    let flows = begun.wrapping_sub(ended);
    if (flows as i64) < 0 { 0 } else { flows }
}

const _: () = assert!(size_of::<Limits>() == 36);
const _: () = assert!(size_of::<UsageKey>() == 20);
const _: () = assert!(size_of::<Usage>() == 32);
const _: () = assert!(size_of::<UsageTask>() == 40);
