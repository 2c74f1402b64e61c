//! portfwd beside its references, measured in one run.

use anyhow::Result;

use crate::{host, setup, steps};

/// What is measured without arguments.
const DEFAULT: [&str; 3] = ["--report", "docs/benchmarks", "packets"];

/// Sets up, builds for release, and runs the benchmark of package `portfwd-tests`.
///
/// # Errors
/// When set-up or build fail, or something cannot be measured.
pub fn run(arguments: &[String]) -> Result<()> {
    setup::run()?;
    let mut build = host::cargo_workspace("build");
    build.arg("--release");
    steps::run("build", &mut build)?;

    let mut bench = host::cargo();
    bench
        .args(["run", "--quiet", "--release", "--package", "portfwd-tests"])
        .args(["--bin", "bench", "--"]);
    if arguments.is_empty() {
        bench.args(DEFAULT);
    } else {
        bench.args(arguments);
    }
    host::as_root(&mut bench)?;
    steps::run("bench", &mut bench)
}
