//! Kernel ticks and CLOCK_MONOTONIC: the datapath stamps flows with ticks, which user space cannot read directly.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use nix::time::{ClockId, clock_gettime};
use portfwd_common::abi::{ClockReading, Instant, Ticks, names};

use super::{map::Map, pins::Pins};

/// What CONFIG_HZ can be.
const TICK_RATES: [u32; 4] = [100, 250, 300, 1_000];
/// How long the calibration lasts at least: long enough to tell the tick rates apart, whose nearest two differ by a sixth.
const CALIBRATION: Duration = Duration::from_millis(40);
const SECOND: u64 = 1_000_000_000;

/// Converts between the two clocks. Neither runs while the machine sleeps, so they never drift apart.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    reading: ClockReading,
    ticks_per_second: u32,
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

    /// The first reading of a new tick.
    fn read_edge(&self) -> Result<ClockReading> {
        let start = self.read()?;
        loop {
            let reading = self.read()?;
            if reading.ticks != start.ticks {
                return Ok(reading);
            }
            // Ticks come every 10 ms at the slowest.
            ensure!(
                reading.ns.saturating_sub(start.ns) < SECOND,
                "the kernel's tick counter stands still"
            );
        }
    }
}

impl Clock {
    /// Reads the clocks, given the tick rate.
    pub fn read(pins: &Pins, ticks_per_second: u32) -> Result<Self> {
        Ok(Self {
            reading: Reader::open(pins)?.read()?,
            ticks_per_second,
        })
    }

    /// Reads the clocks and finds out the tick rate; takes some 50 ms.
    pub fn calibrate(pins: &Pins) -> Result<Self> {
        let reader = Reader::open(pins)?;
        let start = reader.read_edge()?;
        thread::sleep(CALIBRATION);
        let end = reader.read_edge()?;
        let ticks_per_second = nearest_rate(end.ticks - start.ticks, end.ns - start.ns);
        Ok(Self {
            reading: end,
            ticks_per_second,
        })
    }

    /// Kernel ticks in a second.
    pub const fn ticks_per_second(&self) -> u32 {
        self.ticks_per_second
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
        let ticks = elapsed * u128::from(self.ticks_per_second) / u128::from(SECOND);
        Instant::from_ticks(self.reading.ticks.wrapping_add(ticks as u64))
    }

    /// A length of time in ticks.
    pub fn ticks(&self, length: Duration) -> Ticks {
        let ticks = length.as_nanos() * u128::from(self.ticks_per_second) / u128::from(SECOND);
        Ticks(u32::try_from(ticks).unwrap_or(u32::MAX))
    }

    /// A length of time in ticks as a duration.
    pub fn duration(&self, Ticks(ticks): Ticks) -> Duration {
        Duration::from_nanos(u64::from(ticks) * SECOND / u64::from(self.ticks_per_second.max(1)))
    }
}

fn nearest_rate(ticks: u64, ns: u64) -> u32 {
    let measured = ticks.saturating_mul(SECOND) / ns.max(1);
    let distance = |rate: &u32| u64::from(*rate).abs_diff(measured);
    TICK_RATES
        .into_iter()
        .min_by_key(distance)
        .unwrap_or(TICK_RATES[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measured_rate_is_rounded_to_one_that_kernels_have() {
        const MS: u64 = 1_000_000;
        for (ticks, ns, rate) in [
            (4, 40 * MS, 100),
            (5, 49 * MS, 100),
            (10, 40 * MS, 250),
            (11, 44 * MS, 250),
            (11, 43 * MS, 250),
            (12, 40 * MS, 300),
            (13, 43 * MS, 300),
            (41, 41 * MS, 1_000),
        ] {
            assert_eq!(nearest_rate(ticks, ns), rate, "{ticks} in {ns}");
        }
    }

    #[test]
    fn ticks_follow_the_monotonic_clock_from_the_reading_on() {
        let clock = Clock {
            reading: ClockReading {
                ticks: 0x1_0000_0000,
                ns: 7 * SECOND,
            },
            ticks_per_second: 250,
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
}
