//! Ranges of ports, and which rule a port meets.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use anyhow::{Context, Result};
use portfwd_tests::address::{DualStack, GATEWAY_WAN};
use portfwd_tests::daemon::Mode;
use portfwd_tests::{Family, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, rule_name};

/// Exchanges a datagram through `listen` of the gateway with an echo on `target` of the server.
fn reaches(scene: &Scene, family: Family, listen: u16, target: u16) -> Result<()> {
    let _echo = udp::Echo::start(&scene.lab.server, family, target)?;
    let endpoint = GATEWAY_WAN.endpoint(family, listen);
    udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")
        .with_context(|| format!("{endpoint} does not lead to port {target}"))
}

/// Checks that the gateway answers for `listen` itself: nothing listens there.
fn is_the_gateways_own(scene: &Scene, family: Family, listen: u16) -> Result<()> {
    let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(family, listen))?;
    socket.send(b"knock")?;
    let error = udp::reported_error(&socket)?;
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_shifted_range_leads_each_port_to_its_own_and_its_neighbours_stay_out(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = Scene::new(mode)?;
    for family in Family::BOTH {
        let server = scene.lab.server_address().of(family);
        let target = match family {
            Family::V4 => format!("{server}:30000-30099"),
            Family::V6 => format!("[{server}]:30000-30099"),
        };
        scene
            .daemon
            .add(rule_name(family), "both", "20000-20099", &target)?;
        for offset in [0, 1, 50, 98, 99] {
            reaches(&scene, family, 20000 + offset, 30000 + offset)?;
        }
        is_the_gateways_own(&scene, family, 19999)?;
        is_the_gateways_own(&scene, family, 20100)?;

        let _echo = tcp::Echo::start(&scene.lab.server, family, 30042)?;
        let mut stream = tcp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(family, 20042))?;
        tcp::exchange(&mut stream, b"TCP too")?;
    }
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn all_ports_of_an_address_are_one_rule(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let external = DualStack::new(1, 77);
    for family in Family::BOTH {
        scene.lab.add_external_address(external.of(family))?;
        let server = scene.lab.server_address().of(family);
        let (listen, target) = match family {
            Family::V4 => (
                format!("{}:1-65535", external.v4),
                format!("{server}:1-65535"),
            ),
            Family::V6 => (
                format!("[{}]:1-65535", external.v6),
                format!("[{server}]:1-65535"),
            ),
        };
        scene
            .daemon
            .add(rule_name(family), "udp", &listen, &target)?;
        for port in [1, 2, 32768, 65534, 65535] {
            let _echo = udp::Echo::start(&scene.lab.server, family, port)?;
            let endpoint = external.endpoint(family, port);
            udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")
                .with_context(|| format!("{endpoint}"))?;
        }
        is_the_gateways_own(&scene, family, 32768)?;
    }
    assert_eq!(scene.daemon.rules()?.len(), 2);
    Ok(())
}

#[test]
fn the_ports_of_a_range_are_counted_one_by_one() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    scene
        .daemon
        .add("range", "udp", "20000-20099", "10.2.0.2:30000-30099")?;
    let expected = BTreeMap::from([(20000, 1), (20007, 3), (20099, 2)]);
    for (port, packets) in &expected {
        for _ in 0..*packets {
            reaches(&scene, Family::V4, *port, port + 10000)?;
        }
    }
    let counters = scene.daemon.json(&["counters"])?;
    for direction in ["to_target", "to_client"] {
        let counted: BTreeMap<u16, u64> = counters["ports"]
            .as_array()
            .context("no ports")?
            .iter()
            .filter_map(|line| {
                Some((
                    line["port"].as_u64()? as u16,
                    line[direction]["packets"].as_u64()?,
                ))
            })
            .filter(|(_, packets)| *packets > 0)
            .collect();
        assert_eq!(counted, expected, "{direction}");
    }
    assert_eq!(scene.daemon.rule("range")?.to_target.packets, 6);
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn an_exact_port_goes_before_a_range_in_whatever_order_they_came(#[case] mode: Mode) -> Result<()> {
    for order in [["range", "exact"], ["exact", "range"]] {
        let scene = Scene::new(mode)?;
        for name in order {
            match name {
                "range" => scene
                    .daemon
                    .add(name, "udp", "9000-9100", "10.2.0.2:9000-9100")?,
                _ => scene.daemon.add(name, "udp", "9050", "10.2.0.2:7")?,
            }
        }
        reaches(&scene, Family::V4, 9050, 7)?;
        reaches(&scene, Family::V4, 9049, 9049)?;
        reaches(&scene, Family::V4, 9051, 9051)?;
        scene.daemon.ok(&["remove", "exact"])?;
        reaches(&scene, Family::V4, 9050, 9050)?;
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rule_with_an_address_goes_before_a_rule_without(#[case] mode: Mode) -> Result<()> {
    for order in [["any", "addressed"], ["addressed", "any"]] {
        let scene = Scene::new(mode)?;
        let external = DualStack::new(1, 77);
        scene.lab.add_external_address(external.v4.into())?;
        for name in order {
            match name {
                "any" => scene
                    .daemon
                    .add(name, "udp", "9000-9100", "10.2.0.2:9000-9100")?,
                _ => scene
                    .daemon
                    .add(name, "udp", "10.1.0.77:9050", "10.2.0.2:7")?,
            }
        }
        reaches(&scene, Family::V4, 9050, 9050)?;
        let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 7)?;
        let endpoint = external.endpoint(Family::V4, 9050);
        udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")?;
        assert_eq!(scene.daemon.rule("addressed")?.to_target.packets, 1);
    }
    Ok(())
}
