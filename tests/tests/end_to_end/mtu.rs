//! Packets too big for a link on the way: whoever sent one learns the right size.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::thread;

use anyhow::{Context, Result, anyhow};
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::{Family, LabOptions, Offloads, snmp, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// A datagram that fits into 1500 bytes and not into 1400.
const BIG: [u8; 1440] = [7; 1440];

/// What the rules say besides: whom the server takes for its client.
type Rule = &'static [&'static str];
const PLAIN: Rule = &[];
/// The kernel cannot tell anybody of what does not fit: both addresses are the gateway's own.
const MASQUERADED: Rule = &["--masquerade"];

fn scene(
    mode: Mode,
    change: impl FnOnce(LabOptions) -> LabOptions,
    proto: &str,
    rule: Rule,
) -> Result<Scene> {
    let lab = change(LabOptions::for_mode(mode).offloads(Offloads::Off));
    with_rules(Scene::with(lab, DaemonOptions::new(mode))?, proto, rule)
}

fn with_rules(scene: Scene, proto: &str, rule: Rule) -> Result<Scene> {
    for family in Family::BOTH {
        let target = scene.lab.server_address().endpoint(family, TARGET);
        let forward = [proto, &LISTEN.to_string(), &target.to_string()];
        scene.daemon.add_with(rule_name(family), forward, rule)?;
    }
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
    #[values(PLAIN, MASQUERADED)] rule: Rule,
) -> Result<()> {
    let scene = scene(mode, narrow, "udp", rule)?;
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
fn the_server_learns_the_path_mtu_of_the_wan(
    #[case] mode: Mode,
    #[values(PLAIN, MASQUERADED)] rule: Rule,
) -> Result<()> {
    let scene = scene(mode, narrow_wan, "udp", rule)?;
    for family in Family::BOTH {
        let address = scene.lab.server_address().endpoint(family, TARGET);
        let server = udp::bind(&scene.lab.server, address)?;
        server.set_read_timeout(Some(here(PATIENCE)))?;
        let client = udp::connect(&scene.lab.client, listen(family))?;
        client.send(b"a big answer, please")?;
        let (_, peer) = udp::receive(&server, &mut [0; 32])?;
        server.send_to(&BIG, peer)?;
        scene.lab.server_end().wait_for_path_mtu(peer.ip(), 1400)?;
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
    #[values(PLAIN, MASQUERADED)] rule: Rule,
) -> Result<()> {
    let scene = scene(mode, narrow, "tcp", rule)?;
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

/// Has the client send so many bytes to the server, which answers with how many have come: what it sends is small.
fn upload(scene: &Scene, family: Family, bytes: usize) -> Result<()> {
    let endpoint = scene.lab.server_address().endpoint(family, TARGET);
    let listener = scene.lab.server.run(|| TcpListener::bind(endpoint))??;
    let server = thread::spawn(move || -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let read = stream.read_to_end(&mut Vec::new())?;
        stream.write_all(&read.to_be_bytes())
    });
    let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
    stream.write_all(&vec![0xa5; bytes])?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; size_of::<usize>()];
    stream.read_exact(&mut answer).context("what has come")?;
    assert_eq!(usize::from_be_bytes(answer), bytes);
    server
        .join()
        .map_err(|_| anyhow!("the server panicked"))??;
    Ok(())
}

/// Segments come to the gateway as super-packets, the first of which are too big for its LAN: nobody has lowered their size.
#[rstest]
#[case::over_tc(Mode::Tc, Offloads::On)]
#[case::over_tc_segment_by_segment(Mode::Tc, Offloads::Off)]
#[case::over_native_xdp(Mode::Xdp, Offloads::Off)]
fn tcp_uploads_of_hidden_clients_find_their_size(
    #[case] mode: Mode,
    #[case] offloads: Offloads,
) -> Result<()> {
    const RULE: Rule = &["--masquerade", "--no-mss-clamp"];
    let lab = LabOptions::for_mode(mode).offloads(offloads).build()?;
    // The server's end takes 1500 bytes, and says so to its peers.
    lab.gateway.ip("link set lan0 mtu 1400\n")?;
    for end in [lab.wan_end(), lab.lan_end()] {
        end.turn_transmit_offloads_off()?;
    }
    let daemon = DaemonOptions::new(mode).start(&lab.gateway)?;
    let scene = with_rules(Scene { daemon, lab }, "tcp", RULE)?;
    for family in Family::BOTH {
        upload(&scene, family, 1_000_000)?;
        scene
            .lab
            .client_end()
            .wait_for_path_mtu(GATEWAY_WAN.of(family), 1400)?;
    }
    snmp::expect_no_malformed(&[&scene.lab.client, &scene.lab.gateway, &scene.lab.server])
}
