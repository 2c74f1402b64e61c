//! Format, lints and documentation.

use anyhow::{Result, bail};
use xtask::{
    ebpf::{self, Subcommand},
    toolchain::Toolchain,
};

use crate::{host, steps};

/// Every check that needs no test to run.
///
/// # Errors
/// At the first check that fails.
pub fn run() -> Result<()> {
    let mut fmt = host::cargo();
    fmt.args(["fmt", "--all", "--check"]);
    steps::run("format", &mut fmt)?;

    let mut clippy = host::cargo_workspace("clippy");
    clippy.args(["--all-targets", "--", "-Dwarnings"]);
    steps::run("lints", &mut clippy)?;

    lint_kernel_object()?;

    let mut doc = host::cargo_workspace("doc");
    doc.arg("--no-deps").env("RUSTDOCFLAGS", "-Dwarnings");
    steps::run("documentation", &mut doc)
}

fn lint_kernel_object() -> Result<()> {
    let toolchain = Toolchain::find()?;
    let driver = toolchain.compiler.tool("cargo-clippy");
    if !driver.exists() {
        bail!(
            "{} does not exist; run `cargo xtask setup`",
            driver.display()
        );
    }
    let mut clippy = ebpf::cargo(&toolchain, &host::target_dir(), Subcommand::Clippy);
    clippy.args(["--", "-Dwarnings"]);
    steps::run_as(
        "lints of the kernel object",
        "cargo clippy with the BPF toolchain",
        &mut clippy,
    )?;

    let mut doc = ebpf::cargo(&toolchain, &host::target_dir(), Subcommand::Doc);
    doc.arg("--no-deps").env("RUSTDOCFLAGS", "-Dwarnings");
    steps::run_as(
        "documentation of the kernel object",
        "cargo doc with the BPF toolchain",
        &mut doc,
    )
}
