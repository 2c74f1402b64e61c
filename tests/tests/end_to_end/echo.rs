//! ICMP echo that is forwarded: ping and traceroute, and the kernels' answers.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN};
use portfwd_tests::daemon::Mode;
use portfwd_tests::ping::{Answer, Ping};
use portfwd_tests::traceroute::{self, Probe};
use portfwd_tests::{Family, Namespace, nftables};
use rstest::rstest;

use crate::scene::{Scene, rule_name};

/// TTL of an answer of the server, which the gateway has taken one off, and of the gateway's own.
const FORWARDED: u8 = 63;
const OWN: u8 = 64;

/// Rules for echo to the gateway's WAN addresses.
fn forward(scene: &Scene, options: &[&str]) -> Result<()> {
    for family in Family::BOTH {
        let target = scene.lab.server_address().of(family).to_string();
        let arguments = ["add", "icmp", "echo", &target, "--name", rule_name(family)];
        scene.daemon.ok(&[&arguments, options].concat())?;
    }
    Ok(())
}

/// Every request is answered in the name of `destination`.
fn expect_answers(from: &Namespace, ping: Ping, hop_limit: u8) -> Result<()> {
    let answers = ping.from(from)?;
    let expected = Answer {
        from: ping.destination,
        hop_limit,
    };
    ensure!(
        answers == vec![expected; ping.count as usize],
        "{ping:?}: {answers:?}"
    );
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn the_server_answers_while_there_is_a_rule_and_the_gateway_otherwise(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::new(mode)?;
    for family in Family::BOTH {
        let ping = Ping::to(GATEWAY_WAN.of(family));
        expect_answers(&scene.lab.client, ping, OWN)?;
    }
    forward(&scene, &[])?;
    for family in Family::BOTH {
        let ping = Ping::to(GATEWAY_WAN.of(family));
        expect_answers(&scene.lab.client, ping, FORWARDED)?;
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!(rule.to_target.packets, 5, "{family}");
        assert_eq!(rule.to_client.packets, 5, "{family}");
    }
    let flows = scene.daemon.json(&["flows"])?;
    let is_echo = |flow: &serde_json::Value| flow["proto"] == "icmp" && flow["state"] == "replied";
    ensure!(
        flows
            .as_array()
            .is_some_and(|flows| flows.len() == 2 && flows.iter().all(is_echo)),
        "{flows}"
    );
    for family in Family::BOTH {
        scene.daemon.ok(&["remove", rule_name(family)])?;
        let ping = Ping::to(GATEWAY_WAN.of(family));
        expect_answers(&scene.lab.client, ping, OWN)?;
    }
    scene.expect_no_errors()
}

/// 8,000 bytes are six fragments in each direction, which the server's kernel and the client's put together.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_large_ping_in_fragments_is_answered(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    forward(&scene, &[])?;
    for family in Family::BOTH {
        for size in [0, 1, 1_400, 1_473, 8_000] {
            // A time to tell is in the first 16 bytes: without them ping says nothing of it, and the TTL all the same.
            let ping = Ping::to(GATEWAY_WAN.of(family)).of_size(size);
            expect_answers(&scene.lab.client, ping, FORWARDED)?;
        }
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn hidden_clients_and_the_lan_itself_are_answered(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    forward(&scene, &["--masquerade"])?;
    for family in Family::BOTH {
        let ping = Ping::to(GATEWAY_WAN.of(family));
        expect_answers(&scene.lab.client, ping, FORWARDED)?;
        // The server asks, and is asked by the gateway.
        expect_answers(&scene.lab.server, ping, FORWARDED)?;
    }
    scene.expect_no_errors()
}

/// The kernel hides the servers behind the gateway's address, as it does on every gateway.
const MASQUERADE: &str = "table inet kernel {
 chain postrouting { type nat hook postrouting priority srcnat; oifname wan0 masquerade; }
}
";

/// What the gateway and the server ask on their own account is answered to themselves: the server behind the kernel's own NAT.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_gateway_and_the_server_still_ask_others(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    forward(&scene, &[])?;
    nftables::load(&scene.lab.gateway, MASQUERADE)?;
    for family in Family::BOTH {
        let client = CLIENT.of(family);
        expect_answers(&scene.lab.gateway, Ping::to(client), OWN)?;
        let server = scene.lab.server_address().of(family);
        expect_answers(&scene.lab.gateway, Ping::to(server), OWN)?;
        expect_answers(&scene.lab.server, Ping::to(client), FORWARDED)?;
    }
    scene.expect_no_errors()
}

/// traceroute by echo: an error about an echo request quotes it as it was sent.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn traceroute_by_echo_shows_the_gateway_and_then_the_server(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    forward(&scene, &[])?;
    for family in Family::BOTH {
        let dialled = GATEWAY_WAN.of(family);
        let hops = traceroute::trace(&scene.lab.client, (dialled, 0).into(), Probe::Echo)?;
        let addresses: Vec<Option<IpAddr>> = hops.iter().map(|hop| hop.address).collect();
        assert_eq!(addresses, [Some(dialled), Some(dialled)], "{family}");
    }
    scene.expect_no_errors()
}
