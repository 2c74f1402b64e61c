//! Interfaces that come, go, come back and change while the daemon runs.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portfwd::bpf::{Pins, Tables};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::lab::Offloads;
use portfwd_tests::{Family, Lab, LabOptions, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

/// How often an interface goes and comes back under another index.
const RETURNS: usize = 100;
/// How long a knock waits for its answer.
const KNOCK: Duration = Duration::from_millis(100);

fn offloads(mode: Mode) -> Offloads {
    LabOptions::for_mode(mode).offloads
}

fn knock(lab: &Lab, endpoint: SocketAddr) -> Result<bool> {
    let socket = udp::connect(&lab.client, endpoint)?;
    socket.set_read_timeout(Some(KNOCK))?;
    Ok(udp::exchange(&socket, b"knock").is_ok())
}

/// Waits until a datagram of a new flow gets there and back.
fn wait_until_forwarded(scene: &Scene, family: Family) -> Result<Duration> {
    let began = Instant::now();
    wait_until("packets to be forwarded", PATIENCE, || {
        knock(&scene.lab, listen(family))
    })?;
    Ok(began.elapsed())
}

/// `MODE` of an interface in `status`.
fn mode_of(scene: &Scene, interface: &str) -> Result<String> {
    let status = scene.daemon.json(&["status"])?;
    let interfaces = status["interfaces"].as_array().context("no interfaces")?;
    let found = interfaces.iter().find(|of| of["name"] == interface);
    let mode = found.and_then(|of| of["mode"].as_str());
    Ok(mode
        .with_context(|| format!("no {interface} in {status}"))?
        .to_string())
}

fn wait_for_mode(scene: &Scene, interface: &str, mode: &str) -> Result<()> {
    wait_until(&format!("{interface} to be {mode}"), PATIENCE, || {
        Ok(mode_of(scene, interface)? == mode)
    })
}

/// What of the daemon could leak with every return: its descriptors, the pinned links, the elements of INTERFACES.
#[derive(Debug, PartialEq, Eq)]
struct Possessions {
    descriptors: usize,
    links: BTreeSet<String>,
    interfaces: usize,
}

fn possessions(scene: &Scene) -> Result<Possessions> {
    let pid = scene.daemon.pid().context("no daemon")?;
    let links = fs::read_dir(Pins::new(&scene.daemon.pins()).links())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    Ok(Possessions {
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        links,
        interfaces: Tables::open_pinned(&scene.daemon.pins())?
            .interfaces()?
            .len(),
    })
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn an_interface_that_comes_back_under_another_index_is_attached_again_a_hundred_times(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let _echoes = [
        udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?,
        udp::Echo::start(&scene.lab.server, Family::V6, TARGET)?,
    ];
    wait_until_forwarded(&scene, Family::V4)?;
    let before = possessions(&scene)?;
    let mut longest = Duration::ZERO;
    for number in 0..RETURNS {
        if number % 2 == 0 {
            scene.lab.delete_wan()?;
            scene.lab.recreate_wan(offloads(mode))?;
        } else {
            scene.lab.delete_lan()?;
            scene.lab.recreate_lan(offloads(mode))?;
        }
        let took =
            wait_until_forwarded(&scene, Family::V4).with_context(|| format!("return {number}"))?;
        longest = longest.max(took);
    }
    wait_until_forwarded(&scene, Family::V6)?;
    eprintln!("forwarding again within {longest:?} at most, {RETURNS} times");
    wait_until("nothing to be left of the old interfaces", PATIENCE, || {
        let now = possessions(&scene)?;
        // A command of the test may still have had its connection to the daemon.
        Ok(now.descriptors <= before.descriptors
            && (now.links, now.interfaces) == (before.links.clone(), before.interfaces))
    })
    .with_context(|| format!("{before:?}, then {:?}", possessions(&scene)))?;
    ensure!(mode_of(&scene, "wan0")? == mode.word());
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn interfaces_that_do_not_exist_at_the_start_are_waited_for(#[case] mode: Mode) -> Result<()> {
    let lab = LabOptions::for_mode(mode).build()?;
    lab.delete_wan()?;
    lab.delete_lan()?;
    let daemon = DaemonOptions::new(mode).start(&lab.gateway)?;
    let scene = Scene { daemon, lab };
    scene.forward("udp")?;
    for interface in ["wan0", "lan0"] {
        assert_eq!(mode_of(&scene, interface)?, "waiting");
    }
    let status = scene.daemon.json(&["status"])?;
    assert_eq!(status["interfaces"][0]["reason"], "no such interface");

    scene.lab.recreate_lan(offloads(mode))?;
    wait_for_mode(&scene, "lan0", mode.word())?;
    assert_eq!(mode_of(&scene, "wan0")?, "waiting");
    scene.lab.recreate_wan(offloads(mode))?;
    wait_for_mode(&scene, "wan0", mode.word())?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        wait_until_forwarded(&scene, family)?;
    }
    Ok(())
}

#[test]
fn an_interface_that_went_is_said_to_be_waited_for() -> Result<()> {
    let scene = Scene::new(Mode::Tc)?;
    scene.lab.delete_wan()?;
    wait_for_mode(&scene, "wan0", "waiting")?;
    assert_eq!(mode_of(&scene, "lan0")?, "tc");
    let text = scene.daemon.ok(&["status"])?;
    ensure!(text.contains("no such interface"), "{text}");
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn an_interface_is_followed_by_its_name(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    wait_until_forwarded(&scene, Family::V4)?;
    scene.rename("wan0", "other0")?;
    wait_for_mode(&scene, "wan0", "waiting")?;
    let links = scene.lab.gateway.ip_json(&["link", "show", "other0"])?;
    ensure!(
        links[0]["xdp"].is_null(),
        "the XDP program stays at what is no more wan0: {links}"
    );
    ensure!(
        Tables::open_pinned(&scene.daemon.pins())?
            .interfaces()?
            .len()
            == 1
    );
    scene.rename("other0", "wan0")?;
    wait_for_mode(&scene, "wan0", mode.word())?;
    wait_until_forwarded(&scene, Family::V4)?;
    Ok(())
}

/// One of the two took the other's name within one burst of news: the daemon has never seen a time without a `wan0`.
#[test]
fn another_interface_of_the_same_name_is_another_interface() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "udp")?;
    scene
        .lab
        .gateway
        .ip("link add spare0 type veth peer name spare1\n")?;
    scene.rename("wan0", "former0")?;
    scene.rename("spare0", "wan0")?;
    let index = |name: &str| -> Result<u64> {
        let links = scene.lab.gateway.ip_json(&["link", "show", name])?;
        links[0]["ifindex"].as_u64().context("no ifindex")
    };
    let (former, now) = (index("former0")?, index("wan0")?);
    wait_until("the other interface to be the WAN", PATIENCE, || {
        let tables = Tables::open_pinned(&scene.daemon.pins())?;
        let indexes: Vec<_> = tables
            .interfaces()?
            .iter()
            .map(|interface| u64::from(interface.ifindex))
            .collect();
        Ok(indexes.contains(&now) && !indexes.contains(&former))
    })?;
    wait_for_mode(&scene, "wan0", "tc")
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn down_and_up_and_another_mac_address_and_mtu_are_followed(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    socket.set_read_timeout(Some(KNOCK))?;
    wait_until_forwarded(&scene, Family::V4)?;
    for change in [
        "link set wan0 down\nlink set wan0 up\n",
        "link set wan0 address 02:00:00:00:00:77\n",
        "link set wan0 mtu 1400\n",
        "link set lan0 down\nlink set lan0 address 02:00:00:00:00:78\nlink set lan0 up\n",
    ] {
        scene.lab.gateway.ip(change)?;
        // The client's kernel sends to the old MAC address until it asks again, which it may do only after half a minute. That
        // is not what is to be followed here.
        scene.lab.client.ip("neigh flush dev c0\n")?;
        wait_until("the flow to go on", PATIENCE, || {
            Ok(udp::exchange(&socket, b"still the same flow").is_ok())
        })
        .with_context(|| change.to_string())?;
    }
    let client = socket.local_addr()?.to_string();
    let flows = scene.daemon.flows()?;
    let flow = flows.iter().find(|flow| flow.client == client);
    let flow = flow.context("the flow has ended")?;
    ensure!(flow.to_client.packets >= 4, "{flow:?}");
    let tables = Tables::open_pinned(&scene.daemon.pins())?;
    let mtus: Vec<_> = tables.interfaces()?.iter().map(|of| of.mtu).collect();
    ensure!(mtus.contains(&1400), "{mtus:?}");
    Ok(())
}

/// What somebody else takes off is put back: by the review at the latest, and by the next event before that.
#[test]
fn a_link_that_somebody_detached_is_attached_again() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    wait_until_forwarded(&scene, Family::V4)?;
    scene.take_off("wan0")?;
    scene.lab.gateway.ip("link set wan0 txqueuelen 999\n")?;
    wait_until_forwarded(&scene, Family::V4)?;
    Ok(())
}
