//! Loading the kernel object on other kernels, in virtual machines.
//!
//! A machine has no disk and no network: everything that runs in it is in its initial file system, and its serial line is the report.
//! It is emulated, so that this works where there is no KVM.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use xtask::ebpf;

use crate::{host, setup, steps};

/// After these seconds a machine that did not end by itself is ended.
const PATIENCE: &str = "900";

/// What the last line of a machine's report begins with; the rest of it is the check's exit code.
const END: &str = "vm: exit ";

/// The first process of the machine.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t bpf bpf /sys/fs/bpf
echo "vm: kernel $(/bin/busybox uname -r)"
/bin/load /object 2>&1
echo "vm: exit $?"
/bin/busybox poweroff -f
"#;

/// Loads every program on the newest Debian kernel of each series.
///
/// # Errors
/// When a kernel cannot be had or booted, and, after all have run, when one refuses a program.
pub fn run(series: &[String]) -> Result<()> {
    setup::for_vm()?;
    let target = host::target_dir();
    let object = ebpf::build(&target, "portfwd")?;
    let mut build = host::cargo();
    build.args(["build", "--package", "portfwd-tests", "--bin", "load"]);
    steps::run("build", &mut build)?;
    let folder = target.join("vm");
    let image = initial_file_system(&folder, &target.join("debug/load"), &object)?;
    let mut failed = Vec::new();
    for series in series {
        let kernel = kernel(&folder, series)?;
        let report = boot(&kernel, &image)?;
        let report = report.find("vm: ").map_or("", |start| &report[start..]);
        println!("{}", report.trim_end());
        match report.lines().find_map(|line| line.strip_prefix(END)) {
            Some(code) if code.trim() == "0" => {}
            Some(_) => failed.push(format!("Linux {series} refuses programs")),
            None => failed.push(format!("the machine of Linux {series} did not finish")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// The kernel's image, from Debian's package, which is downloaded unless it is there.
fn kernel(folder: &Path, series: &str) -> Result<PathBuf> {
    let package = newest_package(series)?;
    let unpacked = folder.join(&package);
    if !unpacked.exists() {
        let mut download = Command::new("apt-get");
        download.current_dir(folder).args(["download", &package]);
        steps::run("download", &mut download)?;
        let archive = downloaded(folder, &package)?;
        // Under its own name only when it is whole.
        let half = folder.join("unpacking");
        drop(fs::remove_dir_all(&half));
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(&archive).arg(&half);
        steps::run("unpack", &mut unpack)?;
        fs::remove_file(&archive)?;
        fs::rename(&half, &unpacked)?;
    }
    let version = package.trim_start_matches("linux-image-");
    Ok(unpacked.join("boot").join(format!("vmlinuz-{version}")))
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

/// An archive of everything that runs in a machine.
fn initial_file_system(folder: &Path, load: &Path, object: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    drop(fs::remove_dir_all(&root));
    for name in ["bin", "dev", "proc", "sys"] {
        fs::create_dir_all(root.join(name))?;
    }
    let busybox = host::find_program("busybox").context("there is no busybox")?;
    copy(&busybox, &root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    copy(load, &root.join("bin/load"))?;
    copy(object, &root.join("object"))?;
    for library in libraries(load)? {
        let inside = root.join(library.trim_start_matches('/'));
        copy(Path::new(&library), &inside)?;
    }
    let init = root.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let archive = folder.join("root.cpio");
    let mut pack = Command::new("sh");
    pack.current_dir(&root)
        .args(["-c", "find . | busybox cpio -o -H newc > \"$0\""])
        .arg(&archive);
    steps::run("initial file system", &mut pack)?;
    Ok(archive)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// The paths of the libraries that a program needs.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let listed = output(Command::new("ldd").arg(program))?;
    let words = listed.split_whitespace();
    Ok(words
        .filter(|word| word.starts_with('/'))
        .map(str::to_owned)
        .collect())
}

/// Boots a kernel and returns what it wrote to its serial line.
fn boot(kernel: &Path, image: &Path) -> Result<String> {
    eprintln!("==> boot: {}", kernel.display());
    let mut machine = Command::new("timeout");
    machine.args([PATIENCE, "qemu-system-x86_64"]);
    machine.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2G"]);
    machine.args(["-nodefaults", "-no-reboot", "-display", "none"]);
    machine.args(["-serial", "stdio"]);
    machine.args([OsStr::new("-kernel"), kernel.as_os_str()]);
    machine.args([OsStr::new("-initrd"), image.as_os_str()]);
    // An emulated timer that is late on a busy machine is no broken one ("IO-APIC + timer doesn't work!").
    machine.args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"]);
    let told = machine
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run qemu-system-x86_64")?;
    Ok(String::from_utf8_lossy(&told.stdout).replace('\r', ""))
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
