//! Other kernels, in virtual machines: that they load every program, and that the suites pass there.

mod gateway;
mod kernel;
mod machine;

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use xtask::{ebpf, workspace_root};

use crate::{host, setup, steps};

use kernel::Kernel;
use machine::Machine;

/// The kernel series of Debian that are supported beside the running kernel.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];
/// After so many seconds a machine that only loads programs is ended, and one that runs suites.
const LOADING: u32 = 900;
const TESTING: u32 = 18_000;
/// What tests for emulated machines are built as, in the workspace's Cargo.toml.
const PROFILE: [&str; 2] = ["--profile", "emulated"];
/// An emulated machine is slower by so much that tests wait for things so many times as long.
const SLOWNESS: u32 = 10;

/// What is done on each kernel.
#[derive(Clone, Debug)]
pub enum What {
    /// Every program is loaded.
    Load,
    /// Tests run whose names contain one of some words, of the suites on the real kernel.
    Test(Vec<String>),
    /// Gateways of the kernel that not every kernel has are measured beside portfwd.
    Bench,
    /// The machine is the gateway between a client and a server of this one, with network cards.
    Gateway,
}

/// Boots the newest Debian kernel of each series.
///
/// # Errors
/// When a kernel cannot be had or booted, and, after all have run, when one refuses a program or a test fails there.
pub fn run(series: &[String], what: &What) -> Result<()> {
    setup::for_vm()?;
    let target = host::target_dir();
    let work = match what {
        What::Load => Work::Script(load_script(&target)?, LOADING),
        What::Test(words) => Work::Script(test_script(words)?, TESTING),
        What::Bench => Work::Script(bench_script(&target)?, TESTING),
        What::Gateway => {
            gateway::build()?;
            Work::Gateway
        }
    };
    let folder = target.join("vm");
    let machine = Machine::new(&folder)?;
    let mut failed = Vec::new();
    for series in series {
        let kernel = Kernel::newest(&folder, series)?;
        let done = match &work {
            Work::Script(script, seconds) => machine.run(&kernel, script, *seconds),
            Work::Gateway => gateway::run(&machine, &kernel),
        };
        if let Err(error) = done {
            failed.push(format!("{error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// What is done on each kernel, when everything is built.
enum Work {
    /// A script runs there, which is ended after so many seconds.
    Script(String, u32),
    /// Clients are driven through it.
    Gateway,
}

/// Loads every program, and holds it to its budget.
fn load_script(target: &Path) -> Result<String> {
    let object = ebpf::build(target, "portfwd")?;
    // Of the whole workspace: a package by itself has other features of what it depends on, and all of that would be built again.
    let mut build = host::cargo_workspace("build");
    build.args(["--bin", "load"]);
    steps::run("build", &mut build)?;
    Ok(format!(
        "\"{}\" \"{}\"\n",
        target.join("debug/load").display(),
        object.display()
    ))
}

/// Runs tests, one suite after the other.
fn test_script(words: &[String]) -> Result<String> {
    let mut build = host::cargo_workspace("build");
    build.arg("--all-targets").args(PROFILE);
    steps::run("build", &mut build)?;
    let quoted: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
    let mut script = format!("export PORTFWD_SLOWNESS={SLOWNESS}\ncd tests\nfailed=\n");
    for suite in suites()? {
        script += &format!("\"{suite}\" {} || failed=yes\n", quoted.join(" "));
    }
    Ok(script + "test -z \"$failed\"\n")
}

/// Measures the kernel's own fast paths and portfwd, a packet's whole way. Emulated, so only what one takes of the other counts.
fn bench_script(target: &Path) -> Result<String> {
    const WORDS: &str = "packets flows --flows 1,1024 --frames 20000 --rounds 5 \
        --gateways redirect,routing,nftables,flowtable,iptables,ipvs,xdp,tc";
    let mut build = host::cargo_workspace("build");
    build.arg("--all-targets").args(PROFILE);
    steps::run("build", &mut build)?;
    let bench = target.join("emulated/bench");
    Ok(format!(
        "export PORTFWD_SLOWNESS={SLOWNESS}\ncd tests\n\"{}\" {WORDS}\n",
        bench.display()
    ))
}

/// The test programs of the package `portfwd-tests` that run on the kernel.
fn suites() -> Result<Vec<String>> {
    // Of the whole workspace, as it was built: a package by itself has other features of what it depends on.
    let mut cargo = host::cargo_workspace("test");
    cargo.arg("--no-run").args(PROFILE);
    for suite in ["budgets", "programs", "sweep", "end_to_end"] {
        cargo.args(["--test", suite]);
    }
    // "  Executable tests/sweep.rs (target/emulated/deps/sweep-0123)", on the standard error.
    let told = cargo.output().context("cannot run cargo")?;
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    let suites: Vec<_> = told
        .lines()
        .filter(|line| line.trim_start().starts_with("Executable"))
        .filter_map(|line| line.rsplit_once('(')?.1.strip_suffix(')'))
        .map(|path| workspace_root().join(path).display().to_string())
        .collect();
    if suites.is_empty() {
        bail!("cargo named no test program:\n{told}");
    }
    Ok(suites)
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let told = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(told.status.success(), "{name} failed ({})", told.status);
    Ok(String::from_utf8_lossy(&told.stdout).into_owned())
}
