//! ICMP errors about forwarded packets, seen by the one who sent them.

use std::io::ErrorKind;
use std::net::IpAddr;

use anyhow::Result;
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::traceroute::{self, Probe};
use portfwd_tests::{Family, LabOptions, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_closed_udp_port_behind_the_forward_is_refused_to_the_client(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for family in Family::BOTH {
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        for attempt in 1..=3 {
            socket.send(b"anybody there?")?;
            let error = udp::reported_error(&socket)?;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family}");
            let rule = scene.daemon.rule(rule_name(family))?;
            assert_eq!(rule.to_target.packets, attempt, "{family}");
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_client_that_closed_its_port_refuses_the_servers_answer(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for family in Family::BOTH {
        let server = scene.lab.server_address().endpoint(family, TARGET);
        let server = udp::bind(&scene.lab.server, server)?;
        server.set_read_timeout(Some(portfwd_tests::deadline::PATIENCE))?;
        let client = udp::connect(&scene.lab.client, listen(family))?;
        client.send(b"a question, and gone")?;
        let (_, peer) = udp::receive(&server, &mut [0; 32])?;
        udp::close(&scene.lab.client, client)?;
        server.connect(peer)?;
        server.send(b"an answer")?;
        let error = udp::reported_error(&server)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family}");
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn traceroute_shows_the_gateway_and_then_the_server(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    for family in Family::BOTH {
        for probe in [Probe::Udp, Probe::Tcp] {
            let hops = traceroute::trace(&scene.lab.client, listen(family), probe)?;
            let addresses: Vec<_> = hops.iter().map(|hop| hop.address).collect();
            // The server's answer bears the address that was dialled.
            let dialled: Option<IpAddr> = Some(GATEWAY_WAN.of(family));
            assert_eq!(addresses, [dialled, dialled], "{family}, {probe:?}");
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn traceroute_shows_a_router_behind_the_gateway_as_a_hop(#[case] mode: Mode) -> Result<()> {
    let lab = LabOptions::for_mode(mode).server_side(ServerSide::BehindRouter { mtu: 1500 });
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("both")?;
    for family in Family::BOTH {
        for probe in [Probe::Udp, Probe::Tcp] {
            let hops = traceroute::trace(&scene.lab.client, listen(family), probe)?;
            assert_eq!(hops.len(), 3, "{family}, {probe:?}: {hops:?}");
            assert!(
                hops.iter().all(|hop| hop.address.is_some()),
                "{family}, {probe:?}: {hops:?}"
            );
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_servers_way_to_the_client_is_traced_too(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for family in Family::BOTH {
        let server = udp::bind(
            &scene.lab.server,
            scene.lab.server_address().endpoint(family, TARGET),
        )?;
        server.set_read_timeout(Some(portfwd_tests::deadline::PATIENCE))?;
        let client = udp::connect(&scene.lab.client, listen(family))?;
        client.send(b"hello")?;
        let (_, peer) = udp::receive(&server, &mut [0; 32])?;
        udp::limit_hops(&server, family, 1)?;
        server.connect(peer)?;
        server.send(b"too short a life")?;
        let error = udp::reported_error(&server)?;
        assert_eq!(
            error.kind(),
            ErrorKind::HostUnreachable,
            "{family}: {error}"
        );
    }
    scene.expect_no_errors()
}
