//! Neighbours that are not known yet, not known any more, or changed.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use portfwd_tests::daemon::{Daemon, Mode};
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

/// The daemon vouches for what flows have looked up, for three seconds at a time. One that hangs, or is gone, ceases to: a second
/// after that, flows look again by themselves. (Ten seconds are for a busy machine; as long as the daemon vouches, it is thirty.)
#[rstest]
#[case::of_a_daemon_that_is_dead(Mode::Xdp, Daemon::kill9)]
#[case::of_a_daemon_that_hangs(Mode::Tc, |daemon: &mut Daemon| daemon.signal(Signal::SIGSTOP))]
fn a_new_mac_address_is_found_when_the_word_has_run_out(
    #[case] mode: Mode,
    #[case] silence: fn(&mut Daemon) -> Result<()>,
) -> Result<()> {
    const MAC: &str = "02:00:00:00:00:55";
    let mut scene = Scene::forwarding(mode, "udp")?;
    let mut sockets = Vec::new();
    let mut echoes = Vec::new();
    for family in Family::BOTH {
        echoes.push(udp::Echo::start(&scene.lab.server, family, TARGET)?);
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        udp::exchange(&socket, b"at the old address")?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        sockets.push(socket);
    }
    silence(&mut scene.daemon)?;
    scene
        .lab
        .server
        .ip(&format!("link set s0 address {MAC}\n"))?;
    for family in Family::BOTH {
        let server = scene.lab.server_address().of(family);
        scene.lab.gateway.ip(&format!(
            "neigh replace {server} lladdr {MAC} dev lan0 nud reachable\n"
        ))?;
    }
    wait_until("the new MAC address", Duration::from_secs(10), || {
        let found = |socket| udp::exchange(socket, b"at the new address").is_ok();
        // Both go on sending: silence would have a flow look again, too.
        Ok(sockets.iter().map(found).filter(|found| *found).count() == sockets.len())
    })
}
