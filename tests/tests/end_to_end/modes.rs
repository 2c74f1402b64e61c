//! Which hook an interface gets, and mixtures.

use anyhow::{Context, Result};
use portfwd::netlink::driver::Drivers;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::{Family, LabOptions, Offloads, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

fn mode_of(scene: &Scene, interface: &str) -> Result<(String, String)> {
    let status = scene.daemon.json(&["status"])?;
    let line = status["interfaces"]
        .as_array()
        .context("status has no interfaces")?
        .iter()
        .find(|line| line["name"] == interface)
        .with_context(|| format!("status has no {interface}: {status}"))?;
    let text = |key: &str| line[key].as_str().unwrap_or_default().to_string();
    Ok((text("mode"), text("reason")))
}

fn traffic_flows(scene: &Scene) -> Result<()> {
    for family in Family::BOTH {
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        for size in [1, 100, 1400] {
            udp::exchange(&socket, &vec![3; size])?;
            tcp::exchange(&mut stream, &vec![4; size * 20])?;
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::native_xdp(Mode::Xdp)]
#[case::generic_xdp(Mode::XdpGeneric)]
#[case::tc(Mode::Tc)]
fn a_forced_mode_is_the_one_that_status_shows_and_that_works(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    for interface in ["wan0", "lan0"] {
        assert_eq!(mode_of(&scene, interface)?.0, mode.word());
    }
    traffic_flows(&scene)
}

#[rstest]
#[case::xdp_on_the_wan_and_tc_on_the_lan("wan0=xdp", "lan0=tc")]
#[case::tc_on_the_wan_and_xdp_on_the_lan("wan0=tc", "lan0=xdp")]
#[case::generic_xdp_on_the_wan_and_tc_on_the_lan("wan0=xdp-generic", "lan0=tc")]
#[case::native_and_generic_xdp("wan0=xdp", "lan0=xdp-generic")]
fn two_modes_work_together(#[case] wan: &str, #[case] lan: &str) -> Result<()> {
    let options = DaemonOptions {
        wan: vec![wan.into()],
        lan: vec![lan.into()],
        ..DaemonOptions::new(Mode::Auto)
    };
    let scene = Scene::with(LabOptions::default().offloads(Offloads::Off), options)?;
    scene.forward("both")?;
    for argument in [wan, lan] {
        let (interface, mode) = argument.split_once('=').context("IF=MODE")?;
        assert_eq!(mode_of(&scene, interface)?.0, mode);
    }
    traffic_flows(&scene)
}

#[test]
fn auto_takes_tc_on_a_veth_and_says_why() -> Result<()> {
    let scene = Scene::with(LabOptions::default(), DaemonOptions::new(Mode::Auto))?;
    scene.forward("both")?;
    for interface in ["wan0", "lan0"] {
        let (mode, reason) = mode_of(&scene, interface)?;
        assert_eq!(mode, "tc");
        assert!(reason.contains("veth"), "{reason}");
    }
    traffic_flows(&scene)
}

/// Kernels before 6.3 do not say what a driver can do for XDP; its name does.
#[test]
fn the_driver_of_an_interface_is_known_by_name() -> Result<()> {
    let namespace = portfwd_tests::namespace::Namespace::new("driver")?;
    namespace.ip("link set lo down\nlink add v0 type veth peer name v1\n")?;
    let name = |interface: &'static str| {
        namespace.run(move || anyhow::Ok(Drivers::open()?.name(interface)))?
    };
    assert_eq!(name("v0")?.as_deref(), Some("veth"));
    assert_eq!(name("nosuch0")?, None);
    Ok(())
}

#[test]
fn status_has_the_names_that_programs_rely_on() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "both")?;
    let status = scene.daemon.json(&["status"])?;
    assert!(status["version"].is_string(), "{status}");
    assert_eq!(status["instance"], scene.lab.gateway.name());
    let roles: Vec<_> = status["interfaces"]
        .as_array()
        .context("no interfaces")?
        .iter()
        .map(|line| (line["name"].as_str(), line["role"].as_str()))
        .collect();
    assert_eq!(
        roles,
        [(Some("wan0"), Some("wan")), (Some("lan0"), Some("lan"))]
    );
    assert_eq!(status["flows"]["entries"], 0);
    assert_eq!(status["flows"]["capacity"], 262_144);
    assert_eq!(
        status["daemon"]["pid"].as_u64(),
        scene.daemon.pid().map(u64::from)
    );
    assert!(status["daemon"]["uptime_s"].is_number(), "{status}");
    Ok(())
}
