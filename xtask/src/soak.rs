//! What takes long: the daemon started again and again, under load or timed, very many connections, and everything that can happen.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::{host, setup, sources, steps};

/// What is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// The daemon is ended and started again
    Restarts,
    /// The same with two builds by turns
    Upgrades,
    /// The daemon is started from nothing and after it was killed, without load, and timed
    Starts,
    /// A connection is dialled through a forward, from 1,024 ports in turn
    Connections,
    /// A million forged SYNs beside a transfer, through portfwd and through nftables: what the transfer keeps
    Flood,
    /// Everything that can happen to a gateway happens, with every kind of traffic going on
    Chaos,
}

/// Profile of the kernel object in the other build's copy of the sources.
const PROFILE: &str = "[profile.bpf]";
/// What is changed there: the same layouts, other instructions.
const CHANGE: (&str, &str) = ("opt-level = 3", "opt-level = 2");

/// Builds for release, and runs the soak of package `portfwd-tests`.
///
/// # Errors
/// When a build fails, or when anything is lost or left.
pub fn run(what: What, count: Option<u32>, arguments: &[String]) -> Result<()> {
    setup::run()?;
    let target = host::target_dir();
    steps::run(
        "build",
        host::cargo().args(["build", "--release", "--package", "portfwd"]),
    )?;
    let program = match what {
        What::Restarts | What::Upgrades | What::Starts => "soak",
        What::Connections => "connections",
        What::Flood => "flood",
        What::Chaos => "chaos",
    };
    let mut soak = host::cargo();
    soak.args(["run", "--quiet", "--package", "portfwd-tests"])
        .args(["--bin", program, "--"])
        .env("PORTFWD_BIN", target.join("release/portfwd"));
    match what {
        What::Restarts => soak.arg("restarts"),
        What::Starts => soak.arg("starts"),
        What::Upgrades => soak
            .arg("upgrades")
            .arg("--other")
            .arg(other_build(&target)?),
        What::Connections | What::Flood | What::Chaos => &mut soak,
    };
    ensure!(
        count.is_none() || what != What::Chaos,
        "chaos has no --count: name what is to happen, more than once if need be"
    );
    if let Some(count) = count {
        soak.args(["--count", &count.to_string()]);
    }
    soak.args(arguments);
    host::as_root(&mut soak)?;
    steps::run("soak", &mut soak)
}

/// A second build whose programs differ and whose layouts do not, from a copy of the sources.
fn other_build(target: &Path) -> Result<PathBuf> {
    let copy = target.join("soak/sources");
    sources::copy_to(&copy)?;
    let manifest = copy.join("Cargo.toml");
    let text = fs::read_to_string(&manifest)
        .with_context(|| format!("cannot read {}", manifest.display()))?;
    let (before, profile) = text
        .split_once(PROFILE)
        .with_context(|| format!("Cargo.toml has no {PROFILE}"))?;
    ensure!(profile.contains(CHANGE.0), "{PROFILE} has no {}", CHANGE.0);
    let changed = format!(
        "{before}{PROFILE}{}",
        profile.replacen(CHANGE.0, CHANGE.1, 1)
    );
    fs::write(&manifest, changed)
        .with_context(|| format!("cannot write {}", manifest.display()))?;
    let mut cargo = host::cargo();
    cargo
        .current_dir(&copy)
        .args(["build", "--release", "--package", "portfwd", "--target-dir"])
        .arg(target.join("soak/target"));
    steps::run("the other build", &mut cargo)?;
    Ok(target.join("soak/target/release/portfwd"))
}
