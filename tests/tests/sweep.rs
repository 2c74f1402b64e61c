//! The daemon's sweep frees the memory of flows that are over, and touches no other.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use portfwd::bpf::Tables;
use portfwd_common::abi::{
    ABI_VERSION, Config, FlowDir, FlowEntry, FlowKey, Instant, Ticks, names,
};
use portfwd_common::datapath::DropReason;
use portfwd_common::net::{Ipv4, be::Ports};
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::{Family, LabOptions, tcp, udp};

const LISTEN: u16 = 8080;
const TARGET: u16 = 80;
const TCP: u8 = 6;
/// Two sweeps and what a half without partner is given to find one.
const TWO_SWEEPS: Duration = Duration::from_secs(20);

/// IPv4 flows as bytes; a key is source, destination, ports, protocol.
type FlowsV4 = HashMap<MapData, [u8; 16], [u8; 64]>;

fn flows_v4(daemon: &Daemon) -> Result<FlowsV4> {
    let path = daemon
        .pins()
        .join(format!("v{ABI_VERSION}/maps"))
        .join(names::FLOWS_V4);
    let data = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
    Ok(HashMap::try_from(Map::HashMap(data))?)
}

fn tcp_halves(flows: &FlowsV4) -> Result<Vec<[u8; 16]>> {
    let keys = flows.keys().collect::<Result<Vec<_>, _>>()?;
    Ok(keys.into_iter().filter(|key| key[12] == TCP).collect())
}

#[test]
fn expired_flows_and_lonely_halves_leave_the_table_and_live_flows_stay() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let mut streams = Vec::new();
    let mut echoes = Vec::new();
    for family in Family::BOTH {
        let target = SERVER.endpoint(family, TARGET);
        daemon.add(
            match family {
                Family::V4 => "over-ipv4",
                Family::V6 => "over-ipv6",
            },
            "both",
            &GATEWAY_WAN.endpoint(family, LISTEN).to_string(),
            &target.to_string(),
        )?;
        echoes.push((
            udp::Echo::start(&lab.server, family, TARGET)?,
            tcp::Echo::start(&lab.server, family, TARGET)?,
        ));
        let listen = GATEWAY_WAN.endpoint(family, LISTEN);
        udp::exchange(&udp::connect(&lab.client, listen)?, b"once")?;
        let mut stream = tcp::connect(&lab.client, listen)?;
        tcp::exchange(&mut stream, b"for hours")?;
        streams.push(stream);
    }
    let mut tables = Tables::open_pinned(&daemon.pins())?;
    assert_eq!(tables.flow_entries()?, 4);

    let mut v4 = flows_v4(&daemon)?;
    let halves = tcp_halves(&v4)?;
    assert_eq!(halves.len(), 2);
    v4.remove(&halves[0])?;
    let config = tables.config()?;
    tables.write_config(&Config {
        udp: Ticks(1),
        ..config
    })?;

    wait_until("the dead flows to leave the table", TWO_SWEEPS, || {
        Ok(tables.flow_entries()? == 1 && v4.keys().next().is_none())
    })?;
    let left = tables.flows()?;
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].listen.is_ipv6(), "{left:?}");
    tcp::exchange(&mut streams[1], b"after the sweep")?;
    Ok(())
}

/// A listing while entries come and go by the thousands ends, and has every flow that was there all the time.
#[test]
fn a_listing_during_heavy_change_has_every_flow_that_stays() -> Result<()> {
    const FLOWS: usize = 200;
    const LISTINGS: usize = 20;
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let target = SERVER.endpoint(Family::V4, TARGET).to_string();
    daemon.add("over-ipv4", "udp", &listen.to_string(), &target)?;
    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let (mut clients, mut sockets) = (BTreeSet::new(), Vec::new());
    for _ in 0..FLOWS {
        let socket = udp::connect(&lab.client, listen)?;
        udp::exchange(&socket, b"once")?;
        udp::exchange(&socket, b"twice")?;
        clients.insert(socket.local_addr()?);
        // As long as it is open nobody else has its port.
        sockets.push(socket);
    }
    let mut table = flows_v4(&daemon)?;
    let keys = table.keys().collect::<Result<Vec<_>, _>>()?;
    assert_eq!(keys.len(), 2 * FLOWS);
    let (template, value) = (keys[0], table.get(&keys[0], 0)?);
    let tables = Tables::open_pinned(&daemon.pins())?;
    let is_over = AtomicBool::new(false);
    let churned = AtomicU32::new(0);
    std::thread::scope(|scope| -> Result<()> {
        let churn = scope.spawn(|| -> Result<()> {
            while !is_over.load(Ordering::Relaxed) {
                let round = churned.fetch_add(1, Ordering::Relaxed);
                // Halves of nobody's, from addresses that nobody has.
                let key = |number: u32| {
                    let mut key = template;
                    key[..4].copy_from_slice(&(0xcb00_0000 | number).to_be_bytes());
                    key
                };
                table.insert(key(round % 10_000), value, 0)?;
                if round >= 5_000 {
                    // The sweep may have been faster.
                    drop(table.remove(&key((round - 5_000) % 10_000)));
                }
            }
            Ok(())
        });
        let mut listings = Ok(());
        for _ in 0..LISTINGS {
            let before = churned.load(Ordering::Relaxed);
            let listed = tables.flows()?;
            let seen: BTreeSet<_> = listed.iter().map(|flow| flow.client).collect();
            let missing: Vec<_> = clients.difference(&seen).collect();
            if !missing.is_empty() {
                listings = Err(anyhow::anyhow!("{} flows were left out", missing.len()));
                break;
            }
            while churned.load(Ordering::Relaxed) == before && !churn.is_finished() {
                std::thread::yield_now();
            }
        }
        is_over.store(true, Ordering::Relaxed);
        churn.join().expect("the churn does not panic")?;
        listings
    })
}

/// Of many flows that are new to it, a sweep does not ask for each half's partner. Those that have none are found all the same, by
/// the next one.
#[test]
fn lonely_halves_among_thousands_leave_the_table() -> Result<()> {
    const FLOWS: usize = 1_000;
    const LONELY: usize = 3;
    /// What a half is given to find its partner.
    const GROWN_UP: Duration = Duration::from_secs(2);
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let mut daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let target = SERVER.endpoint(Family::V4, TARGET).to_string();
    daemon.add("over-ipv4", "udp", &listen.to_string(), &target)?;
    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let mut sockets = Vec::new();
    for _ in 0..FLOWS {
        let socket = udp::connect(&lab.client, listen)?;
        udp::exchange(&socket, b"once")?;
        udp::exchange(&socket, b"twice")?;
        sockets.push(socket);
    }
    daemon.kill9()?;
    let tables = Tables::open_pinned(&daemon.pins())?;
    wait_until("the flows to be old enough", here(PATIENCE), || {
        Ok(tables.flows()?.iter().all(|flow| flow.age > GROWN_UP))
    })?;
    let mut table = flows_v4(&daemon)?;
    let keys = table.keys().collect::<Result<Vec<_>, _>>()?;
    assert_eq!(keys.len(), 2 * FLOWS);
    for key in keys.iter().step_by(2 * FLOWS / LONELY).take(LONELY) {
        table.remove(key)?;
    }
    let mut sweeper = daemon.sweeper()?;
    let (first, second) = (sweeper.sweep()?, sweeper.sweep()?);
    assert_eq!(
        first.orphans + second.orphans,
        LONELY as u64,
        "{first:?} {second:?}"
    );
    assert_eq!(second.left as usize, 2 * (FLOWS - LONELY), "{second:?}");
    assert_eq!(sweeper.sweep()?.orphans, 0);
    Ok(())
}

/// Flows that cannot be over yet are not looked at again and again: a table of a million would take a second each time.
#[test]
fn a_sweep_is_due_when_a_flow_has_begun_or_may_be_over() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let mut daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let target = SERVER.endpoint(Family::V4, TARGET).to_string();
    daemon.add("over-ipv4", "both", &listen.to_string(), &target)?;
    let _echoes = (
        udp::Echo::start(&lab.server, Family::V4, TARGET)?,
        tcp::Echo::start(&lab.server, Family::V4, TARGET)?,
    );
    daemon.kill9()?;
    let mut sweeper = daemon.sweeper()?;
    assert!(sweeper.is_due()?, "nothing was ever swept");
    sweeper.sweep()?;
    assert!(!sweeper.is_due()?, "there is no flow");

    let mut stream = tcp::connect(&lab.client, listen)?;
    tcp::exchange(&mut stream, b"for hours")?;
    let socket = udp::connect(&lab.client, listen)?;
    udp::exchange(&socket, b"for minutes")?;
    assert!(sweeper.is_due()?, "flows have begun");
    let swept = sweeper.sweep()?;
    assert_eq!((swept.left, swept.expired), (4, 0), "{swept:?}");
    assert!(!sweeper.is_due()?, "no flow can be over");

    let mut tables = Tables::open_pinned(&daemon.pins())?;
    let config = tables.config()?;
    tables.write_config(&Config {
        udp: Ticks(1),
        ..config
    })?;
    assert!(sweeper.is_due()?, "flows live shorter");
    wait_until("the datagrams' flow to be over", here(PATIENCE), || {
        Ok(sweeper.is_due()? && sweeper.sweep()?.expired == 1)
    })?;
    assert!(sweeper.is_due()?, "what was taken out had ports");
    let swept = sweeper.sweep()?;
    assert_eq!((swept.left, swept.expired), (2, 0), "{swept:?}");
    assert!(!sweeper.is_due()?, "the connection lives for hours");
    Ok(())
}

/// Seen by reading: what finds no room makes no flow, so where all connections had been closed nobody was told that there was anything
/// to take out.
#[test]
fn a_sweep_is_due_when_somebody_has_found_no_room() -> Result<()> {
    const ROOM: u32 = 16;
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let options = DaemonOptions {
        max_flows: Some(ROOM),
        ..DaemonOptions::new(Mode::Tc)
    };
    let mut daemon = options.start(&lab.gateway)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let target = SERVER.endpoint(Family::V4, TARGET).to_string();
    // Flows of hidden clients begin where nobody makes room.
    daemon.ok(&["add", "udp", &listen.to_string(), &target, "--masquerade"])?;
    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    daemon.kill9()?;
    let tables = Tables::open_pinned(&daemon.pins())?;
    let turned_away = || -> Result<u64> {
        let reasons = tables.reasons()?;
        let no_room = [DropReason::TableFull, DropReason::NoPort];
        Ok(no_room
            .map(|reason| reasons[reason.index() as usize])
            .iter()
            .sum())
    };
    let mut sockets = Vec::new();
    let mut knock_until_turned_away = || -> Result<()> {
        let before = turned_away()?;
        wait_until("somebody to find no room", here(PATIENCE), || {
            let socket = udp::connect(&lab.client, listen)?;
            socket.send(b"is there room?")?;
            sockets.push(socket);
            Ok(turned_away()? > before)
        })
    };
    knock_until_turned_away()?;
    let mut sweeper = daemon.sweeper()?;
    // What has been sent is still on its way.
    wait_until("all to be looked at", here(PATIENCE), || {
        sweeper.sweep()?;
        Ok(!sweeper.is_due()?)
    })?;
    knock_until_turned_away()?;
    assert!(sweeper.is_due()?, "somebody has found no room");
    Ok(())
}

/// A half of a flow.
type Half = (FlowKey<Ipv4>, FlowEntry<Ipv4>);

/// One life of a flow over IPv4: both its halves.
#[derive(Clone, Copy)]
struct Life {
    original: Half,
    reply: Half,
}

impl Life {
    /// Of a client's port, like a life that there is, but begun and ended then.
    fn like(original: &Half, port: u16, at: Instant) -> Self {
        let (mut key, mut entry) = *original;
        let mut to = key.rewritten(&entry.rewrite);
        key.ports = Ports::new(port, key.ports.dst());
        to.ports = Ports::new(port, to.ports.dst());
        (entry.created, entry.last_seen) = (at, at);
        entry.rewrite = key.rewrite_to(&to);
        let reply = FlowEntry {
            rewrite: to.reversed().rewrite_to(&key.reversed()),
            marks: entry.marks | FlowDir::Reply.mark(),
            ..entry
        };
        Self {
            original: (key, entry),
            reply: (to.reversed(), reply),
        }
    }

    /// Both as the table has them, in the order in which they come.
    fn elements(&self) -> [([u8; 16], [u8; 64]); 2] {
        [self.reply, self.original].map(|(key, entry)| (bytemuck::cast(key), bytemuck::cast(entry)))
    }

    /// Enters it, whatever was there.
    fn enter(&self, flows: &mut FlowsV4) -> Result<()> {
        for (key, entry) in self.elements() {
            flows.insert(key, entry, 0)?;
        }
        Ok(())
    }

    /// Takes the place of one that is over, as the datapath does with its packets: what is there goes, the reply half comes first,
    /// and neither comes where something is. A packet that finds something there all the same leaves it to the next.
    fn begin(&self, flows: &mut FlowsV4) {
        const NO_EXIST: u64 = 1;
        loop {
            for (key, _) in self.elements() {
                // The sweep may have been faster.
                drop(flows.remove(&key));
            }
            let mut elements = self.elements().into_iter();
            if elements.all(|(key, entry)| flows.insert(key, entry, NO_EXIST).is_ok()) {
                return;
            }
        }
    }

    fn is_there(&self, flows: &FlowsV4) -> bool {
        let mut elements = self.elements().into_iter();
        elements.all(|(key, entry)| flows.get(&key, 0).is_ok_and(|found| found == entry))
    }
}

/// Flows that are over begin anew while a sweep goes over them: between its look at one and its taking it out. It must notice, and
/// put back what it has in its hands.
#[test]
fn a_flow_that_begins_anew_under_a_sweep_keeps_its_new_life() -> Result<()> {
    const FLOWS: u16 = 2_000;
    /// How often a sweep is to find that somebody was faster.
    const OVERTAKEN: u64 = 100;
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let mut daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let target = SERVER.endpoint(Family::V4, TARGET).to_string();
    daemon.add("over-ipv4", "udp", &listen.to_string(), &target)?;
    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&lab.client, listen)?;
    udp::exchange(&socket, b"once")?;
    udp::exchange(&socket, b"twice")?;
    daemon.kill9()?;
    let (mut flows, mut racing) = (flows_v4(&daemon)?, flows_v4(&daemon)?);
    let config = Tables::open_pinned(&daemon.pins())?.config()?;
    let template = flows
        .iter()
        .map(|half| {
            half.map(|(key, entry)| -> Half { (bytemuck::cast(key), bytemuck::cast(entry)) })
        })
        .find(|half| {
            half.as_ref()
                .is_ok_and(|(_, entry)| entry.dir() == FlowDir::Original)
        })
        .context("the flow has no original half")??;
    let now = template.1.last_seen;
    let over = now.minus(Ticks(config.udp.0 * 2));
    let lives = |at| -> Vec<_> {
        let ports = 1_024..1_024 + FLOWS;
        ports.map(|port| Life::like(&template, port, at)).collect()
    };
    let (old, new) = (lives(over), lives(now));
    let mut sweeper = daemon.sweeper()?;
    let mut overtaken = 0;
    wait_until("sweeps to be overtaken", here(PATIENCE), || {
        for life in &old {
            life.enter(&mut flows)?;
        }
        let swept = std::thread::scope(|scope| {
            let race = scope.spawn(|| new.iter().for_each(|life| life.begin(&mut racing)));
            let swept = sweeper.sweep();
            race.join().expect("the race does not panic");
            swept
        })?;
        let lost = new.iter().filter(|life| !life.is_there(&flows)).count();
        assert_eq!(lost, 0, "new lives that are not whole: {swept:?}");
        overtaken += swept.revived;
        Ok(overtaken >= OVERTAKEN)
    })
}

#[test]
fn ports_are_looked_at_when_a_rule_or_a_client_has_come() -> Result<()> {
    let lab = LabOptions::for_mode(Mode::Tc).build()?;
    let mut daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    let listen = GATEWAY_WAN.endpoint(Family::V4, LISTEN);
    let target = SERVER.endpoint(Family::V4, TARGET).to_string();
    let _echo = udp::Echo::start(&lab.server, Family::V4, TARGET)?;
    daemon.ok(&["add", "udp", &listen.to_string(), &target, "--masquerade"])?;
    // It vouches, and raises the generation, while it runs.
    daemon.kill9()?;
    let mut sweeper = daemon.sweeper()?;
    sweeper.sweep()?;
    assert!(!sweeper.keep_others()?, "nothing has changed");
    // At rest both banks hold the same.
    let mut tables = Tables::open_pinned(&daemon.pins())?;
    for _ in 0..2 {
        let bank = tables.config()?.bank();
        tables.turn(bank.other(), false)?;
    }
    assert!(
        sweeper.keep_others()?,
        "rules have changed, and changed back"
    );
    assert!(!sweeper.keep_others()?, "nothing has changed since");
    udp::exchange(&udp::connect(&lab.client, listen)?, b"hidden")?;
    assert!(sweeper.keep_others()?, "a client has a port");
    assert!(sweeper.keep_others()?, "and keeps it");
    Ok(())
}
