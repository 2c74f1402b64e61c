//! Ten thousand rules.

use std::time::{Duration, Instant};

use anyhow::Result;
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::Mode;
use portfwd_tests::{Family, udp};

use crate::scene::{Scene, TARGET};

#[test]
fn ten_thousand_rules_are_added_by_a_loop_within_a_minute_and_all_work() -> Result<()> {
    const COUNT: u16 = 10_000;
    const FIRST: u16 = 20_000;
    let scene = Scene::new(Mode::Xdp)?;
    let start = Instant::now();
    for number in 0..COUNT {
        let port = (FIRST + number).to_string();
        scene.daemon.ok(&["add", "udp", &port, "10.2.0.2:80"])?;
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(scene.daemon.rules()?.len(), usize::from(COUNT));

    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    for number in [0, 1, COUNT / 2, COUNT - 2, COUNT - 1] {
        let endpoint = GATEWAY_WAN.endpoint(Family::V4, FIRST + number);
        udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")?;
    }
    Ok(())
}
