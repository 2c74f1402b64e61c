//! What becomes of a frame, by XDP and by TC.

use std::collections::BTreeMap;

use anyhow::Result;
use portfwd_common::{
    datapath::Event,
    model::{
        frame::{Draft, error, ethernet},
        rules::{Forward, Lowered},
        world::{BACKEND_MAC, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, WAN_TUNNEL, World, at},
    },
};

use crate::kernel::{Entry, Kernel};
use crate::rows::Becomes::{self, Dropped, Redirected, Untouched, Up};
use crate::rows::{Row, by_lan, by_wan, rows, rules, to_lan, to_wan};
use crate::surroundings::Surroundings;
use crate::test_run::{Segments, Sums};

/// A kernel that carries out the rows.
struct Bench {
    kernel: Kernel,
}

impl Bench {
    fn new(max_flows: u32, forwards: &[Forward]) -> Result<Self> {
        let mut kernel = Kernel::new(max_flows)?;
        kernel.configure(1)?;
        kernel.set_rules(Lowered::of(forwards))?;
        Ok(Self { kernel })
    }

    fn pass(&self, entry: Entry, (ifindex, frame): &(u32, Vec<u8>)) -> Result<(u32, Vec<u8>)> {
        let run = self
            .kernel
            .run(entry, *ifindex, frame, Segments::default(), Sums::Unknown)?;
        Ok((run.code, run.frame))
    }

    fn check(&self, entry: Entry, row: &Row) -> Result<()> {
        for frame in &row.earlier {
            let (_, after) = self.pass(Entry::Tc, frame)?;
            assert_ne!(
                after, frame.1,
                "{}: what came before was not carried",
                row.sentence
            );
        }
        let becomes = if entry == Entry::Xdp {
            &row.by_xdp
        } else {
            &row.by_tc
        };
        let books = (self.kernel.flows()?, self.kernel.counters()?);
        let reasons = self.kernel.reasons()?;
        let (code, frame) = self.pass(entry, &row.frame)?;
        let (expected, reason) = match becomes {
            Redirected(frame) => (frame, None),
            Up(frame) => (frame, Some(Event::Stack.index())),
            Untouched(reason) => (
                &row.frame.1,
                entry.hook().counts(*reason).then(|| reason.index()),
            ),
            Dropped(reason) => (&row.frame.1, Some(reason.index())),
        };
        assert_eq!(
            frame, *expected,
            "{}, by {entry:?}: {becomes:?}",
            row.sentence
        );
        assert_eq!(
            code,
            code_of(entry, becomes),
            "{}, by {entry:?}",
            row.sentence
        );
        let counted = difference(&reasons, &self.kernel.reasons()?);
        if let Some(reason) = reason {
            assert_eq!(
                counted.get(&reason),
                Some(&1),
                "{}, by {entry:?}: {counted:?}",
                row.sentence
            );
        }
        if let Untouched(_) | Dropped(_) = becomes {
            let after = (self.kernel.flows()?, self.kernel.counters()?);
            assert_eq!(after, books, "{}, by {entry:?}", row.sentence);
            assert_eq!(
                counted.values().sum::<u64>(),
                u64::from(reason.is_some()),
                "{}",
                row.sentence
            );
        }
        Ok(())
    }
}

fn code_of(entry: Entry, becomes: &Becomes) -> u32 {
    const XDP: [u32; 3] = [4, 2, 1];
    const TC: [u32; 3] = [7, u32::MAX, 2];
    let [redirect, pass, drop] = if entry == Entry::Xdp { XDP } else { TC };
    match becomes {
        Redirected(_) => redirect,
        Up(_) | Untouched(_) => pass,
        Dropped(_) => drop,
    }
}

fn difference(before: &BTreeMap<u32, u64>, after: &BTreeMap<u32, u64>) -> BTreeMap<u32, u64> {
    after
        .iter()
        .map(|(index, count)| (*index, count - before.get(index).copied().unwrap_or(0)))
        .filter(|(_, count)| *count != 0)
        .collect()
}

#[test]
fn every_row_becomes_what_it_says() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut bench = Bench::new(64, &rules(&world))?;
            let rows = rows(&world);
            for entry in [Entry::Xdp, Entry::Tc, Entry::TcSlow] {
                for row in &rows {
                    println!("{} by {entry:?}", row.sentence);
                    bench.kernel.forget_flows()?;
                    bench.check(entry, row)?;
                }
            }
        }
        Ok(())
    })?
}

#[test]
fn when_the_table_is_full_static_forwards_work_without_a_place_in_it() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let bench = Bench::new(2, &rules(&world))?;
            let listen = at(world.listen, 53);
            let target = at(world.target, 1053);
            for entry in [Entry::Xdp, Entry::Tc] {
                for port in 1..=8 {
                    let client = at(world.client, port);
                    let question = Draft::udp(client, listen);
                    let answer = question.between(target, client);
                    for (frame, becomes) in [
                        (by_wan(&question), to_lan(question.between(client, target))),
                        (by_lan(&answer), to_wan(question.between(listen, client))),
                    ] {
                        let Redirected(expected) = &becomes else {
                            panic!("{becomes:?} leaves");
                        };
                        let (code, after) = bench.pass(entry, &frame)?;
                        assert_eq!((code, &after), (code_of(entry, &becomes), expected));
                    }
                }
            }
            assert_eq!(
                bench.kernel.reasons()?.get(&Event::FlowProven.index()),
                Some(&2)
            );
            assert_eq!(bench.kernel.pressure()?.was_full, 1);
        }
        Ok(())
    })?
}

#[test]
fn an_interface_without_link_header_carries_packets_too() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let bench = Bench::new(64, &rules(&world))?;
            let client = at(world.tunnel_client, 9);
            let to = |port| Draft::udp(client, at(world.listen, port));
            let tunnel = to(443)
                .between(client, at(world.tunnel_target, 3))
                .hop()
                .packet();
            let lan = ethernet(
                BACKEND_MAC,
                LAN_MAC,
                &to(53)
                    .between(client, at(world.target, 1053))
                    .hop()
                    .packet(),
            );
            for _ in 0..2 {
                let (code, packet) = bench.pass(Entry::TcRaw, &(WAN_TUNNEL, to(443).packet()))?;
                assert_eq!((code, packet), (7, tunnel.clone()));
                let (code, frame) = bench.pass(Entry::TcRaw, &(WAN_TUNNEL, to(53).packet()))?;
                assert_eq!(
                    (code, &frame[..12], &frame[14..]),
                    (7, &lan[..12], &lan[14..])
                );
            }
        }
        Ok(())
    })?
}

#[test]
fn an_error_of_the_gateway_itself_is_translated_where_it_leaves() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let bench = Bench::new(64, &rules(&world))?;
            let (client, listen) = (at(world.client, 9), at(world.listen, 445));
            let sent = Draft::udp(client, listen).hop_limit(1);
            let (_, up) = bench.pass(Entry::Tc, &by_wan(&sent))?;
            let kind = if world.is_v4() { 11 } else { 3 };
            let quoting = |packet: &[u8]| {
                let packet = error(world.listen, world.client, kind, 0, [0; 4], packet);
                (WAN, ethernet(UPSTREAM_MAC, WAN_MAC, &packet))
            };
            let (code, frame) = bench.pass(Entry::TcOut, &quoting(&up[14..]))?;
            assert_eq!((code, frame), (u32::MAX, quoting(&sent.packet()).1));
            let own = quoting(&Draft::udp(at(world.listen, 1), at(world.client, 2)).packet());
            let reasons = bench.kernel.reasons()?;
            assert_eq!(bench.pass(Entry::TcOut, &own)?, (u32::MAX, own.1.clone()));
            assert_eq!(bench.kernel.reasons()?, reasons);
        }
        Ok(())
    })?
}
