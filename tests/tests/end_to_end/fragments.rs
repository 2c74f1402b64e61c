//! Datagrams in fragments, through real stacks at both ends.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use portfwd_common::model::frame::{Draft, fragments};
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::capture::Capture;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::namespace::Namespace;
use portfwd_tests::{Family, LabOptions, Offloads, udp};
use rstest::rstest;
use socket2::{Domain, Protocol, Socket, Type};

use crate::private_sources::PRIVATE;
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
    let capture = Capture::start(scene.lab.client_end(), PRIVATE)?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        for size in [1_473, 2_000, 2_952, 4_096, 8_192, 30_000, 65_000] {
            udp::exchange(&socket, &payload(size, 0)).with_context(|| format!("{size} bytes"))?;
        }
    }
    let seen = capture.stop()?.select("", &["frame.number"])?;
    assert!(
        seen.is_empty(),
        "{} frames with an address of the LAN",
        seen.len()
    );
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
        let raw = Raw::new(&scene.lab.client, family)?;
        every_order_arrives(&raw, peer, listen(family), &server, peer)?;
        let raw = Raw::new(&scene.lab.server, family)?;
        every_order_arrives(&raw, own, peer, &client, listen(family))?;
    }
    let seen = capture.stop()?.select("", &["frame.number"])?;
    assert!(
        seen.is_empty(),
        "{} frames with an address of the LAN",
        seen.len()
    );
    scene.expect_no_errors()
}
