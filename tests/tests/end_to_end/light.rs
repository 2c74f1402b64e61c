//! Rules with light tracking: the same to both ends, exact figures of rules, and entries that are left alone.

use std::io::ErrorKind;

use anyhow::{Context, Result, bail, ensure};
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::{Family, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

const LIGHT: [&str; 2] = ["--track", "light"];

/// The rules of [`Scene::forward`], with light tracking.
fn scene(mode: Mode) -> Result<Scene> {
    let scene = Scene::new(mode)?;
    for family in Family::BOTH {
        add(&scene, family, TARGET)?;
    }
    Ok(scene)
}

fn add(scene: &Scene, family: Family, target: u16) -> Result<()> {
    let target = scene.lab.server_address().endpoint(family, target);
    let rule = ["both", "8080", &target.to_string()];
    scene.daemon.add_with(rule_name(family), rule, &LIGHT)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn traffic_goes_through_and_is_counted_for_the_rule_while_entries_are_left_alone(
    #[case] mode: Mode,
) -> Result<()> {
    const SEGMENTS: usize = 200;
    let scene = scene(mode)?;
    let listed = scene.daemon.json(&["rules"])?;
    assert_eq!(listed[0]["track"], "light");
    for family in Family::BOTH {
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let stream = udp::Stream::start(&scene.lab.client, listen(family), 2_000)?;
        // Until the neighbours are known on either side every packet has to be looked at, with light tracking or without.
        stream.wait_for_more(1_000)?;
        let before = wait_for_rest(&stream, &scene)?;
        stream.wait_for_more(4_000)?;
        let after = met(&scene)?;
        let sent = stream.finish()?;
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!(
            (rule.to_target.packets, rule.to_client.packets),
            (sent, sent),
            "{family}"
        );
        // An IP header, that of UDP, and a number.
        let header = if family == Family::V4 { 20 } else { 40 };
        assert_eq!(rule.to_target.bytes, sent * (header + 8 + 8));
        for (before, after) in before.iter().zip(after) {
            let met = after - before;
            let events = scene.daemon.events()?;
            ensure!(met <= 100, "{met} of 4000 were met, {family}: {events:?}");
        }

        let mut connection = tcp::connect(&scene.lab.client, listen(family))?;
        for _ in 0..SEGMENTS {
            tcp::exchange(&mut connection, &[7; 3_000])?;
        }
        let state = |is: &str| {
            let flows = scene.daemon.flows()?.into_iter();
            let mut states = flows
                .filter(|flow| flow.proto == "tcp")
                .map(|flow| flow.state);
            Ok(states.any(|state| state == is))
        };
        wait_until("the connection to be listed", PATIENCE, || {
            state("established")
        })?;
        drop(connection);
        wait_until("its end to be listed", PATIENCE, || state("closing"))?;
        scene.daemon.ok(&["remove", rule_name(family)])?;
    }
    scene.expect_no_errors()
}

/// Packets of the only stream of datagrams that its entries have met, in either direction.
fn met(scene: &Scene) -> Result<[u64; 2]> {
    let flows = scene.daemon.flows()?.into_iter();
    let flows: Vec<_> = flows.filter(|flow| flow.proto == "udp").collect();
    let [flow] = &flows[..] else {
        bail!("one stream is one flow, not {}", flows.len())
    };
    Ok([flow.to_target.packets, flow.to_client.packets])
}

/// Waits until entries meet few of the stream's packets: neighbours are known on both sides.
fn wait_for_rest(stream: &udp::Stream, scene: &Scene) -> Result<[u64; 2]> {
    let mut now = met(scene)?;
    for _ in 0..20 {
        let before = now;
        stream.wait_for_more(500)?;
        now = met(scene)?;
        if now
            .iter()
            .zip(before)
            .all(|(now, before)| now - before <= 50)
        {
            return Ok(now);
        }
    }
    bail!("entries go on meeting packets: {now:?}")
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_daemons_death_and_return_lose_nothing(#[case] mode: Mode) -> Result<()> {
    let mut scene = scene(mode)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 1_000)?;
    stream.wait_for_more(500)?;
    scene.daemon.kill9()?;
    stream.wait_for_more(1_500)?;
    scene.daemon.start()?;
    stream.wait_for_more(1_500)?;
    let sent = stream.finish()?;
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    assert_eq!(
        (rule.to_target.packets, rule.to_client.packets),
        (sent, sent)
    );
    assert_eq!(scene.daemon.json(&["rules"])?[0]["track"], "light");
    // Without a daemon a way out is looked at every second, and its packet told to the entry.
    let flows = scene.daemon.flows()?;
    let met = flows.iter().map(|flow| flow.to_target.packets).sum::<u64>();
    ensure!(met <= sent / 20, "{met} of {sent} were met");
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_removed_rule_stops_its_packets_at_once(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    for family in Family::BOTH {
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        let mut connection = tcp::connect(&scene.lab.client, listen(family))?;
        for _ in 0..50 {
            udp::exchange(&socket, b"while it is there")?;
            tcp::exchange(&mut connection, b"while it is there")?;
        }
        scene.daemon.ok(&["remove", rule_name(family)])?;
        socket.send(b"when it is gone")?;
        let error = udp::reported_error(&socket)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family}");
        let error = tcp::exchange(&mut connection, b"when it is gone").err();
        let error: std::io::Error = error.context("the server answered")?.downcast()?;
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family}");
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn packets_follow_a_change_of_the_rule_at_once_and_lose_nothing(#[case] mode: Mode) -> Result<()> {
    const NEW: u16 = 82;
    let scene = scene(mode)?;
    let old = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let new = udp::Echo::start(&scene.lab.server, Family::V4, NEW)?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 1_000)?;
    stream.wait_for_more(500)?;
    assert_eq!((old.peers().len(), new.peers().len()), (1, 0));
    let target = scene.lab.server_address().endpoint(Family::V4, NEW);
    let name = rule_name(Family::V4);
    let replace = ["replace", name, "both", "8080", &target.to_string()];
    scene.daemon.ok(&[&replace[..], &LIGHT].concat())?;
    wait_until("the new server to be asked", PATIENCE, || {
        Ok(new.peers().len() == 1)
    })?;
    stream.wait_for_more(500)?;
    let (sent, gaps) = stream.finish_with_sent_and_gaps()?;
    wait_until("every datagram to have come to a server", PATIENCE, || {
        Ok(old.received() + new.received() == sent)
    })?;
    // What the old server was about to answer when its rule went does not leave, however far behind it was.
    ensure!(gaps.len() <= 1, "{gaps:?}");
    Ok(())
}

/// An answer that comes while the tracking of its rule changes is the target's, whose rule is the same.
#[test]
fn a_rule_goes_from_full_tracking_to_light_and_back() -> Result<()> {
    let scene = Scene::forwarding(Mode::Xdp, "both")?;
    let name = rule_name(Family::V4);
    let _udp = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    let mut connection = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    let target = scene.lab.server_address().endpoint(Family::V4, TARGET);
    let replace = ["replace", name, "both", "8080", &target.to_string()];
    for track in ["light", "full", "light"] {
        udp::exchange(&socket, b"before")?;
        tcp::exchange(&mut connection, &[7; 100_000])?;
        scene
            .daemon
            .ok(&[&replace[..], &["--track", track]].concat())?;
        let rules = scene.daemon.json(&["rules"])?;
        let rules = rules.as_array().context("no list")?;
        let rule = rules.iter().find(|rule| rule["name"] == name);
        assert_eq!(rule.context("it is gone")?["track"], track);
    }
    udp::exchange(&socket, b"after")?;
    tcp::exchange(&mut connection, &[7; 100_000])?;
    scene.expect_no_errors()
}

/// On a copy that knows no way out yet.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_packet_is_explained_as_with_full_tracking(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    scene.daemon.add("full", "udp", "8081", "10.2.0.2:81")?;
    let rule = ["udp", "8082", "10.2.0.2:82"];
    scene.daemon.add_with("light", rule, &LIGHT)?;
    let explain = |port: &str| -> Result<_> {
        let client = CLIENT.endpoint(Family::V4, 40_000).to_string();
        let told = scene.daemon.json(&["explain", "udp", &client, port])?;
        let fate = |leg: &str| told[leg]["fate"].clone();
        Ok([told["conclusion"].clone(), fate("there"), fate("back")])
    };
    let (full, light) = (explain("8081")?, explain("8082")?);
    ensure!(full.iter().all(|said| !said.is_null()), "{full:?}");
    assert_eq!(light, full);
    Ok(())
}
