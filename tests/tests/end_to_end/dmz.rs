//! A DMZ host: it gets what is nobody else's, and nobody else loses anything by it.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::nginx::Nginx;
use portfwd_tests::ping::{Answer, Ping};
use portfwd_tests::{Family, LabOptions, Namespace, curl, nftables, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// TTL of an answer of the host, which the gateway has taken one off, and of the gateway's own.
const FORWARDED: u8 = 63;
const OWN: u8 = 64;
/// A port that no test serves elsewhere.
const PORT: u16 = 4_321;

/// Rules for everything else.
fn forward(scene: &Scene, options: &[&str]) -> Result<()> {
    for family in Family::BOTH {
        let target = scene.lab.server_address().of(family).to_string();
        let arguments = ["add", "dmz", "rest", &target, "--name", rule_name(family)];
        scene.daemon.ok(&[&arguments, options].concat())?;
    }
    Ok(())
}

/// The kernel hides the LANs behind the gateway's address, as it does on every gateway.
const MASQUERADE: &str = "table inet kernel {
 chain postrouting { type nat hook postrouting priority srcnat; oifname wan0 masquerade; }
}
";

/// A lab with a second LAN, whose server is a client of the masquerade here; the kernel hides both LANs.
fn two_lans(mode: Mode) -> Result<Scene> {
    let options = DaemonOptions {
        lan: vec!["lan0".into(), "lan1".into()],
        ..DaemonOptions::new(mode)
    };
    let lab = LabOptions::for_mode(mode).server_side(ServerSide::TwoLans);
    let scene = Scene::with(lab, options)?;
    nftables::load(&scene.lab.gateway, MASQUERADE)?;
    Ok(scene)
}

fn dialled(family: Family, port: u16) -> SocketAddr {
    GATEWAY_WAN.endpoint(family, port)
}

/// Somebody answers on TCP and UDP.
fn expect_answers(from: &Namespace, endpoint: SocketAddr) -> Result<()> {
    let mut stream = tcp::connect(from, endpoint).with_context(|| format!("TCP to {endpoint}"))?;
    tcp::exchange(&mut stream, &vec![7; 50_000])?;
    let socket = udp::connect(from, endpoint)?;
    for _ in 0..3 {
        udp::exchange(&socket, b"hello").with_context(|| format!("UDP to {endpoint}"))?;
    }
    Ok(())
}

fn expect_ping(from: &Namespace, family: Family, hop_limit: u8) -> Result<()> {
    let ping = Ping::to(GATEWAY_WAN.of(family));
    let expected = Answer {
        from: ping.destination,
        hop_limit,
    };
    let answers = ping.from(from)?;
    ensure!(
        answers == vec![expected; ping.count as usize],
        "{answers:?}"
    );
    Ok(())
}

/// Services of a family on a port.
fn serve(namespace: &Namespace, family: Family, port: u16) -> Result<(tcp::Echo, udp::Echo)> {
    Ok((
        tcp::Echo::start(namespace, family, port)?,
        udp::Echo::start(namespace, family, port)?,
    ))
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn the_host_gets_everything_while_there_is_a_rule(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    forward(&scene, &[])?;
    for family in Family::BOTH {
        // Among them one that the gateway's own connections may use.
        for port in [1, 22, PORT, 40_000, u16::MAX] {
            let _services = serve(&scene.lab.server, family, port)?;
            expect_answers(&scene.lab.client, dialled(family, port))?;
        }
        expect_ping(&scene.lab.client, family, FORWARDED)?;
        let rule = scene.daemon.rule(rule_name(family))?;
        assert!(rule.to_target.packets > 5 * (10 + 3), "{rule:?}");
        assert!(rule.to_client.packets > 5 * (10 + 3), "{rule:?}");
        // Nobody serves it: the host says so, not the gateway.
        let refused = tcp::connect(&scene.lab.client, dialled(family, 4)).unwrap_err();
        let refused = refused
            .downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind);
        assert_eq!(refused, Some(ErrorKind::ConnectionRefused));
    }
    for family in Family::BOTH {
        let _services = serve(&scene.lab.server, family, PORT)?;
        let socket = udp::connect(&scene.lab.client, dialled(family, PORT))?;
        udp::exchange(&socket, b"still there")?;
        scene.daemon.ok(&["remove", rule_name(family)])?;
        socket.send(b"no longer")?;
        let error = udp::reported_error(&socket)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert!(tcp::connect(&scene.lab.client, dialled(family, PORT)).is_err());
        expect_ping(&scene.lab.client, family, OWN)?;
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn services_of_the_gateway_keep_their_ports(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    forward(&scene, &[])?;
    let content = curl::varied_content(1 << 20);
    let nginx = Nginx::start(&scene.lab.gateway, TARGET, &[("page", &content)])?;
    for family in Family::BOTH {
        let own = udp::Echo::start(&scene.lab.gateway, family, 53)?;
        let (other_tcp, other_udp) = serve(&scene.lab.server, family, 53)?;
        let _web = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let url = curl::url(dialled(family, TARGET), "page");
        let fetched = curl::fetch_sha256(&scene.lab.client, &url, PATIENCE)?;
        assert_eq!(fetched, curl::sha256(&content)?);
        let socket = udp::connect(&scene.lab.client, dialled(family, 53))?;
        udp::exchange(&socket, b"who are you?")?;
        assert_eq!(own.peers().len(), 1);
        assert!(other_udp.peers().is_empty());
        // Of TCP nobody has this port but the host.
        let mut stream = tcp::connect(&scene.lab.client, dialled(family, 53))?;
        tcp::exchange(&mut stream, b"zone transfer")?;
        assert_eq!(other_tcp.peers().len(), 1);
        assert!(scene.daemon.passes()?.contains_key("own_socket"));
    }
    drop(nginx);
    scene.expect_no_errors()
}

/// What the gateway does on its own account, before the rule and after: DNS, updates.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_gateway_hears_its_own_answers(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let mut before = Vec::new();
    for family in Family::BOTH {
        let services = serve(&scene.lab.client, family, PORT)?;
        let endpoint = CLIENT.endpoint(family, PORT);
        let mut stream = tcp::connect(&scene.lab.gateway, endpoint)?;
        tcp::exchange(&mut stream, b"before")?;
        let socket = udp::connect(&scene.lab.gateway, endpoint)?;
        udp::exchange(&socket, b"before")?;
        before.push((services, stream, socket));
    }
    forward(&scene, &[])?;
    for (_, stream, socket) in &mut before {
        tcp::exchange(stream, &vec![7; 100_000])?;
        udp::exchange(socket, b"after")?;
    }
    for family in Family::BOTH {
        expect_answers(&scene.lab.gateway, CLIENT.endpoint(family, PORT))?;
        let ping = Ping::to(CLIENT.of(family));
        let answers = ping.from(&scene.lab.gateway)?;
        ensure!(answers.len() == ping.count as usize, "{answers:?}");
    }
    scene.expect_no_errors()
}

/// A datagram of the peer's own accord: whoever is meant gets it.
fn speak_up(peer: &UdpSocket, to: SocketAddr, listener: &UdpSocket) -> Result<()> {
    peer.send_to(b"news", to)?;
    let mut buffer = [0; 16];
    let (length, _) = udp::receive(listener, &mut buffer).context("news did not arrive")?;
    ensure!(&buffer[..length] == b"news");
    Ok(())
}

/// Who is masqueraded by the kernel notices nothing: neither what was under way, of which portfwd has seen no packet leave, nor
/// what begins later.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn machines_behind_the_kernels_masquerade_hear_their_answers(#[case] mode: Mode) -> Result<()> {
    let scene = two_lans(mode)?;
    let lan = [scene.lab.second_server()?, &scene.lab.server];
    let mut before = Vec::new();
    for family in Family::BOTH {
        for machine in lan {
            let peer = udp::bind(&scene.lab.client, CLIENT.endpoint(family, 0))?;
            peer.set_read_timeout(Some(here(PATIENCE)))?;
            let socket = udp::connect(machine, peer.local_addr()?)?;
            socket.send(b"subscribe")?;
            let (_, hidden) = udp::receive(&peer, &mut [0; 16])?;
            assert_eq!(hidden.ip(), GATEWAY_WAN.of(family));
            before.push((peer, socket, hidden));
        }
    }
    let services = Family::BOTH.map(|family| serve(&scene.lab.client, family, PORT));
    let mut streams = Vec::new();
    for family in Family::BOTH {
        for machine in lan {
            let mut stream = tcp::connect(machine, CLIENT.endpoint(family, PORT))?;
            tcp::exchange(&mut stream, b"before")?;
            streams.push(stream);
        }
    }
    forward(&scene, &[])?;
    for (peer, socket, hidden) in &before {
        speak_up(peer, *hidden, socket)?;
    }
    for stream in &mut streams {
        tcp::exchange(stream, &vec![7; 100_000])?;
    }
    for family in Family::BOTH {
        for machine in lan {
            expect_answers(machine, CLIENT.endpoint(family, PORT))?;
            let peer = udp::bind(&scene.lab.client, CLIENT.endpoint(family, 0))?;
            peer.set_read_timeout(Some(here(PATIENCE)))?;
            let socket = udp::connect(machine, peer.local_addr()?)?;
            socket.send(b"subscribe")?;
            let (_, hidden) = udp::receive(&peer, &mut [0; 16])?;
            speak_up(&peer, hidden, &socket)?;
        }
    }
    // And the host is the host all the while.
    for family in Family::BOTH {
        let _services = serve(&scene.lab.server, family, PORT)?;
        expect_answers(&scene.lab.client, dialled(family, PORT))?;
        // From the LAN too, by the address that the world knows.
        expect_answers(scene.lab.second_server()?, dialled(family, PORT))?;
    }
    assert!(scene.daemon.passes()?.contains_key("answer"));
    drop(services);
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn other_rules_go_first_and_exceptions_are_the_gateways(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    // On the very address: a range without one goes before it all the same.
    for family in Family::BOTH {
        let server = scene.lab.server_address();
        let listen = match GATEWAY_WAN.of(family) {
            std::net::IpAddr::V4(v4) => format!("{v4}:rest"),
            std::net::IpAddr::V6(v6) => format!("[{v6}]:rest"),
        };
        let target = server.of(family).to_string();
        let options = [
            "--except",
            "tcp/22",
            "--except",
            "udp/500-600",
            "--except",
            "icmp",
        ];
        let rule = ["dmz", &listen, &target];
        scene
            .daemon
            .add_with(&format!("dmz-{}", rule_name(family)), rule, &options)?;
        let range = server.endpoint(family, 9_000).to_string() + "-9009";
        scene.daemon.ok(&["add", "both", "7000-7009", &range])?;
    }
    scene.forward("tcp")?;
    for family in Family::BOTH {
        let _behind_rules = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut stream, b"a rule of its own")?;
        let _shifted = serve(&scene.lab.server, family, 9_003)?;
        expect_answers(&scene.lab.client, dialled(family, 7_003))?;
        let _rest = serve(&scene.lab.server, family, 7_010)?;
        expect_answers(&scene.lab.client, dialled(family, 7_010))?;
        let excepted = serve(&scene.lab.server, family, 22)?;
        assert!(tcp::connect(&scene.lab.client, dialled(family, 22)).is_err());
        let other = udp::Echo::start(&scene.lab.server, family, 555)?;
        let socket = udp::connect(&scene.lab.client, dialled(family, 555))?;
        socket.send(b"not for the host")?;
        let error = udp::reported_error(&socket)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert!(excepted.0.peers().is_empty() && other.peers().is_empty());
        expect_ping(&scene.lab.client, family, OWN)?;
    }
    scene.expect_no_errors()
}

/// Its rule is in the state file, and in the maps while there is no daemon.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn it_goes_on_without_the_daemon_and_with_the_next(#[case] mode: Mode) -> Result<()> {
    let mut scene = two_lans(mode)?;
    forward(&scene, &["--except", "tcp/22"])?;
    let services = Family::BOTH.map(|family| serve(&scene.lab.server, family, PORT));
    let mut streams = Vec::new();
    for family in Family::BOTH {
        let mut stream = tcp::connect(&scene.lab.client, dialled(family, PORT))?;
        tcp::exchange(&mut stream, b"before")?;
        streams.push(stream);
    }
    scene.daemon.kill9()?;
    let without = |scene: &Scene| -> Result<()> {
        for family in Family::BOTH {
            expect_answers(&scene.lab.client, dialled(family, PORT))?;
            let _elsewhere = serve(&scene.lab.client, family, PORT)?;
            expect_answers(scene.lab.second_server()?, CLIENT.endpoint(family, PORT))?;
        }
        Ok(())
    };
    without(&scene)?;
    scene.daemon.start()?;
    without(&scene)?;
    for stream in &mut streams {
        tcp::exchange(stream, b"after")?;
    }
    for family in Family::BOTH {
        let words = scene.daemon.json(&["rules"])?;
        ensure!(
            words[0]["except"] == serde_json::json!(["tcp/22"]),
            "{words}"
        );
        let target = scene.lab.server_address().of(family).to_string();
        let again = scene.daemon.cli(&["add", "dmz", "rest", &target])?;
        assert!(!again.status.success());
        let message = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(message.contains("listens on dmz rest already"), "{message}");
        let gateway = tcp::connect(&scene.lab.client, dialled(family, 22));
        assert!(gateway.is_err());
    }
    drop(services);
    scene.expect_no_errors()
}

/// What operators ask says whose a packet is, and the gateway's own services and ports are no fault of such a rule.
#[test]
fn explain_and_doctor_know_who_goes_first() -> Result<()> {
    let scene = Scene::new(Mode::Tc)?;
    forward(&scene, &["--except", "tcp/22"])?;
    let _own = tcp::Echo::start(&scene.lab.gateway, Family::V4, 81)?;
    let explain = |port: u16| {
        let listen = dialled(Family::V4, port).to_string();
        scene.daemon.ok(&["explain", "tcp", "10.1.0.2", &listen])
    };
    let text = explain(PORT)?;
    for line in [
        "rule    1 (over-ipv4): dmz rest -> 10.2.0.2:rest",
        "there   forwarded: 10.1.0.2:40000 -> 10.2.0.2:4321",
        "back    forwarded: 10.1.0.1:4321 -> 10.1.0.2:40000",
    ] {
        ensure!(
            text.lines().any(|of| of.starts_with(line)),
            "{line:?} is not in:\n{text}"
        );
    }
    for (port, word) in [
        (81, "a socket of the gateway"),
        (22, "no rule listens there"),
    ] {
        let listen = dialled(Family::V4, port).to_string();
        let output = scene.daemon.cli(&["explain", "tcp", "10.1.0.2", &listen])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.contains(word), "{word:?} is not in:\n{text}");
    }
    let doctor = scene.daemon.cli(&["doctor"])?;
    let text = String::from_utf8_lossy(&doctor.stdout).into_owned();
    for finding in ["own-connections", "local-service"] {
        ensure!(!text.contains(finding), "{text}");
    }
    Ok(())
}
