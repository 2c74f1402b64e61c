//! A client whose flow finds no room is told so, as by a host that cannot be reached just now (RFC 6888 REQ-11, RFC 5508 REQ-8).

use std::io::{self, ErrorKind};
use std::net::{IpAddr, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use portfwd_common::datapath::refusal::ERROR_RATE;
use portfwd_tests::address::{CLIENT, GATEWAY_LAN, GATEWAY_WAN};
use portfwd_tests::capture::{Capture, Frames, sent_by};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_for, wait_until};
use portfwd_tests::{Family, LabOptions, Offloads, snmp, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// Ports that may stand for clients of a rule.
const PORTS: usize = 4;
/// Flows that the small connection table holds.
const ROOM: usize = 16;

/// What tshark calls the errors that a family's clients get.
fn errors(family: Family) -> &'static str {
    match family {
        Family::V4 => "icmp.type == 3 && icmp.code == 1",
        Family::V6 => "icmpv6.type == 1 && icmpv6.code == 3",
    }
}

/// Adds rules of both families with [`PORTS`] ports each, and takes all of them for UDP.
fn use_up(scene: &Scene) -> Result<(Vec<udp::Echo>, Vec<UdpSocket>)> {
    let (mut echoes, mut sockets) = (Vec::new(), Vec::new());
    for family in Family::BOTH {
        let address = match GATEWAY_LAN.of(family) {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        let range = format!("{address}:20000-{}", 20_000 + PORTS - 1);
        let target = scene.lab.server_address().endpoint(family, TARGET);
        let rule = ["both", &LISTEN.to_string(), &target.to_string()];
        scene
            .daemon
            .add_with(rule_name(family), rule, &["--snat", &range])?;
        echoes.push(udp::Echo::start(&scene.lab.server, family, TARGET)?);
        for _ in 0..PORTS {
            let socket = udp::connect(&scene.lab.client, listen(family))?;
            udp::exchange(&socket, b"mine")?;
            sockets.push(socket);
        }
    }
    Ok((echoes, sockets))
}

/// A client to whom every error is reported.
fn listener(scene: &Scene, family: Family) -> Result<UdpSocket> {
    let socket = udp::connect(&scene.lab.client, listen(family))?;
    udp::report_soft_errors(&socket, family)?;
    Ok(socket)
}

fn events(scene: &Scene) -> Result<u64> {
    Ok(scene
        .daemon
        .events()?
        .get("error_sent")
        .copied()
        .unwrap_or(0))
}

fn drops(scene: &Scene, reason: &str) -> Result<u64> {
    Ok(scene.daemon.drops()?.get(reason).copied().unwrap_or(0))
}

/// Judges the errors in a capture: from the address that was dialled, to the client.
fn judge(frames: &Frames, family: Family, count: usize) -> Result<()> {
    let filter = errors(family);
    assert_eq!(frames.expect(filter)?, count, "{family}");
    let (version, fields) = match family {
        Family::V4 => ("ip", ["ip.src", "ip.dst"]),
        Family::V6 => ("ipv6", ["ipv6.src", "ipv6.dst"]),
    };
    // The first of each is that of the error, the second that of the packet that it quotes.
    let (gateway, client) = (GATEWAY_WAN.of(family), CLIENT.of(family));
    let expected = format!("{gateway},{client}\t{client},{gateway}");
    for line in frames.select(&format!("{version} && {filter}"), &fields)? {
        assert_eq!(line, expected);
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_client_without_a_port_hears_that_its_host_cannot_be_reached(#[case] mode: Mode) -> Result<()> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    let (_echoes, sockets) = use_up(&scene)?;
    let capture = Capture::start(scene.lab.client_end())?;
    for family in Family::BOTH {
        for attempt in 1..=3 {
            let socket = listener(&scene, family)?;
            socket.send(b"no port is left")?;
            let error = udp::reported_error(&socket)?;
            assert_eq!(
                error.kind(),
                ErrorKind::HostUnreachable,
                "{family}, {attempt}"
            );
        }
    }
    for socket in &sockets {
        udp::exchange(socket, b"still mine")?;
    }
    let frames = capture.stop()?;
    for family in Family::BOTH {
        judge(&frames, family, 3)?;
    }
    assert_eq!((drops(&scene, "no_port")?, events(&scene)?), (6, 6));
    snmp::expect_no_malformed(&[&scene.lab.client, &scene.lab.gateway, &scene.lab.server])
}

/// A connection table of [`ROOM`] flows, and in each family two rules with one target: which of the two an answer belongs to, only an
/// entry can tell.
fn full_scene(mode: Mode) -> Result<Scene> {
    let options = DaemonOptions {
        max_flows: Some(ROOM as u32),
        ..DaemonOptions::new(mode)
    };
    let scene = Scene::with(LabOptions::for_mode(mode), options)?;
    scene.forward("both")?;
    for family in Family::BOTH {
        let target = scene.lab.server_address().endpoint(family, TARGET);
        let (port, target) = ((LISTEN + 1).to_string(), target.to_string());
        scene
            .daemon
            .add(&other_name(family), "both", &port, &target)?;
    }
    Ok(scene)
}

fn other_name(family: Family) -> String {
    format!("other-{}", rule_name(family))
}

/// Takes all the room of a family.
fn fill(scene: &Scene, family: Family) -> Result<Vec<UdpSocket>> {
    let mut inside = Vec::new();
    for _ in 0..ROOM {
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        udp::exchange(&socket, b"while there is room")?;
        inside.push(socket);
    }
    Ok(inside)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_client_hears_of_a_full_table(#[case] mode: Mode) -> Result<()> {
    let scene = full_scene(mode)?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let inside = fill(&scene, family)?;
        let outside = listener(&scene, family)?;
        let before = drops(&scene, "table_full")?;
        // It may begin, but not stay.
        outside.send(b"no room")?;
        wait_until("the answer to be refused", PATIENCE, || {
            Ok(drops(&scene, "table_full")? == before + 1)
        })?;
        ensure!(
            outside.take_error()?.is_none(),
            "only the server was refused over {family}"
        );
        outside.send(b"no room")?;
        let error = udp::reported_error(&outside)?;
        assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{family}");
        for socket in &inside {
            udp::exchange(socket, b"flows in the table go on")?;
        }
    }
    assert_eq!((drops(&scene, "table_full")?, events(&scene)?), (4, 2));
    Ok(())
}

/// Linux gives a connection up that has not begun, whatever the error (RFC 5461 section 4.1), and tries another address at once. The
/// segment comes with a sum that its sender has left to the hardware, and leaves by an interface where the kernel would finish that
/// sum, in the middle of the quotation.
#[rstest]
#[case::over_native_xdp(Mode::Xdp, Offloads::Off)]
#[case::over_tc(Mode::Tc, Offloads::Off)]
#[case::over_tc_with_sums_left_to_the_hardware(Mode::Tc, Offloads::On)]
fn who_wants_to_connect_need_not_wait_in_vain(
    #[case] mode: Mode,
    #[case] offloads: Offloads,
) -> Result<()> {
    let scene = Scene::with(
        LabOptions::for_mode(mode).offloads(offloads),
        DaemonOptions::new(mode),
    )?;
    let (_echoes, _sockets) = use_up(&scene)?;
    scene.lab.wan_end().turn_transmit_offloads_off()?;
    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut streams = Vec::new();
        for _ in 0..PORTS {
            let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
            tcp::exchange(&mut stream, b"mine")?;
            streams.push(stream);
        }
        let capture = Capture::start(scene.lab.client_end())?;
        let begun = Instant::now();
        let refused = tcp::connect(&scene.lab.client, listen(family)).err();
        let error = refused.context("there was a port")?;
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        assert_eq!(
            kind,
            Some(ErrorKind::HostUnreachable),
            "{family}: {error:#}"
        );
        ensure!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
        // An error that comes while the call still has its socket in hand waits for the next segment.
        // What comes from the gateway is finished there; what the client sends is as it leaves its stack.
        let frames = match offloads {
            Offloads::On => capture.stop_excusing(&sent_by(scene.lab.client_end())?)?,
            Offloads::Off => capture.stop()?,
        };
        let told = frames.expect(errors(family))?;
        ensure!(told <= 2, "{told} errors over {family}");
        judge(&frames, family, told)?;
        for stream in &mut streams {
            tcp::exchange(stream, b"still mine")?;
        }
    }
    Ok(())
}

/// RFC 1122 section 4.2.3.9: the error is a soft one to a connection that both sides know of. It waits, and goes on when it can.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_connection_outlives_a_full_table(#[case] mode: Mode) -> Result<()> {
    let scene = full_scene(mode)?;
    for family in Family::BOTH {
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _inside = fill(&scene, family)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        // Asked for, a soft error is told like any other, and forgotten.
        let error = wait_for("the error", PATIENCE, || Ok(stream.take_error()?))?;
        assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{family}");
        // The rule that is left determines the translation alone.
        scene.daemon.ok(&["remove", &other_name(family)])?;
        tcp::exchange(&mut stream, b"there and back")?;
    }
    Ok(())
}

/// RFC 1812 section 4.3.2.8: a client gets as many as the burst and the rate allow, however much it sends.
#[rstest]
#[case::over_native_xdp_and_ipv4(Mode::Xdp, Family::V4)]
#[case::over_native_xdp_and_ipv6(Mode::Xdp, Family::V6)]
#[case::over_tc_and_ipv4(Mode::Tc, Family::V4)]
#[case::over_tc_and_ipv6(Mode::Tc, Family::V6)]
fn a_flood_is_told_of_a_few_times(#[case] mode: Mode, #[case] family: Family) -> Result<()> {
    const FLOOD: u64 = 20_000;
    let scene = Scene::new(mode)?;
    let (_echoes, sockets) = use_up(&scene)?;
    let left_by_xdp = || -> Result<u64> {
        let passes = scene.daemon.passes()?;
        Ok(passes.get("slow_path").copied().unwrap_or(0))
    };
    let before = left_by_xdp()?;
    let flood = udp::connect(&scene.lab.client, listen(family))?;
    let begun = Instant::now();
    udp::send_many(&flood, b"let me in", FLOOD)?;
    wait_until("all to be dropped", PATIENCE, || {
        Ok(drops(&scene, "no_port")? == FLOOD)
    })?;
    let seconds = begun.elapsed().as_secs() + 1;
    let told = events(&scene)?;
    let burst = u64::from(ERROR_RATE.burst);
    let most = burst + seconds * u64::from(ERROR_RATE.flows);
    ensure!(
        (burst..=most).contains(&told),
        "{told} errors in {seconds} s"
    );
    // What nobody is told of ends in XDP; a few may be on their way to TC at once.
    let left = left_by_xdp()? - before;
    ensure!(left <= 100 * most, "XDP left {left} packets to TC");
    for socket in &sockets {
        udp::exchange(socket, b"still mine")?;
    }
    Ok(())
}

/// The question is put to a copy: it costs no client its answer.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn explain_says_that_the_client_is_told(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let (_echoes, _sockets) = use_up(&scene)?;
    for family in Family::BOTH {
        let (client, listen) = (CLIENT.endpoint(family, 9), listen(family));
        let question = ["explain", "udp", &client.to_string(), &listen.to_string()];
        let there = scene.daemon.json(&question)?["there"].clone();
        let reasons = match mode {
            Mode::Xdp | Mode::XdpGeneric => vec!["slow_path", "no_port", "error_sent"],
            Mode::Tc | Mode::Auto => vec!["no_port", "error_sent"],
        };
        assert_eq!(there["reasons"], serde_json::json!(reasons), "{there}");
        assert_eq!(there["fate"], "dropped", "{there}");
        ensure!(there["translated_source"].is_null(), "{there}");
    }
    assert_eq!((drops(&scene, "no_port")?, events(&scene)?), (0, 0));
    Ok(())
}
