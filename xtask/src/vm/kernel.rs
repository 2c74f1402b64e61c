//! Kernels of Debian, with their modules, from their packages.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::output;
use crate::steps;

/// A kernel that is unpacked.
pub(super) struct Kernel {
    root: PathBuf,
    version: String,
}

impl Kernel {
    /// The newest of a series. Its package is downloaded and unpacked unless it is there.
    pub(super) fn newest(folder: &Path, series: &str) -> Result<Self> {
        let package = newest_package(series)?;
        let version = package.trim_start_matches("linux-image-").to_owned();
        let root = folder.join(&package);
        if !root.exists() {
            unpack(folder, &package, &version, &root)?;
        }
        Ok(Self { root, version })
    }

    /// What is booted.
    pub(super) fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.version))
    }

    /// Where its modules are, in a folder of its version's name.
    pub(super) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.version)
    }

    /// What `uname -r` says there.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// The files of some modules and of those that they need, in the order in which they can be put in; none of those that are
    /// built in.
    pub(super) fn module_files(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for name in names {
            let mut modprobe = Command::new("modprobe");
            modprobe.arg("-d").arg(&self.root);
            modprobe.args(["-S", &self.version, "--show-depends", name]);
            for line in output(&mut modprobe)?.lines() {
                let file = line.strip_prefix("insmod ").map(str::trim_end);
                if let Some(file) = file.map(PathBuf::from)
                    && !files.contains(&file)
                {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }
}

fn unpack(folder: &Path, package: &str, version: &str, to: &Path) -> Result<()> {
    let mut download = Command::new("apt-get");
    download.current_dir(folder).args(["download", package]);
    steps::run("download", &mut download)?;
    let archive = downloaded(folder, package)?;
    // Under its own name only when it is whole.
    let half = folder.join("unpacking");
    drop(fs::remove_dir_all(&half));
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&archive).arg(&half);
    steps::run("unpack", &mut unpack)?;
    // The package's own script would do that.
    let mut depmod = Command::new("depmod");
    depmod.arg("-b").arg(&half).arg(version);
    steps::run("depmod", &mut depmod)?;
    fs::remove_file(&archive)?;
    fs::rename(&half, to)?;
    Ok(())
}

/// The package of a series with the highest version, without the flavours for clouds and real time.
fn newest_package(series: &str) -> Result<String> {
    let pattern = format!("^linux-image-{}\\.", series.replace('.', "\\."));
    let found = output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    found
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|name| name.ends_with("-amd64"))
        .filter(|name| !["-rt-", "-cloud-"].iter().any(|other| name.contains(other)))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
        .with_context(|| {
            format!("no package has a Linux {series}: `apt-cache search linux-image` lists those there are")
        })
}

fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

fn downloaded(folder: &Path, package: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&format!("{package}_")) && name.ends_with(".deb") {
            return Ok(path);
        }
    }
    bail!("apt-get left no {package} in {}", folder.display())
}
