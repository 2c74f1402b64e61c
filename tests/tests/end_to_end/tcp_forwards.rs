//! TCP through a forward.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::{Family, LabOptions, Offloads, curl, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

const FILE: usize = 100 << 20;

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc_with_all_offloads(Mode::Tc)]
fn a_file_of_100_mib_arrives_unchanged_and_the_server_sees_the_client(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    let content = curl::varied_content(FILE);
    let nginx = Nginx::start(&scene.lab.server, TARGET, &[("file", &content)])?;
    let expected = curl::sha256(&content)?;
    for family in Family::BOTH {
        let url = curl::url(listen(family), "file");
        let arrived = curl::fetch_sha256(&scene.lab.client, &url, Duration::from_secs(60))?;
        assert_eq!(arrived, expected, "{family}");

        let client = CLIENT.of(family).to_string();
        let access = nginx.wait_for_access(|access| access.client == client)?;
        assert_eq!(
            (access.status, access.request.as_str()),
            (200, "GET /file HTTP/1.1")
        );

        let rule = scene.daemon.rule(rule_name(family))?;
        assert!(rule.to_client.bytes > FILE as u64, "{rule:?}");
        // Super-packets count as the segments that they are on a wire.
        assert!(rule.to_client.packets > FILE as u64 / 1500, "{rule:?}");
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn both_ends_of_a_connection_see_the_endpoints_they_dialled_and_serve(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    for family in Family::BOTH {
        let echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        for _ in 0..100 {
            tcp::exchange(&mut stream, b"there and back")?;
        }
        assert_eq!(stream.peer_addr()?, listen(family));
        assert_eq!(echo.peers(), [stream.local_addr()?]);

        let flows = scene.daemon.flows()?;
        let client = stream.local_addr()?.to_string();
        let flow = flows
            .iter()
            .find(|flow| flow.client == client)
            .with_context(|| format!("no flow of {client} in {flows:?}"))?;
        assert_eq!(flow.proto, "tcp");
        assert_eq!(flow.listen, listen(family).to_string());
        let target = scene.lab.server_address().endpoint(family, TARGET);
        assert_eq!(flow.target, target.to_string());
        assert_eq!(flow.state, "established");
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp, LabOptions::for_mode(Mode::Xdp))]
#[case::over_tc_with_offloads(Mode::Tc, LabOptions::for_mode(Mode::Tc))]
#[case::over_tc_without_offloads(Mode::Tc, LabOptions::for_mode(Mode::Tc).offloads(Offloads::Off))]
fn bulk_transfers_run_in_both_directions(
    #[case] mode: Mode,
    #[case] lab: LabOptions,
) -> Result<()> {
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("tcp")?;
    let _server = iperf::Server::start(&scene.lab.server, TARGET)?;
    for family in Family::BOTH {
        for direction in [Direction::Upload, Direction::Download] {
            let second = Duration::from_secs(1);
            let report = iperf::transfer(&scene.lab.client, listen(family), direction, second)?;
            ensure!(
                report.bits_per_second > 50e6,
                "{family} {direction:?}: {report:?}"
            );
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_closed_port_behind_the_forward_refuses_the_connection_at_once(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    for family in Family::BOTH {
        let error = tcp::connect(&scene.lab.client, listen(family))
            .err()
            .context("somebody accepted")?;
        let error: std::io::Error = error.downcast()?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family}");
        // The RST is the server's: the gateway itself would not have let the rule count.
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!((rule.to_target.packets, rule.to_client.packets), (1, 1));
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_half_closed_connection_still_carries_the_other_half(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    let _echo = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    tcp::exchange(&mut stream, b"before")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    assert!(rest.is_empty());
    Ok(())
}

#[test]
fn a_port_can_be_kept_and_a_protocol_left_out() -> Result<()> {
    let scene = Scene::new(Mode::Tc)?;
    let server = scene.lab.server_address().v4.to_string();
    let port = LISTEN.to_string();
    scene.daemon.add("kept", "tcp", &port, &server)?;
    let _echo = tcp::Echo::start(&scene.lab.server, Family::V4, LISTEN)?;
    let _udp = udp::Echo::start(&scene.lab.server, Family::V4, LISTEN)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    tcp::exchange(&mut stream, b"same port")?;

    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    socket.send(b"no rule for UDP")?;
    let refused = udp::reported_error(&socket)?;
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    Ok(())
}
