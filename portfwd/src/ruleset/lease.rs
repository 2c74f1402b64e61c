//! Rules that end: `--expires 2h`, or at a point in time.
//!
//! A point in time is what the clock on the wall says, so setting the clock moves it. A length of
//! time is not: it is measured by the kernel's clock that nobody sets and that runs while the
//! machine sleeps (CLOCK_BOOTTIME). Only after a reboot, which ends that clock, does the end that
//! was computed at the beginning count.

use std::{fmt, fs, str::FromStr, time::Duration};

use anyhow::{Context, Result};
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp, Zoned};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Refusal;

/// When a rule ends, as the operator says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Expires {
    /// At a point in time.
    At(Timestamp),
    /// After a length of time from when the rule is taken.
    In(SignedDuration),
}

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The clock on the wall.
    pub wall: Timestamp,
    /// Since the machine was started, time asleep included.
    pub boot: Duration,
}

/// A length of time that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Which start of the machine `end_ms` counts from.
    boot_id: String,
    /// Its end, milliseconds since that start.
    end_ms: u64,
}

/// No lease is longer: the datapath's operators think in hours, and sums must not overflow.
const LONGEST: SignedDuration = SignedDuration::from_hours(24 * 366 * 10);

impl Now {
    /// What the clocks say.
    pub fn read() -> Result<Self> {
        let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).context("cannot read CLOCK_BOOTTIME")?;
        Ok(Self {
            wall: Timestamp::now(),
            boot: Duration::from(boot),
        })
    }
}

impl Expires {
    /// The point in time, given when the rule is taken.
    pub fn end(self, now: Now) -> Timestamp {
        match self {
            Self::At(end) => end,
            Self::In(length) => now.wall.saturating_add(length).unwrap_or(Timestamp::MAX),
        }
    }

    /// What has to be remembered of a length of time that begins now.
    pub fn lease(self, now: Now) -> Result<Option<Lease>> {
        let length = match self {
            Self::At(_) => return Ok(None),
            Self::In(length) => length.unsigned_abs(),
        };
        let end = now.boot.saturating_add(length).as_millis();
        Ok(Some(Lease {
            boot_id: boot_id()?,
            end_ms: u64::try_from(end).unwrap_or(u64::MAX),
        }))
    }
}

impl Lease {
    /// Whether it counts: not after a reboot.
    pub fn is_of_this_boot(&self) -> Result<bool> {
        Ok(self.boot_id == boot_id()?)
    }

    /// What is left of it.
    pub fn left(&self, now: Now) -> Duration {
        Duration::from_millis(self.end_ms).saturating_sub(now.boot)
    }
}

fn boot_id() -> Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context("cannot read which start of the machine this is")?;
    Ok(id.trim().to_owned())
}

impl FromStr for Expires {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let illegal = || Refusal::IllegalExpires {
            text: text.to_owned(),
        };
        if let Ok(end) = text.parse::<Timestamp>() {
            return Ok(Self::At(end));
        }
        if let Ok(end) = text.parse::<Zoned>() {
            return Ok(Self::At(end.timestamp()));
        }
        let span: Span = text.parse().map_err(|_| illegal())?;
        let length = span
            .to_duration(SpanRelativeTo::days_are_24_hours())
            .map_err(|_| illegal())?;
        if length <= SignedDuration::ZERO || length > LONGEST {
            return Err(illegal());
        }
        Ok(Self::In(length))
    }
}

impl fmt::Display for Expires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(end) => end.fmt(f),
            Self::In(length) => write!(f, "{length:#}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(wall: &str, boot: u64) -> Now {
        Now {
            wall: wall.parse().unwrap(),
            boot: Duration::from_secs(boot),
        }
    }

    #[test]
    fn lengths_and_points_of_time_are_understood() {
        let start = now("2026-11-24T12:00:00Z", 1_000);
        for (text, end) in [
            ("90s", "2026-11-24T12:01:30Z"),
            ("2h", "2026-11-24T14:00:00Z"),
            ("1h 30m", "2026-11-24T13:30:00Z"),
            ("7d", "2026-12-01T12:00:00Z"),
            ("2026-12-24T18:00:00Z", "2026-12-24T18:00:00Z"),
            ("2026-12-24T18:00:00+01:00", "2026-12-24T17:00:00Z"),
            ("2026-12-24T18:00:00[Europe/Berlin]", "2026-12-24T17:00:00Z"),
        ] {
            let expires: Expires = text.parse().unwrap();
            assert_eq!(expires.end(start), end.parse().unwrap(), "{text}");
            assert_eq!(expires.to_string().parse(), Ok(expires), "{text}");
        }
        for text in [
            "",
            "soon",
            "2",
            "-2h",
            "0s",
            "2026-12-24",
            "18:00",
            "11y",
            "1 month",
        ] {
            assert!(text.parse::<Expires>().is_err(), "{text:?}");
        }
    }

    /// Somebody sets the clock while a lease runs.
    #[test]
    fn a_length_of_time_does_not_follow_the_clock_on_the_wall() {
        let lease = "2h".parse::<Expires>().unwrap();
        let lease = lease
            .lease(now("2026-11-24T12:00:00Z", 1_000))
            .unwrap()
            .unwrap();
        assert!(lease.is_of_this_boot().unwrap());
        let set_ahead = now("2027-01-01T00:00:00Z", 1_000 + 3_600);
        assert_eq!(lease.left(set_ahead), Duration::from_secs(3_600));
        let set_back = now("2020-01-01T00:00:00Z", 1_000 + 7_201);
        assert_eq!(lease.left(set_back), Duration::ZERO);
        let point = "2026-11-24T14:00:00Z".parse::<Expires>().unwrap();
        assert_eq!(point.lease(set_back).unwrap(), None);
    }
}
