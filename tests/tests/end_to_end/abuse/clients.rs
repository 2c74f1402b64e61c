//! Many clients, and clients that do not go on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use portfwd_tests::{deadline::fewer, process::allow_descriptors};

use super::scene::{LIFETIME, Scene, get, post};

const MANY: usize = 1000;
/// A connection is closed after that, whatever it is at.
const CUT_OFF: Duration = Duration::from_secs(30);

#[test]
fn a_thousand_clients_at_once_are_all_answered() -> Result<()> {
    allow_descriptors(2 * MANY as u64)?;
    let scene = Scene::new(3)?;
    // Each must have its answer before it is cut off.
    let mut clients = (0..fewer(MANY))
        .map(|_| scene.connect())
        .collect::<Result<Vec<_>>>()?;
    for client in &mut clients {
        client.say(get("/v1/rules").as_bytes())?;
    }
    for client in &mut clients {
        let answer = client.answer(LIFETIME)?;
        ensure!(answer.status == 200, "{answer:?}");
        let rules: Vec<serde_json::Value> = serde_json::from_slice(&answer.body)?;
        assert_eq!(rules.len(), 3);
    }
    scene.expect_served_in_bounds()
}

#[test]
fn a_thousand_half_open_clients_keep_nobody_waiting_and_are_cut_off() -> Result<()> {
    allow_descriptors(2 * MANY as u64)?;
    let scene = Scene::new(3)?;
    let beginnings = [
        "",
        "G",
        "GET /v1/rules HTTP/1.1\r\n",
        "GET /v1/rules HTTP/1.1\r\nhost: x\r\nx-long: ",
    ];
    let mut clients = (0..MANY)
        .map(|number| {
            let mut client = scene.connect()?;
            client.say(beginnings[number % beginnings.len()].as_bytes())?;
            Ok(client)
        })
        .collect::<Result<Vec<_>>>()?;
    scene.expect_served_in_bounds()?;
    scene
        .daemon
        .add("meanwhile", "tcp", "8080", "10.2.0.2:80")?;
    for client in &mut clients {
        client.answer(LIFETIME)?;
    }
    scene.expect_served_in_bounds()
}

#[test]
fn a_body_that_does_not_come_is_given_up_and_others_are_served_meanwhile() -> Result<()> {
    let scene = Scene::new(3)?;
    let before = scene.daemon.rules()?.len();
    let whole = post(r#"{"proto":"tcp","listen":"8080","target":"10.2.0.2:80"}"#);
    // More than there are turns for long bodies, so that short ones are shown not to need one.
    let long = "POST /v1/rules HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n{";
    let mut clients = Vec::new();
    for number in 0..100 {
        let mut client = scene.connect()?;
        let beginning = match number % 3 {
            0 => &whole[..whole.len() - 5],
            1 => long,
            _ => "POST /v1/rules HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
        };
        client.say(beginning.as_bytes())?;
        clients.push(client);
    }
    scene
        .daemon
        .add("meanwhile", "tcp", "9090", "10.2.0.2:80")?;
    scene.expect_served_in_bounds()?;
    for client in &mut clients {
        let answer = client.answer(LIFETIME)?;
        ensure!(
            answer.status == 0 || (400..500).contains(&answer.status),
            "{answer:?}"
        );
    }
    assert_eq!(scene.daemon.rules()?.len(), before + 1);
    scene.expect_served_in_bounds()
}

/// Answers of a size that no socket buffer takes stay in memory until they are read; so their number is limited, and a reader
/// that does not read is cut off.
#[test]
fn readers_that_do_not_read_are_few_and_are_cut_off_and_small_answers_go_on() -> Result<()> {
    let scene = Scene::new(2000)?;
    let mut readers = (0..100)
        .map(|_| {
            let mut reader = scene.connect()?;
            reader.say(get("/v1/rules").as_bytes())?;
            Ok(reader)
        })
        .collect::<Result<Vec<_>>>()?;
    scene.expect_served_in_bounds()?;
    scene
        .daemon
        .add("meanwhile", "tcp", "8080", "10.2.0.2:80")?;
    scene.daemon.ok(&["remove", "meanwhile"])?;
    // Nobody has read anything or been cut off, and whoever reads is served all the same: those that stand still make room.
    let began = Instant::now();
    portfwd_tests::deadline::wait_until("a large answer", LIFETIME, || {
        Ok(scene.ask(&get("/v1/rules"))?.status == 200)
    })?;
    ensure!(
        began.elapsed() < CUT_OFF,
        "it was served after {:?}, when the readers were cut off anyway",
        began.elapsed()
    );
    let whole = scene.ask(&get("/v1/rules"))?.body.len();
    let (mut cut, mut refused) = (0, 0);
    for reader in &mut readers {
        let answer = reader.answer(LIFETIME)?;
        cut += usize::from(answer.status == 200 && answer.body.len() < whole);
        if answer.status == 500 {
            ensure!(answer.text().contains("have not read theirs"), "{answer:?}");
            refused += 1;
        }
    }
    ensure!(refused > 0, "no reader was refused");
    ensure!(cut > 0, "no reader was cut off in the middle");
    scene.expect_served_in_bounds()
}

#[test]
fn a_daemon_that_is_starved_is_reported_in_one_line_and_goes_on_when_it_can() -> Result<()> {
    let scene = Scene::new(3)?;
    scene.daemon.signal(Signal::SIGSTOP)?;
    let output = portfwd_tests::process::output_within(
        scene.daemon.command().args(["-j", "rules"]),
        LIFETIME,
    )?;
    scene.daemon.signal(Signal::SIGCONT)?;
    let error = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    ensure!(
        error.contains("does not answer") && error.contains("forwarding goes on"),
        "{error}"
    );
    let pid = scene.daemon.pid().context("the daemon runs")?;
    let lock = std::fs::read_to_string(scene.daemon.socket().with_extension("lock"))?;
    assert_eq!(lock.trim(), pid.to_string(), "the hint leads to the daemon");
    scene.expect_served_in_bounds()
}
