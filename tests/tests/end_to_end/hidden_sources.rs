//! Masquerade, SNAT and hairpin: the server takes the gateway for its client.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{
    CLIENT, DualStack, GATEWAY_LAN, GATEWAY_SECOND_LAN, GATEWAY_WAN, SECOND_SERVER, SERVER,
};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::nginx::Nginx;
use portfwd_tests::process::allow_descriptors;
use portfwd_tests::{Family, LabOptions, Namespace, curl, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// Where clients masquerade to: a port outside of what the gateway's own connections use.
const CLIENT_PORT: u16 = 20_000;

/// A lab with a second LAN, whose server is a client here.
fn two_lans(mode: Mode) -> Result<Scene> {
    let options = DaemonOptions {
        lan: vec!["lan0".into(), "lan1".into()],
        ..DaemonOptions::new(mode)
    };
    let lab = LabOptions::for_mode(mode).server_side(ServerSide::TwoLans);
    Scene::with(lab, options)
}

/// A socket with a port of its own choice, connected.
fn dial_from(namespace: &Namespace, from: SocketAddr, endpoint: SocketAddr) -> Result<UdpSocket> {
    let socket = udp::bind(namespace, from)?;
    socket.set_read_timeout(Some(here(PATIENCE)))?;
    socket.connect(endpoint)?;
    Ok(socket)
}

/// What the server took for its clients since it was started.
fn seen(echo: &udp::Echo) -> BTreeSet<SocketAddr> {
    echo.peers()
}

/// RFC 4787 REQ-9: from another LAN, and from the server itself, whose own packets come back to it from the gateway.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_lan_reaches_a_forward_by_the_wan_address(#[case] mode: Mode) -> Result<()> {
    let scene = two_lans(mode)?;
    scene.forward("both")?;
    for family in Family::BOTH {
        let clients = [scene.lab.second_server()?, &scene.lab.server];
        // A port that stood for one of them is not the other's at once.
        for (client, port) in clients.into_iter().zip(CLIENT_PORT..) {
            let (udp_echo, tcp_echo) = (
                udp::Echo::start(&scene.lab.server, family, TARGET)?,
                tcp::Echo::start(&scene.lab.server, family, TARGET)?,
            );
            let from = SocketAddr::new(family.unspecified(), port);
            let socket = dial_from(client, from, listen(family))?;
            for _ in 0..3 {
                udp::exchange(&socket, b"round the corner")?;
            }
            let expected = GATEWAY_WAN.endpoint(family, port);
            assert_eq!(seen(&udp_echo), BTreeSet::from([expected]));
            let mut stream = tcp::connect(client, listen(family))?;
            tcp::exchange(&mut stream, &vec![7; 100_000])?;
            let peers = tcp_echo.peers();
            assert_eq!(peers.len(), 1);
            assert_eq!(peers[0].ip(), GATEWAY_WAN.of(family));
            let flows = scene.daemon.flows()?;
            let shown: BTreeSet<_> = flows.iter().map(|flow| flow.source.as_str()).collect();
            assert!(shown.contains(expected.to_string().as_str()), "{shown:?}");
            drop(stream);
            udp::close(client, socket)?;
        }
    }
    scene.expect_no_errors()
}

/// As somebody on the LAN would see it, with a page of some size.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_page_is_fetched_by_the_wan_address_from_everywhere(#[case] mode: Mode) -> Result<()> {
    let scene = two_lans(mode)?;
    scene.forward("tcp")?;
    let content = curl::varied_content(3 << 20);
    let _nginx = Nginx::start(&scene.lab.server, TARGET, &[("page", &content)])?;
    let expected = curl::sha256(&content)?;
    for family in Family::BOTH {
        for client in [
            &scene.lab.client,
            scene.lab.second_server()?,
            &scene.lab.server,
        ] {
            let url = curl::url(listen(family), "page");
            assert_eq!(curl::fetch_sha256(client, &url, PATIENCE)?, expected);
        }
    }
    scene.expect_no_errors()
}

/// What no rule listens on is the gateway's own, also by its WAN address.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_gateways_own_services_are_the_lans_too(#[case] mode: Mode) -> Result<()> {
    let scene = two_lans(mode)?;
    scene.forward("tcp")?;
    for family in Family::BOTH {
        let _own = udp::Echo::start_on(&scene.lab.gateway, listen(family))?;
        let _ssh = tcp::Echo::start(&scene.lab.gateway, family, 22)?;
        let client = scene.lab.second_server()?;
        // The rule is for TCP.
        udp::exchange(&udp::connect(client, listen(family))?, b"own")?;
        for own in [GATEWAY_WAN, GATEWAY_LAN, GATEWAY_SECOND_LAN] {
            let mut stream = tcp::connect(client, own.endpoint(family, 22))?;
            tcp::exchange(&mut stream, b"own")?;
        }
    }
    Ok(())
}

/// Adds the rules of both families with options, which may name the gateway's LAN address.
fn forward_with(scene: &Scene, options: impl Fn(Family) -> Vec<String>) -> Result<()> {
    for family in Family::BOTH {
        let options = options(family);
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let target = SERVER.endpoint(family, TARGET).to_string();
        let rule = ["both", &LISTEN.to_string(), &target];
        scene.daemon.add_with(rule_name(family), rule, &options)?;
    }
    Ok(())
}

fn masquerade(_family: Family) -> Vec<String> {
    vec!["--masquerade".into()]
}

/// NAT-24: the server knows no way to the client.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_masqueraded_forward_needs_no_route_back(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let DualStack { v4, v6 } = GATEWAY_LAN;
    scene.lab.server.ip(&format!(
        "route del default via {v4}\nroute del default via {v6}\n"
    ))?;
    forward_with(&scene, masquerade)?;
    for family in Family::BOTH {
        let (udp_echo, tcp_echo) = (
            udp::Echo::start(&scene.lab.server, family, TARGET)?,
            tcp::Echo::start(&scene.lab.server, family, TARGET)?,
        );
        let from = CLIENT.endpoint(family, CLIENT_PORT);
        let socket = dial_from(&scene.lab.client, from, listen(family))?;
        for _ in 0..3 {
            udp::exchange(&socket, b"answer me here")?;
        }
        let expected = GATEWAY_LAN.endpoint(family, CLIENT_PORT);
        assert_eq!(seen(&udp_echo), BTreeSet::from([expected]));
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut stream, &vec![7; 300_000])?;
        assert_eq!(tcp_echo.peers()[0].ip(), GATEWAY_LAN.of(family));
    }
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    assert_eq!(rule.source.as_deref(), Some("masquerade"));
    scene.expect_no_errors()
}

/// RFC 4787 REQ-3, NAT-35: one of the two keeps its port, the other gets another, and each hears its own answers.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn two_clients_with_one_source_port_are_two_to_the_server(#[case] mode: Mode) -> Result<()> {
    const SECOND_CLIENT: DualStack = DualStack::new(1, 3);
    let scene = Scene::new(mode)?;
    let DualStack { v4, v6 } = SECOND_CLIENT;
    scene.lab.client.ip(&format!(
        "addr add {v4}/24 dev c0\naddr add {v6}/64 dev c0 nodad\n"
    ))?;
    forward_with(&scene, masquerade)?;
    for family in Family::BOTH {
        let echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let sockets = [CLIENT, SECOND_CLIENT].map(|client| {
            let from = client.endpoint(family, CLIENT_PORT);
            dial_from(&scene.lab.client, from, listen(family))
        });
        for round in 0..3 {
            for (number, socket) in sockets.iter().enumerate() {
                let socket = socket
                    .as_ref()
                    .map_err(|error| anyhow::anyhow!("{error:#}"))?;
                udp::exchange(socket, format!("client {number}, {round}").as_bytes())?;
            }
        }
        let peers = seen(&echo);
        assert_eq!(peers.len(), 2, "{peers:?}");
        assert!(peers.contains(&GATEWAY_LAN.endpoint(family, CLIENT_PORT)));
        assert!(peers.iter().all(|peer| peer.port().is_multiple_of(2)));
    }
    scene.expect_no_errors()
}

/// Each client hears what it said, and none of them shares a port.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn more_than_a_thousand_masqueraded_flows_are_kept_apart(#[case] mode: Mode) -> Result<()> {
    const FLOWS: usize = 1_200;
    allow_descriptors(2 * FLOWS as u64)?;
    let scene = Scene::new(mode)?;
    forward_with(&scene, masquerade)?;
    let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let mut sockets = Vec::new();
    for _ in 0..FLOWS {
        sockets.push(udp::connect(&scene.lab.client, listen(Family::V4))?);
    }
    for round in 0..2 {
        for (number, socket) in sockets.iter().enumerate() {
            udp::exchange(socket, format!("{number} of {FLOWS}, {round}").as_bytes())?;
        }
    }
    assert_eq!(seen(&echo).len(), FLOWS);
    assert_eq!(scene.daemon.flows()?.len(), FLOWS);
    scene.expect_no_errors()
}

/// RFC 6888 REQ-11: the new flow is refused and counted; nobody is evicted, also not by many who try.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_small_range_is_used_up_and_nobody_is_evicted(#[case] mode: Mode) -> Result<()> {
    const PORTS: usize = 20;
    let scene = Scene::new(mode)?;
    forward_with(&scene, |family| {
        let address = match GATEWAY_LAN.of(family) {
            std::net::IpAddr::V4(v4) => v4.to_string(),
            std::net::IpAddr::V6(v6) => format!("[{v6}]"),
        };
        vec!["--snat".into(), format!("{address}:20000-20019")]
    })?;
    for family in Family::BOTH {
        let echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut sockets = Vec::new();
        for _ in 0..PORTS {
            let socket = udp::connect(&scene.lab.client, listen(family))?;
            udp::exchange(&socket, b"mine")?;
            sockets.push(socket);
        }
        let before = scene.daemon.drops()?.get("no_port").copied().unwrap_or(0);
        for _ in 0..50 {
            udp::connect(&scene.lab.client, listen(family))?.send(b"too many")?;
        }
        let peers = seen(&echo);
        ensure!(
            peers
                .iter()
                .all(|peer| (20_000..20_020).contains(&peer.port())),
            "{peers:?}"
        );
        assert_eq!(peers.len(), PORTS);
        for socket in &sockets {
            udp::exchange(socket, b"still mine")?;
        }
        assert_eq!(seen(&echo), peers);
        let after = scene.daemon.drops()?.get("no_port").copied().unwrap_or(0);
        assert_eq!(after - before, 50);
    }
    Ok(())
}

/// ATK-07, NAT-20 (port shadowing): a client chooses the source port of one of the gateway's own services. It gets another, and
/// what comes for the service reaches the service.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn no_client_takes_a_port_of_the_gateways_own(#[case] mode: Mode) -> Result<()> {
    const OWN: u16 = 5_353;
    let lab = LabOptions::for_mode(mode).build()?;
    // Bound before the daemon starts, and known to it with the first look.
    let own = udp::bind(&lab.gateway, SocketAddr::new(Family::V4.unspecified(), OWN))?;
    let daemon = DaemonOptions::new(mode).start(&lab.gateway)?;
    let scene = Scene { daemon, lab };
    forward_with(&scene, masquerade)?;
    let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let ephemeral = 40_000;
    for port in [OWN, ephemeral] {
        let from = CLIENT.endpoint(Family::V4, port);
        let socket = dial_from(&scene.lab.client, from, listen(Family::V4))?;
        udp::exchange(&socket, b"shadow")?;
    }
    let ports: Vec<_> = seen(&echo).into_iter().map(|peer| peer.port()).collect();
    assert_eq!(ports.len(), 2);
    // What the kernel gives to connections of its own.
    let kept = |port: &u16| *port == OWN || (32_768..61_000).contains(port);
    assert!(!ports.iter().any(kept), "{ports:?}");
    // The server writes to the gateway's service, from the very port that clients are served at.
    own.set_read_timeout(Some(here(PATIENCE)))?;
    drop(echo);
    let server = udp::bind(&scene.lab.server, SERVER.endpoint(Family::V4, TARGET))?;
    server.send_to(b"for the gateway", GATEWAY_LAN.endpoint(Family::V4, OWN))?;
    let (length, peer) = udp::receive(&own, &mut [0; 64]).context("the gateway's own socket")?;
    assert_eq!((length, peer), (15, SERVER.endpoint(Family::V4, TARGET)));
    Ok(())
}

/// Seen by reading: until the daemon had looked, a client shared the port of a socket that the gateway had just bound.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn no_client_takes_a_port_that_the_gateway_has_just_bound(#[case] mode: Mode) -> Result<()> {
    const OWN: u16 = 5_454;
    let scene = Scene::new(mode)?;
    forward_with(&scene, masquerade)?;
    let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let any = SocketAddr::new(Family::V4.unspecified(), OWN);
    let _own = udp::bind(&scene.lab.gateway, any)?;
    let from = CLIENT.endpoint(Family::V4, OWN);
    let socket = dial_from(&scene.lab.client, from, listen(Family::V4))?;
    udp::exchange(&socket, b"shadow")?;
    let ports: Vec<_> = seen(&echo).into_iter().map(|peer| peer.port()).collect();
    assert_eq!(ports.len(), 1);
    assert_ne!(ports[0], OWN);
    Ok(())
}

/// The second server is a client by the WAN address, and the first answers with an error (RFC 5508 REQ-7).
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_refusal_comes_back_round_the_corner(#[case] mode: Mode) -> Result<()> {
    let scene = two_lans(mode)?;
    scene.forward("udp")?;
    for family in Family::BOTH {
        let client = scene.lab.second_server()?;
        let socket = udp::connect(client, listen(family))?;
        socket.send(b"nobody serves this")?;
        let error = udp::reported_error(&socket)?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        assert_ne!(SECOND_SERVER.of(family), GATEWAY_WAN.of(family));
    }
    Ok(())
}

/// Seen by reading: the ports of an address were made known beside the rule alone that needs them, not beside all rules.
#[test]
fn a_new_rules_address_keeps_the_ports_that_other_rules_listen_on_there() -> Result<()> {
    const OWN: u16 = 27_015;
    let scene = Scene::new(Mode::Tc)?;
    let daemon = &scene.daemon;
    daemon.ok(&["add", "udp", &format!("10.77.0.1:{OWN}"), "10.2.0.2"])?;
    daemon.add_with(
        "elsewhere",
        ["udp", "8080", "10.2.0.2:80"],
        &["--snat", "10.77.0.1"],
    )?;
    let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let from = CLIENT.endpoint(Family::V4, OWN);
    let socket = dial_from(&scene.lab.client, from, listen(Family::V4))?;
    udp::exchange(&socket, b"shadow")?;
    let ports: Vec<_> = seen(&echo).into_iter().map(|peer| peer.port()).collect();
    assert_eq!(ports.len(), 1);
    assert_ne!(ports[0], OWN);
    Ok(())
}

/// An address that is not the gateway's answers to clients if the server's way to it leads here.
#[test]
fn snat_needs_no_address_of_the_gateway() -> Result<()> {
    let scene = Scene::new(Mode::Tc)?;
    let rule = ["udp", "8080", "10.2.0.2:80"];
    scene
        .daemon
        .add_with("elsewhere", rule, &["--snat", "10.77.0.1"])?;
    let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let from = CLIENT.endpoint(Family::V4, CLIENT_PORT);
    let socket = dial_from(&scene.lab.client, from, listen(Family::V4))?;
    udp::exchange(&socket, b"by way of the gateway")?;
    let expected = SocketAddr::new("10.77.0.1".parse()?, CLIENT_PORT);
    assert_eq!(seen(&echo), BTreeSet::from([expected]));
    let rule = scene.daemon.rule("elsewhere")?;
    assert_eq!(rule.source.as_deref(), Some("snat 10.77.0.1"));
    Ok(())
}
