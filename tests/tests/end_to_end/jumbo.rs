//! Frames larger than a buffer of a driver, which XDP has in several.

use anyhow::{Result, ensure};
use aya::util::KernelVersion;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::{Family, LabOptions, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// MTU of every link, bytes: a frame takes three pages.
const MTU: u32 = 9_000;
/// The largest datagram that fits, over either family.
const PAYLOAD: usize = MTU as usize - 48;
const DATAGRAMS: u64 = 100;
/// Packets that may be left to TC or to the kernel: neighbours have to be resolved at first.
const FIRST: u64 = 20;

fn scene(mode: Mode, proto: &str) -> Result<Scene> {
    let lab = LabOptions {
        wan_mtu: MTU,
        lan_mtu: MTU,
        ..LabOptions::for_mode(mode)
    };
    let scene = Scene::with(lab, DaemonOptions::new(mode))?;
    scene.forward(proto)?;
    Ok(scene)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn datagrams_of_nine_thousand_bytes_are_echoed_by_the_hook_itself(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = scene(mode, "udp")?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        let payload: Vec<u8> = (0..PAYLOAD).map(|n| (n * 7 + n / 251) as u8).collect();
        for _ in 0..DATAGRAMS {
            udp::exchange(&socket, &payload)?;
        }
        let rule = scene.daemon.rule(rule_name(family))?;
        for traffic in [rule.to_target, rule.to_client] {
            assert_eq!(traffic.packets, DATAGRAMS, "{family}");
        }
    }
    // Before Linux 6.3 no driver says that it sends frames in several buffers: TC sends them.
    if mode == Mode::Xdp && KernelVersion::current()? < KernelVersion::new(6, 3, 0) {
        return scene.expect_no_errors();
    }
    let passes = scene.daemon.passes()?;
    ensure!(
        passes.values().sum::<u64>() <= FIRST,
        "the hook left packets to others: {passes:?}"
    );
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn a_stream_in_large_segments_comes_back_unchanged(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode, "tcp")?;
    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        let payload: Vec<u8> = (0..1_000_000_u32)
            .map(|n| (n * 7 + n / 251) as u8)
            .collect();
        tcp::exchange(&mut stream, &payload)?;
        let rule = scene.daemon.rule(rule_name(family))?;
        // More than half of what fits into a segment, on the average with the acknowledgements of the way back.
        let average = rule.to_target.bytes / rule.to_target.packets;
        ensure!(average > 2_500, "{family}: {average} bytes a segment");
    }
    scene.expect_no_errors()
}
