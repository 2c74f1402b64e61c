//! `portfwd check-port`: from inside the gateway, and from another machine.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::{Mode, binary};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::process::{Process, output_within};
use portfwd_tests::{Family, nftables, tcp, udp};
use serde_json::Value;

use crate::scene::{LISTEN, Scene, TARGET};

/// A port that nothing answers on is waited for, by the gateway and by the helper.
const LONG: Duration = Duration::from_secs(40);
const HELPER: u16 = 7373;

fn scene() -> Result<Scene> {
    let scene = Scene::forwarding(Mode::Tc, "both")?;
    scene
        .lab
        .gateway
        .ip("route add default dev wan0\nroute add ::/0 dev wan0\n")?;
    Ok(scene)
}

/// The report, and whether the command said that the port answers.
fn check(scene: &Scene, arguments: &str) -> Result<(Value, bool)> {
    let mut command = scene.daemon.command();
    command
        .args(["--json", "check-port"])
        .args(arguments.split(' '));
    let output = output_within(&mut command, LONG)?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let code = output.status.code().context("killed")?;
    assert_eq!(report["answers"], code == 0, "{report:#}");
    Ok((report, code == 0))
}

/// State and detail of a step of the first address.
fn step<'a>(report: &'a Value, name: &str) -> Option<(&'a str, &'a str)> {
    let steps = report["checks"][0]["inside"].as_array()?;
    let step = steps.iter().find(|step| step["step"] == name)?;
    Some((step["state"].as_str()?, step["detail"].as_str()?))
}

#[test]
fn from_inside_the_whole_path_is_walked() -> Result<()> {
    let scene = scene()?;
    let v4 = "tcp 8080 --listen 10.1.0.1";
    let (report, answers) = check(&scene, v4)?;
    assert!(!answers);
    assert_eq!(
        step(&report, "rule").map(|of| of.0),
        Some("good"),
        "{report:#}"
    );
    assert_eq!(
        step(&report, "packet").map(|of| of.0),
        Some("good"),
        "{report:#}"
    );
    assert_eq!(
        step(&report, "answer").map(|of| of.0),
        Some("good"),
        "{report:#}"
    );
    let (state, detail) = step(&report, "target").context("no step target")?;
    assert_eq!(state, "bad");
    assert!(detail.contains("10.2.0.2:80 refuses"), "{detail}");

    let _servers = Family::BOTH.map(|family| tcp::Echo::start(&scene.lab.server, family, TARGET));
    let (report, answers) = check(&scene, "tcp 8080")?;
    assert!(answers, "{report:#}");
    // Rules of both families listen on the port, and both were looked at.
    assert_eq!(report["checks"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        step(&report, "neighbour").map(|of| of.0),
        Some("good"),
        "{report:#}"
    );

    // A service that says nothing to strangers may well be there; a closed port is not.
    let (report, answers) = check(&scene, "udp 8080 --listen 10.1.0.1")?;
    assert!(
        !answers && step(&report, "target").is_some_and(|of| of.1.contains("refuses")),
        "{report:#}"
    );
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let (report, answers) = check(&scene, "udp 8080 --listen 10.1.0.1")?;
    assert!(
        answers && step(&report, "target").is_some_and(|of| of.1.contains("answers")),
        "{report:#}"
    );
    Ok(())
}

#[test]
fn from_inside_it_is_said_where_the_path_ends() -> Result<()> {
    let scene = scene()?;
    let (report, answers) = check(&scene, "tcp 9999")?;
    let (state, detail) = step(&report, "rule").context("no step rule")?;
    assert!(
        !answers && state == "bad" && detail.contains("no rule listens there"),
        "{report:#}"
    );

    scene.daemon.add("nobody", "tcp", "81", "10.2.0.77")?;
    let (report, answers) = check(&scene, "tcp 81")?;
    let (state, detail) = step(&report, "neighbour").context("no step neighbour")?;
    assert!(
        !answers && state == "bad" && detail.starts_with("10.2.0.77"),
        "{report:#}"
    );

    scene.lab.gateway.sysctl("net/ipv4/ip_forward", "0")?;
    let (report, answers) = check(&scene, "tcp 81")?;
    let (state, detail) = step(&report, "packet").context("no step packet")?;
    assert!(!answers && state == "bad", "{report:#}");
    assert!(detail.contains("the kernel forwards no IPv4"), "{report:#}");
    Ok(())
}

/// The helper at work in the client's namespace.
fn start_helper(scene: &Scene) -> Result<Process> {
    let mut command = Command::new(binary()?);
    command.args(["-n", scene.lab.client.name(), "check-port", "--serve"]);
    command.arg(format!("[::]:{HELPER}"));
    let process = Process::spawn(command)?;
    process.wait_for_output("ready to dial back", PATIENCE)?;
    Ok(process)
}

fn outside(scene: &Scene, proto: &str, family: Family) -> Result<(String, bool)> {
    let helper = CLIENT.endpoint(family, HELPER);
    let listen = portfwd_tests::address::GATEWAY_WAN.of(family);
    let (report, answers) = check(
        scene,
        &format!("{proto} {LISTEN} --listen {listen} --helper {helper}"),
    )?;
    let detail = report["checks"][0]["outside"]["detail"].as_str();
    Ok((detail.context("nothing from outside")?.to_owned(), answers))
}

#[test]
fn another_machine_says_whether_the_port_answers_from_outside() -> Result<()> {
    let scene = scene()?;
    let _helper = start_helper(&scene)?;
    for family in Family::BOTH {
        for proto in ["tcp", "udp"] {
            let (detail, answers) = outside(&scene, proto, family)?;
            assert!(
                !answers && detail.starts_with("refused"),
                "{proto} {family}: {detail}"
            );
        }
        let _tcp = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let _udp = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        for proto in ["tcp", "udp"] {
            let (detail, answers) = outside(&scene, proto, family)?;
            assert!(answers && detail == "answers", "{proto} {family}: {detail}");
        }
    }
    // Open for the gateway and closed for the world: only the other machine sees it.
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    nftables::load(
        &scene.lab.server,
        "table ip t { chain c { type filter hook input priority 0; ip saddr 10.1.0.0/24 drop; }\n}",
    )?;
    let (detail, answers) = outside(&scene, "tcp", Family::V4)?;
    assert!(!answers && detail == "no answer", "{detail}");
    assert!(check(&scene, "tcp 8080 --listen 10.1.0.1")?.1);
    Ok(())
}

#[test]
fn the_helper_answers_nonsense_and_goes_on() -> Result<()> {
    let scene = scene()?;
    let helper = start_helper(&scene)?;
    let endpoint: SocketAddr = CLIENT.endpoint(Family::V4, HELPER);
    let say = |words: &[u8]| -> Result<String> {
        let stream: TcpStream = tcp::connect(&scene.lab.gateway, endpoint)?;
        (&stream).write_all(words)?;
        let mut line = String::new();
        // A helper that hangs up on what it has not read resets the connection.
        let _ = BufReader::new(&stream).read_line(&mut line);
        Ok(line)
    };
    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"portfwd-check 1 tcp 0\n"] {
        assert_eq!(say(words)?, "failed this is no request for a port\n");
    }
    // Longer than any request, and no text: whatever it answers, it goes on.
    say(&[b'x'; 4096])?;
    say(&[0xff, 0xfe, b'\n'])?;
    // An open connection that says nothing keeps nobody waiting.
    let _silent = tcp::connect(&scene.lab.gateway, endpoint)?;
    let _echo = tcp::Echo::start(&scene.lab.gateway, Family::V4, 2222)?;
    assert_eq!(say(b"portfwd-check 1 tcp 2222\n")?, "open\n");
    helper.wait_for_output("portfwd-check 1 tcp 2222: open", PATIENCE)?;
    Ok(())
}

#[test]
fn without_helper_or_port_it_says_so_in_one_line() -> Result<()> {
    let scene = scene()?;
    let (report, answers) = check(&scene, "tcp 8080 --listen 10.1.0.1 --helper 10.1.0.2:9")?;
    let outside = &report["checks"][0]["outside"];
    assert!(!answers && outside["state"] == "unknown", "{report:#}");
    for arguments in [
        &["check-port", "tcp"][..],
        &["check-port", "tcp", "0"],
        &["check-port", "both", "80"],
        &["check-port", "tcp", "80", "--helper", "nowhere"],
        &["check-port", "tcp", "80", "--serve", "[::]:1"],
    ] {
        let output = scene.daemon.cli(arguments)?;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert_eq!(String::from_utf8(output.stderr)?.lines().count(), 1);
    }
    Ok(())
}
