//! A start keeps the programs of an earlier one if they come from the same object, and puts its own in their places if not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use aya::programs::SchedClassifier;
use portfwd::bpf::Pins;
use portfwd::bpf::inspect::pinned_links;
use portfwd_common::abi::names;
use portfwd_tests::daemon::{DaemonOptions, Mode, binary};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::kernel_objects::KernelObjects;
use portfwd_tests::other_build::OtherBuild;
use portfwd_tests::process::run;
use portfwd_tests::{Family, LabOptions, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// A port that nobody may use.
const CLOSED: u16 = LISTEN + 1;

/// A daemon that forwards a flow.
struct Forwarding {
    scene: Scene,
    _echo: udp::Echo,
    flow: std::net::UdpSocket,
    objects: KernelObjects,
}

impl Forwarding {
    fn new(mode: Mode) -> Result<Self> {
        Self::of(Scene::forwarding(mode, "udp")?)
    }

    fn of(scene: Scene) -> Result<Self> {
        let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
        let flow = udp::connect(&scene.lab.client, listen(Family::V4))?;
        udp::exchange(&flow, b"before")?;
        let objects = KernelObjects::of(&scene.daemon.pins())?;
        Ok(Self {
            scene,
            _echo: echo,
            flow,
            objects,
        })
    }

    fn programs(&self) -> Result<BTreeMap<String, u32>> {
        self.scene.daemon.program_ids()
    }

    fn pins(&self) -> Pins {
        Pins::new(&self.scene.daemon.pins())
    }

    fn again(&mut self) -> Result<()> {
        self.scene.daemon.kill9()?;
        self.scene.daemon.start()
    }

    /// Fails unless the flow and new ones are forwarded by the pinned programs, and nothing else is left.
    fn expect_all_well(&self) -> Result<()> {
        udp::exchange(&self.flow, b"after")?;
        let socket = udp::connect(&self.scene.lab.client, listen(Family::V4))?;
        udp::exchange(&socket, b"a new flow")?;
        for link in pinned_links(&self.pins())? {
            ensure!(link.own_program, "{link:?} has another program");
        }
        let same = wait_until("what was replaced to go", PATIENCE, || {
            Ok(KernelObjects::of(&self.scene.daemon.pins())? == self.objects)
        });
        let now = KernelObjects::of(&self.scene.daemon.pins())?;
        same.with_context(|| now.difference(&self.objects))?;
        ensure!(fs::read_dir(self.pins().seals())?.count() == 1);
        self.scene.expect_no_errors()
    }

    /// Fails unless a packet that is dropped is told of in the daemon's log.
    fn expect_drop_in_log(&self) -> Result<()> {
        let mut endpoint = listen(Family::V4);
        endpoint.set_port(CLOSED);
        udp::connect(&self.scene.lab.client, endpoint)?.send(b"knock")?;
        wait_until("the drop to be in the log", PATIENCE, || {
            Ok(self.scene.daemon.log()?.contains("dropped, reason "))
        })
    }

    /// Fails unless the next start replaces every program.
    fn expect_replacement(&mut self) -> Result<()> {
        let before: BTreeSet<_> = self.programs()?.into_values().collect();
        self.again()?;
        let after: BTreeSet<_> = self.programs()?.into_values().collect();
        ensure!(
            before.is_disjoint(&after) && after.len() == before.len(),
            "{before:?} and then {after:?}"
        );
        self.expect_all_well()
    }
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_restart_with_the_same_object_replaces_no_program(#[case] mode: Mode) -> Result<()> {
    let mut forwarding = Forwarding::new(mode)?;
    let before = forwarding.programs()?;
    for _ in 0..2 {
        forwarding.again()?;
        assert_eq!(forwarding.programs()?, before);
        forwarding.expect_all_well()?;
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn another_object_replaces_every_program_and_so_does_the_way_back(
    #[case] mode: Mode,
) -> Result<()> {
    let other = OtherBuild::new()?;
    let mut forwarding = Forwarding::new(mode)?;
    forwarding.scene.daemon.use_binary(other.path());
    forwarding.expect_replacement()?;
    forwarding.scene.daemon.use_binary(&binary()?);
    forwarding.expect_replacement()
}

/// Whatever of the pins is not what the seal was put on, nothing of them is trusted.
#[rstest]
#[case::no_seal("seals")]
#[case::a_program_is_missing("programs/portfwd_clock")]
#[case::a_map_is_missing("maps/HELD")]
fn pins_that_somebody_has_meddled_with_are_loaded_anew(#[case] removed: &str) -> Result<()> {
    let mut forwarding = Forwarding::new(Mode::Tc)?;
    let path = forwarding.pins().version().join(removed);
    if path.is_dir() {
        for seal in fs::read_dir(&path)? {
            fs::remove_dir(seal?.path())?;
        }
    } else {
        fs::remove_file(&path)?;
    }
    let before = forwarding.programs()?;
    forwarding.again()?;
    let after = forwarding.programs()?;
    for (name, id) in &after {
        ensure!(before.get(name) != Some(id), "{name} was kept");
    }
    forwarding.expect_all_well()
}

/// While the programs of one object take the places of another's, one packet may meet both. Each object has a workspace of its own, so
/// what a program for fragments handed back was another packet's key.
#[test]
fn a_fragment_that_meets_the_programs_of_two_objects_is_dropped() -> Result<()> {
    const FRAGMENTED: [u8; 4_000] = [7; 4_000];
    let other = OtherBuild::new()?;
    let mut forwarding = Forwarding::new(Mode::Tc)?;
    udp::exchange(&forwarding.flow, &FRAGMENTED)?;
    let fragments = names::SLOW_TC[2];
    let former = SchedClassifier::from_pin(forwarding.pins().program(fragments))?;
    let former_id = former.info()?.id().to_string();
    forwarding.scene.daemon.use_binary(other.path());
    forwarding.again()?;
    udp::exchange(&forwarding.flow, &FRAGMENTED)?;
    run(Command::new("bpftool")
        .args(["map", "update", "pinned"])
        .arg(forwarding.pins().maps().join(names::TC_SLOW))
        .args(["key", "2", "0", "0", "0", "value", "id", &former_id]))?;
    let datagrams = forwarding
        .scene
        .daemon
        .rule(rule_name(Family::V4))?
        .to_target;
    let socket = udp::connect(&forwarding.scene.lab.client, listen(Family::V4))?;
    socket.send(&FRAGMENTED)?;
    wait_until("all three fragments to be dropped", PATIENCE, || {
        let drops = forwarding.scene.daemon.drops()?;
        Ok(drops.get("vanished") == Some(&3))
    })
    .with_context(|| format!("{:?}", forwarding.scene.daemon.drops()))?;
    let after = forwarding
        .scene
        .daemon
        .rule(rule_name(Family::V4))?
        .to_target;
    assert_eq!(datagrams, after, "a fragment was translated");
    forwarding.again()?;
    udp::exchange(&socket, &FRAGMENTED)?;
    forwarding.scene.daemon.use_binary(&binary()?);
    Ok(())
}

/// A start of another object that is killed early has only put its slow paths in their places.
#[test]
fn slow_paths_that_a_killed_start_has_left_are_put_back() -> Result<()> {
    let mut forwarding = Forwarding::new(Mode::Tc)?;
    let pins = forwarding.pins();
    // The other family's, which makes nothing of these packets.
    run(Command::new("bpftool")
        .args(["map", "update", "pinned"])
        .arg(pins.maps().join(names::TC_SLOW))
        .args(["key", "0", "0", "0", "0", "value", "pinned"])
        .arg(pins.program(names::SLOW_TC[1])))?;
    let before = forwarding.programs()?;
    forwarding.again()?;
    assert_eq!(forwarding.programs()?, before);
    forwarding.expect_all_well()
}

/// XDP programs for the driver know of frames in several buffers, those for the stack do not: each calls slow paths of its own kind.
#[test]
fn a_restart_in_another_mode_keeps_flows_and_forwards_new_ones() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Xdp);
    let scene = Scene::with(lab, DaemonOptions::new(Mode::Xdp))?;
    scene.forward("udp")?;
    let mut forwarding = Forwarding::of(scene)?;
    for mode in [Mode::XdpGeneric, Mode::Xdp, Mode::Tc, Mode::XdpGeneric] {
        forwarding.scene.daemon.use_mode(mode);
        forwarding.again()?;
        udp::exchange(&forwarding.flow, b"as before")?;
        let another = udp::connect(&forwarding.scene.lab.client, listen(Family::V4))?;
        udp::exchange(&another, b"new")?;
    }
    forwarding.scene.expect_no_errors()
}

/// Programs that tell the log of drops write into a buffer that goes with the daemon: they are never taken over, and those
/// that tell nothing do not stand in for them.
#[test]
fn a_start_that_is_to_log_drops_loads_programs_that_do() -> Result<()> {
    let mut forwarding = Forwarding::new(Mode::Tc)?;
    let (closed, target) = (CLOSED.to_string(), format!("10.2.0.2:{TARGET}"));
    let nobody = ["--from", "203.0.113.0/24"];
    let daemon = &forwarding.scene.daemon;
    daemon.add_with("closed", ["udp", &closed, &target], &nobody)?;
    let loud = ("RUST_LOG", "info,portfwd::report=debug");
    for log in [Some(loud), Some(loud), None] {
        forwarding.scene.daemon.set_environment(log);
        let before: BTreeSet<_> = forwarding.programs()?.into_values().collect();
        forwarding.again()?;
        let after: BTreeSet<_> = forwarding.programs()?.into_values().collect();
        ensure!(
            before.is_disjoint(&after),
            "{log:?} kept some of {before:?}"
        );
        if log.is_some() {
            forwarding.expect_drop_in_log()?;
        }
    }
    let before = forwarding.programs()?;
    forwarding.again()?;
    assert_eq!(forwarding.programs()?, before);
    Ok(())
}
