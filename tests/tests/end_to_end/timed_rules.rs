//! Rules that end, rules that open and close, rules that are not enabled, rules with tags.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::process::Command;

use anyhow::Result;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::process::run_for_text;
use portfwd_tests::{Family, udp};

use crate::scene::{LISTEN, Scene, TARGET, listen};

fn expect_refused(socket: &UdpSocket) -> Result<()> {
    socket.send(b"knock")?;
    assert_eq!(
        udp::reported_error(socket)?.kind(),
        ErrorKind::ConnectionRefused
    );
    Ok(())
}

#[test]
fn a_lease_ends_by_itself_also_over_a_restart() -> Result<()> {
    let mut scene = Scene::new(Mode::Xdp)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    let add = [
        "add",
        "udp",
        "8080",
        "10.2.0.2:80",
        "--name",
        "leased",
        "--expires",
    ];
    for restart in [false, true] {
        scene.daemon.ok(&[&add[..], &["2s"]].concat())?;
        assert!(scene.daemon.rule("leased")?.expires.is_some());
        udp::exchange(&socket, b"for two seconds")?;
        if restart {
            scene.daemon.kill9()?;
            scene.daemon.start()?;
        }
        wait_until("the lease to end", PATIENCE, || {
            Ok(scene.daemon.rules()?.is_empty())
        })?;
        expect_refused(&socket)?;
    }
    let output = scene
        .daemon
        .cli(&[&add[..], &["2020-01-01T00:00:00Z"]].concat())?;
    assert_eq!(output.status.code(), Some(2));
    Ok(())
}

/// A schedule that is open, or closed, for hours from here on.
fn schedule(open: bool) -> Result<String> {
    let hour: u32 = run_for_text(Command::new("date").args(["-u", "+%-H"]))?
        .trim()
        .parse()?;
    let (from, to) = if open {
        (hour + 22, hour + 3)
    } else {
        (hour + 3, hour + 5)
    };
    Ok(format!("daily {:02}:30-{:02}:30 UTC", from % 24, to % 24))
}

#[test]
fn a_rule_forwards_when_its_schedule_says_so() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    let words = [
        "udp",
        "8080",
        "10.2.0.2:80",
        "--name",
        "timed",
        "--schedule",
    ];
    scene
        .daemon
        .ok(&[&["add"], &words[..], &[&schedule(true)?]].concat())?;
    udp::exchange(&socket, b"in time")?;
    assert!(scene.daemon.rule("timed")?.open);
    scene
        .daemon
        .ok(&[&["replace", "timed"], &words[..], &[&schedule(false)?]].concat())?;
    assert!(!scene.daemon.rule("timed")?.open);
    expect_refused(&socket)?;
    // Its port is taken all the same.
    let output = scene.daemon.cli(&["add", "udp", "8080", "10.2.0.2:81"])?;
    assert_eq!(output.status.code(), Some(6));
    Ok(())
}

#[test]
fn a_rule_that_is_not_enabled_waits_and_keeps_its_counters() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    let words = ["udp", "8080", "10.2.0.2:80", "--name", "web"];
    scene.daemon.ok(&[&["add"], &words[..]].concat())?;
    udp::exchange(&socket, b"enabled")?;
    let replace = [&["replace", "web"], &words[..]].concat();
    scene.daemon.ok(&[&replace[..], &["--disabled"]].concat())?;
    expect_refused(&socket)?;
    scene.daemon.ok(&replace)?;
    udp::exchange(&socket, b"enabled again")?;
    assert_eq!(scene.daemon.rule("web")?.to_target.packets, 2);
    Ok(())
}

#[test]
fn rules_are_found_and_removed_by_their_tags() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    for (number, tags) in [&["shop", "public"][..], &["shop"], &["public"], &[]]
        .iter()
        .enumerate()
    {
        let (name, port) = (format!("r{number}"), (LISTEN + number as u16).to_string());
        let mut words = vec!["add", "tcp", &port, "10.2.0.2", "--name", &name];
        for tag in *tags {
            words.extend(["--tag", tag]);
        }
        scene.daemon.ok(&words)?;
    }
    let found = scene.daemon.json(&["rules", "--tag", "shop"])?;
    assert_eq!(found.as_array().map(Vec::len), Some(2));
    assert_eq!(
        scene
            .daemon
            .cli(&["remove", "--tag", "nobody", "r3"])?
            .status
            .code(),
        Some(5)
    );
    scene.daemon.ok(&["remove", "--tag", "shop"])?;
    let left: Vec<_> = scene
        .daemon
        .rules()?
        .into_iter()
        .map(|rule| (rule.name, rule.tags))
        .collect();
    assert_eq!(
        left,
        [
            (Some("r2".to_string()), vec!["public".to_string()]),
            (Some("r3".to_string()), vec![]),
        ]
    );
    Ok(())
}
