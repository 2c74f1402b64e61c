//! What is not portfwd's stays as it is.

use std::time::Duration;

use anyhow::{Context, Result};
use portfwd_tests::address::{CLIENT, GATEWAY_LAN, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::foreign_xdp::{ForeignXdp, attached_id};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::{Family, Lab, curl, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, rule_name};

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn the_gateways_own_services_answer_as_before(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let nginx = Nginx::start(
        &scene.lab.gateway,
        8081,
        &[("own", b"the gateway's own page")],
    )?;
    for family in Family::BOTH {
        let url = curl::url(GATEWAY_WAN.endpoint(family, 8081), "own");
        let page = curl::fetch(&scene.lab.client, &url, Duration::from_secs(10))?;
        assert_eq!(page, b"the gateway's own page");
        let client = CLIENT.of(family).to_string();
        nginx.wait_for_access(|access| access.client == client)?;

        let _echo = udp::Echo::start(&scene.lab.gateway, family, 5353)?;
        let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(family, 5353))?;
        udp::exchange(&socket, b"the gateway's own echo")?;
    }
    let flows = scene.daemon.flows()?;
    assert!(flows.is_empty(), "{flows:?}");
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_gateway_still_talks_to_the_target_itself(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    for family in Family::BOTH {
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let server = SERVER.endpoint(family, TARGET);
        let mut stream = tcp::connect(&scene.lab.gateway, server)?;
        tcp::exchange(&mut stream, b"from the gateway")?;
        assert_eq!(stream.local_addr()?.ip(), GATEWAY_LAN.of(family));
        udp::exchange(
            &udp::connect(&scene.lab.gateway, server)?,
            b"from the gateway",
        )?;
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!((rule.to_target.packets, rule.to_client.packets), (0, 0));
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn routed_traffic_that_no_rule_covers_is_routed(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    // With a route the client reaches the server by its own address, as before portfwd came.
    scene
        .lab
        .client
        .ip("route add 10.2.0.0/24 via 10.1.0.1\nroute add 2001:db8:2::/64 via 2001:db8:1::1\n")?;
    for family in Family::BOTH {
        let _tcp = tcp::Echo::start(&scene.lab.server, family, 7)?;
        let _udp = udp::Echo::start(&scene.lab.server, family, 7)?;
        let server = SERVER.endpoint(family, 7);
        tcp::exchange(&mut tcp::connect(&scene.lab.client, server)?, b"routed")?;
        udp::exchange(&udp::connect(&scene.lab.client, server)?, b"routed")?;
    }
    let flows = scene.daemon.flows()?;
    assert!(flows.is_empty(), "{flows:?}");
    scene.expect_no_errors()
}

#[rstest]
#[case::native_xdp(Mode::Xdp)]
#[case::generic_xdp(Mode::XdpGeneric)]
fn another_owners_xdp_program_is_not_replaced(#[case] mode: Mode) -> Result<()> {
    let lab = Lab::for_mode(mode)?;
    let _foreign = ForeignXdp::attach(lab.wan_end())?;
    let before = attached_id(lab.wan_end())?;
    let error = DaemonOptions::new(mode)
        .start(&lab.gateway)
        .err()
        .context("portfwd started")?;
    let message = format!("{error:#}");
    assert!(message.contains("wan0"), "{message}");
    assert_eq!(attached_id(lab.wan_end())?, before);
    // Nothing half applied: the other interface is as it was, too.
    assert_eq!(attached_id(lab.lan_end())?, None);
    Ok(())
}

/// There is nothing to talk to: no NAT-PMP, PCP, UPnP or any other server, on any interface.
#[test]
fn the_daemon_listens_to_no_network() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "both")?;
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"] {
        let sockets = scene.lab.gateway.run(|| {
            // `/proc/net` is that of the process; a thread that changed namespace has its own.
            std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))
        })??;
        let open: Vec<_> = sockets.lines().skip(1).collect();
        assert!(open.is_empty(), "{table}: {open:?}");
    }
    // SSDP, NAT-PMP, PCP, SOAP: nobody is there, which the kernel says, and no flow begins.
    for port in [1_900, 5_350, 5_351, 5_000] {
        for family in Family::BOTH {
            let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(family, port))?;
            socket.send(b"M-SEARCH * HTTP/1.1\r\n")?;
            let error = udp::reported_error(&socket)?;
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    }
    let flows = scene.daemon.flows()?;
    assert!(flows.is_empty(), "{flows:?}");
    Ok(())
}
