//! The main job, on real packets, on one machine.

use anyhow::Result;

use crate::{host, setup, steps};

/// Sets up, builds, and runs the demo of package `portfwd-tests`.
///
/// # Errors
/// When set-up or build fail, or something in the demo does not work.
pub fn run(arguments: &[String]) -> Result<()> {
    setup::run()?;
    steps::run("build", &mut host::cargo_workspace("build"))?;

    let mut demo = host::cargo();
    demo.args(["run", "--quiet", "--package", "portfwd-tests"])
        .args(["--bin", "demo", "--"])
        .args(arguments);
    host::as_root(&mut demo)?;
    steps::run("demo", &mut demo)
}
