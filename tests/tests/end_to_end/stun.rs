//! What clients of STUN say of the gateway is what the rule says.

use anyhow::{Result, ensure};
use portfwd_tests::Family;
use portfwd_tests::address::{CLIENT, DualStack, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::Mode;
use portfwd_tests::stun::{self, Behavior};
use rstest::rstest;

use crate::scene::{Scene, rule_name};

/// The STUN server's second address.
const SECOND: DualStack = DualStack::new(1, 3);
/// The port that the host asks from.
const TARGET: u16 = 5_000;

fn scene(mode: Mode) -> Result<Scene> {
    let scene = Scene::new(mode)?;
    scene.lab.client.ip(&format!(
        "address add {}/24 dev c0\naddress add {}/64 dev c0 nodad\n",
        SECOND.v4, SECOND.v6
    ))?;
    Ok(scene)
}

/// A host behind a rule is seen at its listen endpoint by everybody, everybody may send there, itself too, and a rule that keeps
/// ports keeps them: what RFC 4787 calls endpoint-independent, and RFC 3489 a full cone.
#[rstest]
#[case::over_native_xdp_with_another_port(Mode::Xdp, 8_080, "random port")]
#[case::over_tc_with_another_port(Mode::Tc, 8_080, "random port")]
#[case::over_tc_with_the_same_port(Mode::Tc, TARGET, "preserves ports")]
fn a_host_behind_a_rule_finds_its_listen_endpoint(
    #[case] mode: Mode,
    #[case] listen: u16,
    #[case] ports: &str,
) -> Result<()> {
    let scene = scene(mode)?;
    for family in Family::BOTH {
        let local = SERVER.endpoint(family, TARGET);
        // The client of RFC 3489 asks from the port behind it, too.
        scene.daemon.add(
            rule_name(family),
            "udp",
            &format!("{listen}-{}", listen + 1),
            &format!("{local}-{}", TARGET + 1),
        )?;
        let addresses = [CLIENT.of(family), SECOND.of(family)];
        let _server = stun::Server::start(&scene.lab.client, addresses)?;
        let seen = format!("UDP reflexive addr: {}:{listen}", GATEWAY_WAN.of(family));
        for (behavior, finding) in [
            (Behavior::Mapping, "NAT with Endpoint Independent Mapping!"),
            (
                Behavior::Filtering,
                "NAT with Endpoint Independent Filtering!",
            ),
            (
                Behavior::Hairpinning,
                "Received a request (maybe a successful hairpinning)",
            ),
        ] {
            let found = stun::natdiscovery(&scene.lab.server, behavior, local, addresses[0])?;
            for line in [seen.as_str(), finding] {
                ensure!(found.contains(line), "no {line:?} in: {found}");
            }
        }
        if family == Family::V4 {
            let found = stun::classic(&scene.lab.server, local, addresses[0])?;
            let line =
                format!("Primary: Independent Mapping, Independent Filter, {ports}, will hairpin");
            ensure!(found.contains(&line), "no {line:?} in: {found}");
        }
    }
    scene.expect_no_errors()
}
