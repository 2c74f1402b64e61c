//! The WAN's address changes, as DHCP and PPP change it; routes, links and neighbours change under load.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use portfwd::bpf::Tables;
use portfwd_tests::address::{CLIENT, DualStack, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::lab::ServerSide;
use portfwd_tests::{Family, LabOptions, Offloads, tcp, udp};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen};

const NEW_WAN: DualStack = DualStack::new(1, 77);
/// How long after an address was replaced a packet may leave by it, and a flow to it be in the table.
const FLUSHED: Duration = Duration::from_secs(1);

/// A server that answers the first datagram with a steady stream, and the client that receives it without sending again.
struct Push {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    last: Arc<Mutex<Instant>>,
    local: SocketAddr,
    threads: Vec<JoinHandle<()>>,
}

impl Push {
    fn start(scene: &Scene, family: Family) -> Result<Self> {
        let any = SocketAddr::new(family.unspecified(), TARGET);
        let server = udp::bind(&scene.lab.server, any)?;
        server.set_read_timeout(Some(here(PATIENCE)))?;
        let client = udp::connect(&scene.lab.client, listen(family))?;
        client.send(b"push")?;
        let (_, peer) = udp::receive(&server, &mut [0; 16])?;
        let local = client.local_addr()?;
        let mut push = Self {
            stop: Arc::default(),
            sent: Arc::default(),
            received: Arc::default(),
            last: Arc::new(Mutex::new(Instant::now())),
            local,
            threads: Vec::new(),
        };
        push.send(server, peer);
        push.receive(client)?;
        push.wait_for_more_received(100)?;
        Ok(push)
    }

    fn send(&mut self, server: UdpSocket, peer: SocketAddr) {
        let (stop, sent) = (Arc::clone(&self.stop), Arc::clone(&self.sent));
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // While the WAN is out there is no way to the client, and the gateway says so.
                drop(server.send_to(b"pushed", peer));
                sent.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        }));
    }

    /// The socket is connected: it takes nothing from any other source than the address it has dialled.
    fn receive(&mut self, client: UdpSocket) -> Result<()> {
        client.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (stop, received) = (Arc::clone(&self.stop), Arc::clone(&self.received));
        let last = Arc::clone(&self.last);
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if client.recv(&mut [0; 16]).is_ok() {
                    received.fetch_add(1, Ordering::Relaxed);
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                }
            }
        }));
        Ok(())
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn last(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_more_received(&self, count: u64) -> Result<()> {
        let goal = self.received() + count;
        wait_until("what the server pushes", PATIENCE, || {
            Ok(self.received() >= goal)
        })
    }

    fn wait_for_more_sent(&self, count: u64) -> Result<()> {
        let goal = self.sent.load(Ordering::Relaxed) + count;
        wait_until("the server to push", PATIENCE, || {
            Ok(self.sent.load(Ordering::Relaxed) >= goal)
        })
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// How an address is replaced.
#[derive(Clone, Copy, Debug)]
enum Replacement {
    /// The new one comes first, as network managers do it.
    NewFirst,
    /// The old one goes first, as dhclient does it.
    OldFirst,
    /// The interface goes, and comes back with the new one, as PPP does it.
    WithInterface,
}

/// Replaces the address, and says when the command that does it was given.
fn replace(scene: &Scene, how: Replacement, offloads: Offloads) -> Result<Instant> {
    let change = |verb: &str, address: DualStack| {
        format!(
            "addr {verb} {}/24 dev wan0\naddr {verb} {}/64 dev wan0{}\n",
            address.v4,
            address.v6,
            if verb == "add" { " nodad" } else { "" }
        )
    };
    let (add, remove) = (change("add", NEW_WAN), change("del", GATEWAY_WAN));
    match how {
        Replacement::NewFirst => {
            // Else the kernel deletes all addresses of a network with the first of them. systemd sets it, too.
            let key = "net/ipv4/conf/wan0/promote_secondaries";
            scene.lab.gateway.sysctl(key, "1")?;
            let began = Instant::now();
            scene.lab.gateway.ip(&(add + &remove))?;
            Ok(began)
        }
        Replacement::OldFirst => {
            let began = Instant::now();
            scene.lab.gateway.ip(&(remove + &add))?;
            Ok(began)
        }
        Replacement::WithInterface => {
            scene.lab.delete_wan()?;
            // Until there is another address, the old one may come back, and its flows wait for it.
            let began = Instant::now();
            scene.lab.recreate_wan_with(offloads, NEW_WAN)?;
            // What portfwd let go while the flow lived may wait in the kernel for the client's MAC address. If the kernel asked before
            // the link was up, nobody heard, and it asks again a second later: that second is not portfwd's.
            let wan = scene.lab.wan_end();
            wan.introduce(scene.lab.client_end(), CLIENT)?;
            Ok(began)
        }
    }
}

/// How many flows to an address are in the tables: read there, which takes no time, and not asked of the daemon, which does.
fn flows_to(tables: &Tables, address: DualStack) -> Result<usize> {
    let own = Family::BOTH.map(|family| address.of(family));
    let flows = tables.flows()?;
    let to = flows.iter().filter(|flow| own.contains(&flow.listen.ip()));
    Ok(to.count())
}

#[rstest]
#[case::over_tc_and_ipv4(Mode::Tc, Family::V4)]
#[case::over_tc_and_ipv6(Mode::Tc, Family::V6)]
#[case::over_native_xdp_and_ipv4(Mode::Xdp, Family::V4)]
fn no_packet_leaves_by_an_address_that_was_replaced(
    #[case] mode: Mode,
    #[case] family: Family,
    #[values(
        Replacement::NewFirst,
        Replacement::OldFirst,
        Replacement::WithInterface
    )]
    how: Replacement,
) -> Result<()> {
    let scene = Scene::forwarding(mode, "udp")?;
    // Some that will never send again: they must leave the table all the same.
    let mut silent = Vec::new();
    for _ in 0..20 {
        let socket = udp::connect(&scene.lab.client, listen(family))?;
        socket.send(b"once")?;
        silent.push(socket);
    }
    let push = Push::start(&scene, family)?;
    let tables = Tables::open_pinned(&scene.daemon.pins())?;
    wait_until("the flows to be there", PATIENCE, || {
        Ok(flows_to(&tables, GATEWAY_WAN)? == 21)
    })?;

    let changed = replace(&scene, how, LabOptions::for_mode(mode).offloads)?;
    wait_until("the flows to the old address to end", PATIENCE, || {
        Ok(flows_to(&tables, GATEWAY_WAN)? == 0)
    })?;
    let emptied = changed.elapsed();
    // Two seconds more.
    push.wait_for_more_sent(2000)?;
    let last = push.last().saturating_duration_since(changed);
    eprintln!(
        "{how:?}: last packet by the old address {last:?} after the change, last flow gone from the table after {emptied:?} at most"
    );
    for (what, after) in [("packet left by", last), ("flow was to", emptied)] {
        ensure!(
            after <= here(FLUSHED),
            "{how:?}: the last {what} the old address {after:?} after it was replaced"
        );
    }
    drop(push);

    let _echo = udp::Echo::start(&scene.lab.server, family, TARGET)?;
    wait_until("the new address to be forwarded", PATIENCE, || {
        let socket = udp::connect(&scene.lab.client, NEW_WAN.endpoint(family, LISTEN))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(udp::exchange(&socket, b"knock").is_ok())
    })?;
    ensure!(flows_to(&tables, NEW_WAN)? > 0);
    Ok(())
}

#[rstest]
#[case::the_daemon_runs(Daemon::Runs)]
#[case::the_daemon_is_killed_meanwhile(Daemon::IsKilledMeanwhile)]
fn the_same_address_back_after_an_outage_keeps_the_flows(#[case] daemon: Daemon) -> Result<()> {
    let mut scene = Scene::forwarding(Mode::Tc, "both")?;
    for family in Family::BOTH {
        let _echo = tcp::Echo::start(&scene.lab.server, family, TARGET)?;
        let mut connection = tcp::connect(&scene.lab.client, listen(family))?;
        tcp::exchange(&mut connection, b"before")?;
        let push = Push::start(&scene, family)?;

        scene.lab.delete_wan()?;
        if daemon == Daemon::IsKilledMeanwhile {
            scene.daemon.kill9()?;
            scene.daemon.start()?;
        }
        wait_until("the daemon to notice", PATIENCE, || {
            let status = scene.daemon.json(&["status"])?;
            Ok(status["interfaces"][0]["mode"] == "waiting")
        })?;
        // The server goes on: its packets must not end the flow.
        push.wait_for_more_sent(500)?;
        scene.lab.recreate_wan(Default::default())?;
        push.wait_for_more_received(100)
            .context("the client has not sent anything since the outage")?;
        tcp::exchange(&mut connection, b"after")?;
        let flows = scene.daemon.flows()?;
        let flow = flows
            .iter()
            .find(|flow| flow.client == push.local.to_string());
        let flow = flow.context("the flow has ended")?;
        ensure!(
            flow.to_target.packets == 1,
            "it is another flow of the same name: {flow:?}"
        );
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Daemon {
    Runs,
    IsKilledMeanwhile,
}

/// Ten thousand changes of addresses and routes, and among them one that counts.
fn storm(changes: usize) -> String {
    let mut lines = String::new();
    for number in 0..changes / 4 {
        let (high, low) = (number / 250, 1 + number % 250);
        lines += &format!(
            "addr add 10.9.{high}.{low}/32 dev wan0\nroute add 10.10.{high}.{low}/32 dev lan0\n\
             addr del 10.9.{high}.{low}/32 dev wan0\nroute del 10.10.{high}.{low}/32 dev lan0\n"
        );
    }
    lines
}

/// Fails unless the table of own addresses comes to be what the kernel has.
fn expect_right_addresses(scene: &Scene) -> Result<()> {
    let links = scene.lab.gateway.ip_json(&["addr", "show", "wan0"])?;
    let there = links[0]["addr_info"].as_array().context("no addresses")?;
    let mut expected: Vec<String> = there
        .iter()
        .filter(|address| address["scope"] == "global")
        .filter_map(|address| Some(address["local"].as_str()?.to_string()))
        .collect();
    expected.sort();
    let found = || -> Result<Vec<String>> {
        let own = Tables::open_pinned(&scene.daemon.pins())?.addresses()?;
        let mut own: Vec<_> = own.iter().map(|(ip, _)| ip.to_string()).collect();
        own.sort();
        Ok(own)
    };
    let right = wait_until("the right addresses", Duration::from_secs(60), || {
        Ok(found()? == expected)
    });
    right.with_context(|| format!("{:?} instead of {expected:?}", found()))
}

#[test]
fn after_a_storm_of_changes_the_final_state_is_right() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 500)?;
    scene.lab.gateway.ip(&storm(10_000))?;
    scene.lab.add_external_address(NEW_WAN.of(Family::V4))?;
    expect_right_addresses(&scene)?;
    let socket = udp::connect(&scene.lab.client, NEW_WAN.endpoint(Family::V4, LISTEN))?;
    udp::exchange(&socket, b"after the storm")?;
    stream
        .finish()
        .context("the storm is not the flows' business")?;
    Ok(())
}

/// The kernel throws news away when nobody reads them, and says that it did.
#[test]
fn news_that_the_kernel_threw_away_are_made_up_for() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    scene.daemon.signal(Signal::SIGSTOP)?;
    scene.lab.gateway.ip(&storm(10_000))?;
    scene.lab.delete_wan()?;
    scene.lab.recreate_wan_with(Default::default(), NEW_WAN)?;
    scene.lab.gateway.ip(&storm(4_000))?;
    scene.daemon.signal(Signal::SIGCONT)?;
    expect_right_addresses(&scene)?;
    wait_until("the new interface to be attached", PATIENCE, || {
        let socket = udp::connect(&scene.lab.client, NEW_WAN.endpoint(Family::V4, LISTEN))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(udp::exchange(&socket, b"knock").is_ok())
    })?;
    let log = scene.daemon.log()?;
    if !log.contains("more has changed than the kernel could tell") {
        bail!("nothing was thrown away: {log}");
    }
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_link_that_flaps_costs_one_gap_each_time_and_no_flow(#[case] mode: Mode) -> Result<()> {
    const FLAPS: usize = 5;
    let scene = Scene::forwarding(mode, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 1000)?;
    stream.wait_for_more(500)?;
    for _ in 0..FLAPS {
        scene
            .lab
            .gateway
            .ip("link set lan0 down\nlink set lan0 up\n")?;
        scene.lab.lan_end().wait_until_up()?;
        scene.lab.server_end().wait_until_up()?;
        let echoed = scene.daemon.flows()?;
        stream.wait_for_more(1500)?;
        ensure!(
            scene.daemon.flows()?.len() == 1,
            "the flow did not stay the only one: {echoed:?}"
        );
    }
    let sent = stream.sent();
    let gaps = stream.finish_with_gaps()?;
    eprintln!("{FLAPS} flaps, {sent} datagrams, gaps {gaps:?}");
    ensure!(gaps.len() <= FLAPS, "{gaps:?}");
    ensure!(gaps.iter().all(|(_, last)| *last < sent - 500), "{gaps:?}");
    Ok(())
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_route_that_changes_under_load_costs_nothing(#[case] mode: Mode) -> Result<()> {
    let mut daemon = DaemonOptions::new(mode);
    daemon.lan.push("lan1".into());
    let lab = LabOptions::for_mode(mode).server_side(ServerSide::TwoLans);
    let scene = Scene::with(lab, daemon)?;
    scene.forward("udp")?;
    // The same server on both LANs, as far as anybody can tell.
    let second = scene.lab.second_server()?;
    let address = SERVER.v4;
    second.ip(&format!("addr add {address}/32 dev lo\n"))?;
    let first_echo = udp::Echo::start_on(&scene.lab.server, SERVER.endpoint(Family::V4, TARGET))?;
    let second_echo = udp::Echo::start_on(second, SERVER.endpoint(Family::V4, TARGET))?;
    let stream = udp::Stream::start(&scene.lab.client, listen(Family::V4), 1000)?;
    stream.wait_for_more(200)?;
    ensure!(second_echo.peers().is_empty());
    for _ in 0..10 {
        for route in [
            format!("route replace {address}/32 via 10.4.0.2 dev lan1\n"),
            format!("route del {address}/32\n"),
        ] {
            scene.lab.gateway.ip(&route)?;
            stream.wait_for_more(100)?;
        }
    }
    let sent = stream.finish()?;
    let client = CLIENT.of(Family::V4);
    for echo in [&first_echo, &second_echo] {
        ensure!(echo.peers().iter().all(|peer| peer.ip() == client) && !echo.peers().is_empty());
    }
    eprintln!("{sent} datagrams over 20 changes of their route, none lost");
    scene.expect_no_errors()
}
