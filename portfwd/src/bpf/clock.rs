//! Kernel ticks and CLOCK_MONOTONIC: the datapath stamps flows with ticks, which user space cannot read directly.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use nix::time::{ClockId, clock_getres, clock_gettime};
use portfwd_common::abi::{ClockReading, Instant, Ticks, names};

use super::{map::Map, pins::Pins};

const SECOND: u64 = 1_000_000_000;

/// Converts between the two clocks. Neither runs while the machine sleeps, so they never drift apart.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    reading: ClockReading,
    /// Length of a tick, nanoseconds.
    tick: u64,
}

/// The pinned program that reads both clocks at once.
struct Reader {
    program: SchedClassifier,
    map: Map<u32, ClockReading>,
}

impl Reader {
    fn open(pins: &Pins) -> Result<Self> {
        let path = pins.program(names::PROGRAM_CLOCK);
        let program = SchedClassifier::from_pin(&path)
            .with_context(|| format!("cannot open program {}", path.display()))?;
        Ok(Self {
            program,
            map: Map::open(&pins.maps(), names::CLOCK)?,
        })
    }

    fn read(&self) -> Result<ClockReading> {
        /// The kernel wants an Ethernet header at least.
        const FRAME: [u8; 64] = [0; 64];
        self.program
            .test_run(TestRunOptions {
                data_in: Some(&FRAME),
                ..TestRunOptions::new()
            })
            .context("cannot run the program that reads the kernel's clock")?;
        self.map.lookup(&0)?.context("map CLOCK has no element")
    }
}

impl Clock {
    /// Reads the clocks, and how long a tick is.
    pub fn read(pins: &Pins) -> Result<Self> {
        // A coarse clock goes on with every tick (`TICK_NSEC`), and says so.
        let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)
            .context("the kernel does not say how long a tick is")?;
        let tick = u64::try_from(Duration::from(tick).as_nanos())?;
        ensure!(
            (1..=SECOND).contains(&tick),
            "the kernel says that a tick lasts {tick} ns"
        );
        Ok(Self {
            reading: Reader::open(pins)?.read()?,
            tick,
        })
    }

    /// Kernel ticks in a second.
    pub fn ticks_per_second(&self) -> u32 {
        rate(self.tick)
    }

    /// The time as the datapath sees it.
    pub fn now(&self) -> Result<Instant> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read CLOCK_MONOTONIC")?;
        Ok(self.at(Duration::from(now)))
    }

    fn at(&self, monotonic: Duration) -> Instant {
        let elapsed = monotonic
            .as_nanos()
            .saturating_sub(u128::from(self.reading.ns));
        // By the length that ticks have, which a whole number of them in a second is not: 300 of 3,333,333 ns.
        let ticks = elapsed / u128::from(self.tick);
        Instant::from_ticks(self.reading.ticks.wrapping_add(ticks as u64))
    }

    /// A length of time in ticks.
    pub fn ticks(&self, length: Duration) -> Ticks {
        let ticks = length.as_nanos() / u128::from(self.tick);
        Ticks(u32::try_from(ticks).unwrap_or(u32::MAX))
    }

    /// A length of time in ticks as a duration.
    pub fn duration(&self, Ticks(ticks): Ticks) -> Duration {
        Duration::from_nanos(u64::from(ticks).saturating_mul(self.tick))
    }
}

/// Ticks of so many nanoseconds in a second. The kernel rounds the length of a tick to a whole number of them.
fn rate(tick: u64) -> u32 {
    u32::try_from((SECOND + tick / 2) / tick).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_what_the_kernel_was_configured_with() {
        // CONFIG_HZ of x86, arm64, MIPS and Alpha.
        for hz in [24, 48, 100, 128, 250, 256, 300, 1_000, 1_024, 1_200] {
            let tick_nsec = (SECOND + u64::from(hz) / 2) / u64::from(hz);
            assert_eq!(rate(tick_nsec), hz, "a tick of {tick_nsec} ns");
        }
    }

    #[test]
    fn ticks_follow_the_monotonic_clock_from_the_reading_on() {
        let clock = Clock {
            reading: ClockReading {
                ticks: 0x1_0000_0000,
                ns: 7 * SECOND,
            },
            tick: 4_000_000,
        };
        assert_eq!(clock.at(Duration::from_secs(7)), Instant::from_ticks(0));
        assert_eq!(
            clock.at(Duration::from_millis(8_500)),
            Instant::from_ticks(375)
        );
        assert_eq!(clock.ticks(Duration::from_secs(300)), Ticks(75_000));
        assert_eq!(clock.duration(Ticks(75_000)), Duration::from_secs(300));
        assert_eq!(clock.ticks(Duration::from_secs(1 << 40)), Ticks(u32::MAX));
    }

    /// Counted by 300 ticks a second, the clock would be 946 ticks behind.
    #[test]
    fn a_year_of_ticks_that_are_no_whole_part_of_a_second_is_exact() {
        const YEAR: u64 = 365 * 86_400 * SECOND;
        let clock = Clock {
            reading: ClockReading { ticks: 0, ns: 0 },
            tick: 3_333_333,
        };
        let year = clock.at(Duration::from_nanos(YEAR));
        assert_eq!(year, Instant::from_ticks(YEAR / 3_333_333));
        assert_eq!(YEAR / 3_333_333 - 365 * 86_400 * 300, 946);
    }
}
