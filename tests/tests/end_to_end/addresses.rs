//! Listen addresses: one, several, every one of the WAN, and as they change.

use anyhow::{Context, Result};
use portfwd_tests::address::{DualStack, GATEWAY_LAN, SECOND_SERVER, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::{Family, LabOptions, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, rule_name};

const SECOND_EXTERNAL: DualStack = DualStack::new(1, 5);
const THIRD_EXTERNAL: DualStack = DualStack::new(1, 6);

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn one_port_of_two_addresses_leads_to_two_servers_on_two_lans(#[case] mode: Mode) -> Result<()> {
    let mut daemon = DaemonOptions::new(mode);
    daemon.lan.push("lan1".into());
    let scene = Scene::with(
        LabOptions::for_mode(mode).server_side(ServerSide::TwoLans),
        daemon,
    )?;
    for family in Family::BOTH {
        let mut echoes = Vec::new();
        for (external, server, host) in [
            (SECOND_EXTERNAL, SERVER, &scene.lab.server),
            (THIRD_EXTERNAL, SECOND_SERVER, scene.lab.second_server()?),
        ] {
            scene.lab.add_external_address(external.of(family))?;
            let listen = external.endpoint(family, LISTEN);
            let target = server.endpoint(family, TARGET).to_string();
            let number = echoes.len();
            let name = format!("{}-{number}", rule_name(family));
            let listen_text = listen.to_string();
            scene.daemon.add(&name, "both", &listen_text, &target)?;
            echoes.push((
                udp::Echo::start(host, family, TARGET)?,
                tcp::Echo::start(host, family, TARGET)?,
            ));
            let socket = udp::connect(&scene.lab.client, listen)?;
            udp::exchange(&socket, b"over UDP")?;
            let mut stream = tcp::connect(&scene.lab.client, listen)?;
            tcp::exchange(&mut stream, b"over TCP")?;
        }
        for (udp, tcp) in echoes {
            assert_eq!((udp.peers().len(), tcp.peers().len()), (1, 1), "{family}");
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rule_without_address_follows_the_addresses_of_the_wan(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let external = SECOND_EXTERNAL.of(family);
        let listen = SECOND_EXTERNAL.endpoint(family, LISTEN);
        scene.lab.add_external_address(external)?;
        wait_until("the new address to be forwarded", PATIENCE, || {
            let socket = udp::connect(&scene.lab.client, listen)?;
            Ok(udp::exchange(&socket, b"knock").is_ok())
        })?;
        scene.lab.remove_external_address(external)?;
        // Nobody has the address any more: not even the neighbour answers, or the stack refuses.
        wait_until("the old address to be forgotten", PATIENCE, || {
            let before = echoes(&scene, family)?;
            let socket = udp::connect(&scene.lab.client, listen)?;
            socket.set_read_timeout(Some(std::time::Duration::from_millis(100)))?;
            let answered = udp::exchange(&socket, b"knock").is_ok();
            Ok(!answered && echoes(&scene, family)? == before)
        })?;
    }
    Ok(())
}

fn echoes(scene: &Scene, family: Family) -> Result<u64> {
    let rule = scene.daemon.rule(rule_name(family))?;
    Ok(rule.to_target.packets)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rule_without_address_leaves_the_lan_address_alone(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    scene
        .lab
        .client
        .ip("route add 10.2.0.1/32 via 10.1.0.1\n")?;
    let lan = GATEWAY_LAN.endpoint(Family::V4, LISTEN);
    let _own = udp::Echo::start_on(&scene.lab.gateway, lan)?;
    let socket = udp::connect(&scene.lab.client, lan)?;
    udp::exchange(&socket, b"the gateway's own").context("the gateway's own service")?;
    assert_eq!(echoes(&scene, Family::V4)?, 0);
    Ok(())
}
