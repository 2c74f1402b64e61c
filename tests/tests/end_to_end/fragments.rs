//! Datagrams in fragments, through real stacks at both ends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use portfwd_common::model::frame::{Draft, fragment, fragments};
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::capture::Capture;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::namespace::Namespace;
use portfwd_tests::{Family, LabOptions, Offloads, nftables, tcp, udp};
use rstest::rstest;
use socket2::{Domain, Protocol, Socket, Type};

use crate::private_sources::expect_no_private_source;
use crate::scene::{Scene, TARGET, listen};

/// The client's port.
const PEER: u16 = 45_000;

/// Sends IP packets as they are.
struct Raw(Socket);

impl Raw {
    fn new(namespace: &Namespace, family: Family) -> Result<Self> {
        const RAW: i32 = 255;
        let domain = match family {
            Family::V4 => Domain::IPV4,
            Family::V6 => Domain::IPV6,
        };
        let socket =
            namespace.run(|| Socket::new(domain, Type::RAW, Some(Protocol::from(RAW))))??;
        Ok(Self(socket))
    }

    fn send(&self, packet: &[u8], to: SocketAddr) -> Result<()> {
        let to = SocketAddr::new(to.ip(), 0);
        let sent = self.0.send_to(packet, &to.into()).context("send")?;
        ensure!(sent == packet.len(), "{sent} bytes sent");
        Ok(())
    }
}

fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8 ^ seed).collect()
}

fn scene(mode: Mode) -> Result<Scene> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("both")?;
    Ok(scene)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn datagrams_of_any_size_are_echoed(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    let capture = Capture::start(scene.lab.client_end())?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        for size in [1_473, 2_000, 2_952, 4_096, 8_192, 30_000, 65_000] {
            udp::exchange(&socket, &payload(size, 0)).with_context(|| format!("{size} bytes"))?;
        }
    }
    expect_no_private_source(&capture.stop()?)?;
    scene.expect_no_errors()
}

/// All orders of three.
const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];

/// Sends a datagram in fragments in every order, and expects it to arrive each time.
fn every_order_arrives(
    raw: &Raw,
    source: SocketAddr,
    destination: SocketAddr,
    receiver: &UdpSocket,
    from: SocketAddr,
) -> Result<()> {
    for (number, order) in (1_u8..).zip(ORDERS) {
        let payload = payload(1_200, number);
        let draft = Draft {
            dont_fragment: false,
            ..Draft::udp(source, destination).payload(payload.clone())
        };
        let pieces = fragments(&draft.packet(), u32::from(number) << 8, 504, 0);
        assert_eq!(pieces.len(), 3);
        for at in order {
            raw.send(&pieces[at], destination)?;
        }
        let mut buffer = [0; 2_000];
        let (len, sender) = udp::receive(receiver, &mut buffer)
            .with_context(|| format!("receive fragments in the order {order:?}"))?;
        assert_eq!(sender, from, "{order:?}");
        assert_eq!(buffer[..len], payload, "{order:?}");
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn fragments_in_any_order_arrive_on_either_side(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
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
        let raw = Raw::new(&scene.lab.client, family)?;
        every_order_arrives(&raw, peer, listen(family), &server, peer)?;
        let raw = Raw::new(&scene.lab.server, family)?;
        every_order_arrives(&raw, own, peer, &client, listen(family))?;
    }
    expect_no_private_source(&capture.stop()?)?;
    scene.expect_no_errors()
}

/// Fragments of a flood between two exchanges of whole packets: fewer than the kernel lets wait for a CPU (netdev_max_backlog), so
/// what is lost is lost by the gateway.
const WAVE: u32 = 400;
/// Waves, in either family. In all several times what the tables of fragments hold.
const WAVES: u32 = 150;
/// Bytes of a fragment's payload.
const PART: usize = 64;

/// The fragment with this number of a flood, of a datagram of its own: of three, one first fragment whose rest never comes, one
/// whose first never comes, and one that no sender makes.
fn stray(family: Family, number: u32) -> Vec<u8> {
    let low = number as u16;
    let source = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(0xc612_0000 | u32::from(low))),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 1, low)),
    };
    let draft = Draft {
        dont_fragment: false,
        ..Draft::udp(SocketAddr::new(source, PEER), listen(family)).payload([0x5a; PART])
    };
    let packet = draft.packet();
    let head = match family {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    let (head, rest) = packet.split_at(head);
    match number % 3 {
        0 => fragment(head, number, 0, true, &rest[..PART]),
        1 => fragment(head, number, 64, true, &rest[..PART]),
        _ => fragment(head, number, 0, true, &rest[..4]),
    }
}

/// RFC 4787 REQ-14a: fragments that never make a datagram must not harm packets that are whole.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_flood_of_fragments_costs_no_whole_packet(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp_echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let datagrams = udp::connect(&scene.lab.client, listen(family))?;
        let mut connection = tcp::connect(&scene.lab.client, listen(family))?;
        let raw = Raw::new(&scene.lab.client, family)?;
        for wave in 0..WAVES {
            for number in wave * WAVE..(wave + 1) * WAVE {
                raw.send(&stray(family, number), listen(family))?;
            }
            let message = format!("after wave {wave}");
            udp::exchange(&datagrams, message.as_bytes()).context(message.clone())?;
            tcp::exchange(&mut connection, message.as_bytes()).context(message)?;
        }
    }
    let each = u64::from(2 * WAVES * WAVE / 3);
    let (events, drops) = (scene.daemon.events()?, scene.daemon.drops()?);
    assert_eq!(drops["bad_fragment"], each, "{drops:?}");
    assert_eq!(events["fragment_held"], each, "{events:?}");
    Ok(())
}

/// Connection tracking in the gateway's kernel, which puts datagrams together before it looks at them, changes nothing: fragments
/// are carried before it sees them.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn fragments_arrive_beside_connection_tracking(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    let rules = "table inet beside {\n chain early {\n  type filter hook prerouting priority raw;\n  ct state invalid counter\n }\n}\n";
    nftables::load(&scene.lab.gateway, rules)?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        for size in [1_473, 4_096, 30_000] {
            udp::exchange(&socket, &payload(size, 0)).with_context(|| format!("{size} bytes"))?;
        }
    }
    scene.expect_no_errors()
}
