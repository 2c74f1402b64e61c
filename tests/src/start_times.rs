//! How long a start takes, from the command line to the word "ready" to the service manager, and to the first packet that is
//! forwarded and answered.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::address::{Family, GATEWAY_WAN, SERVER};
use crate::daemon::{Daemon, DaemonOptions, Mode};
use crate::lab::LabOptions;
use crate::udp;

/// What the daemon tells when it forwards, in a line of its own (sd_notify(3)).
const READY: &str = "READY=1";
/// A start takes a busy machine this long at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// A client that waits for an answer asks again this often.
const KNOCK: Duration = Duration::from_millis(1);
const PORT: u16 = 5000;

/// Times of starts.
#[derive(Clone, Debug, Default)]
pub struct StartTimes {
    /// Nothing was there before.
    pub first: Vec<Duration>,
    /// The same starts, until a client got an answer.
    pub forwarding: Vec<Duration>,
    /// A daemon of the same build was killed before.
    pub again: Vec<Duration>,
}

impl StartTimes {
    /// Measures `count` first starts, and as many restarts, of a binary or of the usual one.
    pub fn measure(mode: Mode, count: usize, binary: Option<&Path>) -> Result<Self> {
        let lab = LabOptions::for_mode(mode).build()?;
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path)?;
        manager.set_read_timeout(Some(PATIENCE))?;
        let mut options = DaemonOptions::new(mode);
        options.log_at_end = false;
        options.environment = vec![("NOTIFY_SOCKET".into(), path.display().to_string())];
        let mut daemon = options.start_as(&lab.gateway, binary)?;
        wait_ready(&manager)?;
        daemon.ok(&["add", "udp", &PORT.to_string(), &SERVER.v4.to_string()])?;
        let _server = udp::Echo::start(&lab.server, Family::V4, PORT)?;
        let mut times = Self::default();
        for _ in 0..count {
            daemon.kill9()?;
            daemon.ok(&["detach", "--keep-rules"])?;
            let client = udp::connect(&lab.client, (GATEWAY_WAN.v4, PORT).into())?;
            let (first, forwarding) = thread::scope(|scope| -> Result<_> {
                let began = Instant::now();
                let answered = scope.spawn(|| wait_answered(&client));
                let first = timed(&mut daemon, &manager)?;
                let answered = answered
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                Ok((first, answered - began))
            })?;
            times.first.push(first);
            times.forwarding.push(forwarding);
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

/// Asks until there is an answer, and says when it came.
fn wait_answered(client: &UdpSocket) -> Result<Instant> {
    client.set_read_timeout(Some(KNOCK))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Until it is forwarded, the gateway itself refuses the port.
        drop(client.send(b"knock"));
        match client.recv(&mut [0; 64]) {
            Ok(_) => return Ok(Instant::now()),
            Err(error) => ensure!(Instant::now() < deadline, "nobody answers: {error}"),
        }
        thread::sleep(KNOCK);
    }
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
