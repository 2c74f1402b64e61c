//! Inputs that nobody thought of, for some minutes: frames before the core, and what is written to the daemon.

use anyhow::Result;

use crate::{host, steps};

/// Variable that the tests take their length from.
const MINUTES: &str = "PORTFWD_FUZZ_MINUTES";

/// The tests: what they are about, the arguments that select them, the name.
const TESTS: [(&str, &[&str], &str); 2] = [
    (
        "frames",
        &["--package", "portfwd-common", "--test", "datapath"],
        "fuzz::no_conversation_of_any_frames_breaks_what_must_hold",
    ),
    (
        "control inputs",
        &["--package", "portfwd", "--lib"],
        "fuzz_tests::no_control_input_panics_and_what_is_accepted_reads_back",
    ),
];

/// Runs each for so many minutes, optimised.
///
/// # Errors
/// When an input breaks what must hold; it is printed.
pub fn run(minutes: f64) -> Result<()> {
    for (what, package, test) in TESTS {
        let mut cargo = host::cargo();
        cargo
            .args(["test", "--release", "--quiet"])
            .args(package)
            .args(["--", "--nocapture", "--exact", test])
            .env(MINUTES, minutes.to_string());
        steps::run(what, &mut cargo)?;
    }
    Ok(())
}
