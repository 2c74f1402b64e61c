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
/// What is done in the root once it is booted, and the unit that does it.
const BOOTED: [(&str, &str); 2] = [
    ("boot.sh", include_str!("boot.sh")),
    (
        "etc/systemd/system/look.service",
        include_str!("look.service"),
    ),
];

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
    // Under its own name, as the README has it.
    copy.arg(package).arg(&root);
    steps::run("package into the root", &mut copy)?;
    let checked = inside(&root, SCRIPT).and_then(|()| boot(&root));
    remove(&root)?;
    checked
}

/// Boots the root in a container, and tries the service there.
fn boot(root: &Path) -> Result<()> {
    for (name, text) in BOOTED {
        let path = root.join(name);
        let mut write = as_root("sh");
        write
            .args(["-c", "printf %s \"$1\" > \"$0\""])
            .arg(&path)
            .arg(text);
        steps::run_as("unit", &format!("write {name}"), &mut write)?;
    }
    // A container sees no BPF file system but one that it is given. Its own, and gone with the mount namespace.
    let script = r#"
set -e
mkdir -p "$1/bpffs"
mount -t bpf -o mode=700 bpf "$1/bpffs"
timeout 600 systemd-nspawn --quiet --boot --directory="$1" --machine="portfwd-dist-$$" \
    --private-network --register=no --keep-unit --capability=all --system-call-filter=bpf \
    --bind="$1/bpffs:/sys/fs/bpf" systemd.unit=look.service > "$1/console.log" 2>&1 && exit
cat "$1/console.log" "$1/boot.log" >&2
exit 1
"#;
    let mut unshare = as_root("unshare");
    unshare
        .args(["--mount", "sh", "-c", script, "boot"])
        .arg(root);
    steps::run_as(
        "service",
        "xtask/src/dist/boot.sh in the booted root",
        &mut unshare,
    )
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
