//! Ports that stand for clients go back when no flow uses them, and only then.

use std::collections::BTreeSet;

use anyhow::Result;
use portfwd::bpf::Tables;
use portfwd_common::abi::{Config, Ticks};
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::{Family, LabOptions, tcp};
use std::time::Duration;

const LISTEN: u16 = 8080;
const PORTS: usize = 4;
/// Four looks at the pools: five seconds apart, or a hundred times as long as one takes on a slow machine.
const FOUR_LOOKS: Duration = Duration::from_secs(240);

#[test]
fn ports_come_back_when_their_flows_are_over_and_not_before() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let rule = ["tcp", "8080", "10.2.0.2:80"];
    daemon.add_with("small", rule, &["--snat", "10.2.0.1:20000-20003"])?;
    let echo = tcp::Echo::start(&lab.server, Family::V4, 80)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let mut streams = Vec::new();
    for _ in 0..PORTS {
        streams.push(tcp::connect(&lab.client, listen)?);
    }
    // A connection is made before the server has accepted it.
    wait_until("the server to accept them", PATIENCE, || {
        Ok(echo.peers().len() == PORTS)
    })?;
    let mut kept = streams.remove(0);
    let kept_as = echo.peers()[0];
    drop(streams);
    // What ended is over at once, not after four minutes.
    let mut tables = Tables::open_pinned(&daemon.pins())?;
    let config = tables.config()?;
    tables.write_config(&Config {
        tcp_closing: Ticks(1),
        ..config
    })?;
    let mut again = Vec::new();
    wait_until("ports to come back", FOUR_LOOKS, || {
        if let Ok(stream) = tcp::connect_within(&lab.client, listen, Duration::from_secs(1)) {
            again.push(stream);
        }
        Ok(again.len() == PORTS - 1)
    })?;
    tcp::exchange(&mut kept, b"mine all the time")?;
    let later = || -> BTreeSet<_> { echo.peers().into_iter().skip(PORTS).collect() };
    wait_until("the server to accept the others", PATIENCE, || {
        Ok(later().len() == PORTS - 1)
    })?;
    let later = later();
    assert!(!later.contains(&kept_as), "{later:?} and {kept_as}");
    Ok(())
}
