//! A machine of its own, as far as namespaces go: network, `/etc`, `/run`, `/var/lib` and the BPF file system.
//!
//! There portfwd is what it is on a gateway: the default instance, with the paths that the documents name. Everything in it
//! is gone with the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::daemon::binary;
use crate::deadline::PATIENCE;
use crate::namespace::Namespace;
use crate::process::Process;

/// What the machine has for itself. `$1` is a directory of ours.
const MOUNTS: &str = r#"
cp --archive /etc/. "$1"
mount --bind "$1" /etc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount -t bpf bpf /sys/fs/bpf
echo mounted
exec sleep infinity
"#;

/// Where a command is typed on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mounts {
    /// Among the machine's own file systems.
    Own,
    /// Among copies of them: what is mounted there is gone when the command ends.
    Copied,
}

/// A machine. What runs there must have ended before it is dropped.
pub struct Machine {
    /// Keeps the mount namespace.
    holder: Process,
    etc: TempDir,
    /// Its network.
    pub network: Namespace,
}

impl Machine {
    /// Makes one, named after `role`, without interfaces.
    pub fn new(role: &str) -> Result<Self> {
        let network = Namespace::new(role)?;
        let etc = tempfile::Builder::new().prefix("pfwd-etc-").tempdir()?;
        let mut command = network.command("unshare")?;
        command
            .args(["--mount", "sh", "-ec", MOUNTS, "sh"])
            .arg(etc.path());
        let holder = Process::spawn(command)?;
        // A whole `/etc` is copied.
        holder.wait_for_output("mounted", PATIENCE * 6)?;
        Ok(Self {
            holder,
            etc,
            network,
        })
    }

    /// Writes a file in `/etc`.
    pub fn write_etc(&self, path: &str, text: &str) -> Result<()> {
        let path = self.etc.path().join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// `line`, typed to a shell on this machine.
    pub fn shell(&self, line: &str, mounts: Mounts) -> Result<Command> {
        let mut command = Command::new("nsenter");
        let pid = self.holder.pid();
        command
            .arg(format!("--mount=/proc/{pid}/ns/mnt"))
            .arg(format!("--net=/proc/{pid}/ns/net"));
        match mounts {
            Mounts::Own => &mut command,
            Mounts::Copied => command.args(["unshare", "--mount"]),
        };
        command.args(SHELL).arg(line);
        with_portfwd(&mut command)?;
        // What HTTP calls an error, curl is to call one.
        fs::write(self.etc.path().join(".curlrc"), "fail-with-body\nsilent\n")?;
        command.env("CURL_HOME", "/etc");
        Ok(command)
    }
}

/// A shell that fails when any program of a pipe does.
const SHELL: [&str; 4] = ["bash", "-o", "pipefail", "-c"];

/// `line`, typed to a shell in a namespace that has the network alone for itself.
pub fn shell_in(network: &Namespace, line: &str) -> Result<Command> {
    let mut command = network.command(SHELL[0])?;
    command.args(&SHELL[1..]).arg(line);
    with_portfwd(&mut command)?;
    Ok(command)
}

/// The program is found by its name.
fn with_portfwd(command: &mut Command) -> Result<()> {
    let binary = binary()?;
    let folder = binary.parent().unwrap_or(Path::new("."));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(PathBuf::from(folder)).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(folders)?);
    Ok(())
}
