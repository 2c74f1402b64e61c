//! What the command line refuses, and how.

use std::os::unix::process::CommandExt;
use std::process::Output;

use anyhow::{Context, Result};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::process::run;

use crate::scene::Scene;

const USAGE: i32 = 2;
const NOT_RUNNING: i32 = 3;
const DENIED: i32 = 4;
const NOT_FOUND: i32 = 5;
const CONFLICT: i32 = 6;

/// One line on stderr, nothing on stdout, and the exit code.
fn expect_refusal(output: &Output, code: i32, about: &str) -> Result<()> {
    let stderr = String::from_utf8(output.stderr.clone())?;
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "one line, not:\n{stderr}");
    assert!(stderr.contains(about), "{stderr:?} does not name {about:?}");
    assert!(output.stdout.is_empty());
    Ok(())
}

/// The rules that are there before each refusal.
fn scene() -> Result<Scene> {
    let scene = Scene::new(Mode::Tc)?;
    scene.daemon.add("web", "tcp", "8080", "10.2.0.2:80")?;
    scene
        .daemon
        .add("range", "both", "9000-9100", "10.2.0.2:9000-9100")?;
    scene
        .daemon
        .add("pinned", "udp", "10.1.0.1:53", "10.2.0.2")?;
    Ok(scene)
}

#[test]
fn bad_rules_are_refused_with_a_code_and_one_line_and_change_nothing() -> Result<()> {
    let scene = scene()?;
    let before = scene.daemon.ok(&["--json", "rules"])?;
    for (arguments, code, about) in [
        (&["tcp", "0", "10.2.0.2"][..], USAGE, "0"),
        (&["tcp", "70000", "10.2.0.2"], USAGE, "70000"),
        (&["tcp", "80", "10.2.0.2:0"], USAGE, "0"),
        (&["tcp", "80", "10.2.0.2:65536"], USAGE, "65536"),
        (&["sctp", "80", "10.2.0.2"], USAGE, "sctp"),
        (&["tcp", "eighty", "10.2.0.2"], USAGE, "eighty"),
        (&["tcp", "80", "10.2.0.300"], USAGE, "10.2.0.300"),
        (&["tcp", "80", "server..example"], USAGE, "server..example"),
        (&["tcp", "200-100", "10.2.0.2"], USAGE, "200-100"),
        (&["tcp", "100-200", "10.2.0.2:300-350"], USAGE, "51 ports"),
        (&["tcp", "100-200", "10.2.0.2:300"], USAGE, "1 port"),
        (&["tcp", "80", "10.2.0.2", "--track", "half"], USAGE, "half"),
        (
            &["icmp", "echo", "10.2.0.2", "--track", "light"],
            USAGE,
            "--track light",
        ),
        (
            &["tcp", "80", "10.2.0.2", "--track", "light", "--masquerade"],
            USAGE,
            "--masquerade",
        ),
        (
            &[
                "tcp", "80", "10.2.0.2", "--track", "light", "--snat", "10.2.0.1",
            ],
            USAGE,
            "--snat",
        ),
        (
            &[
                "tcp",
                "80",
                "10.2.0.2",
                "--track",
                "light",
                "--max-flows",
                "5",
            ],
            USAGE,
            "limits",
        ),
        (
            &[
                "tcp", "80", "10.2.0.2", "--track", "light", "--flows", "keep",
            ],
            USAGE,
            "--flows",
        ),
        (&["tcp", "100-200", "10.2.0.2:65500-65600"], USAGE, "65600"),
        (
            &["tcp", "10.1.0.1:443", "[2001:db8:2::2]:443"],
            USAGE,
            "2001:db8:2::2",
        ),
        (
            &["tcp", "[2001:db8:1::1]:443", "10.2.0.2:443"],
            USAGE,
            "10.2.0.2",
        ),
        (&["tcp", "443"], USAGE, "TARGET"),
        (&["tcp", "10.1.0.1:443", "10.1.0.1:443"], USAGE, "10.1.0.1"),
        (&["tcp", "443", "10.1.0.1:443"], USAGE, "10.1.0.1"),
        (&["tcp", "443", "0.0.0.0"], USAGE, "0.0.0.0"),
        (&["tcp", "443", "224.0.0.1"], USAGE, "224.0.0.1"),
        (&["tcp", "443", "127.0.0.1"], USAGE, "127.0.0.1"),
        (&["tcp", "443", "[::]"], USAGE, "::"),
        (&["tcp", "443", "10.2.0.0"], USAGE, "10.2.0.0/24"),
        (&["tcp", "443", "10.2.0.255"], USAGE, "10.2.0.0/24"),
        (&["tcp", "443", "10.1.0.255"], USAGE, "10.1.0.0/24"),
        (&["tcp", "8080", "10.2.0.2:80"], CONFLICT, "web"),
        (&["tcp", "8080", "10.2.0.3:81"], CONFLICT, "web"),
        (&["both", "8080", "10.2.0.3:81"], CONFLICT, "web"),
        (&["udp", "9050-9150", "10.2.0.3"], CONFLICT, "range"),
        (&["udp", "8900-9000", "10.2.0.3"], CONFLICT, "range"),
        (&["udp", "10.1.0.1:53", "10.2.0.3:53"], CONFLICT, "pinned"),
        (
            &["tcp", "443", "10.2.0.2", "--name", "web"],
            CONFLICT,
            "web",
        ),
    ] {
        let mut command = vec!["add"];
        command.extend(arguments);
        let output = scene.daemon.cli(&command)?;
        expect_refusal(&output, code, about).with_context(|| command.join(" "))?;
        assert_eq!(
            scene.daemon.ok(&["--json", "rules"])?,
            before,
            "{command:?}"
        );
    }
    Ok(())
}

#[test]
fn what_only_looks_like_a_conflict_is_accepted() -> Result<()> {
    let scene = scene()?;
    let before = scene.daemon.rules()?.len();
    for (why, rule) in [
        ("inside a range", ["tcp", "9050", "10.2.0.3:9050"]),
        ("the other protocol", ["udp", "8080", "10.2.0.3:80"]),
        ("the other family", ["tcp", "8080", "[2001:db8:2::2]:80"]),
        ("of one address", ["tcp", "10.1.0.1:8080", "10.2.0.3:80"]),
        (
            "next to a range",
            ["both", "9101-9200", "10.2.0.3:9101-9200"],
        ),
    ] {
        let added = scene.daemon.ok(&[&["add"][..], &rule].concat());
        added.context(why)?;
    }
    assert_eq!(scene.daemon.rules()?.len(), before + 5);
    Ok(())
}

#[test]
fn removing_what_is_not_there_is_not_found() -> Result<()> {
    let scene = scene()?;
    for id in ["nobody", "4711"] {
        expect_refusal(&scene.daemon.cli(&["remove", id])?, NOT_FOUND, id)?;
    }
    assert_eq!(scene.daemon.rules()?.len(), 3);
    Ok(())
}

#[test]
fn without_a_daemon_writing_fails_and_reading_works() -> Result<()> {
    let mut scene = scene()?;
    let before = scene.daemon.ok(&["--json", "rules"])?;
    scene.daemon.kill9()?;
    let add = scene.daemon.cli(&["add", "tcp", "443", "10.2.0.2"])?;
    expect_refusal(&add, NOT_RUNNING, "run --wan")?;
    let remove = scene.daemon.cli(&["remove", "web"])?;
    expect_refusal(&remove, NOT_RUNNING, "run --wan")?;
    assert_eq!(
        scene.daemon.cli(&["status"])?.status.code(),
        Some(NOT_RUNNING)
    );
    assert_eq!(scene.daemon.ok(&["--json", "rules"])?, before);
    for noun in ["rules", "flows", "counters"] {
        scene.daemon.ok(&[noun])?;
    }
    Ok(())
}

#[test]
fn a_second_daemon_of_the_same_instance_is_a_conflict() -> Result<()> {
    let scene = scene()?;
    let output = scene
        .daemon
        .cli(&["run", "--wan", "wan0", "--lan", "lan0", "--mode", "tc"])?;
    expect_refusal(&output, CONFLICT, scene.lab.gateway.name())?;
    assert_eq!(scene.daemon.rules()?.len(), 3);
    Ok(())
}

#[test]
fn a_daemon_that_cannot_start_says_why_in_one_line() -> Result<()> {
    let mut scene = scene()?;
    scene.daemon.kill9()?;
    for (arguments, about) in [
        (&["run", "--wan", "wan0=fast", "--lan", "lan0"][..], "fast"),
        (&["run", "--lan", "lan0"], "--wan"),
        (&["fly"], "fly"),
    ] {
        expect_refusal(&scene.daemon.cli(arguments)?, USAGE, about)?;
    }
    Ok(())
}

#[test]
fn a_namespace_that_is_not_there_is_not_found() -> Result<()> {
    let output = std::process::Command::new(portfwd_tests::daemon::binary()?)
        .args(["-n", "pfwd-nowhere", "rules"])
        .output()?;
    expect_refusal(&output, NOT_FOUND, "pfwd-nowhere")
}

#[test]
fn a_stranger_is_denied() -> Result<()> {
    const NOBODY: u32 = 65534;
    let scene = scene()?;
    // A copy that anybody may execute, wherever the build directory is. Made by another process: a program that this one has
    // open for writing cannot be executed, and what another test forks has it open for a moment longer.
    let directory = tempfile::tempdir()?;
    let binary = directory.path().join("portfwd");
    let mut copy = std::process::Command::new("cp");
    run(copy.arg(portfwd_tests::daemon::binary()?).arg(&binary))?;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), everybody)?;
    for arguments in [&["rules"][..], &["add", "tcp", "443", "10.2.0.2"]] {
        let output = std::process::Command::new(&binary)
            .args(["--instance", scene.lab.gateway.name()])
            .args(arguments)
            .uid(NOBODY)
            .gid(NOBODY)
            .output()?;
        expect_refusal(&output, DENIED, "portfwd")?;
    }
    assert_eq!(scene.daemon.rules()?.len(), 3);
    Ok(())
}

#[test]
fn a_port_on_which_the_gateway_listens_is_forwarded_with_a_warning() -> Result<()> {
    let scene = scene()?;
    let _nginx = Nginx::start(&scene.lab.gateway, 443, &[])?;
    let output = scene.daemon.cli(&["add", "tcp", "443", "10.2.0.2"])?;
    let warning = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{warning}");
    assert!(
        warning.contains("nginx") && warning.contains("443"),
        "{warning:?}"
    );
    Ok(())
}

#[test]
fn a_bare_command_is_status() -> Result<()> {
    let scene = scene()?;
    let without_seconds = |text: String| -> Vec<String> {
        text.lines()
            .filter(|line| !line.contains("uptime") && !line.contains("daemon"))
            .map(str::to_string)
            .collect()
    };
    let bare = without_seconds(scene.daemon.ok(&[])?);
    assert_eq!(bare, without_seconds(scene.daemon.ok(&["status"])?));
    assert!(!bare.is_empty());
    Ok(())
}

#[test]
fn a_reader_that_goes_away_is_no_panic() -> Result<()> {
    let scene = scene()?;
    let mut child = scene
        .daemon
        .command()
        .arg("rules")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(!stderr.contains("panicked"), "{stderr}");
    Ok(())
}

#[test]
fn the_size_of_the_connection_table_is_an_option() -> Result<()> {
    let options = DaemonOptions {
        max_flows: Some(1000),
        ..DaemonOptions::new(Mode::Tc)
    };
    let scene = Scene::with(portfwd_tests::LabOptions::default(), options)?;
    let status = scene.daemon.json(&["status"])?;
    assert_eq!(status["flows"]["capacity"], 1000);
    Ok(())
}
