//! `portfwd explain`: what it says would happen is what happens, and the reason that it gives is the right one.

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::ping::Ping;
use portfwd_tests::{Family, Lab, LabOptions, nftables, tcp, udp};
use rstest::rstest;
use serde_json::Value;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// A gateway with the usual rules and a way to the internet.
fn scene(mode: Mode) -> Result<Scene> {
    let scene = Scene::forwarding(mode, "tcp")?;
    make_public(&scene.lab)?;
    Ok(scene)
}

fn make_public(lab: &Lab) -> Result<()> {
    lab.gateway.ip("addr add 203.0.113.1/24 dev wan0\n\
                    route add default dev wan0\n\
                    route add ::/0 dev wan0\n")
}

fn explain(scene: &Scene, question: &str) -> Result<Value> {
    let mut arguments = vec!["explain"];
    arguments.extend(question.split(' '));
    scene.daemon.json(&arguments)
}

/// All that was found wrong, in one text.
fn reasons(explanation: &Value) -> String {
    let texts = |key: &str, field: Option<&str>| -> Vec<String> {
        let list = explanation[key].as_array().cloned().unwrap_or_default();
        list.iter()
            .map(|item| field.map_or(item, |field| &item[field]))
            .filter_map(|text| text.as_str().map(str::to_owned))
            .collect()
    };
    let mut all = texts("problems", None);
    all.extend(
        texts("findings", Some("id"))
            .iter()
            .map(|id| format!("doctor: {id}")),
    );
    all.join("\n")
}

/// A misconfiguration: how it is made, the question, what the answer must say, and how it is mended.
struct Row {
    make: fn(&Scene) -> Result<()>,
    question: &'static str,
    /// Conclusion, fate of the packet, fate of the answer.
    result: [&'static str; 3],
    says: &'static [&'static str],
    mend: fn(&Scene) -> Result<()>,
}

fn run_all(scene: &Scene, rows: &[Row]) -> Result<()> {
    for Row {
        make,
        question,
        result,
        says,
        mend,
    } in rows
    {
        make(scene).with_context(|| format!("prepare {question}"))?;
        let mut last = String::new();
        // The daemon follows what has changed a moment later.
        wait_until("the explanation", PATIENCE, || {
            let found = explain(scene, question)?;
            let got = [
                &found["conclusion"],
                &found["there"]["fate"],
                &found["back"]["fate"],
            ];
            let reasons = reasons(&found);
            let is_right = got
                .iter()
                .zip(result)
                .all(|(got, want)| got.as_str().unwrap_or("-") == *want)
                && says.iter().all(|text| reasons.contains(text));
            last = format!("{found:#}");
            Ok(is_right)
        })
        .with_context(|| format!("{question} should be {result:?} and say {says:?}, not {last}"))?;
        mend(scene).with_context(|| format!("mend {question}"))?;
    }
    Ok(())
}

fn nothing(_: &Scene) -> Result<()> {
    Ok(())
}

fn add(scene: &Scene, listen: &str, target: &str) -> Result<()> {
    scene.daemon.add("odd", "tcp", listen, target)
}

fn remove(scene: &Scene) -> Result<()> {
    scene.daemon.ok(&["remove", "odd"]).map(drop)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_forward_that_works_is_said_to_work_and_nothing_is_changed_by_asking(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = scene(mode)?;
    for family in Family::BOTH {
        let question = format!("tcp {} {}", CLIENT.endpoint(family, 40_000), listen(family));
        let created =
            || -> Result<Option<u64>> { Ok(scene.daemon.events()?.get("flow_created").copied()) };
        let before = created()?;
        let first = explain(&scene, &question)?;
        assert_eq!(first["conclusion"], "unproven", "{first:#}");
        assert_eq!(first["same_build"], true);
        assert_eq!(first["flow"], Value::Null);
        let target = scene
            .lab
            .server_address()
            .endpoint(family, TARGET)
            .to_string();
        assert_eq!(first["there"]["translated_destination"], target.as_str());
        assert_eq!(first["there"]["egress"], "lan0");
        assert_eq!(
            first["back"]["translated_source"],
            listen(family).to_string().as_str()
        );
        assert_eq!(first["back"]["egress"], "wan0");
        // Asking counts nothing and enters nothing.
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!((rule.flows, rule.to_target.packets), (0, 0));
        assert_eq!(created()?, before);

        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut stream, b"hello")?;
        let proven = explain(&scene, &question)?;
        assert_eq!(proven["conclusion"], "works", "{proven:#}");
        let of_stream = format!("tcp {} {}", stream.local_addr()?, listen(family));
        let known = explain(&scene, &of_stream)?;
        assert_eq!(known["flow"]["state"], "established", "{known:#}");
        assert_eq!(known["conclusion"], "works", "{known:#}");
        tcp::exchange(&mut stream, b"still there")?;
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn echo_is_explained_like_any_packet(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    for family in Family::BOTH {
        let (client, gateway) = (CLIENT.endpoint(family, 77), GATEWAY_WAN.endpoint(family, 0));
        let target = SERVER.endpoint(family, 0);
        let question = format!("icmp {client} {}", gateway.ip());
        let own = explain(&scene, &question)?;
        assert_eq!(own["conclusion"], "fails", "{own:#}");
        assert_eq!(own["there"]["fate"], "passed", "{own:#}");
        let echo = format!("echo-{}", rule_name(family));
        scene
            .daemon
            .add(&echo, "icmp", "echo", &target.ip().to_string())?;
        let found = explain(&scene, &question)?;
        assert_eq!(found["proto"], "icmp");
        assert_eq!(found["conclusion"], "unproven", "{found:#}");
        let (there, back) = (&found["there"], &found["back"]);
        assert_eq!(there["translated_destination"], target.to_string().as_str());
        assert_eq!(back["translated_source"], gateway.to_string().as_str());
        assert_eq!(back["translated_destination"], client.to_string().as_str());

        assert_eq!(Ping::to(gateway.ip()).from(&scene.lab.client)?.len(), 5);
        let question = format!("icmp {} echo", client.ip());
        let found = explain(&scene, &question)?;
        assert_eq!(found["conclusion"], "works", "{found:#}");
    }
    Ok(())
}

#[test]
fn a_packet_that_meets_no_rule_is_told_what_comes_closest() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    scene
        .daemon
        .add("pinned", "tcp", "10.1.0.1:82", "10.2.0.2")?;
    scene.daemon.add("old", "tcp", "83", "10.2.0.2")?;
    scene.daemon.ok(&[
        "add",
        "tcp",
        "84",
        "10.2.0.2",
        "--name",
        "off",
        "--disabled",
    ])?;
    let passed = ["fails", "passed", "-"];
    let row = |question, says| Row {
        make: nothing,
        question,
        result: passed,
        says,
        mend: nothing,
    };
    run_all(
        &scene,
        &[
            row("tcp 10.1.0.2 10.1.0.1:9999", &["no rule listens there"]),
            row(
                "tcp 2001:db8:1::2 [2001:db8:1::1]:9999",
                &["no rule listens there"],
            ),
            row("udp 10.1.0.2 10.1.0.1:8080", &["for tcp only"]),
            row(
                "tcp 10.1.0.2 203.0.113.1:82",
                &["(pinned) listens on 10.1.0.1 only"],
            ),
            row(
                "tcp 2001:db8:1::2 83",
                &["(old) listens on this port for IPv4 only"],
            ),
            row(
                "tcp 10.1.0.2 10.2.0.1:8080",
                &["and 10.2.0.1 is none of them"],
            ),
            row(
                "tcp 10.1.0.2 10.1.0.1:84",
                &["(off) listens there, but it is not enabled"],
            ),
            row(
                "tcp 127.0.0.9 10.1.0.1:8080 --in wan0",
                &["an address that no router forwards"],
            ),
        ],
    )
}

#[test]
fn a_packet_that_no_program_sees_is_told_why() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    let unseen = ["fails", "unseen", "-"];
    run_all(
        &scene,
        &[
            Row {
                make: |s| {
                    s.lab.gateway.ip(
                        "link add br9 type bridge\naddr add 10.9.0.1/24 dev br9\nlink set br9 up\n",
                    )
                },
                question: "tcp 10.9.0.2 10.1.0.1:8080",
                result: unseen,
                says: &["not attached to br9"],
                mend: nothing,
            },
            Row {
                make: nothing,
                question: "tcp 10.1.0.2 10.1.0.1:8080 --in br9",
                result: unseen,
                says: &["not attached to br9"],
                mend: |s| s.lab.gateway.ip("link del br9\n"),
            },
            Row {
                make: nothing,
                question: "tcp 203.0.113.1 10.1.0.1:8080",
                result: unseen,
                says: &["203.0.113.1 is the gateway itself"],
                mend: nothing,
            },
            Row {
                make: |s| s.lab.gateway.ip("route del default\n"),
                question: "tcp 192.0.2.9 10.1.0.1:8080",
                result: unseen,
                says: &[
                    "no way to the client 192.0.2.9",
                    "doctor: no-route-to-clients",
                ],
                mend: |s| s.lab.gateway.ip("route add default dev wan0\n"),
            },
        ],
    )
}

#[test]
fn a_target_that_cannot_be_reached_is_told_why() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    run_all(
        &scene,
        &[
            Row {
                make: |s| s.lab.gateway.sysctl("net/ipv4/ip_forward", "0"),
                question: "tcp 10.1.0.2 10.1.0.1:8080",
                result: ["fails", "stack", "-"],
                says: &[
                    "given to the kernel",
                    "no way to 10.2.0.2",
                    "doctor: ipv4-forwarding-off",
                ],
                mend: |s| s.lab.gateway.sysctl("net/ipv4/ip_forward", "1"),
            },
            Row {
                make: |s| s.lab.gateway.sysctl("net/ipv6/conf/all/forwarding", "0"),
                question: "tcp 2001:db8:1::2 8080",
                result: ["fails", "stack", "passed"],
                says: &["the kernel forwards no IPv6", "doctor: ipv6-forwarding-off"],
                mend: |s| s.lab.gateway.sysctl("net/ipv6/conf/all/forwarding", "1"),
            },
            Row {
                make: |s| {
                    s.lab.gateway.ip("route add unreachable 10.99.0.9\n")?;
                    add(s, "81", "10.99.0.9")
                },
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["fails", "stack", "-"],
                says: &["no way to 10.99.0.9", "doctor: target-unreachable"],
                mend: |s| {
                    s.lab.gateway.ip("route del unreachable 10.99.0.9\n")?;
                    remove(s)
                },
            },
            Row {
                make: |s| {
                    s.lab.gateway.ip("route add blackhole 10.99.0.9\n")?;
                    add(s, "81", "10.99.0.9")
                },
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["fails", "stack", "-"],
                says: &["no way to 10.99.0.9: a route discards it"],
                mend: |s| {
                    s.lab.gateway.ip("route del blackhole 10.99.0.9\n")?;
                    remove(s)
                },
            },
            Row {
                make: |s| {
                    s.lab.gateway.ip("route del default\n")?;
                    add(s, "81", "10.99.0.9")
                },
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["fails", "stack", "-"],
                says: &["no way to 10.99.0.9: no route to it"],
                mend: |s| {
                    s.lab.gateway.ip("route add default dev wan0\n")?;
                    remove(s)
                },
            },
            Row {
                make: |s| add(s, "81", "10.2.0.1"),
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["fails", "stack", "-"],
                says: &["10.2.0.1 is this gateway itself"],
                mend: remove,
            },
            Row {
                make: |s| add(s, "81", "10.99.0.9"),
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["unproven", "forwarded", "forwarded"],
                says: &["doctor: target-behind-wan"],
                mend: remove,
            },
            Row {
                make: |s| {
                    add(s, "81", "10.2.0.77")?;
                    s.lab
                        .gateway
                        .ip("neigh replace 10.2.0.77 dev lan0 nud failed\n")
                },
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["fails", "forwarded", "forwarded"],
                says: &["10.2.0.77 has not answered"],
                mend: |s| {
                    s.lab.gateway.ip("neigh del 10.2.0.77 dev lan0\n")?;
                    remove(s)
                },
            },
        ],
    )
}

#[test]
fn an_answer_that_cannot_come_back_is_told_why() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    run_all(
        &scene,
        &[
            Row {
                make: |s| {
                    s.lab.gateway.ip(
                        "link add br9 type bridge\naddr add 10.9.0.1/24 dev br9\nlink set br9 up\n",
                    )?;
                    add(s, "81", "10.9.0.9")
                },
                question: "tcp 10.1.0.2 10.1.0.1:81",
                result: ["fails", "forwarded", "unseen"],
                says: &["not attached to br9, by which the answers of 10.9.0.9 come in"],
                mend: |s| {
                    remove(s)?;
                    s.lab.gateway.ip("link del br9\n")
                },
            },
            Row {
                make: |s| s.lab.gateway.ip("route add unreachable 192.0.2.0/24\n"),
                question: "tcp 192.0.2.9 10.1.0.1:8080 --in wan0",
                result: ["fails", "dropped", "-"],
                says: &["its source cannot be where it came from: the answer would go nowhere"],
                mend: |s| s.lab.gateway.ip("route del unreachable 192.0.2.0/24\n"),
            },
            Row {
                make: |s| {
                    nftables::load(
                        &s.lab.gateway,
                        "table netdev t { chain c { type filter hook egress device lan0 priority 0;
                       tcp dport 80 drop; }\n}",
                    )
                },
                question: "tcp 10.1.0.2 10.1.0.1:8080",
                result: ["fails", "forwarded", "forwarded"],
                says: &["nftables drops it on its way out: netdev t c handle"],
                mend: |s| nftables::load(&s.lab.gateway, "flush ruleset"),
            },
            Row {
                make: |s| s.lab.server.ip("link set s0 down\n"),
                question: "tcp 10.1.0.2 10.1.0.1:8080",
                result: ["fails", "forwarded", "forwarded"],
                says: &["lan0: it is up, but nothing is connected to it"],
                mend: |s| s.lab.server.ip("link set s0 up\n"),
            },
        ],
    )
}

#[test]
fn a_target_that_has_never_answered_is_named() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    scene.daemon.add("mute", "udp", "81", "10.2.0.2")?;
    let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(Family::V4, 81))?;
    socket.send(b"anybody there?")?;
    wait_until("the packet to be counted", PATIENCE, || {
        Ok(scene.daemon.rule("mute")?.to_target.packets == 1)
    })?;
    let found = explain(&scene, "udp 10.1.0.2 10.1.0.1:81")?;
    assert_eq!(found["conclusion"], "unproven");
    assert!(
        reasons(&found).contains("went to 10.2.0.2:81 and none ever came back"),
        "{found:#}"
    );
    Ok(())
}

#[test]
fn a_full_table_is_full_in_the_copy_too() -> Result<()> {
    let options = DaemonOptions {
        max_flows: Some(4),
        ..DaemonOptions::new(Mode::Tc)
    };
    let scene = Scene::with(LabOptions::for_mode(Mode::Tc), options)?;
    make_public(&scene.lab)?;
    // Two ports to one endpoint: only an entry tells which of them a reply belongs to.
    scene.daemon.add("one", "udp", "7000", "10.2.0.2:7000")?;
    scene.daemon.add("two", "udp", "7001", "10.2.0.2:7000")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 7000)?;
    let mut sockets = Vec::new();
    for _ in 0..4 {
        let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(Family::V4, 7000))?;
        udp::exchange(&socket, b"hello")?;
        sockets.push(socket);
    }
    wait_until("four flows in the table", PATIENCE, || {
        Ok(scene.daemon.events()?.get("flow_proven") == Some(&4))
    })?;
    // It may begin, but the answer would have it stay.
    let found = explain(&scene, "udp 10.1.0.2:9 10.1.0.1:7000")?;
    assert_eq!(found["there"]["fate"], "forwarded", "{found:#}");
    assert_eq!(found["back"]["fate"], "dropped", "{found:#}");
    assert!(
        reasons(&found).contains("the connection table is full"),
        "{found:#}"
    );
    // What is in the table goes on.
    let known = format!("udp {} 10.1.0.1:7000", sockets[0].local_addr()?);
    let found = explain(&scene, &known)?;
    assert_eq!(found["there"]["fate"], "forwarded", "{found:#}");
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn without_daemon_the_explanation_is_the_same(#[case] mode: Mode) -> Result<()> {
    let mut scene = scene(mode)?;
    let question = "tcp 10.1.0.2 10.1.0.1:8080";
    scene.daemon.kill9()?;
    let found = explain(&scene, question)?;
    assert_eq!(found["conclusion"], "unproven", "{found:#}");
    assert_eq!(
        explain(&scene, "tcp 10.1.0.2 9")?["there"]["reasons"][0],
        "no_rule"
    );
    let programs = found["there"]["programs"].as_array().context("programs")?;
    let first = match mode {
        Mode::Xdp | Mode::XdpGeneric => "portfwd_xdp",
        Mode::Tc | Mode::Auto => "portfwd_tc",
    };
    assert_eq!(programs[0], first);
    // The copy cannot see that the program itself is no longer there.
    scene.take_off("lan0")?;
    let found = explain(&scene, question)?;
    assert_eq!(found["conclusion"], "fails");
    let reasons = reasons(&found);
    let expected = "lan0 (ingress): portfwd's program is no longer attached there";
    assert!(reasons.contains(expected), "{reasons}");
    Ok(())
}

#[test]
fn the_text_tells_it_in_plain_words() -> Result<()> {
    let scene = scene(Mode::Tc)?;
    let text = scene
        .daemon
        .ok(&["explain", "tcp", "10.1.0.2", &format!("10.1.0.1:{LISTEN}")])?;
    for line in [
        "packet  tcp 10.1.0.2:40000 -> 10.1.0.1:8080, in by wan0",
        "rule    1 (over-ipv4): tcp 8080 -> 10.2.0.2:80",
        "flow    none yet",
        "there   forwarded: 10.1.0.2:40000 -> 10.2.0.2:80, out by lan0 to 10.2.0.2",
        "back    forwarded: 10.1.0.1:8080 -> 10.1.0.2:40000, out by wan0 to 10.1.0.2",
        "so far  0 packets of this rule to the target, 0 back",
        "unproven: both ways are open, and no packet of the target was ever seen",
    ] {
        ensure!(
            text.lines().any(|of| of.starts_with(line)),
            "{line:?} is not in:\n{text}"
        );
    }
    for (arguments, code) in [
        (&["explain", "both", "10.1.0.2", "80"][..], 2),
        (&["explain", "tcp", "10.1.0.2", "0"], 2),
        (&["explain", "tcp", "nobody", "80"], 2),
        (&["explain", "tcp", "10.1.0.2", "[2001:db8:1::1]:80"], 2),
        (&["explain", "tcp", "10.1.0.2", "80", "--in", "nosuch0"], 5),
    ] {
        let output = scene.daemon.cli(arguments)?;
        ensure!(
            output.status.code() == Some(code),
            "{arguments:?}: {output:?}"
        );
    }
    scene.daemon.ok(&["detach"])?;
    Ok(())
}
