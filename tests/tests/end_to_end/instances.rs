//! Two instances on one machine.

use anyhow::Result;
use portfwd_tests::daemon::Mode;
use portfwd_tests::{Family, udp};

use crate::scene::{Scene, TARGET, listen, rule_name};

#[test]
fn two_instances_in_two_namespaces_never_meet() -> Result<()> {
    let (one, mut two) = (Scene::new(Mode::Xdp)?, Scene::new(Mode::Tc)?);
    one.forward("udp")?;
    assert!(two.daemon.rules()?.is_empty());
    two.daemon.add("other", "udp", "9090", "10.2.0.2:80")?;
    assert_eq!(
        (one.daemon.rules()?.len(), two.daemon.rules()?.len()),
        (2, 1)
    );

    let _echo_one = udp::Echo::start(&one.lab.server, Family::V4, TARGET)?;
    let echo_two = udp::Echo::start(&two.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&one.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"through the first")?;
    assert!(echo_two.peers().is_empty());
    assert!(two.daemon.flows()?.is_empty());

    two.daemon.kill9()?;
    two.daemon.ok(&["detach"])?;
    udp::exchange(&socket, b"the first goes on")?;
    assert_eq!(one.daemon.rule(rule_name(Family::V4))?.to_target.packets, 2);
    Ok(())
}

#[test]
fn a_second_instance_on_the_same_interface_is_refused_and_the_first_is_named() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "udp")?;
    let own = scene.lab.gateway.name();
    let second = scene.daemon.second();
    let output = second
        .command()
        .args(["run", "--wan", "wan0", "--lan", "lan0", "--mode", "tc"])
        .output()?;
    let error = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(6), "{error}");
    assert!(
        error.contains("wan0 is attached by another instance of portfwd")
            && error.contains(&format!("({own})")),
        "{error}"
    );
    second.end()?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"the first goes on")
}
