//! Floods from forged sources: they drive out each other, and nobody who is in the connection table. What the log cannot tell of
//! them it counts.

use std::time::Duration;

use anyhow::{Context, Result};
use portfwd_tests::daemon::{DaemonOptions, Flow, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::pipeline::{Load, Order, Pipeline, Segment, Stream, Transport};
use portfwd_tests::{Family, LabOptions, Offloads, iperf, tcp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// Spoofed segments, each of a flow of its own.
const SPOOFED: u32 = 1_000_000;
/// Flows that may be beginning at a time.
const HALF_OPEN: u32 = 4_096;
/// The flood is more than so many segments when it comes to the gateway. On a busy machine the kernel drops much of it before that:
/// then other waves follow, up to a number of them.
const ENOUGH: u64 = 4 * HALF_OPEN as u64;
const WAVES: u32 = 8;
/// Connections that are there before.
const CONNECTIONS: usize = 64;
/// A transfer that goes on meanwhile.
const TRANSFER: Duration = Duration::from_secs(4);
const IPERF_LISTEN: u16 = 5201;
/// A port that nobody may use, and datagrams that go there: many times what the buffer of messages has room for.
const CLOSED: u16 = LISTEN + 1;
const REFUSED: u32 = 200_000;
/// Messages that a connection exchanges meanwhile.
const ROUND_TRIPS: usize = 200;

fn scene(mode: Mode) -> Result<Scene> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let options = DaemonOptions {
        // Far fewer than the flood has sources, of either kind.
        max_flows: Some(1_024),
        max_half_open: Some(HALF_OPEN),
        ..DaemonOptions::new(mode)
    };
    let scene = Scene::with(lab, options)?;
    scene.lab.wan_end().turn_gro_on()?;
    scene.forward("tcp")?;
    Ok(scene)
}

/// Whose flows they are; counters and ages of live ones go on.
fn identities(flows: &[Flow]) -> Vec<(String, String, String)> {
    let mut identities: Vec<_> = flows
        .iter()
        .map(|flow| (flow.client.clone(), flow.target.clone(), flow.state.clone()))
        .collect();
    identities.sort();
    identities
}

fn established(scene: &Scene) -> Result<Vec<Flow>> {
    let mut flows = scene.daemon.flows()?;
    let dialled = listen(Family::V4).to_string();
    flows.retain(|flow| flow.state == "established" && flow.listen == dialled);
    Ok(flows)
}

fn came_through(scene: &Scene) -> Result<u64> {
    Ok(scene.daemon.rule(rule_name(Family::V4))?.to_target.packets)
}

#[rstest]
#[case::syns_over_native_xdp(Mode::Xdp, Segment::SYN)]
#[case::syns_over_tc(Mode::Tc, Segment::SYN)]
#[case::acks_over_native_xdp(Mode::Xdp, Segment::CLIENT_ACK)]
#[case::fins_over_native_xdp(Mode::Xdp, Segment { flags: 0x11, ..Segment::CLIENT_ACK })]
#[case::resets_over_native_xdp(Mode::Xdp, Segment { flags: 0x04, ..Segment::CLIENT_ACK })]
fn a_million_spoofed_segments_cost_no_established_connection_its_entry(
    #[case] mode: Mode,
    #[case] segment: Segment,
) -> Result<()> {
    let scene = scene(mode)?;
    let _echo = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let server = scene
        .lab
        .server_address()
        .endpoint(Family::V4, IPERF_LISTEN);
    let _iperf = iperf::Server::start(&scene.lab.server, IPERF_LISTEN)?;
    let port = IPERF_LISTEN.to_string();
    scene
        .daemon
        .add("iperf", "tcp", &port, &server.to_string())?;
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
        tcp::exchange(&mut stream, b"before")?;
        streams.push(stream);
    }
    let mut dialled = listen(Family::V4);
    dialled.set_port(IPERF_LISTEN);
    let transfer = iperf::Client::start(
        &scene.lab.client,
        dialled,
        iperf::Direction::Upload,
        TRANSFER,
    )?;
    let before = identities(&established(&scene)?);
    assert!(before.len() >= CONNECTIONS, "{before:?}");

    let mut pipeline = Pipeline::new(&scene.lab)?;
    let flood = Stream::to_gateway(LISTEN).of(Transport::Tcp(segment));
    for wave in 0..WAVES {
        let load = Load {
            frames: SPOOFED,
            flows: SPOOFED.next_power_of_two(),
            order: Order::Sequential,
            first: wave * SPOOFED,
        };
        pipeline.pour(&flood, load)?;
        if came_through(&scene)? > ENOUGH {
            break;
        }
    }
    let flooded = came_through(&scene)?;
    assert!(flooded > ENOUGH, "{flooded} of the flood came through");
    let proven = scene.daemon.events()?["flow_proven"];
    assert!(
        proven <= CONNECTIONS as u64 + 8,
        "the flood has proven {proven} flows"
    );
    let after = identities(&established(&scene)?);
    for flow in &before {
        assert!(after.contains(flow), "{flow:?} is gone");
    }
    for stream in &mut streams {
        tcp::exchange(stream, b"after")?;
    }
    let report = transfer.finish()?;
    assert!(report.bits_per_second > 0.0, "{report:?}");
    // Who comes now is served as ever.
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    tcp::exchange(&mut stream, b"anew")
}

/// Drops that the log tells of, and drops that it says it had no room for.
fn logged(scene: &Scene) -> Result<(u64, u64)> {
    let log = scene.daemon.log()?;
    let told = log.matches("dropped, reason 48").count() as u64;
    let mut lost = 0;
    for line in log.lines() {
        if let Some((line, _)) = line.split_once(" more packets were dropped than") {
            let (_, number) = line.rsplit_once(' ').context("no number in the log")?;
            lost += number.parse::<u64>()?;
        }
    }
    Ok((told, lost))
}

#[rstest]
#[case::behind_native_xdp(Mode::Xdp)]
#[case::in_tc(Mode::Tc)]
fn what_the_log_has_no_room_for_is_counted_and_forwarding_goes_on(
    #[case] mode: Mode,
) -> Result<()> {
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let mut scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.lab.wan_end().turn_gro_on()?;
    scene
        .daemon
        .set_environment(Some(("RUST_LOG", "info,portfwd::report=debug")));
    scene.daemon.stop()?;
    scene.daemon.start()?;
    scene.forward("tcp")?;
    let _echo = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let target = scene.lab.server_address().endpoint(Family::V4, TARGET);
    let (closed, target) = (CLOSED.to_string(), target.to_string());
    let nobody = ["--from", "203.0.113.0/24"];
    scene
        .daemon
        .add_with("closed", ["udp", &closed, &target], &nobody)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    tcp::exchange(&mut stream, b"before")?;
    let programs = scene.daemon.program_ids()?;

    let mut pipeline = Pipeline::new(&scene.lab)?;
    let load = Load {
        frames: REFUSED,
        flows: REFUSED.next_power_of_two(),
        order: Order::Sequential,
        first: 0,
    };
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| {
            for _ in 0..ROUND_TRIPS {
                tcp::exchange(&mut stream, &[0x5a; 10_000])?;
            }
            anyhow::Ok(())
        });
        pipeline.pour(&Stream::to_gateway(CLOSED), load)?;
        beside.join().expect("no panic beside the flood")
    })?;

    let refused = scene.daemon.drops()?["source_refused"];
    let lost = scene.daemon.events()?["log_lost"];
    assert!(lost > 0 && lost < refused, "{lost} of {refused}");
    wait_until("the log to be complete", PATIENCE, || {
        Ok(logged(&scene)? == (refused - lost, lost))
    })
    .with_context(|| format!("{:?} of {refused}, {lost} lost", logged(&scene)))?;
    tcp::exchange(&mut stream, b"after")?;
    assert_eq!(scene.daemon.program_ids()?, programs);
    Ok(())
}
