//! Packets too big for a link on the way: whoever sent one learns the right size.

use anyhow::{Context, Result};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::{Family, LabOptions, Offloads, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

/// A datagram that fits into 1500 bytes and not into 1400.
const BIG: [u8; 1440] = [7; 1440];

fn scene(mode: Mode, change: impl FnOnce(LabOptions) -> LabOptions, proto: &str) -> Result<Scene> {
    let lab = change(LabOptions::for_mode(mode).offloads(Offloads::Off));
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward(proto)?;
    Ok(scene)
}

fn behind_a_narrow_router(lab: LabOptions) -> LabOptions {
    lab.server_side(ServerSide::BehindRouter { mtu: 1400 })
}

fn narrow_lan(lab: LabOptions) -> LabOptions {
    LabOptions {
        lan_mtu: 1400,
        ..lab
    }
}

fn narrow_wan(lab: LabOptions) -> LabOptions {
    LabOptions {
        wan_mtu: 1400,
        ..lab
    }
}

#[rstest]
#[case::a_router_behind_the_gateway_over_native_xdp(Mode::Xdp, behind_a_narrow_router)]
#[case::a_router_behind_the_gateway_over_tc(Mode::Tc, behind_a_narrow_router)]
#[case::the_gateway_itself_over_native_xdp(Mode::Xdp, narrow_lan)]
#[case::the_gateway_itself_over_generic_xdp(Mode::XdpGeneric, narrow_lan)]
#[case::the_gateway_itself_over_tc(Mode::Tc, narrow_lan)]
fn the_client_learns_the_path_mtu_from(
    #[case] mode: Mode,
    #[case] narrow: fn(LabOptions) -> LabOptions,
) -> Result<()> {
    let scene = scene(mode, narrow, "udp")?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        udp::exchange(&socket, b"small")?;
        socket.send(&BIG)?;
        scene
            .lab
            .client_end()
            .wait_for_path_mtu(GATEWAY_WAN.of(family), 1400)?;
        let reported = socket.take_error()?.context("no error for the socket")?;
        assert_eq!(reported.raw_os_error(), Some(libc::EMSGSIZE));
        udp::exchange(&socket, b"small again")?;
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_server_learns_the_path_mtu_of_the_wan(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode, narrow_wan, "udp")?;
    for family in Family::BOTH {
        let address = scene.lab.server_address().endpoint(family, TARGET);
        let server = udp::bind(&scene.lab.server, address)?;
        server.set_read_timeout(Some(here(PATIENCE)))?;
        let client = udp::connect(&scene.lab.client, listen(family))?;
        client.send(b"a big answer, please")?;
        let (_, peer) = udp::receive(&server, &mut [0; 32])?;
        server.send_to(&BIG, peer)?;
        scene
            .lab
            .server_end()
            .wait_for_path_mtu(CLIENT.of(family), 1400)?;
        server.send_to(b"a small one, then", peer)?;
        let (length, _) = udp::receive(&client, &mut [0; 32])?;
        assert_eq!(length, b"a small one, then".len());
    }
    Ok(())
}

#[rstest]
#[case::a_router_behind_the_gateway_over_native_xdp(Mode::Xdp, behind_a_narrow_router)]
#[case::a_router_behind_the_gateway_over_tc(Mode::Tc, behind_a_narrow_router)]
fn tcp_uploads_get_through(
    #[case] mode: Mode,
    #[case] narrow: fn(LabOptions) -> LabOptions,
) -> Result<()> {
    let scene = scene(mode, narrow, "tcp")?;
    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        for _ in 0..16 {
            tcp::exchange(&mut stream, &[0xa5; 60_000])?;
        }
        scene
            .lab
            .client_end()
            .wait_for_path_mtu(GATEWAY_WAN.of(family), 1400)?;
    }
    Ok(())
}
