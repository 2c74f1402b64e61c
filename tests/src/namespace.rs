//! Named network namespaces, as `ip netns` makes them.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::process::run;

/// A network namespace, deleted on drop.
///
/// Its processes and threads are entered by `setns`, never by `ip netns exec`: that one mounts a
/// fresh `/sys`, and the pins in `/sys/fs/bpf` would be out of sight.
pub struct Namespace {
    name: String,
}

/// A name that no other lab on this machine has, now or in parallel.
fn unique_name(role: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("pfwd-{}-{number}-{role}", std::process::id())
}

impl Namespace {
    /// Makes a namespace named after `role` and this process, with its loopback up.
    pub fn new(role: &str) -> Result<Self> {
        let name = unique_name(role);
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let namespace = Self { name };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name that `ip -n` and `portfwd -n` take.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn file(&self) -> Result<File> {
        let path = PathBuf::from("/run/netns").join(&self.name);
        File::open(&path).with_context(|| format!("open {}", path.display()))
    }

    /// Runs `work` on a thread inside the namespace and returns its result.
    ///
    /// Sockets keep the namespace they were made in: a socket that `work` returns can be used on
    /// any thread.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.file()?;
        let outcome = std::thread::scope(|scope| {
            scope
                .spawn(move || -> Result<T> {
                    setns(file, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
                    Ok(work())
                })
                .join()
        });
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// The same on a thread that goes on by itself.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let file = self.file()?;
        Ok(std::thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        }))
    }

    /// A command that will run inside the namespace.
    pub fn command(&self, program: &str) -> Result<Command> {
        let file = self.file()?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure only makes the setns system call, which is
        // async-signal-safe, on a descriptor that the closure owns; it allocates nothing, an
        // errno becomes an `io::Error` without a heap allocation.
        unsafe {
            command.pre_exec(move || Ok(setns(&file, CloneFlags::CLONE_NEWNET)?));
        }
        Ok(command)
    }

    /// Runs lines of `ip` commands (without the word `ip`) in the namespace, in one go.
    pub fn ip(&self, lines: &str) -> Result<()> {
        ip_batch(&["-n", &self.name], lines)
    }

    /// What `ip -j` says in the namespace, for example `["link", "show", "wan0"]`.
    pub fn ip_json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let output = run(Command::new("ip")
            .args(["-n", &self.name, "-j", "-d"])
            .args(arguments))?;
        if output.stdout.is_empty() {
            return Ok(serde_json::Value::Array(Vec::new()));
        }
        serde_json::from_slice(&output.stdout).context("parse the JSON of ip")
    }

    /// Sets a sysctl of the namespace; `key` with slashes, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(key);
        self.run(|| std::fs::write(&path, value))?
            .with_context(|| format!("write {value} to {}", path.display()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("ip").args(["netns", "del", &self.name])) {
            eprintln!("cannot delete network namespace {}: {error:#}", self.name);
        }
    }
}

/// Feeds `lines` to one `ip -batch`, which stops at the first line that fails.
pub fn ip_batch(options: &[&str], lines: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip; is iproute2 installed?")?;
    let mut input = child.stdin.take().context("ip has no stdin")?;
    input.write_all(lines.as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip {} failed: {}{lines}",
            options.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
