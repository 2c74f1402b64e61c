//! VLANs: what belongs to one is not untagged traffic, and what belongs to none is.

use anyhow::{Context, Result};
use portfwd_common::model::frame::Draft;
use portfwd_tests::address::{CLIENT, DualStack};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::link::End;
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, Lab, LabOptions, Offloads, tagger, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// What takes tags off the frames that a card receives, as `ethtool` has it.
const TAKES_TAGS_OFF: [&str; 2] = ["rx-vlan-offload", "rx-vlan-stag-hw-parse"];
const FRAMES: u64 = 10;

/// A lab in which frames are whole, and a rule for UDP.
fn scene(mode: Mode, offloads: Offloads) -> Result<Scene> {
    let lab = LabOptions::for_mode(mode).offloads(offloads);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("udp")?;
    Ok(scene)
}

/// Has `send` send frames of every family, none of which may come to a rule.
fn expect_passed(
    scene: &Scene,
    passes: u64,
    mut send: impl FnMut(&Wire, &[u8]) -> Result<()>,
) -> Result<()> {
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    let passed =
        || -> Result<u64> { Ok(scene.daemon.passes()?.get("not_ip").copied().unwrap_or(0)) };
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let sent = Draft::udp(CLIENT.endpoint(family, 45_000), listen(family));
        let before = passed()?;
        for _ in 0..FRAMES {
            send(&wire, &sent.packet())?;
        }
        wait_until("the frames to pass", PATIENCE, || {
            Ok(passed()? >= before + passes * FRAMES)
        })?;
        assert_eq!(sink.received(), 0);
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!(rule.to_target.packets, 0);
    }
    Ok(())
}

/// A frame of a VLAN that the gateway does not have comes to no rule, whether its tag is in the frame, as in native XDP, or the
/// kernel has taken it off, as before TC. One with several tags does neither, nor one whose first tag only says a priority.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_frame_of_a_vlan_is_not_taken_for_untagged(#[case] mode: Mode) -> Result<()> {
    const CUSTOMER: u16 = 0x8100;
    const PROVIDER: u16 = 0x88a8;
    let scene = scene(mode, Offloads::Off)?;
    for tags in [
        &[(CUSTOMER, 20)][..],
        &[(PROVIDER, 20)],
        &[(PROVIDER, 30), (CUSTOMER, 20)],
        &[(CUSTOMER, 30), (CUSTOMER, 20)],
        &[(PROVIDER, 40), (CUSTOMER, 30), (CUSTOMER, 20)],
        &[(CUSTOMER, 7 << 13), (CUSTOMER, 20)],
    ] {
        expect_passed(&scene, 1, |wire, packet| wire.send_in_tags(tags, packet))
            .with_context(|| format!("{tags:x?}"))?;
    }
    Ok(())
}

/// The tag is not in the frame, but beside it: a card has taken it off, or the other end of a veth has never put it in.
#[test]
fn a_tag_beside_the_frame_counts_in_tc() -> Result<()> {
    let scene = scene(Mode::Tc, Offloads::On)?;
    tagger::tag(scene.lab.client_end())?;
    expect_passed(&scene, 1, Wire::send)
}

/// The same packets with their tag in the frame, as a card has them that leaves it there.
#[rstest]
#[case::native(Mode::Xdp)]
#[case::generic(Mode::XdpGeneric)]
fn a_tag_that_a_card_leaves_in_the_frame_counts_in_xdp(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode, Offloads::Off)?;
    tagger::tag(scene.lab.client_end())?;
    expect_passed(&scene, 1, Wire::send)
}

/// A tag of VLAN 0 says a priority, and that the frame belongs to no VLAN.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_frame_with_a_priority_alone_is_untagged(#[case] mode: Mode) -> Result<()> {
    const HIGHEST: u16 = 7 << 13;
    let scene = scene(mode, Offloads::Off)?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let sent = Draft::udp(CLIENT.endpoint(family, 45_000), listen(family));
        for _ in 0..FRAMES {
            wire.send_tagged(HIGHEST, &sent.packet())?;
        }
        wait_until("the datagrams to arrive", PATIENCE, || {
            Ok(sink.received() == FRAMES)
        })?;
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!(rule.to_target.packets, FRAMES);
    }
    scene.expect_no_errors()
}

/// Adds a VLAN's device to an interface, with addresses. False if the kernel has no such devices.
fn add_vlan(end: End<'_>, vlan: u16, DualStack { v4, v6 }: DualStack) -> Result<bool> {
    let name = end.interface;
    let added = end.namespace.ip(&format!(
        "link add link {name} name {name}.{vlan} type vlan id {vlan}\nlink set {name}.{vlan} up\n\
         addr add {v4}/24 dev {name}.{vlan}\naddr add {v6}/64 dev {name}.{vlan} nodad\n"
    ));
    match added {
        Err(error) if format!("{error:#}").contains("Unknown device type") => Ok(false),
        other => other.map(|()| true),
    }
}

/// VLANs on both sides, and portfwd on their own devices, above an interface on which it is, too.
#[rstest]
#[case::above_native_xdp(Mode::Xdp)]
#[case::above_generic_xdp(Mode::XdpGeneric)]
#[case::above_tc(Mode::Tc)]
fn a_vlans_own_device_is_a_wan_and_a_lan(#[case] below: Mode) -> Result<()> {
    const WAN: u16 = 20;
    const LAN: u16 = 30;
    let [outside, inside] =
        [50, 51].map(|network| [1, 2].map(|host| DualStack::new(network, host)));
    let lab = LabOptions::for_mode(below).build()?;
    for (end, vlan, address) in [
        (lab.wan_end(), WAN, outside[0]),
        (lab.client_end(), WAN, outside[1]),
        (lab.lan_end(), LAN, inside[0]),
        (lab.server_end(), LAN, inside[1]),
    ] {
        if !add_vlan(end, vlan, address)? {
            println!("skipped: this kernel has no VLAN devices (CONFIG_VLAN_8021Q)");
            return Ok(());
        }
    }
    lab.server.ip(&format!(
        "route replace default via {}\nroute replace default via {}\n",
        inside[0].v4, inside[0].v6
    ))?;
    let with_mode = |interface: &str| format!("{interface}={}", below.word());
    let options = DaemonOptions {
        wan: vec![with_mode("wan0"), "wan0.20=auto".into()],
        lan: vec![with_mode("lan0"), "lan0.30=auto".into()],
        ..DaemonOptions::new(Mode::Auto)
    };
    let daemon = options.start(&lab.gateway)?;
    let scene = Scene { daemon, lab };
    for family in Family::BOTH {
        let listen = outside[0].endpoint(family, LISTEN);
        let target = inside[1].endpoint(family, TARGET);
        scene.daemon.add(
            rule_name(family),
            "both",
            &listen.to_string(),
            &target.to_string(),
        )?;
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen)?;
        let mut stream = tcp::connect(&scene.lab.client, listen)?;
        for size in [1, 100, 1400] {
            udp::exchange(&socket, &vec![3; size])?;
            tcp::exchange(&mut stream, &vec![4; size * 20])?;
        }
        let rule = scene.daemon.rule(rule_name(family))?;
        assert!(rule.to_client.packets >= 6, "{rule:?}");
    }
    let status = scene.daemon.json(&["status"])?;
    let interfaces = status["interfaces"].as_array().context("no interfaces")?;
    for (name, mode) in [
        ("wan0", below),
        ("wan0.20", Mode::Tc),
        ("lan0.30", Mode::Tc),
    ] {
        let of = interfaces.iter().find(|of| of["name"] == name);
        let found = of.with_context(|| format!("no {name} in {status}"))?;
        assert_eq!(found["mode"], mode.word(), "{status}");
    }
    scene.expect_no_errors()
}

/// Which of the offloads that take tags off are on.
fn on(end: End<'_>) -> Result<Vec<&'static str>> {
    let mut on = Vec::new();
    for offload in TAKES_TAGS_OFF {
        if end.has_offload(offload)? {
            on.push(offload);
        }
    }
    Ok(on)
}

fn expect_on(lab: &Lab, expected: [&[&str]; 2]) -> Result<()> {
    assert_eq!(on(lab.wan_end())?, expected[0], "wan0");
    assert_eq!(on(lab.lan_end())?, expected[1], "lan0");
    Ok(())
}

const NONE: &[&str] = &[];

#[rstest]
#[case::native(Mode::Xdp)]
#[case::generic(Mode::XdpGeneric)]
fn xdp_has_cards_leave_tags_in_frames_until_it_goes(#[case] mode: Mode) -> Result<()> {
    let lab = LabOptions::for_mode(mode).build()?;
    // What somebody has turned off himself stays as it is.
    lab.lan_end().set_offload(TAKES_TAGS_OFF[0], false)?;
    let before = [&TAKES_TAGS_OFF[..], &TAKES_TAGS_OFF[1..]];
    expect_on(&lab, before)?;
    let mut scene = Scene {
        daemon: DaemonOptions::new(mode).start(&lab.gateway)?,
        lab,
    };
    expect_on(&scene.lab, [NONE, NONE])?;
    let reasons = |scene: &Scene| -> Result<Vec<String>> {
        let status = scene.daemon.json(&["status"])?;
        let interfaces = status["interfaces"].as_array().context("no interfaces")?;
        let text = |of: &serde_json::Value| of["reason"].as_str().unwrap_or_default().to_owned();
        Ok(interfaces.iter().map(text).collect())
    };
    let expected = [
        "forced; turned off rx-vlan-hw-parse, rx-vlan-stag-hw-parse",
        "forced; turned off rx-vlan-stag-hw-parse",
    ];
    assert_eq!(reasons(&scene)?, expected);

    scene.daemon.kill9()?;
    expect_on(&scene.lab, [NONE, NONE])?;
    scene.daemon.start()?;
    assert_eq!(reasons(&scene)?, expected);
    expect_on(&scene.lab, [NONE, NONE])?;

    scene.daemon.stop()?;
    scene.daemon.use_mode(Mode::Tc);
    scene.daemon.start()?;
    expect_on(&scene.lab, before)?;
    assert_eq!(reasons(&scene)?, ["forced", "forced"]);

    scene.daemon.stop()?;
    scene.daemon.use_mode(mode);
    scene.daemon.start()?;
    expect_on(&scene.lab, [NONE, NONE])?;
    scene.daemon.stop()?;
    scene.daemon.ok(&["detach"])?;
    expect_on(&scene.lab, before)
}

/// An interface that the next daemon is not told of, or that has another name.
#[test]
fn an_interface_that_is_let_go_gets_its_offloads_back() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Xdp).build()?;
    let mut daemon = DaemonOptions::new(Mode::Xdp).start(&lab.gateway)?;
    expect_on(&lab, [NONE, NONE])?;
    lab.gateway
        .ip("link set lan0 down\nlink set lan0 name lan1\n")?;
    let lan1 = End {
        namespace: &lab.gateway,
        interface: "lan1",
    };
    wait_until("the offloads of lan1 to be on", PATIENCE, || {
        Ok(on(lan1)? == TAKES_TAGS_OFF)
    })?;
    daemon.stop()?;
    daemon.ok(&["detach"])?;
    assert_eq!(on(lab.wan_end())?, TAKES_TAGS_OFF);
    Ok(())
}

#[test]
fn an_offload_that_somebody_turns_on_again_is_turned_off() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    for offload in TAKES_TAGS_OFF {
        scene.lab.wan_end().set_offload(offload, true)?;
        wait_until("it to be off", PATIENCE, || {
            Ok(on(scene.lab.wan_end())?.is_empty())
        })?;
    }
    // Nobody is there to do it.
    let mut scene = scene;
    scene.daemon.kill9()?;
    scene.lab.wan_end().set_offload(TAKES_TAGS_OFF[0], true)?;
    let diagnosis = scene.daemon.cli(&["-j", "doctor"])?;
    let text = String::from_utf8_lossy(&diagnosis.stdout);
    assert!(text.contains("vlan-tags-hidden"), "{text}");
    scene.daemon.start()?;
    assert_eq!(on(scene.lab.wan_end())?, NONE);
    Ok(())
}

/// A start that fails leaves the offloads as it found them.
#[test]
fn a_start_that_fails_changes_no_offload() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Xdp).build()?;
    // A bridge has no XDP of its own.
    lab.gateway
        .ip("link add br0 type bridge\nlink set br0 up\n")?;
    let options = DaemonOptions {
        lan: vec!["br0=xdp".into()],
        ..DaemonOptions::new(Mode::Xdp)
    };
    let refused = options.start(&lab.gateway).err();
    let error = format!("{:#}", refused.context("a bridge takes XDP")?);
    // What a link's error number does not say.
    assert!(
        error.contains("does not support XDP in native mode"),
        "{error}"
    );
    assert_eq!(on(lab.wan_end())?, TAKES_TAGS_OFF);
    Ok(())
}
