//! Rules for some sources only.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{CLIENT, DualStack};
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::{Family, curl, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen};

/// The client's second address.
const NEIGHBOUR: DualStack = DualStack::new(1, 77);
/// Prefixes in a list that nobody writes by hand.
const MANY: u32 = 10_000;

fn scene(mode: Mode) -> Result<Scene> {
    let scene = Scene::new(mode)?;
    scene.lab.client.ip(&format!(
        "address add {}/24 dev c0\naddress add {}/64 dev c0 nodad",
        NEIGHBOUR.v4, NEIGHBOUR.v6
    ))?;
    Ok(scene)
}

/// Adds a rule for TCP and UDP of a family, with further options.
fn add(scene: &Scene, family: Family, options: &[&str]) -> Result<()> {
    let listen = LISTEN.to_string();
    let target = scene.lab.server_address().endpoint(family, TARGET);
    let target = target.to_string();
    let mut words = vec!["add", "both", &listen, &target, "--name", name(family)];
    words.extend(options);
    scene.daemon.ok(&words)?;
    Ok(())
}

const fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "guarded-ipv4",
        Family::V6 => "guarded-ipv6",
    }
}

fn refused(scene: &Scene) -> Result<u64> {
    let drops = scene.daemon.drops()?;
    Ok(drops.get("source_refused").copied().unwrap_or(0))
}

/// Expects that a datagram of `source` is dropped, and that nobody answers it.
fn expect_refused(scene: &Scene, source: IpAddr, family: Family) -> Result<()> {
    let before = refused(scene)?;
    let socket = udp::bind(&scene.lab.client, SocketAddr::new(source, 0))?;
    socket.connect(listen(family))?;
    socket.send(b"knock")?;
    wait_until("the datagram to be refused", PATIENCE, || {
        Ok(refused(scene)? > before)
    })?;
    socket.set_nonblocking(true)?;
    let answer = socket.recv(&mut [0; 64]);
    let is_silent = matches!(&answer, Err(error) if error.kind() == ErrorKind::WouldBlock);
    ensure!(is_silent, "{answer:?}");
    Ok(())
}

fn expect_let_in(scene: &Scene, source: IpAddr, family: Family) -> Result<()> {
    let socket = udp::bind(&scene.lab.client, SocketAddr::new(source, 0))?;
    socket.set_read_timeout(Some(here(PATIENCE)))?;
    socket.connect(listen(family))?;
    udp::exchange(&socket, b"knock").with_context(|| format!("from {source}"))
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn only_the_sources_of_a_list_reach_the_server(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    let _nginx = Nginx::start(&scene.lab.server, TARGET, &[("page", b"hello")])?;
    for family in Family::BOTH {
        let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
        let (client, neighbour) = (CLIENT.of(family), NEIGHBOUR.of(family));
        // By name, by exception, and by both.
        let network = match family {
            Family::V4 => "10.1.0.0/24",
            Family::V6 => "2001:db8:1::/64",
        };
        let (alone, other) = (client.to_string(), neighbour.to_string());
        for options in [
            vec!["--from", &alone],
            vec!["--not-from", &other],
            vec!["--from", network, "--not-from", &other],
        ] {
            add(&scene, family, &options)?;
            expect_let_in(&scene, client, family)?;
            expect_refused(&scene, neighbour, family)?;
            let url = curl::url(listen(family), "page");
            let page = curl::fetch_from(&scene.lab.client, client, &url, PATIENCE)?;
            assert_eq!(page, b"hello");
            let before = refused(&scene)?;
            let short = Duration::from_secs(1);
            let page = curl::fetch_from(&scene.lab.client, neighbour, &url, short);
            assert!(page.is_err(), "{page:?}");
            assert!(refused(&scene)? > before);
            scene.daemon.ok(&["remove", name(family)])?;
        }
    }
    Ok(())
}

/// A list as block lists are: of both families, with comments, the client's second address somewhere in it.
fn block_list() -> Result<tempfile::NamedTempFile> {
    let mut text = "# keep out\n".to_owned();
    for number in 0..MANY - 2 {
        // No two are the same, none is in the lab.
        let (high, low) = (number >> 8, number & 0xff);
        writeln!(text, "198.{high}.{low}.0/{}\t# {number}", 24 + number % 9)?;
    }
    writeln!(text, "{}\n{}", NEIGHBOUR.v4, NEIGHBOUR.v6)?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    Ok(file)
}

#[test]
fn a_list_of_ten_thousand_prefixes_holds_and_outlives_the_daemon() -> Result<()> {
    let mut scene = scene(Mode::Xdp)?;
    let file = block_list()?;
    let option = format!("@{}", file.path().display());
    for family in Family::BOTH {
        add(&scene, family, &["--not-from", &option])?;
    }
    // The file was read once: what becomes of it is nobody's business.
    drop(file);
    for restarts in 0..2 {
        let rules = scene.daemon.json(&["rules"])?;
        let list = rules[0]["not_from"].as_array().context("no list")?;
        ensure!(list.len() == MANY as usize, "{} prefixes", list.len());
        for family in Family::BOTH {
            let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
            expect_let_in(&scene, CLIENT.of(family), family)?;
            expect_refused(&scene, NEIGHBOUR.of(family), family)?;
        }
        if restarts == 0 {
            scene.daemon.kill9()?;
            scene.daemon.start()?;
        }
    }
    let table = scene.daemon.command().arg("rules").output()?.stdout;
    let table = String::from_utf8(table)?;
    assert!(table.contains("10000 denied"), "{table}");
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn another_list_ends_the_flows_of_whom_it_keeps_out_and_no_other(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    let family = Family::V4;
    let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
    add(&scene, family, &[])?;
    let dial = |source: DualStack| -> Result<std::net::UdpSocket> {
        let socket = udp::bind(&scene.lab.client, source.endpoint(family, 0))?;
        socket.set_read_timeout(Some(here(PATIENCE)))?;
        socket.connect(listen(family))?;
        udp::exchange(&socket, b"knock")?;
        Ok(socket)
    };
    let (stays, goes) = (dial(CLIENT)?, dial(NEIGHBOUR)?);
    let file = block_list()?;
    let (listen, option) = (LISTEN.to_string(), format!("@{}", file.path().display()));
    let target = scene.lab.server_address().endpoint(family, TARGET);
    scene.daemon.ok(&[
        "replace",
        name(family),
        "both",
        &listen,
        &target.to_string(),
        "--not-from",
        &option,
    ])?;
    goes.send(b"once more")?;
    wait_until("the flow to be refused", PATIENCE, || {
        Ok(refused(&scene)? == 1)
    })?;
    udp::exchange(&stays, b"still here")?;
    let flows = scene.daemon.flows()?;
    assert_eq!(flows.len(), 1, "{flows:?}");
    // The same flow, the same counters: the rule has kept its place.
    assert_eq!(flows[0].to_target.packets, 2);
    assert_eq!(scene.daemon.rule(name(family))?.to_target.packets, 3);
    Ok(())
}
