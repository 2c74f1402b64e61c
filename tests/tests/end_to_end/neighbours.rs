//! Neighbours that are not known yet, not known any more, or changed.

use std::time::Duration;

use anyhow::Result;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::wait_until;
use portfwd_tests::{Family, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn the_first_packet_to_an_unknown_neighbour_gets_through(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    for family in Family::BOTH {
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        for _ in 0..3 {
            scene
                .lab
                .gateway
                .ip("neigh flush dev lan0\nneigh flush dev wan0\n")?;
            udp::exchange(&socket, b"one packet, no second chance")?;
        }
        scene
            .lab
            .gateway
            .ip("neigh flush dev lan0\nneigh flush dev wan0\n")?;
        let mut stream = tcp::connect_within(
            &scene.lab.client,
            listen(family),
            // Less than the second after which a lost SYN would be sent again.
            Duration::from_millis(900),
        )?;
        tcp::exchange(&mut stream, b"hello")?;
        assert_eq!(scene.daemon.rule(rule_name(family))?.flows, 2);
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn flushing_the_neighbours_costs_no_packet_of_a_running_stream(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let stream = udp::Stream::start(&scene.lab.client, listen(family), 1000)?;
        for _ in 0..10 {
            stream.wait_for_more(100)?;
            scene
                .lab
                .gateway
                .ip("neigh flush dev lan0\nneigh flush dev wan0\n")?;
        }
        stream.wait_for_more(1500)?;
        stream.finish()?;
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_server_with_a_new_mac_address_is_found_within_two_seconds(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for (family, mac) in [
        (Family::V4, "02:00:00:00:00:44"),
        (Family::V6, "02:00:00:00:00:66"),
    ] {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        udp::exchange(&socket, b"at the old address")?;
        scene
            .lab
            .server
            .ip(&format!("link set s0 address {mac}\n"))?;
        let server = scene.lab.server_address().of(family);
        // What the gateway's kernel makes of the server's announcement.
        scene.lab.gateway.ip(&format!(
            "neigh replace {server} lladdr {mac} dev lan0 nud reachable\n"
        ))?;
        wait_until("the new MAC address", Duration::from_secs(2), || {
            Ok(udp::exchange(&socket, b"at the new address").is_ok())
        })?;
    }
    Ok(())
}
