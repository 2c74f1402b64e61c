//! New flows from sources that cannot be where they came from.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use portfwd_common::model::frame::Draft;
use portfwd_tests::address::{CLIENT, DualStack, GATEWAY_LAN, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, LabOptions, Offloads, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

/// A host of the LAN that is not there.
const LAN_HOST: DualStack = DualStack::new(2, 99);
/// An address of the gateway on an interface without a program.
const ELSEWHERE: DualStack = DualStack::new(77, 1);
/// A host behind a route that refuses.
const OUTLAW: DualStack = DualStack::new(78, 9);
/// A host without route.
const NOBODY: DualStack = DualStack::new(79, 9);

fn scene(mode: Mode) -> Result<Scene> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("udp")?;
    scene.lab.gateway.ip(&format!(
        "address add {}/32 dev lo\naddress add {}/128 dev lo nodad\n\
         route add blackhole {}/32\nroute add blackhole {}/128\n",
        ELSEWHERE.v4, ELSEWHERE.v6, OUTLAW.v4, OUTLAW.v6
    ))?;
    Ok(scene)
}

fn martians(scene: &Scene) -> Result<u64> {
    let drops = scene.daemon.drops()?;
    Ok(drops.get("martian_source").copied().unwrap_or(0))
}

fn datagram(source: IpAddr, family: Family) -> Vec<u8> {
    let packet = Draft::udp(SocketAddr::new(source, 45_000), listen(family));
    packet.payload(*b"forged").packet()
}

/// By name, who cannot come in by the WAN.
fn forged(family: Family) -> Vec<(&'static str, IpAddr)> {
    let mut sources = vec![
        ("the server", SERVER.of(family)),
        ("a host of the LAN", LAN_HOST.of(family)),
        ("the gateway's LAN address", GATEWAY_LAN.of(family)),
        (
            "the gateway's address on another interface",
            ELSEWHERE.of(family),
        ),
        ("a host behind a blackhole", OUTLAW.of(family)),
        ("a host without route", NOBODY.of(family)),
    ];
    if family == Family::V4 {
        let [a, b, c, _] = SERVER.v4.octets();
        let broadcast = |c| Ipv4Addr::new(a, b, c, 255).into();
        sources.push(("the LAN's broadcast address", broadcast(c)));
        let [_, _, c, _] = CLIENT.v4.octets();
        sources.push(("the WAN's broadcast address", broadcast(c)));
    }
    sources
}

/// Each is counted and none reaches the server, which hears whoever can be there.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_forged_source_does_not_reach_the_server(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let mut dropped = martians(&scene)?;
        for (who, source) in forged(family) {
            println!("{who}, {source}");
            wire.send(&datagram(source, family))?;
            dropped += 1;
            wait_until("it to be dropped", PATIENCE, || {
                Ok(martians(&scene)? == dropped)
            })?;
        }
        // What came before it would have arrived before it.
        wire.send(&datagram(CLIENT.of(family), family))?;
        sink.wait_for(1)?;
        assert_eq!(sink.received(), 1);
        assert_eq!(martians(&scene)?, dropped);
    }
    Ok(())
}

/// The other way round: a host of the LAN takes an address that the WAN leads to.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_host_of_the_lan_does_not_dial_with_an_address_of_the_wan(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    let wire = Wire::between(scene.lab.server_end(), scene.lab.lan_end())?;
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let dropped = martians(&scene)?;
        wire.send(&datagram(CLIENT.of(family), family))?;
        wait_until("it to be dropped", PATIENCE, || {
            Ok(martians(&scene)? == dropped + 1)
        })?;
        wire.send(&datagram(LAN_HOST.of(family), family))?;
        sink.wait_for(1)?;
        assert_eq!(sink.received(), 1);
    }
    Ok(())
}

/// What was kept out comes in with the route that leads back to it.
#[test]
fn a_blackhole_route_keeps_a_client_out_for_as_long_as_it_is_there() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let dropped = martians(&scene)?;
        wire.send(&datagram(OUTLAW.of(family), family))?;
        wait_until("it to be dropped", PATIENCE, || {
            Ok(martians(&scene)? == dropped + 1)
        })?;
        let bits = match family {
            Family::V4 => 32,
            Family::V6 => 128,
        };
        let (outlaw, client) = (OUTLAW.of(family), CLIENT.of(family));
        scene
            .lab
            .gateway
            .ip(&format!("route replace {outlaw}/{bits} via {client}\n"))?;
        wire.send(&datagram(outlaw, family))?;
        sink.wait_for(1)?;
    }
    Ok(())
}

/// Nothing is forged for a gateway that sees one direction of a client on either side.
#[test]
fn a_daemon_that_trusts_sources_takes_what_the_other_side_leads_to() -> Result<()> {
    let config = tempfile::NamedTempFile::with_suffix(".toml")?;
    std::fs::write(config.path(), "[gateway]\nsource_check = false\n")?;
    let lab = LabOptions::for_mode(Mode::Tc).offloads(Offloads::Off);
    let options = DaemonOptions {
        config: Some(config.path().to_owned()),
        ..DaemonOptions::new(Mode::Tc)
    };
    let scene = Scene::with(lab, options)?;
    scene.forward("udp")?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        wire.send(&datagram(LAN_HOST.of(family), family))?;
        sink.wait_for(1)?;
    }
    assert_eq!(martians(&scene)?, 0);
    Ok(())
}
