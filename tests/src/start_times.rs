//! How long a start takes, from the command line to the word "ready" to the service manager.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::daemon::{Daemon, DaemonOptions, Mode};
use crate::lab::LabOptions;

/// What the daemon tells when it forwards, in a line of its own (sd_notify(3)).
const READY: &str = "READY=1";
/// A start takes a busy machine this long at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// Times of starts.
#[derive(Clone, Debug, Default)]
pub struct StartTimes {
    /// Nothing was there before.
    pub first: Vec<Duration>,
    /// A daemon of the same build was killed before.
    pub again: Vec<Duration>,
}

impl StartTimes {
    /// Measures `count` first starts, and as many restarts.
    pub fn measure(mode: Mode, count: usize) -> Result<Self> {
        let lab = LabOptions::for_mode(mode).build()?;
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path)?;
        manager.set_read_timeout(Some(PATIENCE))?;
        let mut options = DaemonOptions::new(mode);
        options.log_at_end = false;
        options.environment = vec![("NOTIFY_SOCKET".into(), path.display().to_string())];
        let mut daemon = options.start(&lab.gateway)?;
        wait_ready(&manager)?;
        let mut times = Self::default();
        for _ in 0..count {
            daemon.kill9()?;
            daemon.ok(&["detach", "--keep-rules"])?;
            times.first.push(timed(&mut daemon, &manager)?);
            daemon.kill9()?;
            times.again.push(timed(&mut daemon, &manager)?);
        }
        Ok(times)
    }
}

fn timed(daemon: &mut Daemon, manager: &UnixDatagram) -> Result<Duration> {
    thread::scope(|scope| {
        let began = Instant::now();
        let ready = scope.spawn(|| wait_ready(manager));
        daemon.start()?;
        let ready = ready
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(ready - began)
    })
}

/// Waits for the word, and says when it came.
fn wait_ready(manager: &UnixDatagram) -> Result<Instant> {
    loop {
        let mut message = [0; 4096];
        let length = match manager.recv(&mut message) {
            // A process of the lab's has ended. A read with a timeout is not taken up again (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            received => received.context("no word of the daemon")?,
        };
        let now = Instant::now();
        let text = String::from_utf8_lossy(&message[..length]);
        if text.lines().any(|line| line == READY) {
            return Ok(now);
        }
    }
}
