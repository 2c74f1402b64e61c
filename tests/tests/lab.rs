//! The lab itself: with nftables as the gateway, every tool of it is seen to work, and to tell
//! right from wrong.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN, ROUTER_LAN, SECOND_SERVER, SERVER};
use portfwd_tests::capture::{Capture, sent_by};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::foreign_xdp::{ForeignXdp, attached_id};
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::lab::{Lab, LabOptions, Offloads, ServerSide};
use portfwd_tests::link::End;
use portfwd_tests::nftables::{self, Forward};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::traceroute::{self, Probe};
use portfwd_tests::{Family, curl, snmp, tcp, udp};

const LISTEN: u16 = 8080;
const TARGET: u16 = 80;

/// A lab in which nftables forwards the gateway's `LISTEN` to the server's `TARGET`.
fn reference_lab(options: LabOptions) -> Result<Lab> {
    let lab = options.build()?;
    let forwards = Family::BOTH.map(|family| Forward {
        listen: GATEWAY_WAN.endpoint(family, LISTEN),
        target: lab.server_address().endpoint(family, TARGET),
    });
    nftables::forward(&lab.gateway, &forwards)?;
    Ok(lab)
}

fn listen(family: Family) -> SocketAddr {
    GATEWAY_WAN.endpoint(family, LISTEN)
}

#[test]
fn the_client_cannot_reach_the_server_without_a_translation() -> Result<()> {
    let lab = LabOptions::default().build()?;
    let _echo = tcp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let error = tcp::connect(&lab.client, SERVER.endpoint(Family::V4, TARGET))
        .err()
        .context("the client has a route to the server")?;
    assert!(format!("{error:#}").contains("Network is unreachable"));
    Ok(())
}

#[test]
fn curl_fetches_from_nginx_through_nftables_and_the_log_names_the_client() -> Result<()> {
    let content = curl::varied_content(3 << 20);
    for offloads in [Offloads::On, Offloads::Off] {
        let lab = reference_lab(LabOptions::default().offloads(offloads))?;
        let nginx = Nginx::start(&lab.server, TARGET, &[("file", &content)])?;
        for family in Family::BOTH {
            let url = curl::url(listen(family), "file");
            let sum = curl::fetch_sha256(&lab.client, &url, Duration::from_secs(10))?;
            assert_eq!(sum, curl::sha256(&content)?, "{family}, {offloads:?}");
            let client = CLIENT.of(family).to_string();
            let access = nginx.wait_for_access(|access| access.client == client)?;
            assert_eq!(access.status, 200);
        }
        snmp::expect_no_malformed(&[&lab.client, &lab.gateway, &lab.server])?;
    }
    Ok(())
}

#[test]
fn udp_and_tcp_echoes_see_the_client_and_answer_it() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    for family in Family::BOTH {
        let echo = udp::Echo::start(&lab.server, family, TARGET)?;
        let socket = udp::connect(&lab.client, listen(family))?;
        udp::exchange(&socket, b"over UDP")?;
        let seen: Vec<_> = echo.peers().iter().map(SocketAddr::ip).collect();
        assert_eq!(seen, [CLIENT.of(family)]);

        let echo = tcp::Echo::start(&lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&lab.client, listen(family))?;
        tcp::exchange(&mut stream, b"over TCP")?;
        assert_eq!(echo.peers(), [stream.local_addr()?]);
    }
    Ok(())
}

#[test]
fn a_sink_counts_what_was_sent() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    lab.client_end().queue_instead_of_dropping()?;
    let sink = udp::Sink::start(&lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&lab.client, listen(Family::V4))?;
    udp::send_many(&socket, b"count me", 20_000)?;
    sink.wait_for(20_000)?;
    assert_eq!(sink.received(), 20_000);
    assert_eq!(lab.client_end().dropped_on_transmit()?, 0);
    Ok(())
}

#[test]
fn a_stream_counts_every_datagram_that_does_not_come_back() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    let echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let stream = udp::Stream::start(&lab.client, listen(Family::V4), 1000)?;
    stream.wait_for_more(200)?;
    assert!(stream.finish()? >= 200);

    let stream = udp::Stream::start(&lab.client, listen(Family::V4), 1000)?;
    stream.wait_for_more(50)?;
    drop(echo);
    // The closed port answers with an ICMP error: the stream breaks off, and says so.
    let broken = stream
        .wait_for_more(1000)
        .and_then(|()| stream.finish().map(|_| ()));
    assert!(broken.is_err());
    Ok(())
}

#[test]
fn iperf3_measures_both_directions() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    let _server = iperf::Server::start(&lab.server, TARGET)?;
    for direction in [Direction::Upload, Direction::Download] {
        let report = iperf::transfer(
            &lab.client,
            listen(Family::V4),
            direction,
            Duration::from_secs(1),
        )?;
        assert!(report.bits_per_second > 1e6, "{direction:?}: {report:?}");
        assert!(report.intervals.len() >= 8, "{direction:?}: {report:?}");
    }
    Ok(())
}

#[test]
fn a_capture_with_an_unfinished_sum_fails_and_names_the_frame_unless_it_is_excused() -> Result<()> {
    let converse = |offloads| -> Result<(Lab, Capture)> {
        let lab = reference_lab(LabOptions::default().offloads(offloads))?;
        let _echo = tcp::Echo::start(&lab.server, Family::V4, TARGET)?;
        let capture = Capture::start(lab.server_end())?;
        let mut stream = tcp::connect(&lab.client, listen(Family::V4))?;
        tcp::exchange(&mut stream, b"a segment each way")?;
        Ok((lab, capture))
    };
    let (_lab, capture) = converse(Offloads::Off)?;
    let frames = capture.stop()?;
    assert!(frames.expect("tcp")? > 4);
    assert!(frames.expect("udp").is_err(), "there was no UDP");

    let (_lab, capture) = converse(Offloads::On)?;
    let error = capture.stop().err().context("an unfinished sum is right")?;
    let text = format!("{error:#}");
    assert!(
        text.contains("\nframe ") && text.contains("[SYN]"),
        "{text}"
    );

    let (lab, capture) = converse(Offloads::On)?;
    let half = capture.stop_excusing(&sent_by(lab.server_end())?);
    assert!(half.is_err(), "the client's are unfinished, too");

    let (_lab, capture) = converse(Offloads::On)?;
    assert!(capture.stop_with(Offloads::On)?.expect("tcp")? > 4);
    Ok(())
}

#[test]
fn a_capture_without_a_frame_fails() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    let quiet = End {
        namespace: &lab.client,
        interface: "lo",
    };
    for offloads in [Offloads::On, Offloads::Off] {
        let stopped = Capture::start(quiet)?.stop_with(offloads);
        let error = stopped.err().context("an empty capture is fine")?;
        assert!(error.to_string().contains("no frame"), "{error:#}");
    }
    Ok(())
}

#[test]
fn traceroute_finds_gateway_and_server() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    for family in Family::BOTH {
        for probe in [Probe::Udp, Probe::Tcp] {
            let hops = traceroute::trace(&lab.client, listen(family), probe)?;
            let addresses: Vec<_> = hops.iter().map(|hop| hop.address).collect();
            let gateway = Some(GATEWAY_WAN.of(family));
            assert_eq!(addresses, [gateway, gateway], "{family}, {probe:?}");
        }
    }
    Ok(())
}

#[test]
fn a_closed_port_behind_the_gateway_is_refused_to_the_client() -> Result<()> {
    let lab = reference_lab(LabOptions::default())?;
    for family in Family::BOTH {
        let socket = udp::connect(&lab.client, listen(family))?;
        socket.send(b"anybody there?")?;
        let error = udp::reported_error(&socket)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family}");
    }
    Ok(())
}

#[test]
fn a_router_behind_the_gateway_lowers_the_clients_path_mtu() -> Result<()> {
    let options = LabOptions::default()
        .server_side(ServerSide::BehindRouter { mtu: 1400 })
        .offloads(Offloads::Off);
    let lab = reference_lab(options)?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&lab.server, family, TARGET)?;
        let socket = udp::connect(&lab.client, listen(family))?;
        udp::exchange(&socket, b"small")?;
        socket.send(&[0; 1440])?;
        lab.client_end()
            .wait_for_path_mtu(GATEWAY_WAN.of(family), 1400)?;
    }
    Ok(())
}

#[test]
fn two_lans_have_a_server_each() -> Result<()> {
    let lab = LabOptions::default()
        .server_side(ServerSide::TwoLans)
        .build()?;
    nftables::forward(
        &lab.gateway,
        &Family::BOTH.map(|family| Forward {
            listen: listen(family),
            target: SECOND_SERVER.endpoint(family, TARGET),
        }),
    )?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(lab.second_server()?, family, TARGET)?;
        udp::exchange(&udp::connect(&lab.client, listen(family))?, b"second")?;
    }
    Ok(())
}

#[test]
fn the_gateway_reaches_the_server_behind_the_router() -> Result<()> {
    let lab = LabOptions::default()
        .server_side(ServerSide::BehindRouter { mtu: 1500 })
        .build()?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&lab.server, family, TARGET)?;
        let server = lab.server_address().endpoint(family, TARGET);
        udp::exchange(&udp::connect(&lab.gateway, server)?, b"two hops")?;
        let hops = traceroute::trace(
            &lab.gateway,
            lab.server_address().endpoint(family, 9),
            Probe::Udp,
        )?;
        assert_eq!(hops[0].address, Some(ROUTER_LAN.of(family)));
    }
    Ok(())
}

#[test]
fn another_owners_program_shows_on_its_interface_and_goes_with_its_guard() -> Result<()> {
    let lab = LabOptions::default().build()?;
    assert_eq!(attached_id(lab.wan_end())?, None);
    let foreign = ForeignXdp::attach(lab.wan_end())?;
    assert!(attached_id(lab.wan_end())?.is_some());
    drop(foreign);
    // What another test's thread has forked has this process's descriptors until it executes its program.
    wait_until("the program to go", PATIENCE, || {
        Ok(attached_id(lab.wan_end())?.is_none())
    })
}

#[test]
fn a_lab_leaves_no_namespace_behind() -> Result<()> {
    let lab = LabOptions::default().build()?;
    let path = std::path::Path::new("/run/netns").join(lab.gateway.name());
    assert!(path.exists());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _lab = lab;
        panic!("the lab goes even so");
    }));
    assert!(panicked.is_err());
    assert!(!path.exists());
    Ok(())
}
