//! MSS clamping, in front of a link that takes 1400 bytes while both hosts believe in 1500, as behind PPPoE: what is larger
//! vanishes there without a word.

use std::fs;

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN};
use portfwd_tests::capture::{Capture, Frames, sent_by};
use portfwd_tests::curl;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::nginx::Nginx;
use portfwd_tests::{Family, LabOptions, Offloads, tcp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen};

const NARROW: u16 = 1400;

/// What hosts that believe in an MTU say.
fn size(family: Family, mtu: u16) -> u16 {
    match family {
        Family::V4 => mtu - 40,
        Family::V6 => mtu - 60,
    }
}

/// A gateway whose WAN is narrower than the client's end of it says, before portfwd starts.
fn scene(offloads: Offloads, daemon: DaemonOptions) -> Result<Scene> {
    let lab = LabOptions::default().offloads(offloads).build()?;
    lab.gateway.ip(&format!("link set wan0 mtu {NARROW}\n"))?;
    // Sums that the hosts leave unfinished are finished where they leave the gateway.
    for end in [lab.wan_end(), lab.lan_end()] {
        end.turn_transmit_offloads_off()?;
    }
    let daemon = daemon.start(&lab.gateway)?;
    Ok(Scene { daemon, lab })
}

/// The sizes that SYNs (or, if they answer, SYN-ACKs) of a family say.
fn said(frames: &Frames, family: Family, answers: bool) -> Result<Vec<String>> {
    let protocol = match family {
        Family::V4 => "ip",
        Family::V6 => "ipv6",
    };
    let filter = format!(
        "{protocol} && tcp.flags.syn == 1 && tcp.flags.ack == {}",
        u8::from(answers)
    );
    let mut sizes = frames.select(&filter, &["tcp.options.mss_val"])?;
    sizes.sort();
    sizes.dedup();
    Ok(sizes)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp, Offloads::Off)]
#[case::over_generic_xdp(Mode::XdpGeneric, Offloads::Off)]
#[case::over_tc(Mode::Tc, Offloads::Off)]
#[case::over_tc_with_unfinished_sums(Mode::Tc, Offloads::On)]
fn both_sides_are_told_what_fits_through_a_narrow_wan(
    #[case] mode: Mode,
    #[case] offloads: Offloads,
) -> Result<()> {
    const ECHO: u16 = 81;
    let scene = scene(offloads, DaemonOptions::new(mode))?;
    scene.forward("tcp")?;
    let content = curl::varied_content(1 << 20);
    let _nginx = Nginx::start(&scene.lab.server, TARGET, &[("file", &content)])?;
    let [client, server] = [scene.lab.client_end(), scene.lab.server_end()].map(Capture::start);
    let (client, server) = (client?, server?);
    for family in Family::BOTH {
        let url = curl::url(listen(family), "file");
        let sum = curl::fetch_sha256(&scene.lab.client, &url, PATIENCE)?;
        assert_eq!(sum, curl::sha256(&content)?, "{family}");

        // What the client sends is what vanishes if it is too large.
        let target = scene.lab.server_address().endpoint(family, ECHO);
        let name = format!("echo-{family}").to_lowercase();
        scene
            .daemon
            .add(&name, "tcp", &ECHO.to_string(), &target.to_string())?;
        let _echo = tcp::Echo::start(&scene.lab.server, family, ECHO)?;
        let mut stream = tcp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(family, ECHO))?;
        for _ in 0..4 {
            tcp::exchange(&mut stream, &[0xa5; 60_000])?;
        }
    }
    let stop = |capture: Capture, end| match offloads {
        // The gateway finishes what it sends; what the host sends is as it leaves its stack.
        Offloads::On => capture.stop_excusing(&sent_by(end)?),
        Offloads::Off => capture.stop(),
    };
    let client = stop(client, scene.lab.client_end()).context("at the client")?;
    let server = stop(server, scene.lab.server_end()).context("at the server")?;
    for family in Family::BOTH {
        let fits = size(family, NARROW).to_string();
        assert_eq!(said(&server, family, false)?, [fits.as_str()], "{family}");
        assert_eq!(said(&client, family, true)?, [fits.as_str()], "{family}");
    }
    // Nobody had to be told by an error.
    for frames in [&client, &server] {
        let errors = frames.select("icmp.type == 3 || icmpv6.type == 2", &["_ws.col.Info"])?;
        assert!(errors.is_empty(), "{errors:?}");
    }
    // Four connections, both ways.
    let clamped = scene.daemon.events()?.get("mss_clamped").copied();
    ensure!(clamped >= Some(8), "{clamped:?} were clamped");
    scene.expect_no_errors()
}

#[test]
fn who_does_not_want_it_has_sizes_left_as_they_are() -> Result<()> {
    const LEFT: [&str; 1] = ["--no-mss-clamp"];
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("portfwd.toml");
    for (setting, options) in [("true", &LEFT[..]), ("false", &[])] {
        fs::write(&config, format!("[gateway]\nmss_clamp = {setting}\n"))?;
        let daemon = DaemonOptions {
            config: Some(config.clone()),
            ..DaemonOptions::new(Mode::Tc)
        };
        let scene = scene(Offloads::Off, daemon)?;
        let [client, server] = [scene.lab.client_end(), scene.lab.server_end()].map(Capture::start);
        let (client, server) = (client?, server?);
        for family in Family::BOTH {
            let target = scene.lab.server_address().endpoint(family, TARGET);
            let rule = ["tcp", &LISTEN.to_string(), &target.to_string()];
            scene
                .daemon
                .add_with(crate::scene::rule_name(family), rule, options)?;
            let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
            let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
            tcp::exchange(&mut stream, b"small enough")?;
        }
        for rule in 0..2 {
            let rules = scene.daemon.json(&["rules"])?;
            assert_eq!(rules[rule]["mss_clamp"], options.is_empty());
        }
        let (client, server) = (client.stop()?, server.stop()?);
        for family in Family::BOTH {
            let as_said = size(family, 1500).to_string();
            assert_eq!(said(&server, family, false)?, [as_said.as_str()]);
            assert_eq!(said(&client, family, true)?, [as_said.as_str()]);
        }
        assert_eq!(scene.daemon.events()?.get("mss_clamped"), None);
    }
    Ok(())
}

/// `explain` tries a SYN as a host behind Ethernet sends it, and the answer to it.
#[test]
fn explain_says_what_becomes_of_the_size() -> Result<()> {
    let scene = scene(Offloads::Off, DaemonOptions::new(Mode::Tc))?;
    scene.forward("tcp")?;
    for family in Family::BOTH {
        let question = [
            "explain",
            "tcp",
            &CLIENT.of(family).to_string(),
            &listen(family).to_string(),
        ];
        let found = scene.daemon.json(&question)?;
        for leg in ["there", "back"] {
            assert_eq!(
                found[leg]["segment_size"],
                size(family, NARROW),
                "{family} {leg}"
            );
        }
        let text = scene.daemon.ok(&question)?;
        let says = format!("says {} bytes from here on", size(family, NARROW));
        assert_eq!(text.matches(&says).count(), 2, "{text}");
    }
    Ok(())
}
