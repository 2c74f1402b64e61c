//! An interface without Ethernet header: a VPN's tun device as WAN.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context, Result};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::process::Process;
use portfwd_tests::{Family, Lab, LabOptions, Namespace, curl, udp};

use crate::scene::TARGET;

/// Where the tests' forwards listen.
const LISTEN: &str = "10.9.0.1:8080";

/// A tun device in `namespace` whose packets travel in UDP between two ends of the lab's WAN.
fn tunnel(namespace: &Namespace, address: &str, local: &str, remote: &str) -> Result<Process> {
    let mut command = namespace.command("socat")?;
    command.arg(format!("UDP4-DATAGRAM:{remote}:11443,bind={local}:11443"));
    command.arg(format!(
        "TUN:{address}/24,tun-name=vpn0,tun-type=tun,iff-no-pi,iff-up"
    ));
    let process = Process::spawn(command)?;
    wait_until("the tun device", PATIENCE, || {
        namespace.run(|| nix::net::if_::if_nametoindex("vpn0").is_ok())
    })
    .with_context(|| process.output())?;
    Ok(process)
}

/// A client and a gateway that are joined by a tunnel, which is the gateway's WAN.
struct Vpn {
    daemon: Daemon,
    _tunnels: [Process; 2],
    lab: Lab,
}

impl Vpn {
    fn new() -> Result<Self> {
        let lab = LabOptions::for_mode(Mode::Tc).build()?;
        let near = tunnel(&lab.client, "10.9.0.2", "10.1.0.2", "10.1.0.1")?;
        let far = tunnel(&lab.gateway, "10.9.0.1", "10.1.0.1", "10.1.0.2")?;
        let options = DaemonOptions {
            wan: vec!["vpn0".into()],
            ..DaemonOptions::new(Mode::Auto)
        };
        Ok(Self {
            daemon: options.start(&lab.gateway)?,
            _tunnels: [near, far],
            lab,
        })
    }
}

#[test]
fn a_forward_from_a_vpn_without_ethernet_header_works_through_tc() -> Result<()> {
    let Vpn {
        daemon,
        lab,
        _tunnels,
    } = Vpn::new()?;
    daemon.add("web", "tcp", "8080", "10.2.0.2:80")?;
    daemon.add("echo", "udp", "8080", "10.2.0.2:80")?;

    let content = curl::varied_content(1 << 20);
    let nginx = Nginx::start(&lab.server, TARGET, &[("file", &content)])?;
    let sum = curl::fetch_sha256(
        &lab.client,
        "http://10.9.0.1:8080/file",
        Duration::from_secs(20),
    )?;
    assert_eq!(sum, curl::sha256(&content)?);
    nginx.wait_for_access(|access| access.client == "10.9.0.2")?;

    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&lab.client, LISTEN.parse()?)?;
    udp::exchange(&socket, b"through the tunnel")?;
    let drops = daemon.drops()?;
    assert!(drops.is_empty(), "{drops:?}");
    Ok(())
}

/// The packet that tells it has no link header to be turned round.
#[test]
fn a_client_of_a_vpn_hears_that_there_is_no_room() -> Result<()> {
    let Vpn {
        daemon,
        lab,
        _tunnels,
    } = Vpn::new()?;
    let rule = ["udp", "8080", "10.2.0.2:80"];
    daemon.add_with("echo", rule, &["--snat", "10.2.0.1:20000-20000"])?;
    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let first = udp::connect(&lab.client, LISTEN.parse()?)?;
    udp::exchange(&first, b"the only port")?;
    let second = udp::connect(&lab.client, LISTEN.parse()?)?;
    udp::report_soft_errors(&second, Family::V4)?;
    second.send(b"none left")?;
    let error = udp::reported_error(&second)?;
    assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{error}");
    assert_eq!(daemon.events()?["error_sent"], 1);
    udp::exchange(&first, b"as before")
}
