//! The file system that holds the pins.

use std::{fs::File, path::Path};

use anyhow::{Context, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, fstatfs},
};

use crate::failure::{Failure, Kind};

/// Where it is on every Linux.
const PATH: &str = "/sys/fs/bpf";

/// Mounts the BPF file system in its place, unless it is there.
pub fn ensure_mounted() -> Result<()> {
    if is_mounted()? {
        return Ok(());
    }
    // A second mount would hide the pins in the first: of two daemons that start at once, one waits here.
    let directory = open()?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {PATH}"))?;
    if is_mounted()? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RELATIME;
    mount(Some("bpf"), PATH, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| {
        let error = std::io::Error::from(errno);
        Failure::during(
            format!("cannot mount the BPF file system on {PATH}"),
            &error,
        )
        .hint(format!("mount -t bpf bpf {PATH}"))
    })?;
    Ok(())
}

fn open() -> Result<File> {
    if !Path::new(PATH).exists() {
        let failure = Failure::new(
            Kind::Failed,
            format!("{PATH} does not exist: there is no sysfs, or the kernel has no BPF"),
        );
        return Err(failure.hint("mount -t sysfs sysfs /sys").into());
    }
    File::open(PATH).with_context(|| format!("cannot open {PATH}"))
}

/// Whether it is in its place.
pub fn is_mounted() -> Result<bool> {
    let statistics = fstatfs(open()?).with_context(|| format!("cannot look at {PATH}"))?;
    Ok(statistics.filesystem_type() == BPF_FS_MAGIC)
}
