//! Thousands of rules, one after the other.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portfwd_common::model::effort::cases;
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::Mode;
use portfwd_tests::process::Process;
use portfwd_tests::{Family, udp};

use crate::scene::{Scene, TARGET};

/// How many of them every day; `PORTFWD_EFFORT=5` makes it ten thousand.
const USUAL: u32 = 2_000;
const FIRST: u16 = 20_000;

#[test]
fn thousands_of_rules_are_added_by_a_loop_and_all_work() -> Result<()> {
    let count = u16::try_from(cases(USUAL))?;
    let mut scene = Scene::new(Mode::Xdp)?;
    // Processor time, which on a machine that does nothing else is the time that passes: tests run beside this one.
    let in_daemon = scene.daemon.processor_time()?;
    let in_loop = add_in_a_loop(&scene, count)?;
    let took = in_loop + scene.daemon.processor_time()? - in_daemon;
    println!("{count} rules in {took:?} of processor time, {in_loop:?} of it in the loop");
    expect_all_to_work(&scene, count)?;

    scene.daemon.kill9()?;
    scene.daemon.start()?;
    expect_all_to_work(&scene, count)?;

    let ids: Vec<String> = scene
        .daemon
        .rules()?
        .iter()
        .map(|rule| rule.id.to_string())
        .collect();
    let mut remove = vec!["remove"];
    remove.extend(ids.iter().map(String::as_str));
    scene.daemon.ok(&remove)?;
    assert!(scene.daemon.rules()?.is_empty());
    Ok(())
}

/// Adds a rule for each port as a user's shell does it; returns the processor time of the loop.
fn add_in_a_loop(scene: &Scene, count: u16) -> Result<Duration> {
    let last = FIRST + count - 1;
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-ec", "for port in $(seq $1 $2); do \"$3\" -n \"$4\" add udp $port 10.2.0.2:80 > /dev/null; done; times"])
        .args(["loop", &FIRST.to_string(), &last.to_string()])
        .arg(portfwd_tests::daemon::binary()?)
        .arg(scene.lab.gateway.name());
    let mut shell = Process::spawn(shell)?;
    // Longer than a minute: the machine may have other things to do.
    let status = shell.wait(Duration::from_secs(240))?;
    let output = shell.output();
    ensure!(status.success(), "{output}");
    children_time(&output).with_context(|| format!("`times` wrote {output:?}"))
}

/// User and system time of the shell's children, from the second line of `times`: `0m12.340000s 0m5.670000s`.
fn children_time(times: &str) -> Option<Duration> {
    let line = times.lines().nth(1)?;
    line.split_whitespace()
        .map(|word| {
            let (minutes, seconds) = word.strip_suffix('s')?.split_once('m')?;
            let minutes: u32 = minutes.parse().ok()?;
            let seconds: f64 = seconds.parse().ok()?;
            Some(Duration::from_secs(60) * minutes + Duration::from_secs_f64(seconds))
        })
        .sum()
}

fn expect_all_to_work(scene: &Scene, count: u16) -> Result<()> {
    assert_eq!(scene.daemon.rules()?.len(), usize::from(count));
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    for number in [0, 1, count / 2, count - 2, count - 1] {
        let endpoint = GATEWAY_WAN.endpoint(Family::V4, FIRST + number);
        udp::exchange(&udp::connect(&scene.lab.client, endpoint)?, b"knock")?;
    }
    Ok(())
}
