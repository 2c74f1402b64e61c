//! Packets that say by what way they are to go.

use std::net::IpAddr;

use anyhow::{Result, bail};
use portfwd_common::model::frame::{Draft, Transport};
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, LabOptions, Offloads, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// Loose and strict source route (RFC 791 section 3.1).
const ROUTES: [u8; 2] = [131, 137];

/// It is not translated, although its flow is known. By default the kernel does not go by it either; told to, it does, so that what
/// does not arrive before could have.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_packet_with_a_source_route_comes_to_nobody(#[case] mode: Mode) -> Result<()> {
    const EACH: u64 = 5;
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("udp")?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    let passed = || -> Result<u64> {
        let passes = scene.daemon.passes()?;
        Ok(passes.get("source_route").copied().unwrap_or(0))
    };
    let IpAddr::V4(server) = SERVER.endpoint(Family::V4, TARGET).ip() else {
        bail!("the server has no IPv4 address");
    };
    let translated = udp::Sink::start(&scene.lab.server, Family::V4, TARGET)?;
    // The kernel changes the destination address, and no port.
    let routed = udp::Sink::start(&scene.lab.server, Family::V4, LISTEN)?;
    let plain = Draft::udp(CLIENT.endpoint(Family::V4, 45_000), listen(Family::V4));
    wire.send(&plain.packet())?;
    translated.wait_for(1)?;

    let send_routed = || -> Result<u64> {
        let before = passed()?;
        for kind in ROUTES {
            let packet = Draft {
                ip_options: [&[kind, 7, 4][..], &server.octets(), &[0]].concat(),
                // Its sum would be over the last destination's address.
                transport: Transport::UdpWithoutSum,
                ..plain.clone()
            };
            for _ in 0..EACH {
                wire.send(&packet.packet())?;
            }
        }
        let sent = EACH * ROUTES.len() as u64;
        wait_until("the packets to pass", PATIENCE, || {
            Ok(passed()? >= before + sent)
        })?;
        Ok(sent)
    };
    send_routed()?;
    wire.send(&plain.packet())?;
    translated.wait_for(2)?;
    assert_eq!(routed.received(), 0);

    for end in [scene.lab.wan_end(), scene.lab.server_end()] {
        for scope in ["all", end.interface] {
            let key = format!("net/ipv4/conf/{scope}/accept_source_route");
            end.namespace.sysctl(&key, "1")?;
        }
    }
    let sent = send_routed()?;
    routed.wait_for(sent)?;
    assert_eq!(translated.received(), 2);
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    assert_eq!(rule.to_target.packets, 2);
    Ok(())
}
