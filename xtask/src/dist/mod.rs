//! `cargo xtask dist`: the Debian package, and a look at it in a clean root.

mod check;
mod stage;

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use xtask::workspace_root;

use crate::{host, setup, steps};

/// The one that was tried; it builds with Rust 1.85 and later.
const CARGO_DEB: &str = "3.8.0";

/// Whether the package is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is built.
    No,
    /// It is built, and installed in a clean root.
    InCleanRoot,
}

/// Builds the package and prints its path.
///
/// # Errors
/// When something cannot be built, or does not work once installed.
pub fn run(look: Look) -> Result<()> {
    setup::for_dist()?;
    install_cargo_deb()?;
    let mut build = host::cargo();
    build.args(["build", "--release", "--package", "portfwd"]);
    steps::run("release build", &mut build)?;
    let programs = host::target_dir().join("release");
    stage::run(&programs)?;
    let package = package()?;
    if look == Look::InCleanRoot {
        check::run(&package)?;
    }
    println!("{}", package.display());
    Ok(())
}

/// Where everything of this command is.
fn folder() -> PathBuf {
    // Where the manifest of `portfwd` says, whatever CARGO_TARGET_DIR is.
    workspace_root().join("target/dist")
}

fn install_cargo_deb() -> Result<()> {
    let installed = Command::new("cargo-deb").arg("--version").output();
    let is_there = installed.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .any(|word| word == CARGO_DEB)
    });
    if is_there {
        return Ok(());
    }
    let mut install = host::cargo();
    install
        .args(["install", "--locked", "--force"])
        .arg(format!("cargo-deb@{CARGO_DEB}"));
    steps::run("cargo-deb", &mut install)
}

/// Packs what is built and staged.
fn package() -> Result<PathBuf> {
    let output = folder().join("package");
    if output.exists() {
        fs::remove_dir_all(&output).with_context(|| format!("clear {}", output.display()))?;
    }
    let mut deb = host::cargo();
    deb.args(["deb", "--package", "portfwd", "--no-build", "--locked"])
        .arg("--output")
        .arg(&output)
        // The program has no secrets from those who build it: no path of theirs is in it.
        .env("CARGO_TARGET_DIR", host::target_dir());
    fs::create_dir_all(&output).with_context(|| format!("make {}", output.display()))?;
    steps::run("package", &mut deb)?;
    let mut packages = fs::read_dir(&output)?
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("read {}", output.display()))?;
    match (packages.pop(), packages.is_empty()) {
        (Some(package), true) => Ok(package.path()),
        _ => bail!("cargo-deb did not make one package in {}", output.display()),
    }
}

/// `PATH` with a folder before all others.
fn path_with(folder: &std::path::Path) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(env::split_paths(&path));
    env::join_paths(folders).context("a folder in PATH has a colon")
}
