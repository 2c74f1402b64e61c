//! Bulk transfers with iperf3.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::deadline::{PATIENCE, wait_until};
use crate::namespace::Namespace;
use crate::process::Process;

/// An iperf3 server; one client at a time.
pub struct Server {
    _process: Process,
}

impl Server {
    /// Starts it on `port` of every address of `namespace`.
    pub fn start(namespace: &Namespace, port: u16) -> Result<Self> {
        let mut command = namespace.command("iperf3")?;
        command.args(["--server", "--forceflush", "--port", &port.to_string()]);
        let process = Process::spawn(command)?;
        process.wait_for_output("Server listening", PATIENCE)?;
        Ok(Self { _process: process })
    }
}

/// Which way the bytes flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From client to server.
    Upload,
    /// From server to client.
    Download,
}

/// A running iperf3 client.
pub struct Client {
    process: Process,
    duration: Duration,
}

/// What a run moved.
#[derive(Clone, Debug)]
pub struct Report {
    /// Throughput at the receiver, in bits per second.
    pub bits_per_second: f64,
    /// Segments that the sender had to send again.
    pub retransmits: u64,
    /// Throughput of every interval of a tenth of a second, in bits per second.
    pub intervals: Vec<f64>,
}

impl Client {
    /// Starts a TCP transfer of `duration` (whole seconds) to `server`.
    pub fn start(
        namespace: &Namespace,
        server: SocketAddr,
        direction: Direction,
        duration: Duration,
    ) -> Result<Self> {
        Self::spawn(namespace, server, direction, duration, &[])
    }

    /// [`Self::start`] with a window that never fills a veth's ring of 256 frames: without portfwd
    /// in between not a segment is lost.
    pub fn start_gently(
        namespace: &Namespace,
        server: SocketAddr,
        direction: Direction,
        duration: Duration,
    ) -> Result<Self> {
        Self::spawn(
            namespace,
            server,
            direction,
            duration,
            &["--window", "128K"],
        )
    }

    /// [`Self::start`] at a rate, which iperf3 reads: `300M`.
    pub fn start_at(
        namespace: &Namespace,
        server: SocketAddr,
        direction: Direction,
        duration: Duration,
        rate: &str,
    ) -> Result<Self> {
        Self::spawn(namespace, server, direction, duration, &["--bitrate", rate])
    }

    fn spawn(
        namespace: &Namespace,
        server: SocketAddr,
        direction: Direction,
        duration: Duration,
        more: &[&str],
    ) -> Result<Self> {
        let mut command = namespace.command("iperf3")?;
        command.args(["--json", "--interval", "0.1"]);
        command.args(["--client", &server.ip().to_string()]);
        command.args(["--port", &server.port().to_string()]);
        command.args(["--time", &duration.as_secs().to_string()]);
        match direction {
            Direction::Upload => {}
            Direction::Download => {
                command.arg("--reverse");
            }
        }
        command.args(more);
        Ok(Self {
            process: Process::spawn(command)?,
            duration,
        })
    }

    /// Waits for the end of the transfer.
    pub fn finish(mut self) -> Result<Report> {
        let status = self.process.wait(self.duration + PATIENCE)?;
        let text = self.process.output();
        if !status.success() {
            bail!("iperf3 failed ({status}): {text}");
        }
        parse(&serde_json::from_str(&text).context("parse iperf3's JSON")?)
    }
}

fn parse(json: &Value) -> Result<Report> {
    let number = |pointer: &str| {
        json.pointer(pointer)
            .and_then(Value::as_f64)
            .with_context(|| format!("iperf3's JSON has no {pointer}: {json}"))
    };
    let intervals = json["intervals"]
        .as_array()
        .context("iperf3's JSON has no intervals")?
        .iter()
        .filter_map(|interval| interval.pointer("/sum/bits_per_second")?.as_f64())
        .collect();
    Ok(Report {
        bits_per_second: number("/end/sum_received/bits_per_second")?,
        retransmits: json
            .pointer("/end/sum_sent/retransmits")
            .and_then(Value::as_u64)
            .context("iperf3's JSON has no retransmits")?,
        intervals,
    })
}

/// One whole transfer.
pub fn transfer(
    namespace: &Namespace,
    server: SocketAddr,
    direction: Direction,
    duration: Duration,
) -> Result<Report> {
    Client::start(namespace, server, direction, duration)?.finish()
}

/// A TCP transfer that goes on until it is ended.
pub struct Endless {
    process: Process,
}

impl Endless {
    /// Starts a gentle download (see [`Client::start_gently`]) from inside `namespace`.
    pub fn start(namespace: &Namespace, server: SocketAddr) -> Result<Self> {
        let mut command = namespace.command("iperf3")?;
        command.args(["--forceflush", "--interval", "1", "--format", "k"]);
        // iperf3's longest.
        command.args(["--time", "86400", "--reverse", "--window", "128K"]);
        // Enough to keep something on the way at all times, and room for everything else on the machine.
        command.args(["--bitrate", "300M"]);
        command.args(["--client", &server.ip().to_string()]);
        command.args(["--port", &server.port().to_string()]);
        Ok(Self {
            process: Process::spawn(command)?,
        })
    }

    /// Throughput of every second so far, in kbit/s.
    pub fn rates(&self) -> Vec<f64> {
        let output = self.process.output();
        output.lines().filter_map(rate).collect()
    }

    /// Waits until so many seconds have been reported.
    pub fn wait_for_intervals(&self, count: usize) -> Result<()> {
        wait_until("the transfer to begin", PATIENCE, || {
            Ok(self.rates().len() >= count)
        })
        .with_context(|| self.process.output())
    }

    /// Fails if the transfer stood still for a second.
    pub fn check(&self) -> Result<()> {
        let rates = self.rates();
        if let Some(second) = rates.iter().position(|rate| *rate == 0.0) {
            bail!(
                "the transfer stood still in second {second} of {}",
                rates.len()
            );
        }
        Ok(())
    }

    /// Ends the transfer, and fails if it stood still.
    pub fn finish(mut self) -> Result<()> {
        self.check()?;
        self.process.signal(Signal::SIGINT)?;
        // It calls being interrupted a failure.
        self.process.wait(PATIENCE)?;
        Ok(())
    }
}

/// The rate in a line like `[  5]   3.00-4.00   sec  41888 KBytes  343146 Kbits/sec`.
fn rate(line: &str) -> Option<f64> {
    let mut words = line.split_whitespace();
    words.rfind(|word| *word == "Kbits/sec")?;
    words.next_back()?.parse().ok()
}
