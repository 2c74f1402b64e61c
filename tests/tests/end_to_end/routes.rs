//! Routes of every kind, as the kernel has them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::traceroute::{self, Probe};
use portfwd_tests::{Family, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

const NO_WAY: u16 = 9_001;
/// After so long the kernel tells a sender again of a packet that it cannot route.
const BUDGET: Duration = Duration::from_millis(1_100);

/// A datagram to a target that the routing table says no to is answered as the kernel answers, and never leaves.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_target_that_routes_say_no_to_is_refused_by_the_kernel(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let kinds = [
        ("unreachable", [libc::EHOSTUNREACH, libc::ENETUNREACH]),
        ("prohibit", [libc::EHOSTUNREACH, libc::EACCES]),
        ("blackhole", [0, 0]),
    ];
    for (number, (kind, errors)) in (0_u16..).zip(kinds) {
        scene.lab.gateway.ip(&format!(
            "route add {kind} 10.9.{number}.0/24\nroute add {kind} 2001:db8:9{number}::/64\n"
        ))?;
        for (family, error) in Family::BOTH.into_iter().zip(errors) {
            let (target, suffix) = match family {
                Family::V4 => (format!("10.9.{number}.1:80"), "v4"),
                Family::V6 => (format!("[2001:db8:9{number}::1]:80"), "v6"),
            };
            let port = NO_WAY + number;
            let name = format!("{kind}-{suffix}");
            scene.daemon.add(&name, "udp", &port.to_string(), &target)?;
            let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(family, port))?;
            udp::limit_hops(&socket, family, 64)?;
            socket.send(b"anybody there?")?;
            wait_until("the rule to count", PATIENCE, || {
                Ok(scene.daemon.rule(&name)?.to_target.packets == 1)
            })?;
            if error != 0 {
                let reported = udp::reported_error(&socket)?;
                assert_eq!(reported.raw_os_error(), Some(error), "{kind} over {family}");
            }
        }
    }
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        udp::exchange(
            &udp::connect(&scene.lab.client, listen(family))?,
            b"another",
        )?;
    }
    scene.expect_no_errors()
}

/// What XDP redirected to a device that is down or has gone would be lost without a word. The kernel tells the client instead, of a
/// flow that there is as of a new one.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_way_out_that_is_down_or_gone_is_told_to_the_client(#[case] mode: Mode) -> Result<()> {
    for line in ["link set lan0 down\n", "link del lan0\n"] {
        let scene = Scene::forwarding(mode, "udp")?;
        // `ip_error` tells a sender of no more than one packet a second once it has told of a few, and `icmpv4_xrlim_allow` takes as much
        // of the same budget again: whoever asks once a second then hears nothing any more. The second limit is not ours to test.
        scene.lab.gateway.sysctl("net/ipv4/icmp_ratemask", "0")?;
        let echoes = Family::BOTH.map(|family| {
            let echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
            let socket = udp::connect(&scene.lab.client, listen(family))?;
            udp::exchange(&socket, b"before")?;
            udp::limit_hops(&socket, family, 64)?;
            anyhow::Ok((echo, socket))
        });
        scene.lab.gateway.ip(line)?;
        for (family, echo) in Family::BOTH.into_iter().zip(echoes) {
            let (_echo, known) = echo?;
            let new = udp::connect(&scene.lab.client, listen(family))?;
            udp::limit_hops(&new, family, 64)?;
            for (socket, which) in [(known, "known"), (new, "new")] {
                socket.set_read_timeout(Some(BUDGET))?;
                let mut told = None;
                // What the daemon hears is a moment later than what the test does.
                wait_until("the client to be told", PATIENCE, || {
                    // The error of an earlier one may come instead.
                    drop(socket.send(b"anybody there?"));
                    told = Some(udp::reported_error(&socket)?);
                    let number = told.as_ref().and_then(std::io::Error::raw_os_error);
                    Ok(number == Some(libc::ENETUNREACH))
                })
                .with_context(|| {
                    let passes = scene.daemon.passes();
                    format!("{line:?}, a {which} flow over {family}: {told:?}, {passes:?}")
                })?;
            }
        }
        // Of what portfwd itself drops there is nothing; a way out that is gone is no reason.
        assert_eq!(scene.daemon.drops()?, BTreeMap::new(), "{line:?}");
    }
    Ok(())
}

/// IPv4 by a next hop that has an IPv6 address (RFC 5549), whether its MAC address is known or not.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_target_behind_a_next_hop_of_the_other_family_is_reached(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    scene.lab.server.ip("addr add 10.9.9.9/32 dev lo\n")?;
    scene.lab.gateway.ip(&format!(
        "route add 10.9.9.9/32 via inet6 {} dev lan0\n",
        SERVER.v6
    ))?;
    scene.daemon.add("odd", "both", "8080", "10.9.9.9:80")?;
    let target: SocketAddr = "10.9.9.9:80".parse()?;
    let _udp = udp::Echo::start_on(&scene.lab.server, target)?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    for _ in 0..2 {
        scene.lab.gateway.ip("neigh flush dev lan0\n")?;
        for payload in [&b"first"[..], b"second"] {
            let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
            udp::exchange(&socket, payload)?;
            udp::exchange(&socket, payload)?;
            let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
            tcp::exchange(&mut stream, &[7; 50_000])?;
        }
    }
    scene.expect_no_errors()
}

/// With reverse path filters as strict as can be nothing is taken for spoofed that goes up the stack translated.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn strict_reverse_path_filters_take_nothing_for_spoofed(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "both")?;
    for interface in ["all", "wan0", "lan0"] {
        scene
            .lab
            .gateway
            .sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1")?;
    }
    let _udp = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    scene.lab.gateway.ip("neigh flush all\n")?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"first")?;
    // The kernel answers what has its last hop here; it comes by the stack.
    let hops = traceroute::trace(&scene.lab.client, listen(Family::V4), Probe::Udp)?;
    assert_eq!(hops.len(), 2, "{hops:?}");
    assert!(hops.iter().all(|hop| hop.address.is_some()), "{hops:?}");
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    tcp::exchange(&mut stream, &[7; 50_000])?;
    scene.expect_no_errors()
}
