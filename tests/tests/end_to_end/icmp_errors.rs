//! ICMP errors about forwarded packets, seen by the one who sent them.

use std::io::ErrorKind;
use std::net::IpAddr;

use anyhow::Result;
use portfwd_common::model::frame::{Draft, error};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN, SERVER};
use portfwd_tests::capture::Capture;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::traceroute::{self, Probe};
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, LabOptions, Offloads, snmp, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

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

/// The gateway itself tells of a packet that ends at it, in the kernel's place, and drops the packet.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn traceroute_shows_the_gateway_that_hides_its_client(#[case] mode: Mode) -> Result<()> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    for family in Family::BOTH {
        let target = scene.lab.server_address().endpoint(family, TARGET);
        let rule = ["both", &LISTEN.to_string(), &target.to_string()];
        scene
            .daemon
            .add_with(rule_name(family), rule, &["--masquerade"])?;
        let capture = Capture::start(scene.lab.client_end())?;
        for probe in [Probe::Udp, Probe::Tcp] {
            let hops = traceroute::trace(&scene.lab.client, listen(family), probe)?;
            let addresses: Vec<_> = hops.iter().map(|hop| hop.address).collect();
            let dialled: Option<IpAddr> = Some(GATEWAY_WAN.of(family));
            assert_eq!(addresses, [dialled, dialled], "{family}, {probe:?}");
        }
        let exceeded = match family {
            Family::V4 => "icmp.type == 11",
            Family::V6 => "icmpv6.type == 3",
        };
        let frames = capture.stop()?;
        assert_eq!(frames.expect(exceeded)?, 2, "{family}");
        let (version, fields) = match family {
            Family::V4 => ("ip", ["ip.src", "ip.dst"]),
            Family::V6 => ("ipv6", ["ipv6.src", "ipv6.dst"]),
        };
        // The first of each is that of the error, the second that of the packet that it quotes, as the client has sent it.
        let (gateway, client) = (GATEWAY_WAN.of(family), CLIENT.of(family));
        let expected = format!("{gateway},{client}\t{client},{gateway}");
        for line in frames.select(&format!("{version} && {exceeded}"), &fields)? {
            assert_eq!(line, expected);
        }
    }
    let events = scene.daemon.events()?;
    assert_eq!(events.get("error_sent"), Some(&4));
    snmp::expect_no_malformed(&[&scene.lab.client, &scene.lab.gateway, &scene.lab.server])
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

/// Nobody learns a path MTU from an error that is about no packet of theirs: not the server, nor the gateway.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_forged_report_of_a_small_mtu_is_believed_by_nobody(#[case] mode: Mode) -> Result<()> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("both")?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut stream, &[7; 20_000])?;
        let (kind, code) = match family {
            Family::V4 => (3, 4),
            Family::V6 => (2, 0),
        };
        let rest = [0, 0, 0x05, 0x14];
        let listen = listen(family);
        // Of the connection, but far from what is on its way; and of no connection.
        for peer in [stream.local_addr()?, CLIENT.endpoint(family, 9)] {
            for flags in [0x10, 0x02] {
                let quoted = Draft::tcp(listen, peer, flags).payload(vec![7; 1_400]);
                let quoted = quoted.numbers(0x1357_9bdf, 1);
                let forged = error(
                    CLIENT.of(family),
                    listen.ip(),
                    kind,
                    code,
                    rest,
                    &quoted.packet()[..200],
                );
                wire.send(&forged)?;
            }
        }
        tcp::exchange(&mut stream, &[7; 20_000])?;
        for (host, destination) in [
            (&scene.lab.server, CLIENT.of(family)),
            (&scene.lab.gateway, CLIENT.of(family)),
            (&scene.lab.gateway, SERVER.of(family)),
        ] {
            let destination = destination.to_string();
            let routes = host.ip_json(&["route", "get", destination.as_str()])?;
            let learnt = routes[0].pointer("/metrics/0/mtu");
            assert_eq!(learnt, None, "to {destination}");
        }
    }
    Ok(())
}

/// Whoever sends many packets with their last hop gets few errors: those about forwarded packets are the kernel's, and it limits
/// them like its others.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn errors_about_a_flood_are_few(#[case] mode: Mode) -> Result<()> {
    const FLOOD: u64 = 500;
    let scene = Scene::forwarding(mode, "udp")?;
    let gateway = &scene.lab.gateway;
    gateway.sysctl("net/ipv4/icmp_ratelimit", "1000")?;
    gateway.sysctl("net/ipv6/icmp/ratelimit", "1000")?;
    for (family, counter) in [
        (Family::V4, "Icmp.OutTimeExcds"),
        (Family::V6, "Icmp6OutTimeExcds"),
    ] {
        let sent =
            || -> Result<u64> { Ok(snmp::read(gateway)?.get(counter).copied().unwrap_or(0)) };
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        udp::exchange(&socket, b"a flow")?;
        let before = sent()?;
        let flood = udp::connect(&scene.lab.client, listen(family))?;
        udp::limit_hops(&flood, family, 1)?;
        for _ in 0..FLOOD {
            // Errors about earlier ones are reported here.
            drop(flood.send(b"last hop"));
        }
        udp::exchange(&socket, b"the flow goes on")?;
        let errors = sent()? - before;
        assert!(
            (1..=FLOOD / 5).contains(&errors),
            "{errors} errors over {family}"
        );
    }
    Ok(())
}
