//! traceroute, and what it found.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use crate::namespace::Namespace;
use crate::process::run_for_text;

/// What traceroute sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// UDP datagrams to one port.
    Udp,
    /// TCP SYNs to one port.
    Tcp,
    /// ICMP echo requests.
    Echo,
}

/// A line of traceroute's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The TTL or hop limit of the probe.
    pub distance: u8,
    /// Who answered, if anybody did.
    pub address: Option<IpAddr>,
}

/// Traces the way from `namespace` to `destination`, one probe for each distance.
pub fn trace(namespace: &Namespace, destination: SocketAddr, probe: Probe) -> Result<Vec<Hop>> {
    let mut command = namespace.command("traceroute")?;
    command.arg(match probe {
        Probe::Udp => "-U",
        Probe::Tcp => "-T",
        Probe::Echo => "-I",
    });
    command.args(["-n", "-q", "1", "-m", "6", "-w", "2"]);
    match probe {
        Probe::Udp | Probe::Tcp => {
            command.args(["-p", &destination.port().to_string()]);
        }
        Probe::Echo => {}
    }
    command.arg(destination.ip().to_string());
    parse(&run_for_text(&mut command)?)
}

fn parse(text: &str) -> Result<Vec<Hop>> {
    text.lines()
        .skip(1)
        .map(|line| {
            let mut words = line.split_whitespace();
            let distance = words
                .next()
                .and_then(|word| word.parse().ok())
                .with_context(|| format!("traceroute wrote {line:?}"))?;
            let address = words.next().and_then(|word| word.parse().ok());
            Ok(Hop { distance, address })
        })
        .collect()
}
