//! The processors of the machine.

use std::fs;

use anyhow::{Context, Result};

/// The CPUs that the kernel could ever have, as a list of ranges.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// One more than the highest number that a CPU could ever have (`nr_cpu_ids`): numbers need not be without gaps.
pub fn possible_cpus() -> Result<u32> {
    let listed = fs::read_to_string(POSSIBLE).with_context(|| format!("cannot read {POSSIBLE}"))?;
    beyond_the_last(&listed).with_context(|| format!("{POSSIBLE} has no list of CPUs: {listed:?}"))
}

fn beyond_the_last(listed: &str) -> Option<u32> {
    let last = listed.trim_end().rsplit([',', '-']).next()?;
    last.parse::<u32>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cpu_that_there_could_be_counts() {
        for (listed, cpus) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0-3,8-11\n", Some(12)),
            ("0,4\n", Some(5)),
            ("\n", None),
            ("0-x\n", None),
            ("4294967295\n", None),
        ] {
            assert_eq!(beyond_the_last(listed), cpus, "{listed:?}");
        }
    }
}
