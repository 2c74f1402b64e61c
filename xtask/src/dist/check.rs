//! The package in a clean root: a Debian that has nothing but what the package asks for, and what looks at it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::folder;
use crate::{host, steps};

/// The oldest Debian that the package is for.
const RELEASE: &str = "bookworm";
/// What the root has besides what every Debian has. libc6 is there anyway, as the package wants it.
const CONTENTS: &str = "systemd,systemd-sysv,man-db,mandoc,bash-completion,zsh,fish,iproute2";
/// What is done in the root.
const SCRIPT: &str = include_str!("check.sh");

/// Installs the package and tries what it brings.
///
/// # Errors
/// At the first thing that does not work.
pub fn run(package: &Path) -> Result<()> {
    let archive = archive()?;
    let root = folder().join("root");
    remove(&root)?;
    fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
    let mut unpack = as_root("tar");
    unpack
        .args([
            "--extract",
            "--numeric-owner",
            "--exclude=./dev/*",
            "--file",
        ])
        .arg(&archive)
        .arg("--directory")
        .arg(&root);
    steps::run("clean root", &mut unpack)?;
    let mut copy = as_root("cp");
    copy.arg(package).arg(root.join("package.deb"));
    steps::run("package into the root", &mut copy)?;
    let checked = inside(&root, SCRIPT);
    remove(&root)?;
    checked
}

/// Runs a script in the root, in a mount and a process namespace of its own, with what a Debian at work has mounted.
fn inside(root: &Path, script: &str) -> Result<()> {
    let mount = r#"
set -e
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount -t sysfs sysfs "$1/sys"
mount -t tmpfs tmpfs "$1/run"
exec chroot "$1" /bin/sh -c "$2"
"#;
    let mut unshare = as_root("unshare");
    unshare
        .args([
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--fork",
            "--kill-child",
        ])
        .args(["sh", "-c", mount, "check"])
        .arg(root)
        .arg(script);
    steps::run_as(
        "look at the package",
        "xtask/src/dist/check.sh in the clean root",
        &mut unshare,
    )
}

/// The root as an archive; made once.
fn archive() -> Result<PathBuf> {
    let archive = folder().join(format!("{RELEASE}.tar"));
    if archive.exists() {
        return Ok(archive);
    }
    // Under another name until it is whole.
    let partial = folder().join(format!("{RELEASE}.partial.tar"));
    let mut make = as_root("mmdebstrap");
    make.args(["--variant=minbase", "--format=tar"])
        .arg(format!("--include={CONTENTS}"))
        .arg(RELEASE)
        .arg(&partial);
    steps::run("a Debian to install in", &mut make)?;
    fs::rename(&partial, &archive).with_context(|| format!("rename {}", partial.display()))?;
    Ok(archive)
}

fn remove(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let mut remove = as_root("rm");
    remove
        .args(["--recursive", "--force", "--one-file-system"])
        .arg(root);
    steps::run("clear the root", &mut remove)
}

fn as_root(program: &str) -> Command {
    if host::is_root() {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(program);
    sudo
}
