//! Frames as they leave the gateway, judged by tshark.

use anyhow::{Context, Result};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN};
use portfwd_tests::capture::Capture;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::traceroute::{self, Probe};
use portfwd_tests::{Family, LabOptions, Offloads, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// A port behind the forward on which nobody serves.
const CLOSED: u16 = 8088;

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn every_checksum_is_right_on_both_sides_of_the_gateway(#[case] mode: Mode) -> Result<()> {
    // Without offloads every frame is finished, and what is wrong in a capture is wrong.
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("both")?;
    let [client, server] = [scene.lab.client_end(), scene.lab.server_end()].map(Capture::start);
    let (client, server) = (client?, server?);
    for family in Family::BOTH {
        converse(&scene, family)?;
        provoke_errors(&scene, family)?;
    }
    for (side, capture) in [("client", client), ("server", server)] {
        let frames = capture.stop().with_context(|| format!("at the {side}"))?;
        for filter in [
            "ip && tcp && !icmp",
            "ipv6 && tcp && !icmpv6",
            "ip && udp && !icmp",
            "ipv6 && udp && !icmpv6",
            "icmp.type == 3",
            "icmpv6.type == 1",
        ] {
            frames
                .expect(filter)
                .with_context(|| format!("{filter} at the {side}"))?;
        }
    }
    scene.expect_no_errors()
}

/// A message at a time each way, so that GRO has nothing to merge: every frame is as it was sent.
fn converse(scene: &Scene, family: Family) -> Result<()> {
    let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
    let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
    let socket = udp::connect(&scene.lab.client, listen(family))?;
    for size in 1..100_usize {
        let message: Vec<u8> = (0..size).map(|n| (n * size) as u8).collect();
        tcp::exchange(&mut stream, &message)?;
        udp::exchange(&socket, &message)?;
    }
    Ok(())
}

/// An error about a packet to the server, and one about a packet to the client.
fn provoke_errors(scene: &Scene, family: Family) -> Result<()> {
    let target = scene.lab.server_address().endpoint(family, CLOSED);
    let name = format!("closed-{}", rule_name(family));
    scene
        .daemon
        .add(&name, "udp", &CLOSED.to_string(), &target.to_string())?;
    let closed = GATEWAY_WAN.endpoint(family, CLOSED);
    let socket = udp::connect(&scene.lab.client, closed)?;
    socket.send(b"anybody there?")?;
    udp::reported_error(&socket)?;
    traceroute::trace(&scene.lab.client, closed, Probe::Udp)?;

    let server = udp::bind(&scene.lab.server, target)?;
    server.set_read_timeout(Some(here(PATIENCE)))?;
    let client = udp::connect(&scene.lab.client, closed)?;
    client.send(b"a question, and gone")?;
    let (_, peer) = udp::receive(&server, &mut [0; 32])?;
    udp::close(&scene.lab.client, client)?;
    server.connect(peer)?;
    server.send(b"an answer")?;
    udp::reported_error(&server)?;
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_client_never_sees_an_address_of_the_lan(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let capture = Capture::start(scene.lab.client_end())?;
    for family in Family::BOTH {
        converse(&scene, family)?;
        provoke_errors(&scene, family)?;
        traceroute::trace(&scene.lab.client, listen(family), Probe::Tcp)?;
    }
    let frames = capture.stop_with(LabOptions::for_mode(mode).offloads)?;
    // Fields of quoted packets count too: `ip.addr` is any address in the frame.
    let private = frames.select(
        "ip.addr == 10.2.0.0/16 || ipv6.addr == 2001:db8:2::/48",
        &["frame.number", "_ws.col.Info"],
    )?;
    assert!(private.is_empty(), "{private:#?}");
    let all = frames.select(&format!("ip.addr == {}", CLIENT.v4), &["frame.number"])?;
    assert!(all.len() > 400, "{} frames", all.len());
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_hop_limit_is_one_less_and_nothing_else_of_the_header_differs(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let [before, after] = [scene.lab.client_end(), scene.lab.server_end()].map(Capture::start);
    let (before, after) = (before?, after?);
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    socket.set_ttl(37)?;
    udp::exchange(&socket, b"look at me")?;
    let fields = [
        "ip.ttl",
        "ip.dsfield",
        "ip.id",
        "ip.flags",
        "ip.len",
        "data.data",
    ];
    let offloads = LabOptions::for_mode(mode).offloads;
    let sent = before
        .stop_with(offloads)?
        .select(&format!("udp.dstport == {}", 8080), &fields)?;
    let arrived = after
        .stop_with(offloads)?
        .select(&format!("udp.dstport == {TARGET}"), &fields)?;
    assert_eq!((sent.len(), arrived.len()), (1, 1));
    let rest = sent[0].strip_prefix("37\t").context("TTL as sent")?;
    assert_eq!(arrived[0].strip_prefix("36\t"), Some(rest));
    Ok(())
}
