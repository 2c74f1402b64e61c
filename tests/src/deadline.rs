//! Waiting for a condition, never longer than a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything in the lab may take that should take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(10);

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
