//! The daemon dies and comes back; traffic does not notice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portfwd_tests::daemon::{Flow, Mode};
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::{Family, snmp, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// A port for the stream beside iperf3's.
const STREAM_LISTEN: u16 = 8081;
const STREAM_TARGET: u16 = 81;

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn killing_the_daemon_under_load_and_starting_it_again_loses_nothing(
    #[case] mode: Mode,
) -> Result<()> {
    let mut scene = Scene::forwarding(mode, "tcp")?;
    let target = format!("10.2.0.2:{STREAM_TARGET}");
    scene
        .daemon
        .add("stream", "udp", &STREAM_LISTEN.to_string(), &target)?;
    for end in [scene.lab.client_end(), scene.lab.server_end()] {
        end.queue_instead_of_dropping()?;
    }
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, STREAM_TARGET)?;
    let _server = iperf::Server::start(&scene.lab.server, TARGET)?;

    let mut endpoint = listen(Family::V4);
    endpoint.set_port(STREAM_LISTEN);
    let stream = udp::Stream::start(&scene.lab.client, endpoint, 1000)?;
    let transfer = iperf::Client::start_gently(
        &scene.lab.client,
        listen(Family::V4),
        Direction::Download,
        Duration::from_secs(6),
    )?;
    stream.wait_for_more(1000)?;
    let before = stream_flow(&scene)?;

    scene.daemon.kill9()?;
    stream.wait_for_more(1500)?;
    let orphaned = stream_flow(&scene).context("the nouns work from the pins")?;
    ensure!(orphaned.to_target.packets > before.to_target.packets + 1000);

    scene.daemon.start()?;
    stream.wait_for_more(1500)?;
    let after = stream_flow(&scene)?;
    ensure!(
        after.client == before.client
            && after.age_s > before.age_s
            && after.to_target.packets > orphaned.to_target.packets + 1000,
        "the flow entry was not kept: {before:?}, then {after:?}"
    );

    expect_no_standstill(&transfer.finish()?)?;
    let sent = stream.finish()?;
    let rule = scene.daemon.rule("stream")?;
    assert_eq!(
        (rule.to_target.packets, rule.to_client.packets),
        (sent, sent)
    );
    expect_every_segment_translated(&scene)?;
    scene.expect_no_errors()
}

/// How often a sender sent a segment again says nothing about loss: on a busy machine it gives up segments for lost that are
/// only late. A connection that lost what the daemon's death took would stand still until it times out.
fn expect_no_standstill(report: &iperf::Report) -> Result<()> {
    const A_SECOND: usize = 10;
    let moved = |rates: &[f64]| rates.iter().any(|rate| *rate > 0.0);
    ensure!(
        report.intervals.windows(A_SECOND).all(moved),
        "the transfer stood still: {report:?}"
    );
    Ok(())
}

/// What the kernels of client and server sent over TCP, portfwd has counted, to the segment: none went another way.
fn expect_every_segment_translated(scene: &Scene) -> Result<()> {
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    let sent = (
        snmp::tcp_segments_sent(&scene.lab.client)?,
        snmp::tcp_segments_sent(&scene.lab.server)?,
    );
    assert_eq!((rule.to_target.packets, rule.to_client.packets), sent);
    Ok(())
}

fn stream_flow(scene: &Scene) -> Result<Flow> {
    scene
        .daemon
        .flows()?
        .into_iter()
        .find(|flow| flow.proto == "udp")
        .context("no UDP flow")
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_daemon_that_is_asked_to_end_leaves_traffic_flowing(#[case] mode: Mode) -> Result<()> {
    let mut scene = Scene::forwarding(mode, "both")?;
    let _echo = tcp::Echo::start(&scene.lab.server, Family::V6, TARGET)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V6))?;
    tcp::exchange(&mut stream, b"with the daemon")?;
    scene.daemon.stop()?;
    tcp::exchange(&mut stream, b"without it")?;
    let mut second = tcp::connect(&scene.lab.client, listen(Family::V6))?;
    tcp::exchange(&mut second, b"new connections too")?;
    assert_eq!(scene.daemon.cli(&["status"])?.status.code(), Some(3));
    assert_eq!(scene.daemon.rule(rule_name(Family::V6))?.flows, 2);
    scene.daemon.start()?;
    tcp::exchange(&mut stream, b"with the next")?;
    assert_eq!(scene.daemon.rule(rule_name(Family::V6))?.flows, 2);
    Ok(())
}

#[test]
fn rules_survive_a_reboot() -> Result<()> {
    let mut scene = Scene::forwarding(Mode::Tc, "both")?;
    scene
        .daemon
        .add("range", "udp", "20000-20099", "10.2.0.2:30000-30099")?;
    let before = rules_as_text(&scene)?;
    scene.daemon.kill9()?;
    // A reboot takes the pins and everything in the kernel, and leaves the state file.
    std::fs::remove_dir_all(scene.daemon.pins())?;
    scene.daemon.start()?;
    assert_eq!(rules_as_text(&scene)?, before);
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 30042)?;
    let mut endpoint = listen(Family::V4);
    endpoint.set_port(20042);
    udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")
}

/// The rules without their counters, which end with the kernel that counted.
fn rules_as_text(scene: &Scene) -> Result<Vec<String>> {
    Ok(scene
        .daemon
        .rules()?
        .into_iter()
        .map(|rule| {
            format!(
                "{} {:?} {} {} {}",
                rule.id, rule.name, rule.proto, rule.listen, rule.target
            )
        })
        .collect())
}

#[test]
fn a_rule_added_after_the_restart_works_beside_the_old_ones() -> Result<()> {
    let mut scene = Scene::forwarding(Mode::Xdp, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    scene.daemon.kill9()?;
    scene.daemon.start()?;
    scene.daemon.add("new", "udp", "9090", "10.2.0.2:80")?;
    for port in [LISTEN, 9090] {
        let mut endpoint = listen(Family::V4);
        endpoint.set_port(port);
        udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")?;
    }
    scene.daemon.ok(&["remove", rule_name(Family::V4)])?;
    assert_eq!(scene.daemon.rules()?.len(), 2);
    Ok(())
}
