//! Time as the datapath sees it: the low 32 bits of the kernel's tick counter (jiffies), read for free.

use bytemuck::{Pod, Zeroable};

/// An instant in kernel ticks, modulo 2^32. Only differences mean anything; they are right up to 2^32 ticks (49 days at
/// 1,000 ticks a second), far beyond every timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Instant(u32);

/// How far ahead, in ticks, an instant of another CPU can be: a program runs for microseconds; this is seconds.
const AHEAD: u32 = 4_096;

/// The low 16 bits of an [`Instant`]. Differences are right up to 65,535 ticks (a minute at 1,000 ticks a second), so it says
/// something only beside an instant that bounds it, see [`crate::datapath::known::is_fresh`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Stamp(u16);

/// A length of time in kernel ticks, see [`super::Config::ticks_per_second`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct Ticks(pub u32);

/// The only element of CLOCK: both clocks at one moment, from which user space learns what a tick is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ClockReading {
    /// The kernel's 64-bit tick counter (jiffies).
    pub ticks: u64,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub ns: u64,
}

impl Instant {
    /// From the kernel's 64-bit tick counter.
    #[inline(always)]
    pub const fn from_ticks(ticks: u64) -> Self {
        Self(ticks as u32)
    }

    /// The low 32 bits of the tick counter.
    #[inline(always)]
    pub const fn ticks(self) -> u32 {
        self.0
    }

    /// Time from `earlier` to this instant.
    #[inline(always)]
    pub const fn since(self, earlier: Self) -> Ticks {
        Ticks(self.0.wrapping_sub(earlier.0))
    }

    /// Time from `earlier` to this instant, as another CPU may have written `earlier`: what it wrote after this instant was read
    /// lies a tick or so ahead, and is no time ago, not 2^32 ticks.
    #[inline(always)]
    pub const fn since_any_cpu(self, earlier: Self) -> Ticks {
        match self.since(earlier) {
            Ticks(ticks) if ticks > u32::MAX - AHEAD => Ticks(0),
            ago => ago,
        }
    }

    /// The later of two instants that are less than 2^31 ticks apart.
    #[inline(always)]
    pub const fn later(self, other: Self) -> Self {
        if (self.0.wrapping_sub(other.0) as i32) < 0 {
            other
        } else {
            self
        }
    }

    /// This instant moved on.
    #[inline(always)]
    pub const fn plus(self, ticks: Ticks) -> Self {
        Self(self.0.wrapping_add(ticks.0))
    }

    /// This instant moved back.
    #[inline(always)]
    pub const fn minus(self, ticks: Ticks) -> Self {
        Self(self.0.wrapping_sub(ticks.0))
    }
}

impl Stamp {
    /// Of an instant.
    #[inline(always)]
    pub const fn of(instant: Instant) -> Self {
        Self(instant.0 as u16)
    }

    /// Time from this stamp to `now`, if it is less than 2^16 ticks.
    #[inline(always)]
    pub const fn until(self, now: Instant) -> Ticks {
        Ticks((now.0 as u16).wrapping_sub(self.0) as u32)
    }

    /// This stamp moved back.
    #[inline(always)]
    pub const fn minus(self, ticks: Ticks) -> Self {
        Self(self.0.wrapping_sub(ticks.0 as u16))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_survive_the_wrap() {
        let before = Instant::from_ticks(0xffff_fff0);
        let after = before.plus(Ticks(0x20));
        assert_eq!(after.since(before), Ticks(0x20));
        assert_eq!(before.later(after), after);
        assert_eq!(after.later(before), after);
        assert_eq!(after.minus(Ticks(0x20)), before);
    }

    #[test]
    fn stamps_survive_the_wrap() {
        let before = Instant::from_ticks(0x1234_fff0);
        let stamp = Stamp::of(before);
        assert_eq!(stamp.until(before), Ticks(0));
        assert_eq!(stamp.until(before.plus(Ticks(0x20))), Ticks(0x20));
        assert_eq!(stamp.until(before.plus(Ticks(0xffff))), Ticks(0xffff));
        assert_eq!(stamp.minus(Ticks(7)).until(before), Ticks(7));
    }

    #[test]
    fn what_another_cpu_wrote_a_tick_later_is_no_time_ago() {
        let now = Instant::from_ticks(5);
        assert_eq!(now.since_any_cpu(now.plus(Ticks(1))), Ticks(0));
        assert_eq!(now.since_any_cpu(now), Ticks(0));
        assert_eq!(now.since_any_cpu(now.minus(Ticks(1))), Ticks(1));
        assert_eq!(now.since_any_cpu(now.minus(Ticks(1 << 31))), Ticks(1 << 31));
    }
}
