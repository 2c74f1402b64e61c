//! Nothing leaves by the WAN with an address of the LAN: what a target of rules sends is translated, asked or not.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use portfwd::bpf::Tables;
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::capture::{Capture, Frames};
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::{Family, LabOptions, socket, tcp, udp};
use rstest::rstest;
use socket2::Type;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// The client's port that the server speaks to.
const PEER: u16 = 45_000;

/// Fails when a capture at the client has a frame with an address of the LAN as its source, or as that of a packet that it quotes.
pub fn expect_no_private_source(frames: &Frames) -> Result<()> {
    let private = "ip.src == 10.2.0.0/16 || ipv6.src == 2001:db8:2::/48";
    let seen = frames.select(private, &["frame.number", "_ws.col.Info"])?;
    ensure!(
        seen.is_empty(),
        "frames with an address of the LAN:\n{}",
        seen.join("\n")
    );
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_server_that_speaks_first_is_heard_from_its_listen_endpoint(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let capture = Capture::start(scene.lab.client_end())?;
    for family in Family::BOTH {
        let (peer, own) = (
            CLIENT.endpoint(family, PEER),
            SERVER.endpoint(family, TARGET),
        );
        let client = udp::bind(&scene.lab.client, peer)?;
        let server = udp::bind(&scene.lab.server, own)?;
        for socket in [&client, &server] {
            socket.set_read_timeout(Some(here(PATIENCE)))?;
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
    expect_no_private_source(&capture.stop_with(LabOptions::for_mode(mode).offloads)?)?;
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_connection_from_a_forwarded_port_comes_from_the_listen_endpoint(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    let capture = Capture::start(scene.lab.client_end())?;
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
        server.set_read_timeout(Some(here(PATIENCE)))?;
        let (stream, from) = dialled.accept()?;
        assert_eq!(from, listen(family));
        assert_eq!(from.port(), LISTEN);
        let echo = std::thread::spawn(move || tcp::echo(stream));
        tcp::exchange(&mut server, &[0xa5; 40_000])?;
        drop(server);
        echo.join().expect("the echo does not panic")?;
    }
    expect_no_private_source(&capture.stop_with(LabOptions::for_mode(mode).offloads)?)?;
    Ok(())
}

/// Seen before late halves were kept: the data that a server sent again and again after its rule was gone left with its own address.
#[rstest]
#[case::over_native_xdp(Mode::Xdp, Ended::ByThePacket)]
#[case::over_generic_xdp(Mode::XdpGeneric, Ended::ByThePacket)]
#[case::over_tc(Mode::Tc, Ended::ByThePacket)]
#[case::that_a_sweep_has_ended(Mode::Tc, Ended::BySweep)]
fn what_a_server_sends_on_a_flow_of_a_removed_rule_goes_nowhere(
    #[case] mode: Mode,
    #[case] ended: Ended,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let capture = Capture::start(scene.lab.client_end())?;
    let mut conversations = Vec::new();
    for family in Family::BOTH {
        let own = SERVER.endpoint(family, TARGET);
        let listener = socket::bind(&scene.lab.server, Type::STREAM, own)?;
        listener.listen(1)?;
        let listener: TcpListener = listener.into();
        let mut client = tcp::connect(&scene.lab.client, listen(family))?;
        let (mut served, _) = listener.accept()?;
        client.write_all(b"hello")?;
        served.read_exact(&mut [0; 5])?;

        let server = udp::bind(&scene.lab.server, own)?;
        let asking = udp::connect(&scene.lab.client, listen(family))?;
        asking.send(b"hello")?;
        server.set_read_timeout(Some(here(PATIENCE)))?;
        let (_, from) = udp::receive(&server, &mut [0; 32])?;
        server.send_to(b"hello", from)?;
        udp::receive(&asking, &mut [0; 32])?;
        conversations.push((family, (client, served), (asking, server, from)));
    }
    let tables = Tables::open_pinned(&scene.daemon.pins())?;
    assert_eq!(tables.flow_entries()?, 4);
    for family in Family::BOTH {
        scene.daemon.ok(&["remove", rule_name(family)])?;
    }
    match ended {
        Ended::ByThePacket => {}
        Ended::BySweep => wait_until("the flows to end", 3 * PATIENCE, || {
            Ok(tables.flow_entries()? == 0)
        })?,
    }
    for (_, (_, served), (_, server, client)) in &mut conversations {
        served.write_all(b"you do not hear this")?;
        for _ in 0..3 {
            server.send_to(b"nor this", *client)?;
        }
    }
    // The connections' data is sent again, and again.
    wait_until("what is late to be dropped", PATIENCE, || {
        let drops = scene.daemon.drops()?;
        Ok(drops
            .get("private_source")
            .is_some_and(|dropped| *dropped >= 6 + 6))
    })?;
    expect_no_private_source(&capture.stop_with(LabOptions::for_mode(mode).offloads)?)?;
    // With the rules the conversations go on.
    scene.forward("both")?;
    for (family, (client, _), (asking, ..)) in &mut conversations {
        client.set_read_timeout(Some(here(PATIENCE)))?;
        let mut heard = [0; 20];
        client
            .read_exact(&mut heard)
            .with_context(|| format!("{family}: the connection does not go on"))?;
        assert_eq!(&heard, b"you do not hear this");
        asking.send(b"again")?;
    }
    for (_, _, (_, server, client)) in &conversations {
        let (_, from) = udp::receive(server, &mut [0; 32])?;
        assert_eq!(from, *client);
    }
    Ok(())
}

/// What has ended a flow.
#[derive(Clone, Copy, Debug)]
enum Ended {
    ByThePacket,
    BySweep,
}
