//! Several CPUs at once.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::Result;
use portfwd_common::{
    abi::Protocol,
    datapath::{Event, Table, tcp::Side},
    model::{
        frame::{Draft, ethernet},
        maps::pool_key,
        rules::{Forward, Lowered, Source},
        world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::kernel::{Entry, Kernel};
use crate::surroundings::Surroundings;
use crate::test_run::{self, Segments, Sums};

const THREADS: usize = 4;
const FLOWS: u16 = 500;

/// Has threads put a frame before the programs at once, for one client port after the other; half of them before XDP, half before
/// TC. How many frames did not come out as `is_well` asks, given what was sent.
fn race(
    kernel: &Kernel,
    frame: impl Fn(usize, u16) -> (u32, Vec<u8>) + Sync,
    is_well: impl Fn(u16, &[u8], &[u8]) -> bool + Sync,
) -> Result<u32> {
    let (xdp, tc) = (kernel.program(Entry::Xdp)?, kernel.program(Entry::Tc)?);
    let start = Barrier::new(THREADS);
    // Counted, not asserted, in the threads: one that panics would leave the others waiting.
    let lost = AtomicU32::new(0);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (start, lost, frame, is_well) = (&start, &lost, &frame, &is_well);
            scope.spawn(move || {
                for port in 1..=FLOWS {
                    let (ifindex, sent) = frame(number, port);
                    start.wait();
                    let run = if number % 2 == 0 {
                        test_run::xdp(xdp, ifindex, &sent)
                    } else {
                        test_run::tc(tc, ifindex, &sent, Segments::default(), Sums::Unknown)
                    };
                    let well = run.is_ok_and(|run| is_well(port, &sent, &run.frame));
                    lost.fetch_add(u32::from(!well), Ordering::Relaxed);
                }
            });
        }
    });
    Ok(lost.into_inner())
}

/// Two flows of one hidden client endpoint begin on several CPUs at once: the endpoint gets one port, and what a CPU has taken in
/// vain goes back.
#[test]
fn flows_of_one_client_that_race_share_one_port_and_no_port_is_lost() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut kernel = Kernel::new(2 * u32::from(FLOWS))?;
            kernel.configure(1)?;
            let rules = [(53, world.target), (54, world.second_target)].map(|(port, target)| {
                Forward::new(Protocol::Udp, port, at(target, port)).from(Source::Masquerade)
            });
            kernel.set_rules(Lowered::of(&rules))?;
            let frame = |number: usize, port| {
                let listen = at(world.listen, 53 + (number / 2) as u16);
                let sent = Draft::udp(at(world.client, port), listen);
                (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &sent.packet()))
            };
            let lost = race(&kernel, frame, |_, sent, came_out| came_out != sent)?;
            assert_eq!(lost, 0, "packets that did not leave translated");
            let bindings = kernel.bindings()?;
            assert_eq!(bindings.len(), usize::from(FLOWS));
            let ports: BTreeSet<_> = bindings.values().map(|binding| binding.port).collect();
            assert_eq!(ports.len(), usize::from(FLOWS));
            let key = pool_key(world.lan_address, Protocol::Udp);
            let pool = kernel.pools()?[&key];
            let taken: u32 = pool.taken.iter().map(|word| word.count_ones()).sum();
            // And port 0, which is nobody's.
            assert_eq!(taken, u32::from(FLOWS) + 1);
            assert!(ports.iter().all(|port| pool.is_taken(*port)));
        }
        Ok(())
    })?
}

/// Four CPUs see the first datagrams of one flow at once. Seen: one of them had moved the flow to the connection table between two
/// looks of another, which dropped its packet.
#[test]
fn first_packets_that_race_enter_one_flow_and_are_all_carried() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut kernel = Kernel::new(2 * u32::from(FLOWS))?;
            kernel.configure(1)?;
            let target = at(world.target, 53);
            kernel.set_rules(Lowered::of(&[Forward::new(Protocol::Udp, 53, target)]))?;
            let draft = |port| Draft::udp(at(world.client, port), at(world.listen, 53));
            let frame = |_, port| {
                let sent = draft(port).packet();
                (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &sent))
            };
            let lost = race(&kernel, frame, |port, _, came_out| {
                let forwarded = draft(port).between(at(world.client, port), target).hop();
                came_out == ethernet(BACKEND_MAC, LAN_MAC, &forwarded.packet())
            })?;
            assert_eq!(lost, 0, "packets that were not carried");
            let entered = kernel.reasons()?[&Event::FlowCreated.index()];
            assert_eq!(entered, u64::from(FLOWS));
        }
        Ok(())
    })?
}

/// Both ends close a connection at once, seen by different CPUs and hooks: neither's FIN is lost, whoever is first.
#[test]
fn fins_that_race_are_both_taken_note_of() -> Result<()> {
    const FIRST: u32 = 0x1234_5678;
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut kernel = Kernel::new(2 * u32::from(FLOWS))?;
            kernel.configure(1)?;
            let target = at(world.target, 8080);
            kernel.set_rules(Lowered::of(&[Forward::new(Protocol::Tcp, 80, target)]))?;
            let frame = |from_client, port, flags, numbers: (u32, u32)| {
                let (client, listen) = (at(world.client, port), at(world.listen, 80));
                if from_client {
                    let sent = Draft::tcp(client, listen, flags).numbers(numbers.0, numbers.1);
                    (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &sent.packet()))
                } else {
                    let sent = Draft::tcp(target, client, flags).numbers(numbers.0, numbers.1);
                    (LAN, ethernet(LAN_MAC, BACKEND_MAC, &sent.packet()))
                }
            };
            for port in 1..=FLOWS {
                for (from_client, flags, numbers) in [
                    (true, 0x02, (FIRST, 0)),
                    (false, 0x12, (FIRST, FIRST + 1)),
                    (true, 0x10, (FIRST + 1, FIRST + 1)),
                ] {
                    let (ifindex, sent) = frame(from_client, port, flags, numbers);
                    let segments = Segments::default();
                    let run = kernel.run(Entry::Tc, ifindex, &sent, segments, Sums::Unknown)?;
                    assert_ne!(run.frame, sent, "not translated");
                }
            }
            let fins = |number: usize, port| {
                frame(number.is_multiple_of(2), port, 0x11, (FIRST + 1, FIRST + 1))
            };
            let lost = race(&kernel, fins, |_, sent, came_out| came_out != sent)?;
            assert_eq!(lost, 0, "segments that did not leave translated");
            let (v4, v6) = (
                kernel.flows_v4(Table::Flows)?,
                kernel.flows_v6(Table::Flows)?,
            );
            let sides = v4.values().map(Side::of).chain(v6.values().map(Side::of));
            let sides: Vec<_> = sides.collect();
            assert_eq!(sides.len(), 2 * usize::from(FLOWS));
            let open = sides.iter().filter(|side| !side.has(Side::FIN)).count();
            assert_eq!(open, 0, "sides whose FIN was lost");
        }
        Ok(())
    })?
}
