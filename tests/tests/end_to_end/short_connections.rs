//! A short one of what `cargo xtask soak connections` does more than a million times.

use anyhow::Result;
use portfwd_tests::Family;
use portfwd_tests::address::{CLIENT, SERVER};
use portfwd_tests::daemon::Mode;
use portfwd_tests::short_connections::{Answerer, dial};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

/// Each port is dialled from this often.
const TURNS: u16 = 16;
const PORTS: std::ops::Range<u16> = 30_000..30_256;

/// Connections that end and begin again on the same 5-tuples.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn short_connections_from_few_ports_are_all_answered(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::forwarding(mode, "tcp")?;
    for family in Family::BOTH {
        let server = SERVER.endpoint(family, TARGET);
        let _answerer = Answerer::start(&scene.lab.server, server)?;
        let connections = u64::from(TURNS) * PORTS.len() as u64;
        let from = (CLIENT.endpoint(family, 0).ip(), PORTS);
        let tally = dial(&scene.lab.client, from, listen(family), connections)?;
        assert_eq!(tally.failed, 0, "{tally:?}");
        assert_eq!(tally.answered, connections);
    }
    scene.expect_no_errors()
}
