//! A virtual machine whose user space is this one's, read only and with a layer of memory above it.
//!
//! The host's root comes in by 9p. What the machine writes is gone with it; what it prints is on its serial line. It is emulated, so
//! that this works where there is no KVM.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use xtask::workspace_root;

use super::kernel::Kernel;
use crate::{host, steps};

/// Release of Debian that qemu is taken from.
const RELEASE: &str = "bookworm";
/// Modules without which there is no root.
const ROOT_MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// What the last line of a report begins with; the rest of it is the script's exit code.
const END: &str = "vm: exit ";

/// What boots kernels.
pub(super) struct Machine {
    folder: PathBuf,
    qemu: PathBuf,
}

impl Machine {
    /// Gets qemu, unless it is there: unpacked beside the kernels, for Debian's package cannot be installed beside the tools of a
    /// newer one, which some systems have.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let qemu = folder.join("qemu");
        if !qemu.exists() {
            let half = folder.join("qemu.partial");
            drop(fs::remove_dir_all(&half));
            let mut extract = host::root_command(Path::new("mmdebstrap"))?;
            extract.args(["--variant=extract", "--include=qemu-system-x86", RELEASE]);
            extract.arg(&half);
            steps::run("qemu", &mut extract)?;
            fs::rename(&half, &qemu)?;
        }
        Ok(Self {
            folder: folder.to_owned(),
            qemu,
        })
    }

    /// Boots a kernel, runs a shell's script at the top of the workspace, and prints what it prints. Ended after some seconds.
    ///
    /// # Errors
    /// When the machine does not boot or is ended, or the script fails.
    pub(super) fn run(&self, kernel: &Kernel, script: &str, seconds: u32) -> Result<()> {
        let words = self.command_line(kernel, script)?;
        eprintln!("==> boot: {}", kernel.version());
        let mut machine = host::root_command(Path::new("timeout"))?;
        machine.arg(seconds.to_string()).args(words);
        report(&mut machine).with_context(|| format!("on Linux {}", kernel.version()))
    }

    /// The command that boots a kernel and runs a shell's script at the top of the workspace, with the serial line on its standard
    /// input and output. It takes root.
    ///
    /// # Errors
    /// When its file system cannot be made.
    pub(super) fn command_line(&self, kernel: &Kernel, script: &str) -> Result<Vec<OsString>> {
        let image = self.initial_file_system(kernel, script)?;
        let libraries = self.qemu.join("usr/lib/x86_64-linux-gnu");
        let mut words: Vec<OsString> = vec![
            "env".into(),
            format!("LD_LIBRARY_PATH={}", libraries.display()).into(),
            self.qemu.join("usr/bin/qemu-system-x86_64").into(),
        ];
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            words.extend(["-L".into(), self.qemu.join(firmware).into()]);
        }
        let mut options = |more: &[&str]| words.extend(more.iter().map(OsString::from));
        // Page tables of four levels are walked faster than those of five.
        options(&["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]);
        options(&["-smp", "2", "-m", "4G"]);
        options(&["-nodefaults", "-no-reboot", "-display", "none"]);
        options(&["-serial", "stdio"]);
        // An emulated timer that is late on a busy machine is no broken one ("IO-APIC + timer doesn't work!"). What guards against
        // faults of processors is dear without a processor that has them.
        options(&[
            "-append",
            "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off",
        ]);
        options(&[
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ]);
        words.extend(["-kernel".into(), kernel.image().into()]);
        words.extend(["-initrd".into(), image.into()]);
        Ok(words)
    }

    /// An archive of what mounts the root.
    fn initial_file_system(&self, kernel: &Kernel, script: &str) -> Result<PathBuf> {
        let root = self.folder.join("root");
        drop(fs::remove_dir_all(&root));
        for name in ["bin", "dev", "proc", "modules"] {
            fs::create_dir_all(root.join(name))?;
        }
        let busybox = host::find_program("busybox").context("there is no busybox")?;
        fs::copy(&busybox, root.join("bin/busybox"))?;
        let mut order = String::new();
        for (number, file) in kernel.module_files(&ROOT_MODULES)?.iter().enumerate() {
            let inside = format!("modules/{number}.ko");
            fs::write(root.join(&inside), module(file)?)?;
            order += &format!("/{inside}\n");
        }
        fs::write(root.join("modules/order"), order)?;
        fs::write(root.join("script"), script)?;
        let init = root.join("init");
        fs::write(&init, init_text(kernel))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let archive = self.folder.join("root.cpio");
        let mut pack = Command::new("sh");
        pack.current_dir(&root)
            .args(["-c", "find . | busybox cpio -o -H newc > \"$0\""])
            .arg(&archive);
        steps::run("initial file system", &mut pack)?;
        Ok(archive)
    }
}

/// A module as the kernel takes it.
fn module(file: &Path) -> Result<Vec<u8>> {
    if file.extension() != Some(OsStr::new("xz")) {
        return Ok(fs::read(file)?);
    }
    let unpacked = Command::new("xz").arg("-dc").arg(file).output();
    let unpacked = unpacked.context("cannot run xz")?;
    ensure!(unpacked.status.success(), "xz -dc {}", file.display());
    Ok(unpacked.stdout)
}

/// The first process of the machine.
fn init_text(kernel: &Kernel) -> String {
    let (version, modules) = (kernel.version(), kernel.modules().display().to_string());
    let workspace = workspace_root().display().to_string();
    let target = host::target_dir().display().to_string();
    format!(
        r#"#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
export PATH=/bin
mkdir /host /memory /new
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read module; do insmod "$module"; done < /modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host
mount -t tmpfs memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /new
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t bpf bpf /new/sys/fs/bpf
mount -t cgroup2 cgroup /new/sys/fs/cgroup
# As a system's manager does: groups have limits.
echo +memory > /new/sys/fs/cgroup/cgroup.subtree_control
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mkdir -p /new/dev/net; [ -e /new/dev/net/tun ] || mknod /new/dev/net/tun c 10 200
mount -t devpts pts /new/dev/pts
# What was built stays in sight where it is in a folder that is emptied.
mkdir /workspace /target
mount --bind "/new{workspace}" /workspace
mount --bind "/new{target}" /target
for folder in dev/shm run tmp; do mount -t tmpfs memory /new/$folder; done
for kept in "/workspace {workspace}" "/target {target}"; do
  [ -e "/new${{kept#* }}" ] && continue
  mkdir -p "/new${{kept#* }}"
  mount --bind "${{kept%% *}}" "/new${{kept#* }}"
done
mkdir -p "/new/usr/lib/modules/{version}"
mount --bind "/host{modules}" "/new/usr/lib/modules/{version}"
cp /script /new/tmp/script
cat > /new/tmp/init <<'INIT'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
ip link set lo up
# What a system's manager gives everybody; the kernel begins with 1024, and 4096 at most.
ulimit -n 524288
echo "vm: kernel $(uname -r)"
cd "{workspace}"
sh -e /tmp/script 2>&1
echo "{END}$?"
echo o > /proc/sysrq-trigger
while :; do :; done
INIT
# The kernel looks for modprobe in the root of the first process.
exec switch_root /new /bin/sh /tmp/init
"#
    )
}

/// Runs a machine, and prints what it says from its first line on.
fn report(machine: &mut Command) -> Result<()> {
    let mut child = machine
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run qemu-system-x86_64")?;
    let serial = child.stdout.take().context("qemu has no output")?;
    let mut code = None;
    for line in BufReader::new(serial).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).replace('\r', "");
        if let Some(rest) = line.strip_prefix(END) {
            code = Some(rest.trim().to_owned());
        } else {
            println!("{line}");
        }
    }
    child.wait()?;
    let code = code.context("the machine did not finish")?;
    ensure!(code == "0", "the script ended with {code}");
    Ok(())
}
