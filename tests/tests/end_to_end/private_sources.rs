//! Nothing leaves by the WAN with an address of the LAN: what a target of rules sends is translated, asked or not.

use std::net::{TcpListener, TcpStream};

use anyhow::{Context, Result};
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::capture::Capture;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::{Family, socket, tcp, udp};
use rstest::rstest;
use socket2::Type;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// The client's port that the server speaks to.
const PEER: u16 = 45_000;
/// What a capture at the client must not have.
pub const PRIVATE: &str = "src net 10.2.0.0/16 or src net 2001:db8:2::/48";

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_server_that_speaks_first_is_heard_from_its_listen_endpoint(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let capture = Capture::start(scene.lab.client_end(), PRIVATE)?;
    for family in Family::BOTH {
        let (peer, own) = (
            CLIENT.endpoint(family, PEER),
            SERVER.endpoint(family, TARGET),
        );
        let client = udp::bind(&scene.lab.client, peer)?;
        let server = udp::bind(&scene.lab.server, own)?;
        for socket in [&client, &server] {
            socket.set_read_timeout(Some(PATIENCE))?;
        }
        let mut buffer = [0; 32];
        for _ in 0..3 {
            server.send_to(b"are you there?", peer)?;
            let (_, from) = udp::receive(&client, &mut buffer)?;
            assert_eq!(from, listen(family));
            client.send_to(b"yes", from)?;
            let (length, from) = udp::receive(&server, &mut buffer)?;
            assert_eq!((&buffer[..length], from), (&b"yes"[..], peer));
        }
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!((rule.to_target.packets, rule.to_client.packets), (3, 3));
        assert_eq!(rule.flows, 1);
    }
    let seen = capture.stop()?.select("", &["frame.number"])?;
    assert!(
        seen.is_empty(),
        "{} frames with an address of the LAN",
        seen.len()
    );
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_connection_from_a_forwarded_port_comes_from_the_listen_endpoint(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    let capture = Capture::start(scene.lab.client_end(), PRIVATE)?;
    for family in Family::BOTH {
        let peer = CLIENT.endpoint(family, PEER);
        let dialled = socket::bind(&scene.lab.client, Type::STREAM, peer)?;
        dialled.listen(1)?;
        let dialled: TcpListener = dialled.into();
        let server = socket::bind(
            &scene.lab.server,
            Type::STREAM,
            SERVER.endpoint(family, TARGET),
        )?;
        server
            .connect_timeout(&peer.into(), PATIENCE)
            .with_context(|| format!("the server connects to {peer}"))?;
        let mut server: TcpStream = server.into();
        server.set_read_timeout(Some(PATIENCE))?;
        let (stream, from) = dialled.accept()?;
        assert_eq!(from, listen(family));
        assert_eq!(from.port(), LISTEN);
        let echo = std::thread::spawn(move || tcp::echo(stream));
        tcp::exchange(&mut server, &[0xa5; 40_000])?;
        drop(server);
        echo.join().expect("the echo does not panic")?;
    }
    let seen = capture.stop()?.select("", &["frame.number"])?;
    assert!(
        seen.is_empty(),
        "{} frames with an address of the LAN",
        seen.len()
    );
    Ok(())
}
