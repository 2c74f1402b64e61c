//! portfwd beside its references, measured in one run.

use anyhow::Result;
use xtask::workspace_root;

use crate::{host, setup, steps};

/// What is measured without arguments.
const DEFAULT: [&str; 3] = ["--report", "docs/benchmarks", "all"];

/// Sets up, builds for release, and runs the benchmark of package `portfwd-tests`.
///
/// # Errors
/// When set-up or build fail, or something cannot be measured.
pub fn run(arguments: &[String]) -> Result<()> {
    setup::for_bench()?;
    let mut build = host::cargo_workspace("build");
    build.arg("--release");
    steps::run("build", &mut build)?;

    // The program as it was just built: `cargo run` of one package would build it again with other features.
    let mut bench = host::root_command(&host::target_dir().join("release/bench"))?;
    bench.current_dir(workspace_root());
    if arguments.is_empty() {
        bench.args(DEFAULT);
    } else {
        bench.args(arguments);
    }
    steps::run("bench", &mut bench)
}
