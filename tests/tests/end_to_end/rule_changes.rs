//! What becomes of flows when their rule changes or goes.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::Mode;
use portfwd_tests::{Family, tcp, udp};
use rstest::rstest;

use crate::scene::{Scene, listen};

/// The server's ports before and after the change.
const OLD: u16 = 81;
const NEW: u16 = 82;

/// A rule for both protocols that leads to [`OLD`], with a server of each protocol there and at
/// [`NEW`], and a flow of each protocol.
struct Change {
    scene: Scene,
    tcp: [tcp::Echo; 2],
    udp: [udp::Echo; 2],
    stream: TcpStream,
    socket: UdpSocket,
}

impl Change {
    fn new(mode: Mode, family: Family) -> Result<Self> {
        let scene = Scene::new(mode)?;
        let server = &scene.lab.server;
        let tcp = [
            tcp::Echo::start(server, family, OLD)?,
            tcp::Echo::start(server, family, NEW)?,
        ];
        let udp = [
            udp::Echo::start(server, family, OLD)?,
            udp::Echo::start(server, family, NEW)?,
        ];
        let target = target(&scene, family, OLD);
        scene.daemon.add("service", "both", "8080", &target)?;
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut stream, b"before")?;
        udp::exchange(&socket, b"before")?;
        let change = Self {
            scene,
            tcp,
            udp,
            stream,
            socket,
        };
        change.expect_peers([1, 0], [1, 0]);
        Ok(change)
    }

    /// How many have come to the old servers and to the new ones.
    fn expect_peers(&self, tcp: [usize; 2], udp: [usize; 2]) {
        let came = (
            self.tcp.each_ref().map(|echo| echo.peers().len()),
            self.udp.each_ref().map(|echo| echo.peers().len()),
        );
        assert_eq!(came, (tcp, udp), "TCP and UDP, old and new");
    }
}

fn target(scene: &Scene, family: Family, port: u16) -> String {
    scene
        .lab
        .server_address()
        .endpoint(family, port)
        .to_string()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp, Family::V4)]
#[case::over_tc(Mode::Tc, Family::V6)]
fn flows_of_a_replaced_rule_are_kept_drained_or_killed(
    #[case] mode: Mode,
    #[case] family: Family,
) -> Result<()> {
    for policy in ["keep", "drain", "kill"] {
        let mut change = Change::new(mode, family)?;
        let scene = &change.scene;
        let id = scene.daemon.rule("service")?.id;
        let new = target(scene, family, NEW);
        let words = [
            "replace", "service", "both", "8080", &new, "--flows", policy,
        ];
        scene.daemon.ok(&words)?;
        let rule = scene.daemon.rule("service")?;
        assert_eq!((rule.id, rule.target), (id, new));

        // New flows go to the new servers.
        let mut stream = tcp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut stream, b"after")?;
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        udp::exchange(&socket, b"after")?;
        // The old UDP flow goes on where it is sent.
        udp::exchange(&change.socket, b"after")?;
        // So does the old connection; the new server knows nothing of it.
        let goes_on = tcp::exchange(&mut change.stream, b"after");
        if policy == "kill" {
            let error: std::io::Error = goes_on.err().context("the server answered")?.downcast()?;
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        } else {
            goes_on?;
        }
        let udp_new = if policy == "keep" { 1 } else { 2 };
        change.expect_peers([1, 1], [1, udp_new]);
        let draining = match policy {
            "keep" => 2,
            "drain" => 1,
            _ => 0,
        };
        assert_eq!(
            change.scene.daemon.rule("service")?.draining,
            draining,
            "{policy}"
        );
        change.scene.expect_no_errors()?;
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_connection_of_a_removed_rule_goes_on_if_it_is_spared_even_over_a_restart(
    #[case] mode: Mode,
) -> Result<()> {
    let mut change = Change::new(mode, Family::V4)?;
    change
        .scene
        .daemon
        .ok(&["remove", "service", "--flows", "drain"])?;
    assert!(change.scene.daemon.rules()?.is_empty());
    for _ in 0..2 {
        tcp::exchange(&mut change.stream, b"as before")?;
        let refused = tcp::connect(&change.scene.lab.client, listen(Family::V4)).is_err();
        assert!(refused, "a new connection found the rule");
        change.socket.send(b"as before")?;
        let error = udp::reported_error(&change.socket)?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(change.scene.daemon.flows()?.len(), 1);
        change.scene.daemon.kill9()?;
        change.scene.daemon.start()?;
    }
    // The rule comes back as another one; the old connection stays what it is.
    let new = target(&change.scene, Family::V4, NEW);
    change.scene.daemon.add("service", "both", "8080", &new)?;
    tcp::exchange(&mut change.stream, b"as before")?;
    change.expect_peers([1, 0], [1, 0]);
    change.scene.expect_no_errors()
}

#[test]
fn a_rule_says_itself_what_becomes_of_its_flows() -> Result<()> {
    let mut change = Change::new(Mode::Xdp, Family::V4)?;
    let daemon = &change.scene.daemon;
    let old = target(&change.scene, Family::V4, OLD);
    // The same rule with a policy forwards as before: nothing moves.
    daemon.ok(&[
        "replace", "service", "both", "8080", &old, "--flows", "keep",
    ])?;
    let rule = daemon.rule("service")?;
    assert_eq!((rule.flows, rule.draining), (2, 0));
    assert!(rule.to_target.packets > 0);
    daemon.ok(&["remove", "service"])?;
    tcp::exchange(&mut change.stream, b"kept")?;
    udp::exchange(&change.socket, b"kept")?;
    assert_eq!(change.scene.daemon.flows()?.len(), 2);
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rule_that_is_replaced_under_load_is_never_missing(#[case] mode: Mode) -> Result<()> {
    let change = Change::new(mode, Family::V4)?;
    let (daemon, client) = (&change.scene.daemon, &change.scene.lab.client);
    let _named = [
        udp::Named::start(&change.scene.lab.server, Family::V4, 83, "old")?,
        udp::Named::start(&change.scene.lab.server, Family::V4, 84, "new")?,
    ];
    daemon.add("asked", "udp", "7070", "10.2.0.2:83")?;
    let asked: SocketAddr = GATEWAY_WAN.endpoint(Family::V4, 7070);
    // A stream that stays where it is, and one of a rule that nobody touches.
    let kept = udp::Stream::start(client, listen(Family::V4), 1000)?;
    daemon.add("other", "udp", "9090", "10.2.0.2:81")?;
    let other = GATEWAY_WAN.endpoint(Family::V4, 9090);
    let unchanged = udp::Stream::start(client, other, 1000)?;
    // Every flow that begins is answered, by whoever the rule says.
    let changing = AtomicBool::new(true);
    let names = std::thread::scope(|scope| -> Result<BTreeMap<String, u64>> {
        let asking = scope.spawn(|| -> Result<_> {
            let mut names = BTreeMap::new();
            while changing.load(Ordering::Relaxed) {
                *names.entry(udp::ask_name(client, asked)?).or_default() += 1;
            }
            Ok(names)
        });
        let changes = (0..60).try_for_each(|number| {
            let (echo, named) = [(NEW, 84), (OLD, 83)][number % 2];
            for (name, proto, listen, port) in [
                ("service", "both", "8080", echo),
                ("asked", "udp", "7070", named),
            ] {
                let target = target(&change.scene, Family::V4, port);
                daemon.ok(&["replace", name, proto, listen, &target, "--flows", "keep"])?;
            }
            kept.wait_for_more(10)
        });
        changing.store(false, Ordering::Relaxed);
        changes?;
        asking.join().expect("no panic")
    })?;
    assert!(names["old"] > 10 && names["new"] > 10, "{names:?}");
    kept.finish()?;
    let sent = unchanged.finish()?;
    assert_eq!(daemon.rule("other")?.to_target.packets, sent);
    // All of the stream went where it had begun.
    assert_eq!(change.udp.each_ref().map(|echo| echo.peers().len()), [3, 0]);
    change.scene.expect_no_errors()
}

#[test]
fn a_replacement_that_makes_no_sense_changes_nothing() -> Result<()> {
    let change = Change::new(Mode::Xdp, Family::V4)?;
    let daemon = &change.scene.daemon;
    daemon.add("other", "tcp", "9090", "10.2.0.2:81")?;
    for (words, code) in [
        (["replace", "service", "both", "9090", "10.2.0.2"], 6),
        (["replace", "service", "both", "80", "10.2.0.2:0"], 2),
        (["replace", "nobody", "both", "80", "10.2.0.2"], 5),
        (["replace", "../status", "both", "80", "10.2.0.2"], 5),
    ] {
        let output = daemon.cli(&words)?;
        assert_eq!(output.status.code(), Some(code), "{words:?}");
    }
    let output = daemon.cli(&["remove", "service", "--flows", "perhaps"])?;
    assert_eq!(output.status.code(), Some(2));
    udp::exchange(&change.socket, b"as before")?;
    change.expect_peers([1, 0], [1, 0]);
    assert_eq!(daemon.rules()?.len(), 2);
    Ok(())
}
