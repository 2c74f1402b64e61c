//! The BPF file system that holds the pins.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, fstatfs};

/// Where the BPF file system is, on every Linux.
pub const PATH: &str = "/sys/fs/bpf";

/// Mounts the BPF file system on [`PATH`] unless it is there.
///
/// Two labs may get here at once, and a second mount would hide the pins of the first: the
/// directory itself is the lock.
pub fn ensure_mounted() -> Result<()> {
    if is_mounted()? {
        return Ok(());
    }
    let directory = File::open(PATH).with_context(|| format!("open {PATH}"))?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("lock {PATH}"))?;
    if is_mounted()? {
        return Ok(());
    }
    mount(
        Some("bpf"),
        PATH,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .with_context(|| format!("mount the BPF file system on {PATH}"))
}

fn is_mounted() -> Result<bool> {
    let directory = File::open(PATH).with_context(|| format!("open {PATH}"))?;
    let statistics = fstatfs(directory.as_fd()).with_context(|| format!("statfs {PATH}"))?;
    Ok(statistics.filesystem_type() == BPF_FS_MAGIC)
}
