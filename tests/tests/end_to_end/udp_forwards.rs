//! UDP through a forward.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::{Mode, Traffic};
use portfwd_tests::link::End;
use portfwd_tests::{Family, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn datagrams_of_every_size_are_echoed_and_the_server_sees_the_client(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    for family in Family::BOTH {
        let echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        let largest = match family {
            Family::V4 => 1500 - 28,
            Family::V6 => 1500 - 48,
        };
        for size in [0, 1, 2, 3, 17, 18, 19, 64, 255, 1000, largest - 1, largest] {
            let message: Vec<u8> = (0..size).map(|n| n as u8).collect();
            udp::exchange(&socket, &message)?;
        }
        let seen: Vec<_> = echo.peers().iter().map(SocketAddr::ip).collect();
        assert_eq!(seen, [CLIENT.of(family)]);
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!((rule.to_target.packets, rule.to_client.packets), (12, 12));
        assert_eq!(rule.to_target, rule.to_client, "echoes are as long");
        assert_eq!(rule.flows, 1);
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_thousand_clients_have_a_flow_each(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let sockets: Vec<_> = (0..1000)
        .map(|_| udp::connect(&scene.lab.client, listen(Family::V4)))
        .collect::<Result<_>>()?;
    for (number, socket) in sockets.iter().enumerate() {
        udp::exchange(socket, &number.to_be_bytes())?;
    }
    assert_eq!(echo.peers().len(), 1000);
    assert_eq!(scene.daemon.rule(rule_name(Family::V4))?.flows, 1000);
    assert_eq!(scene.daemon.flows()?.len(), 1000);
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp, Family::V4)]
#[case::over_native_xdp_and_ipv6(Mode::Xdp, Family::V6)]
#[case::over_tc(Mode::Tc, Family::V4)]
fn a_million_datagrams_sent_are_a_million_counted(
    #[case] mode: Mode,
    #[case] family: Family,
) -> Result<()> {
    const COUNT: u64 = 1_000_000;
    const PAYLOAD: [u8; 18] = [0x55; 18];
    let scene = Scene::forwarding(mode, "udp")?;
    let _sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(family))?;
    let client = scene.lab.client_end();
    client.queue_instead_of_dropping()?;
    put_on_the_wire(&client, COUNT, |count| {
        udp::send_many(&socket, &PAYLOAD, count)
    })?;

    let headers = match family {
        Family::V4 => 28,
        Family::V6 => 48,
    };
    let expected = Traffic {
        packets: COUNT,
        bytes: COUNT * (headers + PAYLOAD.len() as u64),
    };
    let rule = scene.daemon.rule(rule_name(family))?;
    assert_eq!(rule.to_target, expected);
    let counters = scene.daemon.json(&["counters"])?;
    let of_ports: Vec<_> = counters["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|line| line["to_target"]["packets"].as_u64())
        .filter(|packets| *packets > 0)
        .collect();
    assert_eq!(of_ports, [COUNT]);
    scene.expect_no_errors()
}

/// Sends until `count` frames have left `end`: a veth without room drops a frame after the socket
/// has taken it, and that frame was never on the wire.
fn put_on_the_wire(
    end: &End<'_>,
    count: u64,
    send: impl Fn(u64) -> std::io::Result<()>,
) -> Result<()> {
    let mut left = count;
    for _ in 0..100 {
        let dropped = end.dropped_on_transmit()?;
        send(left)?;
        end.wait_until_queue_is_empty()?;
        left = end.dropped_on_transmit()? - dropped;
        if left == 0 {
            return Ok(());
        }
    }
    ensure!(left == 0, "the client's veth drops whatever is sent");
    Ok(())
}

/// Datagrams that the sender hands over as one (UDP_SEGMENT) arrive as what they are, and are counted as such.
#[test]
fn datagrams_that_are_sent_as_one_are_translated_each() -> Result<()> {
    const EACH: usize = 1_000;
    const COUNT: usize = 20;
    let scene = Scene::forwarding(Mode::Tc, "udp")?;
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        nix::sys::socket::setsockopt(
            &socket,
            nix::sys::socket::sockopt::UdpGsoSegment,
            &(EACH as i32),
        )?;
        for _ in 0..10 {
            socket.send(&[7; EACH * COUNT])?;
        }
        let expected = 10 * COUNT as u64;
        sink.wait_for(expected)?;
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!(rule.to_target.packets, expected);
        assert_eq!(rule.flows, 1);
    }
    scene.expect_no_errors()
}
