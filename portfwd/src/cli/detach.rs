//! `portfwd detach`: everything of an instance off the machine, whatever state it is in.

use std::{
    fmt, fs, io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use clap::Args;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use serde::Serialize;

use super::output::Output;
use crate::{
    bpf::pins,
    control::{client::Client, protocol::StatusReport},
    daemon::lock::Lock,
    failure::{Failure, Kind, Result},
    instance::Instance,
};

/// How long a daemon has to end.
const PATIENCE: Duration = Duration::from_secs(10);

const AFTER_HELP: &str = "\
Ends the daemon if it runs, detaches from all interfaces, and removes connections, counters, rules and control socket.

Examples:
  portfwd detach
  portfwd detach --keep-rules                 the next `portfwd run` has them again
  portfwd -n lab detach";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Keep the rules for the next `portfwd run`
    #[arg(long)]
    keep_rules: bool,
}

/// What was taken away.
#[derive(Debug, Serialize)]
struct Detached {
    instance: String,
    /// A daemon ran.
    daemon: bool,
    /// Something was attached or pinned.
    datapath: bool,
    /// Rules were removed.
    rules: bool,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    if !geteuid().is_root() {
        return Err(Failure::new(Kind::Permission, "only root can detach").hint("run it with sudo"));
    }
    let daemon = end_daemon(instance).await?;
    // From here on no daemon can start, and none that is starting is in the way.
    let lock = Lock::take(instance)?;
    enter_netns_or_none(instance)?;
    let datapath = pins::remove_instance(&instance.pins())?;
    remove_file(&instance.socket())?;
    let rules = !arguments.keep_rules && remove_file(&instance.state_file())?;
    lock.remove()?;
    let detached = Detached {
        instance: instance.name().to_owned(),
        daemon,
        datapath,
        rules,
    };
    output.print(&detached, |out, detached| writeln!(out, "{detached}"))
}

impl fmt::Display for Detached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.daemon, "daemon ended"),
            (self.datapath, "datapath detached"),
            (self.rules, "rules removed"),
        ];
        let done: Vec<_> = parts
            .into_iter()
            .filter_map(|(is, text)| is.then_some(text))
            .collect();
        let done = if done.is_empty() {
            "nothing to detach".to_owned()
        } else {
            done.join(", ")
        };
        write!(f, "instance {}: {done}", self.instance)
    }
}

/// Asks a running daemon to end and waits until its process is gone. False if none runs.
async fn end_daemon(instance: &Instance) -> Result<bool> {
    let mut client = match Client::connect(instance).await {
        Ok(client) => client,
        Err(failure) if failure.kind == Kind::NotRunning => return Ok(false),
        Err(failure) => return Err(failure),
    };
    let status: StatusReport = client.get("/v1/status").await?;
    let Some(daemon) = status.daemon else {
        return Ok(false);
    };
    let process = open_process(daemon.pid)?;
    client.post("/v1/shutdown").await?;
    drop(client);
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    let mut descriptors = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let ended = poll(&mut descriptors, timeout)
        .map_err(|errno| Failure::during("wait for the daemon", &io::Error::from(errno)))?;
    if ended == 0 {
        let seconds = PATIENCE.as_secs();
        return Err(Failure::new(
            Kind::Failed,
            format!(
                "the daemon (pid {}) did not end within {seconds} s",
                daemon.pid
            ),
        )
        .hint(format!("`kill -9 {}`, then detach again", daemon.pid)));
    }
    Ok(true)
}

/// A descriptor that becomes readable when the process has ended.
fn open_process(pid: u32) -> Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = i32::try_from(descriptor).unwrap_or(-1);
    if descriptor < 0 {
        return Err(Failure::during(
            format!("watch the daemon (pid {pid})"),
            &io::Error::last_os_error(),
        ));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Enters the instance's network namespace. If it is gone, so are its interfaces, and an empty one
/// stands for it: interfaces of the same names elsewhere are none of ours.
fn enter_netns_or_none(instance: &Instance) -> Result<()> {
    match instance.enter_netns() {
        Err(failure) if failure.kind == Kind::NotFound => unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| Failure::during("make a network namespace", &io::Error::from(errno))),
        other => other,
    }
}

/// False if there was none.
fn remove_file(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::during(
            format!("remove {}", path.display()),
            &error,
        )),
    }
}
