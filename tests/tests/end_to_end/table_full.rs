//! A connection table without room: what is static goes on without it, and nobody who is in it is put out.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Result;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::wait_until;
use portfwd_tests::{Family, LabOptions, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// Flows that the table holds.
const ROOM: usize = 16;
const DEADLINE: Duration = Duration::from_secs(20);

fn scene(mode: Mode) -> Result<Scene> {
    let options = DaemonOptions {
        max_flows: Some(ROOM as u32),
        ..DaemonOptions::new(mode)
    };
    Scene::with(LabOptions::for_mode(mode), options)
}

/// Takes all the room of a family: so many clients that have had an answer.
fn fill(scene: &Scene, family: Family) -> Result<Vec<UdpSocket>> {
    let clients = more_clients(scene, listen(family), ROOM)?;
    for client in &clients {
        udp::exchange(client, b"while there is room")?;
    }
    assert_eq!(scene.daemon.rule(rule_name(family))?.flows, ROOM as u64);
    assert_eq!(scene.daemon.events()?.get("stateless"), None);
    Ok(clients)
}

fn more_clients(scene: &Scene, endpoint: SocketAddr, count: usize) -> Result<Vec<UdpSocket>> {
    (0..count)
        .map(|_| udp::connect(&scene.lab.client, endpoint))
        .collect()
}

#[rstest]
#[case::over_native_xdp_and_ipv4(Mode::Xdp, Family::V4)]
#[case::over_native_xdp_and_ipv6(Mode::Xdp, Family::V6)]
#[case::over_tc_and_ipv4(Mode::Tc, Family::V4)]
#[case::over_tc_and_ipv6(Mode::Tc, Family::V6)]
fn a_static_forward_works_both_ways_without_room_and_is_counted(
    #[case] mode: Mode,
    #[case] family: Family,
) -> Result<()> {
    const EXCHANGES: u64 = 3;
    let scene = scene(mode)?;
    scene.forward("both")?;
    let echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
    let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
    let inside = fill(&scene, family)?;

    let outside = more_clients(&scene, listen(family), ROOM)?;
    for _ in 0..EXCHANGES {
        for client in outside.iter().chain(&inside) {
            udp::exchange(client, b"there and back")?;
        }
    }
    assert_eq!(echo.peers().len(), 2 * ROOM, "each has an endpoint");
    let rule = scene.daemon.rule(rule_name(family))?;
    let packets = ROOM as u64 * (1 + 2 * EXCHANGES);
    assert_eq!(
        (rule.flows, rule.to_target.packets, rule.to_client.packets),
        (2 * ROOM as u64, packets, packets)
    );
    assert_eq!(scene.daemon.events()?["flow_proven"], ROOM as u64);

    let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
    tcp::exchange(&mut stream, &[0x5a; 100_000])?;
    drop(stream);
    assert_eq!(scene.daemon.events()?["flow_proven"], ROOM as u64);
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn what_cannot_do_without_an_entry_is_dropped_and_counted(#[case] mode: Mode) -> Result<()> {
    const DATAGRAMS: u64 = 5;
    let scene = scene(mode)?;
    scene.forward("udp")?;
    // The second rule with this target: which of the two an answer belongs to, only an entry can tell.
    let mut other = listen(Family::V4);
    other.set_port(LISTEN + 1);
    let port = other.port().to_string();
    scene.daemon.add("other", "udp", &port, "10.2.0.2:80")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let inside = fill(&scene, Family::V4)?;
    let before = scene.daemon.rule(rule_name(Family::V4))?.to_target.packets;

    for endpoint in [listen(Family::V4), other] {
        let outside = udp::connect(&scene.lab.client, endpoint)?;
        outside.set_read_timeout(Some(Duration::from_millis(200)))?;
        // The first may begin a flow; all others would have it stay, and so would the answer.
        for _ in 0..=DATAGRAMS {
            outside.send(b"no room")?;
        }
        let error = udp::reported_error(&outside)?;
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
    }
    let dropped = BTreeMap::from([("table_full".to_string(), 2 * (DATAGRAMS + 1))]);
    wait_until("the answers to be dropped, too", DEADLINE, || {
        Ok(scene.daemon.drops()? == dropped)
    })?;
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    assert_eq!(
        rule.to_target.packets,
        before + 1,
        "what is dropped is not counted as forwarded"
    );
    assert_eq!(scene.daemon.rule("other")?.to_target.packets, 1);

    for client in &inside {
        udp::exchange(client, b"established flows stay")?;
    }
    // The other family has a table of its own, with room.
    let _echo = udp::Echo::start(&scene.lab.server, Family::V6, TARGET)?;
    let client = udp::connect(&scene.lab.client, listen(Family::V6))?;
    udp::exchange(&client, b"room enough")
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_removed_rules_flows_make_room(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    scene.forward("udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let inside = fill(&scene, Family::V4)?;
    let name = rule_name(Family::V4);
    scene.daemon.ok(&["remove", name])?;
    let port = LISTEN.to_string();
    scene.daemon.add(name, "udp", &port, "10.2.0.2:80")?;
    // The same clients: their old flows died with their rule, and the new ones take their place.
    for client in &inside {
        udp::exchange(client, b"once more")?;
    }
    assert_eq!(scene.daemon.rule(name)?.flows, ROOM as u64);
    assert_eq!(scene.daemon.events()?.get("stateless"), None);
    scene.expect_no_errors()
}
