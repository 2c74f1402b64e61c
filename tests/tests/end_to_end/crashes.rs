//! The daemon is killed between any two of its system calls to BPF, or while it writes to the disk: what is there is the old
//! or the new, and the next start works and leaves nothing behind.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use portfwd_tests::daemon::{DaemonOptions, Mode, binary};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::kernel_objects::KernelObjects;
use portfwd_tests::other_build::OtherBuild;
use portfwd_tests::{Family, Lab, LabOptions, Process, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen, rule_name};

/// How many points of a start are tried, evenly apart: by one mode those in the middle between the other's, since all but
/// attaching is the same. `PORTFWD_CRASHES=all` tries every one by both.
const POINTS: usize = 6;
/// More system calls than a start makes.
const BEYOND: usize = 100_000;

/// strace, set to kill what it runs at the `number`-th call of a kind.
fn killer(calls: &str, number: usize) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:signal=KILL:when={number}")]);
    command
}

/// What becomes of a start that is killed at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Killed,
    /// It made fewer calls than that, and was killed when it was ready.
    Ready,
}

fn run_arguments(lab: &Lab, mode: Mode) -> [&str; 9] {
    let name = lab.gateway.name();
    let mode = mode.word();
    [
        "-n", name, "run", "--wan", "wan0", "--lan", "lan0", "--mode", mode,
    ]
}

/// Starts a daemon that is killed at the `number`-th call of one of its threads.
fn start_killed(lab: &Lab, binary: &Path, mode: Mode, number: usize) -> Result<Fate> {
    let mut command = killer("bpf", number);
    command.arg(binary).args(run_arguments(lab, mode));
    let mut process = Process::spawn(command)?;
    let status = || -> Result<ExitStatus> {
        let mut command = Command::new(binary);
        Ok(command
            .args(["-n", lab.gateway.name(), "status"])
            .output()?
            .status)
    };
    let mut fate = Fate::Killed;
    wait_until("the start to end", PATIENCE * 3, || {
        if let Some(status) = process.exited()? {
            let killed = status.signal() == Some(Signal::SIGKILL as i32);
            ensure!(killed, "it was not killed: {status} {}", process.output());
            return Ok(true);
        }
        if status()?.success() {
            fate = Fate::Ready;
            return Ok(true);
        }
        Ok(false)
    })?;
    if fate == Fate::Ready {
        kill_daemon(lab)?;
        process.wait(PATIENCE)?;
    }
    Ok(fate)
}

/// strace would leave the daemon to itself: the daemon is what is killed, and strace follows.
fn kill_daemon(lab: &Lab) -> Result<()> {
    let lock = format!("/run/portfwd/{}.lock", lab.gateway.name());
    let pid = std::fs::read_to_string(&lock).with_context(|| format!("read {lock}"))?;
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse()?);
    nix::sys::signal::kill(pid, Signal::SIGKILL)?;
    Ok(())
}

/// How many calls a start makes, counted.
fn calls_of_a_start(lab: &Lab, binary: &Path, mode: Mode) -> Result<usize> {
    let trace = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("strace");
    command
        .args(["-f", "-e", "trace=bpf", "-o"])
        .arg(trace.path())
        .arg(binary)
        .args(run_arguments(lab, mode));
    let mut process = Process::spawn(command)?;
    process.wait_for_output("is ready", PATIENCE * 3)?;
    kill_daemon(lab)?;
    process.wait(PATIENCE)?;
    count_lines(trace.path())
}

fn count_lines(path: &Path) -> Result<usize> {
    let text = std::fs::read_to_string(path)?;
    Ok(text.lines().filter(|line| line.contains(" bpf(")).count())
}

/// The points to try, of so many.
fn points(count: usize, wanted: usize, mode: Mode) -> Vec<usize> {
    let step = match std::env::var("PORTFWD_CRASHES") {
        Ok(word) if word == "all" => 1,
        Ok(_) | Err(_) => count.div_ceil(wanted),
    };
    let first = match mode {
        Mode::Xdp | Mode::XdpGeneric | Mode::Auto => 1,
        Mode::Tc => 1 + step / 2,
    };
    (first..=count).step_by(step).collect()
}

fn objects(scene: &Scene) -> Result<KernelObjects> {
    KernelObjects::of(&scene.daemon.pins())
}

fn expect_objects(scene: &Scene, expected: &KernelObjects) -> Result<()> {
    let same = wait_until("nothing to be left of the crash", PATIENCE, || {
        Ok(objects(scene)? == *expected)
    });
    let now = objects(scene)?;
    same.with_context(|| now.difference(expected))
}

/// Nothing is there before: whatever the crash left, the next start takes over or replaces.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_crash_at_any_point_of_the_first_start_leaves_what_the_next_can_use(
    #[case] mode: Mode,
) -> Result<()> {
    let lab = LabOptions::for_mode(mode).build()?;
    let daemon = DaemonOptions::new(mode).start(&lab.gateway)?;
    let mut scene = Scene { daemon, lab };
    let expected = objects(&scene)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    scene.forward("udp")?;
    scene.daemon.stop()?;
    scene.daemon.ok(&["detach", "--keep-rules"])?;
    let binary = binary()?;
    let count = calls_of_a_start(&scene.lab, &binary, mode)?;
    for point in points(count, POINTS, mode) {
        scene.daemon.ok(&["detach", "--keep-rules"])?;
        let fate = start_killed(&scene.lab, &binary, mode, point)?;
        scene
            .daemon
            .start()
            .with_context(|| format!("after a crash at call {point} of {count}"))?;
        expect_objects(&scene, &expected).with_context(|| format!("{fate:?} at call {point}"))?;
        let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
        udp::exchange(&socket, b"knock").with_context(|| format!("{fate:?} at call {point}"))?;
        scene.daemon.stop()?;
    }
    scene.daemon.start()
}

/// What forwards goes on through the crash, without losing a datagram. A restart takes the programs over that are there, one of
/// another build replaces them.
#[rstest]
fn a_crash_at_any_point_of_a_restart_loses_nothing(
    #[values(Mode::Xdp, Mode::Tc)] mode: Mode,
    #[values(false, true)] is_upgrade: bool,
) -> Result<()> {
    let own = binary()?;
    let other = OtherBuild::new()?;
    let builds = if is_upgrade {
        [other.path(), own.as_path()]
    } else {
        [own.as_path(); 2]
    };
    let mut scene = Scene::forwarding(mode, "both")?;
    let expected = objects(&scene)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let mut connection = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 500)?;
    scene.daemon.stop()?;
    let count = calls_of_a_start(&scene.lab, builds[0], mode)?;
    // A start that takes the programs over verifies none, and is soon done.
    let wanted = if is_upgrade { POINTS } else { 2 * POINTS };
    let tried = points(count, wanted, mode);
    for (point, build) in tried.into_iter().zip(builds.into_iter().cycle()) {
        start_killed(&scene.lab, build, mode, point)?;
        tcp::exchange(&mut connection, b"after the crash")?;
    }
    scene.daemon.start()?;
    expect_objects(&scene, &expected)?;
    tcp::exchange(&mut connection, b"after the start")?;
    let sent = stream.finish()?;
    let rule = scene.daemon.rule(rule_name(Family::V4))?;
    ensure!(
        rule.to_target.packets >= sent && rule.flows == 2,
        "{rule:?}"
    );
    scene.expect_no_errors()
}

/// A rule that was being added or removed is there or not there, and packets find what `rules` says.
#[rstest]
fn a_crash_in_the_middle_of_a_change_leaves_the_old_rules_or_the_new(
    #[values("bpf", "pwrite64", "fdatasync,fsync")] calls: &str,
    #[values("add", "remove")] change: &str,
) -> Result<()> {
    let mut scene = Scene::forwarding(Mode::Tc, "udp")?;
    let expected = objects(&scene)?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let mut seen = [0, 0];
    for point in 1..=BEYOND {
        let name = format!("new-{point}");
        let name = match change {
            "add" => name.as_str(),
            _ => rule_name(Family::V4),
        };
        let survived = change_killed(&mut scene, calls, point, change, name)?;
        let is_there = scene
            .daemon
            .rules()?
            .iter()
            .any(|rule| rule.name.as_deref() == Some(name));
        seen[usize::from(is_there)] += 1;
        let port = if change == "add" { LISTEN + 1 } else { LISTEN };
        let mut endpoint = listen(Family::V4);
        endpoint.set_port(port);
        let socket = udp::connect(&scene.lab.client, endpoint)?;
        socket.set_read_timeout(Some(std::time::Duration::from_millis(300)))?;
        assert_eq!(
            udp::exchange(&socket, b"knock").is_ok(),
            is_there,
            "{calls} {point}: what packets find is not what `rules` says"
        );
        expect_objects(&scene, &expected)?;
        if survived {
            break;
        }
        // As it was before.
        match (change, is_there) {
            ("add", true) => drop(scene.daemon.ok(&["remove", name])?),
            ("remove", false) => {
                let target = format!("10.2.0.2:{TARGET}");
                scene
                    .daemon
                    .add(name, "udp", &LISTEN.to_string(), &target)?;
            }
            _ => {}
        }
    }
    eprintln!(
        "{calls}, {change}: {} crashes left no such rule, {} the rule",
        seen[0], seen[1]
    );
    Ok(())
}

/// Has the daemon killed at the `number`-th call from here on, or else make the change; then starts it if it was killed.
/// True if it was not.
fn change_killed(
    scene: &mut Scene,
    calls: &str,
    number: usize,
    change: &str,
    name: &str,
) -> Result<bool> {
    let pid = scene.daemon.pid().context("no daemon")?;
    let mut command = killer(calls, number);
    command.args(["-p", &pid.to_string()]);
    let tracer = Process::spawn(command)?;
    tracer.wait_for_output("attached", PATIENCE)?;
    let (listen, target) = ((LISTEN + 1).to_string(), format!("10.2.0.2:{TARGET}"));
    let output = match change {
        "add" => scene
            .daemon
            .cli(&["add", "udp", &listen, &target, "--name", name])?,
        _ => scene.daemon.cli(&["remove", name])?,
    };
    drop(tracer);
    let gone = !output.status.success();
    if gone {
        wait_until("the daemon to end", PATIENCE, || scene.daemon.has_ended())
            .with_context(|| format!("{output:?}"))?;
        scene.daemon.kill9()?;
        scene.daemon.start()?;
    }
    Ok(!gone)
}
