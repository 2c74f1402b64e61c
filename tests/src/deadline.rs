//! Waiting for a condition, never longer than a deadline.

use std::env;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything in the lab may take that should take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How many times as long everything may take: a number, for machines that are emulated.
const SLOWNESS: &str = "PORTFWD_SLOWNESS";

/// A length of time on this machine.
#[must_use]
pub fn here(within: Duration) -> Duration {
    within * slowness()
}

/// How many of something this machine does in a time that portfwd itself sets, if others do `count`.
#[must_use]
pub fn fewer(count: usize) -> usize {
    count / slowness() as usize
}

/// Whether this machine may take longer than portfwd itself waits for an answer.
#[must_use]
pub fn is_slow() -> bool {
    slowness() > 1
}

fn slowness() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let told = || env::var(SLOWNESS).ok()?.parse().ok();
    *FACTOR.get_or_init(|| told().unwrap_or(1))
}

/// Pause between two looks at a condition that nobody announces.
const POLL: Duration = Duration::from_millis(5);

/// Looks at `condition` until it gives a value, and fails when `within` has passed.
///
/// `what` says in the error what was waited for.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let within = here(within);
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("waited {within:?} in vain for {what}");
        }
        std::thread::sleep(POLL);
    }
}

/// [`wait_for`] a condition that is only true or false.
pub fn wait_until(
    what: &str,
    within: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    wait_for(what, within, || Ok(condition()?.then_some(())))
}
