//! Packets whose headers are not where the program can reach them directly.

use anyhow::Result;
use portfwd_common::model::frame::Draft;
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::ring::Ring;
use portfwd_tests::{Family, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// The client's port.
const PORT: u16 = 45_000;

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_generic_xdp(Mode::XdpGeneric)]
#[case::over_tc(Mode::Tc)]
fn headers_out_of_reach_are_brought_into_it(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    let mut ring = Ring::between(scene.lab.client_end(), scene.lab.wan_end())?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let own = CLIENT.endpoint(family, PORT);
        // What is heard is heard by a socket as ever.
        let client = udp::bind(&scene.lab.client, own)?;
        client.set_read_timeout(Some(here(PATIENCE)))?;
        for number in 0..20_usize {
            let message = vec![number as u8; 10 * number + 1];
            let question = Draft::udp(own, listen(family)).payload(message.clone());
            ring.send(&question.packet())?;
            let mut heard = [0; 256];
            let (length, from) = udp::receive(&client, &mut heard)?;
            assert_eq!((&heard[..length], from), (&message[..], listen(family)));
        }
        let rule = scene.daemon.rule(rule_name(family))?;
        assert_eq!((rule.to_target.packets, rule.to_client.packets), (20, 20));
    }
    scene.expect_no_errors()
}
