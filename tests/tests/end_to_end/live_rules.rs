//! Rules come and go while traffic flows.

use std::io::ErrorKind;

use anyhow::{Context, Result};
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::{Family, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rule_acts_on_the_next_packet_and_so_does_its_removal(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    let refused = |socket: &std::net::UdpSocket| -> Result<()> {
        socket.send(b"knock")?;
        let error = udp::reported_error(socket)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        Ok(())
    };
    for _ in 0..5 {
        refused(&socket)?;
        scene.daemon.add("live", "udp", "8080", "10.2.0.2:80")?;
        udp::exchange(&socket, b"forwarded at once")?;
        scene.daemon.ok(&["remove", "live"])?;
        refused(&socket)?;
    }
    assert!(scene.daemon.rules()?.is_empty());
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn flows_of_other_rules_lose_nothing_while_rules_come_and_go(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V6, TARGET)?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 1000)?;
    let mut connection = tcp::connect(&scene.lab.client, listen(Family::V6))?;
    for number in 0..100 {
        let name = format!("passing-{number}");
        let port = (10_000 + number * 10).to_string();
        scene.daemon.add(&name, "both", &port, "10.2.0.2:80")?;
        tcp::exchange(&mut connection, b"still here")?;
        if number % 2 == 0 {
            scene.daemon.ok(&["remove", &name])?;
        }
    }
    stream.wait_for_more(200)?;
    let sent = stream.finish()?;
    assert_eq!(
        scene.daemon.rule(rule_name(Family::V4))?.to_target.packets,
        sent
    );
    assert_eq!(scene.daemon.rules()?.len(), 52);
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rule_that_comes_back_leads_to_its_new_target(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let first = udp::Echo::start(&scene.lab.server, Family::V4, 81)?;
    let second = udp::Echo::start(&scene.lab.server, Family::V4, 82)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    scene.daemon.add("service", "udp", "8080", "10.2.0.2:81")?;
    udp::exchange(&socket, b"to the first")?;
    scene.daemon.ok(&["remove", "service"])?;
    scene.daemon.add("service", "udp", "8080", "10.2.0.2:82")?;
    // The same socket: a flow of the old rule must not outlive it.
    udp::exchange(&socket, b"to the second")?;
    assert_eq!((first.peers().len(), second.peers().len()), (1, 1));
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_removed_rule_stops_its_flows_with_the_next_packet_and_no_other(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    let _other = tcp::Echo::start(&scene.lab.server, Family::V4, 81)?;
    scene.daemon.add("other", "tcp", "8081", "10.2.0.2:81")?;
    let other = GATEWAY_WAN.endpoint(Family::V4, 8081);
    let mut other = tcp::connect(&scene.lab.client, other)?;

    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let server = scene.lab.server_address().endpoint(family, TARGET);
        let server = udp::bind(&scene.lab.server, server)?;
        server.set_read_timeout(Some(here(PATIENCE)))?;
        let client = udp::connect(&scene.lab.client, listen(family))?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        client.send(b"while the rule is there")?;
        let (_, peer) = udp::receive(&server, &mut [0; 32])?;
        server.connect(peer)?;
        tcp::exchange(&mut stream, b"while the rule is there")?;

        scene.daemon.ok(&["remove", rule_name(family)])?;
        tcp::exchange(&mut other, b"other flows go on")?;
        // The gateway itself has no such port, and says so. What the server still sends does not leave with its own address.
        client.send(b"when it is gone")?;
        let error = udp::reported_error(&client)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family}");
        let late = private_sources(&scene)?;
        server.send(b"when it is gone")?;
        wait_until("the server's datagram to be dropped", PATIENCE, || {
            Ok(private_sources(&scene)? > late)
        })?;
        let error = tcp::exchange(&mut stream, b"when it is gone").err();
        let error: std::io::Error = error.context("the server answered")?.downcast()?;
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family}");
    }
    tcp::exchange(&mut other, b"other flows go on")?;
    assert_eq!(scene.daemon.flows()?.len(), 1);
    let drops = scene.daemon.drops()?;
    assert!(drops.into_keys().eq(["private_source"]));
    Ok(())
}

/// Packets that were dropped because they would have left with an address of the LAN.
fn private_sources(scene: &Scene) -> Result<u64> {
    let drops = scene.daemon.drops()?;
    Ok(drops.get("private_source").copied().unwrap_or_default())
}

#[test]
fn several_rules_are_removed_in_one_go_or_none_is() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    for port in 1..=4_u16 {
        let listen = (LISTEN + port).to_string();
        scene
            .daemon
            .add(&format!("r{port}"), "tcp", &listen, "10.2.0.2:80")?;
    }
    let output = scene.daemon.cli(&["remove", "r1", "r2", "nobody"])?;
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(scene.daemon.rules()?.len(), 4);
    let id = scene.daemon.rule("r3")?.id.to_string();
    scene.daemon.ok(&["remove", "r1", &id])?;
    let left: Vec<_> = scene
        .daemon
        .rules()?
        .into_iter()
        .filter_map(|rule| rule.name)
        .collect();
    assert_eq!(left, ["r2", "r4"]);
    Ok(())
}

/// Changes of several clients at once happen one after the other: none is lost, and each answer is true.
#[test]
fn changes_of_many_clients_at_once_are_all_there() -> Result<()> {
    const CLIENTS: u16 = 6;
    const EACH: u16 = 8;
    let scene = Scene::new(Mode::Tc)?;
    let change = |client: u16| -> Result<()> {
        for number in 0..EACH {
            let port = (20_000 + client * EACH + number).to_string();
            scene
                .daemon
                .add(&format!("r{port}"), "udp", &port, "10.2.0.2")?;
            if number % 2 == 1 {
                scene.daemon.ok(&["remove", &format!("r{port}")])?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| scope.spawn(move || change(n)))
            .collect();
        for client in clients {
            client.join().expect("the client does not panic")?;
        }
        Ok(())
    })?;
    let mut names: Vec<_> = scene
        .daemon
        .rules()?
        .into_iter()
        .filter_map(|rule| rule.name)
        .collect();
    names.sort();
    let expected: Vec<_> = (0..CLIENTS * EACH)
        .filter(|number| number % 2 == 0)
        .map(|number| format!("r{}", 20_000 + number))
        .collect();
    assert_eq!(names, expected);
    Ok(())
}
