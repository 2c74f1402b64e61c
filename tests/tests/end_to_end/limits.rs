//! Rules that take so many flows and no more.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use portfwd_common::abi::Usage;
use portfwd_tests::address::{CLIENT, DualStack};
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::{Family, socket, tcp, udp};
use rstest::rstest;
use socket2::Type;

use crate::scene::{LISTEN, Scene, TARGET, listen};

/// The client's second address: of the same /24, and of the same /64.
const NEIGHBOUR: DualStack = DualStack::new(1, 77);
/// How long a connection attempt that is to be refused may try: it is silent.
const SHORT: Duration = Duration::from_millis(300);

fn scene(mode: Mode) -> Result<Scene> {
    let scene = Scene::new(mode)?;
    scene.lab.client.ip(&format!(
        "address add {}/24 dev c0\naddress add {}/64 dev c0 nodad",
        NEIGHBOUR.v4, NEIGHBOUR.v6
    ))?;
    Ok(scene)
}

const fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "limited-ipv4",
        Family::V6 => "limited-ipv6",
    }
}

/// Adds a rule with limits, or has the rule say others.
fn limit(scene: &Scene, words: &[&str], family: Family, options: &[&str]) -> Result<()> {
    let listen = LISTEN.to_string();
    let target = scene.lab.server_address().endpoint(family, TARGET);
    let target = target.to_string();
    let mut line = words.to_vec();
    line.extend(["both", &listen, &target]);
    line.extend(options);
    scene.daemon.ok(&line)?;
    Ok(())
}

fn add(scene: &Scene, family: Family, options: &[&str]) -> Result<()> {
    let mut all = options.to_vec();
    all.extend(["--name", name(family)]);
    limit(scene, &["add"], family, &all)
}

fn refused(scene: &Scene, reason: &str) -> Result<u64> {
    Ok(scene.daemon.drops()?.get(reason).copied().unwrap_or(0))
}

/// A connection from an address of the client.
fn connect(scene: &Scene, source: IpAddr, family: Family, within: Duration) -> Result<TcpStream> {
    let socket = socket::bind(&scene.lab.client, Type::STREAM, SocketAddr::new(source, 0))?;
    socket.connect_timeout(&listen(family).into(), within)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(here(PATIENCE)))?;
    tcp::exchange(&mut stream, b"hello")?;
    Ok(stream)
}

/// A datagram from an address of the client, and its answer.
fn ask(scene: &Scene, source: IpAddr, family: Family) -> Result<UdpSocket> {
    let socket = udp::bind(&scene.lab.client, SocketAddr::new(source, 0))?;
    socket.set_read_timeout(Some(here(PATIENCE)))?;
    socket.connect(listen(family))?;
    udp::exchange(&socket, b"hello")?;
    Ok(socket)
}

/// A port that no flow of this run has had: the system gives a closed socket's to another, whose datagrams are then nobody's
/// first.
fn fresh_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Sends datagrams of so many flows, and waits until the rule has let in or refused each.
fn knock(
    scene: &Scene,
    source: IpAddr,
    family: Family,
    flows: u64,
) -> Result<BTreeMap<String, u64>> {
    let before = outcomes(scene)?;
    let mut sockets = Vec::new();
    for _ in 0..flows {
        let socket = udp::bind(&scene.lab.client, SocketAddr::new(source, fresh_port()))?;
        socket.connect(listen(family))?;
        socket.send(b"knock")?;
        sockets.push(socket);
    }
    let mut counted = BTreeMap::new();
    wait_until("every datagram to be counted", PATIENCE, || {
        counted = outcomes(scene)?;
        for (what, count) in &mut counted {
            *count -= before.get(what).copied().unwrap_or(0);
        }
        Ok(counted.values().sum::<u64>() == flows)
    })?;
    counted.retain(|_, count| *count > 0);
    Ok(counted)
}

/// What became of first packets.
fn outcomes(scene: &Scene) -> Result<BTreeMap<String, u64>> {
    let mut outcomes = scene.daemon.drops()?;
    let begun = scene.daemon.events()?.get("flow_created").copied();
    outcomes.insert("begun".to_owned(), begun.unwrap_or(0));
    Ok(outcomes)
}

fn said(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let pairs = pairs
        .iter()
        .map(|(what, count)| ((*what).to_owned(), *count));
    pairs.collect()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_source_that_opens_too_many_connections_gets_no_more_and_its_neighbour_does(
    #[case] mode: Mode,
) -> Result<()> {
    let scene = scene(mode)?;
    // One source is an address here.
    let bits = |family| match family {
        Family::V4 => "32",
        Family::V6 => "128",
    };
    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let options = [
            "--max-flows",
            "5",
            "--max-flows-per-source",
            "3",
            "--source-prefix",
        ];
        add(&scene, family, &[&options[..], &[bits(family)]].concat())?;
        let (greedy, modest) = (CLIENT.of(family), NEIGHBOUR.of(family));
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.push(connect(&scene, greedy, family, PATIENCE)?);
        }
        let more = connect(&scene, greedy, family, SHORT);
        ensure!(more.is_err(), "{more:?}");
        ensure!(refused(&scene, "source_flows")? > 0);
        // The neighbour gets what is left of the rule's, and not more.
        let neighbours = [
            connect(&scene, modest, family, PATIENCE)?,
            connect(&scene, modest, family, PATIENCE)?,
        ];
        let more = connect(&scene, modest, family, SHORT);
        ensure!(more.is_err(), "{more:?}");
        ensure!(refused(&scene, "rule_flows")? > 0);
        // Connections that are there do not notice.
        for stream in &mut streams {
            tcp::exchange(stream, b"still here")?;
        }
        // One that is closed makes room at once.
        drop(streams.pop());
        drop(neighbours);
        wait_until("the connections to be closed", PATIENCE, || {
            let flows = scene.daemon.flows()?;
            let open = flows.iter().filter(|flow| flow.state == "established");
            Ok(open.count() == 2)
        })?;
        streams.push(connect(&scene, greedy, family, PATIENCE)?);
        let more = connect(&scene, greedy, family, SHORT);
        ensure!(more.is_err(), "{more:?}");
        scene
            .daemon
            .ok(&["remove", name(family), "--flows", "kill"])?;
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_rate_lets_its_burst_in_and_refuses_the_rest(#[case] mode: Mode) -> Result<()> {
    let scene = scene(mode)?;
    for family in Family::BOTH {
        let bits = match family {
            Family::V4 => "32",
            Family::V6 => "128",
        };
        // So slow that nothing comes back meanwhile.
        let options = [
            "--rate",
            "1/h:12",
            "--rate-per-source",
            "1/h:8",
            "--source-prefix",
            bits,
        ];
        add(&scene, family, &options)?;
        let (greedy, modest) = (CLIENT.of(family), NEIGHBOUR.of(family));
        assert_eq!(
            knock(&scene, greedy, family, 50)?,
            said(&[("begun", 8), ("source_rate", 42)])
        );
        assert_eq!(
            knock(&scene, modest, family, 7)?,
            said(&[("begun", 4), ("rule_rate", 3)])
        );
        let rules = scene.daemon.json(&["rules"])?;
        assert_eq!(rules[0]["limits"]["refused"], 45, "{rules}");
        assert_eq!(rules[0]["limits"]["rate"], "1/h:12", "{rules}");
        let table = scene.daemon.ok(&["rules"])?;
        assert!(table.contains("1/h:12, 1/h:8 each"), "{table}");
        // The rule says more from here on, and its flows stay.
        let flows = scene.daemon.flows()?.len();
        limit(
            &scene,
            &["replace", name(family)],
            family,
            &["--rate", "1/h:3"],
        )?;
        assert_eq!(scene.daemon.flows()?.len(), flows);
        assert_eq!(
            knock(&scene, modest, family, 5)?,
            said(&[("begun", 3), ("rule_rate", 2)])
        );
        scene
            .daemon
            .ok(&["remove", name(family), "--flows", "kill"])?;
    }
    Ok(())
}

/// The clock is that of the machine: the test says how long it took itself.
#[test]
fn in_no_time_more_flows_begin_than_burst_and_rate() -> Result<()> {
    const RATE: u64 = 100;
    const BURST: u64 = 10;
    let scene = scene(Mode::Xdp)?;
    let family = Family::V4;
    add(&scene, family, &["--rate", "100/s:10"])?;
    let start = Instant::now();
    let (mut begun, mut rounds) = (0, 0);
    while begun < BURST + 30 {
        let counted = knock(&scene, CLIENT.of(family), family, 20)?;
        begun += counted.get("begun").copied().unwrap_or(0);
        rounds += 1;
        ensure!(rounds < 10_000, "{begun} flows in {:?}", start.elapsed());
    }
    // And a tick, of 10 ms at the longest.
    let elapsed = start.elapsed() + Duration::from_millis(10);
    let allowed = BURST + (elapsed.as_millis() as u64 * RATE).div_ceil(1_000);
    ensure!(
        begun <= allowed,
        "{begun} flows in {elapsed:?}, not {allowed}"
    );
    Ok(())
}

#[test]
fn addresses_of_one_ipv6_network_are_one_source_unless_the_rule_says_otherwise() -> Result<()> {
    let scene = scene(Mode::Xdp)?;
    let family = Family::V6;
    let (one, other) = (CLIENT.of(family), NEIGHBOUR.of(family));
    add(&scene, family, &["--max-flows-per-source", "2"])?;
    assert_eq!(knock(&scene, one, family, 2)?, said(&[("begun", 2)]));
    assert_eq!(
        knock(&scene, other, family, 2)?,
        said(&[("source_flows", 2)])
    );
    let own = ["--max-flows-per-source", "2", "--source-prefix", "128"];
    limit(&scene, &["replace", name(family)], family, &own)?;
    assert_eq!(
        knock(&scene, other, family, 3)?,
        said(&[("begun", 2), ("source_flows", 1)])
    );
    Ok(())
}

/// Numbers of flows are the tables': whoever has counted before, and whatever became of the daemon.
#[test]
fn numbers_of_flows_outlive_the_daemon_and_follow_the_tables() -> Result<()> {
    let mut scene = scene(Mode::Xdp)?;
    let family = Family::V4;
    let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
    add(&scene, family, &[])?;
    // These begin before there is a limit.
    let client = CLIENT.of(family);
    let mut sockets = Vec::new();
    for _ in 0..3 {
        sockets.push(ask(&scene, client, family)?);
    }
    limit(
        &scene,
        &["replace", name(family)],
        family,
        &["--max-flows", "5", "--max-flows-per-source", "4"],
    )?;
    scene.daemon.kill9()?;
    scene.daemon.start()?;
    // The recount finds them: how many flows fit is what is left.
    let target = scene
        .lab
        .server_address()
        .endpoint(family, TARGET)
        .to_string();
    wait_until("the flows to be counted", PATIENCE, || {
        let counted = usages(&scene)?;
        Ok(counted == 3)
    })?;
    assert_eq!(
        knock(&scene, client, family, 3)?,
        said(&[("begun", 1), ("source_flows", 2)])
    );
    for socket in &sockets {
        udp::exchange(socket, b"still here")?;
    }
    // Those that a change of the rule ends make room for what follows.
    let elsewhere = format!("{target}1");
    let listen = LISTEN.to_string();
    let words = ["replace", name(family), "both", &listen, &elsewhere];
    let limits = ["--max-flows", "5", "--max-flows-per-source", "4"];
    let kill = ["--flows", "kill"];
    scene
        .daemon
        .ok(&[&words[..], &limits[..], &kill[..]].concat())?;
    for socket in &sockets {
        socket.send(b"knock")?;
    }
    wait_until("the flows to begin anew", PATIENCE, || {
        Ok(scene.daemon.flows()?.len() == 3)
    })?;
    // The one that has been silent since counts until it is swept.
    let counted = usages(&scene)?;
    ensure!((3..=4).contains(&counted), "{counted} flows");
    Ok(())
}

/// Flows of the only rule, as the datapath counts them.
fn usages(scene: &Scene) -> Result<u64> {
    let tables = portfwd::bpf::Tables::open_pinned(&scene.daemon.pins())?;
    let usages = tables.rule_usages()?;
    Ok(usages.values().map(Usage::flows).sum())
}

#[test]
fn limits_that_make_no_sense_are_refused_whole() -> Result<()> {
    let scene = scene(Mode::Xdp)?;
    for (options, said) in [
        (["--rate", "fast"], "\"fast\" is not a rate of new flows"),
        (
            ["--rate-per-source", "0/s"],
            "\"0/s\" is not a rate of new flows",
        ),
        (["--max-flows", "0"], "a rule that takes no flow is none"),
        (["--source-prefix", "24"], "nothing is limited by source"),
    ] {
        let output = scene
            .daemon
            .cli(&[&["add", "tcp", "80", "10.0.0.2"], &options[..]].concat())?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success() && error.contains(said),
            "{options:?}: {error}"
        );
    }
    assert_eq!(scene.daemon.rules()?.len(), 0);
    Ok(())
}
