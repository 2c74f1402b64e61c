//! Every test there is.

use std::{num::NonZeroUsize, thread, time::Instant};

use anyhow::Result;

use crate::{host, lint, setup, steps, vm};

/// Sets up, lints and tests, and loads every program on the other kernels. With arguments, only the tests that they select.
///
/// # Errors
/// At the first step that fails.
pub fn run(arguments: &[String]) -> Result<()> {
    let start = Instant::now();
    setup::run()?;
    if arguments.is_empty() {
        lint::run()?;
    }
    // The end-to-end tests run the finished program, which `cargo test` alone would not build.
    let mut build = host::cargo_workspace("build");
    build.arg("--all-targets");
    steps::run("build", &mut build)?;

    let mut tests = host::cargo_workspace("test");
    tests.args(["--no-fail-fast", "--"]).args(arguments);
    if arguments.is_empty() {
        tests.args(["--test-threads", &threads().to_string()]);
    }
    host::as_root(&mut tests)?;
    steps::run("tests", &mut tests)?;
    if arguments.is_empty() {
        vm::run(&vm::SERIES.map(str::to_owned), &vm::What::Load)?;
    }
    eprintln!("all passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Tests that run at a time: half as many again as there are processors, because the longest of them mostly wait for packets and
/// timers.
fn threads() -> usize {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    processors.div_ceil(2) + processors
}
