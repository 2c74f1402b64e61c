//! Floods from forged sources: they drive out each other, and nobody who is in the connection table.

use std::time::Duration;

use anyhow::Result;
use portfwd_tests::daemon::{DaemonOptions, Flow, Mode};
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
