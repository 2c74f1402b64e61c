//! Targets by name: a real name server, and rules that follow what it says.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{SECOND_SERVER, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::dns::NameServer;
use portfwd_tests::lab::ServerSide;
use portfwd_tests::{Family, LabOptions, tcp, udp};
use rstest::rstest;
use serde_json::Value;

use crate::scene::{LISTEN, Scene, TARGET, listen};

const NAME: &str = "web.lan";

/// The first server, and with it the name server, and a second one; the daemon asks every second.
fn scene() -> Result<(Scene, NameServer)> {
    let lab = LabOptions::for_mode(Mode::Tc)
        .server_side(ServerSide::TwoLans)
        .build()?;
    let names = NameServer::start(&lab.server, SERVER.of(Family::V4))?;
    let mut options = DaemonOptions::new(Mode::Tc);
    options.lan.push("lan1".into());
    options.resolv_conf = Some(names.resolv_conf());
    options.resolve_every = Some(1);
    let daemon = options.start(&lab.gateway)?;
    Ok((Scene { daemon, lab }, names))
}

fn add(scene: &Scene, more: &[&str]) -> Result<String> {
    let (listen, target) = (LISTEN.to_string(), format!("{NAME}:{TARGET}"));
    let arguments = ["add", "both", &listen, &target, "--name", "web"];
    scene.daemon.ok(&[&arguments, more].concat())
}

fn wait_for_target(scene: &Scene, address: IpAddr) -> Result<()> {
    wait_until("the rule to follow its name", PATIENCE, || {
        Ok(scene.daemon.rule("web")?.target == format!("{address}:{TARGET}"))
    })
    .with_context(|| format!("{:?}", scene.daemon.rule("web")))
}

fn reported_error(scene: &Scene) -> Result<Option<String>> {
    let rules = scene.daemon.json(&["rules"])?;
    ensure!(rules[0]["host"]["name"] == NAME, "{rules}");
    Ok(rules[0]["host"]["error"].as_str().map(str::to_string))
}

/// Where flows that began before the change go on afterwards.
#[rstest]
#[case::kept(&["--flows", "keep"], true, true)]
#[case::drained(&["--flows", "drain"], true, false)]
#[case::drained_unless_it_is_said(&[], true, false)]
#[case::killed(&["--flows", "kill"], false, false)]
fn a_rule_follows_its_name_and_its_flows_as_it_says(
    #[case] options: &[&str],
    #[case] connections_stay: bool,
    #[case] datagrams_stay: bool,
) -> Result<()> {
    let (scene, names) = scene()?;
    let family = Family::V4;
    let second = scene.lab.second_server()?;
    let _tcp = [
        tcp::Echo::start(&scene.lab.server, family, TARGET)?,
        tcp::Echo::start(second, family, TARGET)?,
    ];
    let udp = [
        udp::Echo::start(&scene.lab.server, family, TARGET)?,
        udp::Echo::start(second, family, TARGET)?,
    ];
    names.publish(&[(NAME, SERVER.of(family))])?;
    let said = add(&scene, options)?;
    ensure!(said.contains("web.lan at 10.2.0.2:80"), "{said}");
    let mut connection = tcp::connect(&scene.lab.client, listen(family))?;
    tcp::exchange(&mut connection, b"to the first")?;
    let socket = udp::connect(&scene.lab.client, listen(family))?;
    udp::exchange(&socket, b"to the first")?;
    let client = socket.local_addr()?;

    names.publish(&[(NAME, SECOND_SERVER.of(family))])?;
    wait_for_target(&scene, SECOND_SERVER.of(family))?;
    let mut new = tcp::connect(&scene.lab.client, listen(family))?;
    ensure!(tcp::exchange(&mut new, b"to the second").is_ok());
    ensure!(
        tcp::exchange(&mut connection, b"which one is it now").is_ok() == connections_stay,
        "the connection"
    );
    udp::exchange(&socket, b"which one is it now")?;
    assert_eq!(
        !udp[1].peers().contains(&client),
        datagrams_stay,
        "the datagrams"
    );
    let text = scene.daemon.ok(&["rules"])?;
    ensure!(text.contains("web.lan at 10.4.0.2:80"), "{text}");
    Ok(())
}

#[test]
fn a_name_server_that_does_not_answer_changes_nothing_and_keeps_nobody_waiting() -> Result<()> {
    let (mut scene, names) = scene()?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    names.publish(&[(NAME, SERVER.of(Family::V4))])?;
    add(&scene, &[])?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"before")?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 500)?;

    names.fall_silent()?;
    wait_until("the failure to be reported", PATIENCE, || {
        Ok(reported_error(&scene)?.is_some())
    })?;
    let text = scene.daemon.ok(&["rules"])?;
    ensure!(
        text.contains("goes on to 10.2.0.2:80: web.lan cannot be resolved"),
        "{text}"
    );
    // Lookups are under way all the time now; others are served.
    scene.daemon.add("other", "udp", "9999", "10.2.0.2")?;
    udp::exchange(&socket, b"meanwhile")?;

    scene.daemon.kill9()?;
    scene.daemon.start()?;
    assert_eq!(scene.daemon.rule("web")?.target, "10.2.0.2:80");
    udp::exchange(&socket, b"after a restart")?;
    scene
        .daemon
        .stop()
        .context("it does not wait for an answer")?;
    scene.daemon.start()?;
    stream.finish()?;

    drop(names);
    let names = NameServer::start(&scene.lab.server, SERVER.of(Family::V4))?;
    names.publish(&[(NAME, SECOND_SERVER.of(Family::V4))])?;
    wait_for_target(&scene, SECOND_SERVER.of(Family::V4))?;
    assert_eq!(reported_error(&scene)?, None);
    Ok(())
}

/// A rule has one family; a name may have addresses of both.
#[test]
fn the_family_of_a_name_is_chosen_once() -> Result<()> {
    let (scene, names) = scene()?;
    let both = |host: portfwd_tests::DualStack| Family::BOTH.map(|family| (NAME, host.of(family)));
    names.publish(&both(SERVER))?;
    for (name, more, expected) in [
        ("either", &[][..], "10.2.0.2:80"),
        ("v4", &["--family", "ipv4"], "10.2.0.2:80"),
        ("v6", &["--family", "ipv6"], "[2001:db8:2::2]:80"),
    ] {
        let listen = (9000 + name.len()).to_string();
        let target = format!("{NAME}:{TARGET}");
        let arguments = ["add", "tcp", &listen, &target, "--name", name];
        scene.daemon.ok(&[&arguments, more].concat())?;
        assert_eq!(scene.daemon.rule(name)?.target, expected);
        if name == "either" {
            scene.daemon.ok(&["remove", name])?;
        }
    }
    let target = format!("{NAME}:{TARGET}");
    scene
        .daemon
        .add("as-listen", "tcp", "[2001:db8:1::1]:7000", &target)?;
    assert_eq!(scene.daemon.rule("as-listen")?.target, "[2001:db8:2::2]:80");
    names.publish(&both(SECOND_SERVER))?;
    for (name, expected) in [("v4", "10.4.0.2:80"), ("v6", "[2001:db8:4::2]:80")] {
        wait_until("the rule to follow its name", PATIENCE, || {
            Ok(scene.daemon.rule(name)?.target == expected)
        })?;
    }
    Ok(())
}

#[test]
fn a_name_that_leads_nowhere_or_must_not_be_one_is_refused() -> Result<()> {
    let (scene, names) = scene()?;
    names.publish(&[
        (NAME, SERVER.of(Family::V4)),
        ("gateway.lan", "10.1.0.1".parse()?),
    ])?;
    for (target, code, about) in [
        (&["nobody.lan"][..], 1, "cannot resolve nobody.lan"),
        // It has no address of the family.
        (
            &["web.lan", "--family", "ipv6"],
            1,
            "cannot resolve web.lan",
        ),
        (&["web.lan", "--family", "ipx"], 2, "ipx"),
        (&["10.2.0.2", "--family", "ipv4"], 2, "10.2.0.2"),
        // It leads to the gateway itself.
        (&["gateway.lan"], 2, "10.1.0.1"),
    ] {
        let output = scene
            .daemon
            .cli(&[&["add", "tcp", "80"], target].concat())?;
        let stderr = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "one line, not:\n{stderr}");
        ensure!(stderr.contains(about), "{stderr:?} does not say {about:?}");
        ensure!(matches!(scene.daemon.json(&["rules"])?, Value::Array(rules) if rules.is_empty()));
    }
    Ok(())
}
