//! Packets that say by what way they are to go.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use portfwd_common::model::frame::Draft;
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, LabOptions, Offloads, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// Loose and strict source route (RFC 791 section 3.1).
const ROUTES: [u8; 2] = [131, 137];

/// It is not translated, although its flow is known, and the kernel does not go by it either, as it does not by default.
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
        unreachable!("an IPv4 address");
    };
    let sink = udp::Sink::start(&scene.lab.server, Family::V4, TARGET)?;
    let plain = Draft::udp(CLIENT.endpoint(Family::V4, 45_000), listen(Family::V4));
    wire.send(&plain.packet())?;
    sink.wait_for(1)?;
    let mut sent = 0;
    for kind in ROUTES {
        let route = [&[kind, 7, 4][..], &server.octets(), &[0]].concat();
        let routed = Draft {
            ip_options: route,
            ..plain.clone()
        };
        for _ in 0..EACH {
            wire.send(&routed.packet())?;
            sent += 1;
        }
    }
    wait_until("the packets to pass", PATIENCE, || Ok(passed()? >= sent))?;
    // What comes behind them on the same wire: whatever was going to arrive has arrived before it.
    wire.send(&plain.packet())?;
    sink.wait_for(2)?;
    ensure!(
        sink.received() == 2,
        "{} datagrams arrived",
        sink.received()
    );
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    assert_eq!(rule.to_target.packets, 2);
    Ok(())
}
