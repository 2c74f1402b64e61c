//! A STUN server with two addresses (RFC 5780), and clients that ask it what kind of NAT they are behind.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::deadline::{PATIENCE, wait_until};
use crate::namespace::Namespace;
use crate::process::{Process, output_within};
use crate::udp;

/// Port of the server; its second one is the next.
const PORT: u16 = 3478;

/// coturn's server at work in a namespace, without TURN; it ends with this.
pub struct Server {
    _process: Process,
    _directory: TempDir,
}

impl Server {
    /// Starts it on two addresses of the namespace.
    pub fn start(namespace: &Namespace, addresses: [IpAddr; 2]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pfwd-stun-").tempdir()?;
        let file = |name| directory.path().join(name).display().to_string();
        let mut command = namespace.command("turnserver")?;
        // Without a configuration, and with all that it writes in one place.
        command.args(["-n", "--stun-only", "--no-tls", "--no-dtls", "--no-cli"]);
        command.args(["--log-file", "stdout", "--simple-log"]);
        command.args(["--pidfile", &file("pid"), "--userdb", &file("users")]);
        for address in addresses {
            command.args(["--listening-ip", &address.to_string()]);
        }
        let process = Process::spawn(command)?;
        for address in addresses {
            for port in [PORT, PORT + 1] {
                let endpoint = SocketAddr::new(address, port);
                wait_until("the STUN server", PATIENCE, || answers(namespace, endpoint))
                    .with_context(|| format!("{endpoint}: {}", process.output()))?;
            }
        }
        Ok(Self {
            _process: process,
            _directory: directory,
        })
    }
}

/// Whether a binding request (RFC 8489 section 5) is answered with success.
fn answers(namespace: &Namespace, server: SocketAddr) -> Result<bool> {
    const REQUEST: [u8; 8] = [0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    let socket = udp::connect(namespace, server)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut request = [0x5a; 20];
    request[..8].copy_from_slice(&REQUEST);
    let mut answer = [0; 256];
    // Nobody may be there yet, of which an ICMP error tells.
    let answered = socket.send(&request).and_then(|_| socket.recv(&mut answer));
    Ok(answered.is_ok() && answer[..2] == [1, 1])
}

/// What a [`natdiscovery`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// Whether an endpoint is seen as the same by everybody.
    Mapping,
    /// Whether everybody may send to it.
    Filtering,
    /// Whether the host itself may.
    Hairpinning,
}

/// What `turnutils_natdiscovery` finds out, asked from a local endpoint. One at a time: the sockets of one behavior would take the
/// answers of the next.
pub fn natdiscovery(
    namespace: &Namespace,
    behavior: Behavior,
    local: SocketAddr,
    server: IpAddr,
) -> Result<String> {
    let mut command = namespace.command("turnutils_natdiscovery")?;
    command.arg(match behavior {
        Behavior::Mapping => "-m",
        Behavior::Filtering => "-f",
        Behavior::Hairpinning => "-H",
    });
    command.args(["-L", &local.ip().to_string()]);
    command.args(["-l", &local.port().to_string()]);
    command.arg(server.to_string());
    let output = output_within(&mut command, 6 * PATIENCE).context("turnutils_natdiscovery")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What `stun` says, the client of RFC 3489, asked from a local port and the one behind it. IPv4 alone.
pub fn classic(namespace: &Namespace, local: SocketAddr, server: IpAddr) -> Result<String> {
    let mut command = namespace.command("stun")?;
    command.arg(server.to_string());
    command.args(["-v", "-p", &local.port().to_string()]);
    command.args(["-i", &local.ip().to_string()]);
    let output = output_within(&mut command, 6 * PATIENCE).context("stun")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr))
}
