//! What the datapath has to say: its slow path tells why it drops a packet, if the log wants to know.
//!
//! Whether it does is settled when the programs are loaded: at any other level the calls are dead code to the verifier, which
//! takes them out. The messages lie in a ring buffer until the daemon reads them; one for which there is no room is counted by the
//! datapath instead (`log_lost`), so forwarding waits for no log.

use std::{os::fd::AsFd as _, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use aya::{Ebpf, EbpfLoader};
use aya_log::{EbpfLogger, Level};
use log::{error, log_enabled, warn};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use portfwd_common::{abi::names, datapath::Event};
use tokio::time::{MissedTickBehavior, interval};

use super::map::PerCpuArray;

/// The module of the kernel object that writes to the log; `RUST_LOG=portfwd::report=debug` turns it on.
const TARGET: &str = "portfwd::report";
/// How often the log says what it has lost.
const LOSSES: Duration = Duration::from_secs(5);
/// No message of the datapath is this severe.
pub(super) const OFF: u8 = 0;

/// The level in force, as the object's read-only data has it.
#[must_use]
pub fn level() -> u8 {
    if log_enabled!(target: TARGET, log::Level::Debug) {
        Level::Debug as u8
    } else {
        OFF
    }
}

/// Has the object loaded with a level.
pub fn set_level<'a>(loader: &mut EbpfLoader<'a>, level: &'a u8) {
    loader.override_global(aya_log::LEVEL, level, true);
}

/// Passes on to the log what the programs say, for as long as the process lives. `maps` is where the instance's maps are pinned.
pub fn follow(ebpf: &mut Ebpf, level: u8, maps: &Path) -> Result<()> {
    if level == OFF {
        return Ok(());
    }
    let logger = EbpfLogger::init(ebpf).context("cannot read the datapath's messages")?;
    // A thread: while messages come faster than they can be logged, the daemon has other things to do.
    thread::Builder::new()
        .name("messages".to_owned())
        .spawn(move || pass_on(logger))
        .context("cannot start a thread for the datapath's messages")?;
    let mut losses = Losses::since_now(PerCpuArray::open(maps, names::REASONS)?)?;
    let mut look = interval(LOSSES);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::spawn(async move {
        loop {
            look.tick().await;
            if let Err(cause) = losses.tell() {
                error!("what the log has lost is no longer told: {cause:#}");
                return;
            }
        }
    });
    Ok(())
}

/// Logs messages as they come.
fn pass_on(mut logger: EbpfLogger<&'static dyn log::Log>) {
    loop {
        let ready = {
            let mut ring = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
            poll(&mut ring, PollTimeout::NONE)
        };
        match ready {
            Ok(_) => logger.flush(),
            Err(Errno::EINTR) => {}
            Err(cause) => {
                error!("the datapath's messages are no longer read: {cause}");
                return;
            }
        }
    }
}

/// Messages for which there was no room.
struct Losses {
    reasons: PerCpuArray<u64>,
    /// How many the log knows of.
    told: u64,
}

impl Losses {
    /// Those that are still to come.
    fn since_now(reasons: PerCpuArray<u64>) -> Result<Self> {
        let told = count(&reasons)?;
        Ok(Self { reasons, told })
    }

    /// Has the log say how many there were since the last time, if any.
    fn tell(&mut self) -> Result<()> {
        let lost = count(&self.reasons)?;
        if lost != self.told {
            warn!(
                target: TARGET,
                "{} more packets were dropped than the log had room for",
                lost.wrapping_sub(self.told)
            );
            self.told = lost;
        }
        Ok(())
    }
}

/// What the datapath has counted.
fn count(reasons: &PerCpuArray<u64>) -> Result<u64> {
    let sums = reasons.read_range(Event::LogLost.index(), 1, |sum, more| *sum += more)?;
    sums.first()
        .copied()
        .context("the counters have no place for lost messages")
}
