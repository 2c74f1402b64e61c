//! VLANs: what belongs to one is not untagged traffic.

use anyhow::Result;
use portfwd_common::model::frame::Draft;
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, LabOptions, Offloads, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// A frame of a VLAN that the gateway does not have comes to no rule, whether its tag is in the frame, as in native XDP, or the
/// kernel has taken it off, as before TC.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_frame_of_a_vlan_is_not_taken_for_untagged(#[case] mode: Mode) -> Result<()> {
    const FRAMES: u64 = 10;
    let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward("udp")?;
    let wire = Wire::between(scene.lab.client_end(), scene.lab.wan_end())?;
    let passed =
        || -> Result<u64> { Ok(scene.daemon.passes()?.get("not_ip").copied().unwrap_or(0)) };
    for family in Family::BOTH {
        let sink = udp::Sink::start(&scene.lab.server, family, TARGET)?;
        let sent = Draft::udp(CLIENT.endpoint(family, 45_000), listen(family));
        let before = passed()?;
        for _ in 0..FRAMES {
            wire.send_tagged(20, &sent.packet())?;
        }
        wait_until("the frames to pass", PATIENCE, || {
            Ok(passed()? >= before + FRAMES)
        })?;
        assert_eq!(sink.received(), 0);
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!(rule.to_target.packets, 0);
    }
    Ok(())
}
