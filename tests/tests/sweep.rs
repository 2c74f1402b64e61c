//! The daemon's sweep frees the memory of flows that are over, and touches no other.

use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use portfwd::bpf::Tables;
use portfwd_common::abi::{ABI_VERSION, Config, Ticks, names};
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::deadline::wait_until;
use portfwd_tests::{Family, LabOptions, tcp, udp};

const LISTEN: u16 = 8080;
const TARGET: u16 = 80;
const TCP: u8 = 6;
/// Two sweeps and what a half without partner is given to find one.
const TWO_SWEEPS: Duration = Duration::from_secs(20);

/// Keys of the IPv4 flows as bytes: source, destination, ports, protocol.
fn flows_v4(daemon: &Daemon) -> Result<HashMap<MapData, [u8; 16], [u8; 64]>> {
    let path = daemon
        .pins()
        .join(format!("v{ABI_VERSION}/maps"))
        .join(names::FLOWS_V4);
    let data = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
    Ok(HashMap::try_from(Map::HashMap(data))?)
}

fn tcp_halves(flows: &HashMap<MapData, [u8; 16], [u8; 64]>) -> Result<Vec<[u8; 16]>> {
    let keys = flows.keys().collect::<Result<Vec<_>, _>>()?;
    Ok(keys.into_iter().filter(|key| key[12] == TCP).collect())
}

#[test]
fn expired_flows_and_lonely_halves_leave_the_table_and_live_flows_stay() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let mut streams = Vec::new();
    let mut echoes = Vec::new();
    for family in Family::BOTH {
        let target = SERVER.endpoint(family, TARGET);
        daemon.add(
            match family {
                Family::V4 => "over-ipv4",
                Family::V6 => "over-ipv6",
            },
            "both",
            &GATEWAY_WAN.endpoint(family, LISTEN).to_string(),
            &target.to_string(),
        )?;
        echoes.push((
            udp::Echo::start(&lab.server, family, TARGET)?,
            tcp::Echo::start(&lab.server, family, TARGET)?,
        ));
        let listen = GATEWAY_WAN.endpoint(family, LISTEN);
        udp::exchange(&udp::connect(&lab.client, listen)?, b"once")?;
        let mut stream = tcp::connect(&lab.client, listen)?;
        tcp::exchange(&mut stream, b"for hours")?;
        streams.push(stream);
    }
    let mut tables = Tables::open_pinned(&daemon.pins())?;
    assert_eq!(tables.flow_entries()?, 4);

    let mut v4 = flows_v4(&daemon)?;
    let halves = tcp_halves(&v4)?;
    assert_eq!(halves.len(), 2);
    v4.remove(&halves[0])?;
    let config = tables.config()?;
    tables.write_config(&Config {
        udp: Ticks(1),
        ..config
    })?;

    wait_until("the dead flows to leave the table", TWO_SWEEPS, || {
        Ok(tables.flow_entries()? == 1 && v4.keys().next().is_none())
    })?;
    let left = tables.flows()?;
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].listen.is_ipv6(), "{left:?}");
    tcp::exchange(&mut streams[1], b"after the sweep")?;
    Ok(())
}
