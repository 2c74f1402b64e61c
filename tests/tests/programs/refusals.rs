//! An ICMP error in the place of a packet for which there is no room, or that cannot leave: what the program makes of the buffer is
//! what the model makes of the frame.

use anyhow::Result;
use portfwd_common::{
    abi::{PoolRange, Protocol},
    datapath::{DropReason, PassReason, Verdict},
    model::{
        frame::{Draft, ethernet, fragments, with_options},
        rules::{Forward, Lowered, Source},
        world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::kernel::Entry;
use crate::surroundings::Surroundings;
use crate::test_run::Sums;
use crate::twins::{Crossing, Twins};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const RANGE: PoolRange = PoolRange {
    first: 3_000,
    last: 3_000,
};

/// Both, with one port that stands for clients of a protocol, which has it.
fn used_up(world: &World) -> Result<Twins> {
    let mut twins = Twins::new(64, Sums::Unknown)?;
    let forwards = [Protocol::Tcp, Protocol::Udp].map(|protocol| {
        Forward::new(protocol, 80, at(world.target, 8080))
            .from(Source::Snat(world.lan_address, RANGE))
    });
    twins.set_rules(&Lowered::of(&forwards))?;
    let (client, listen) = (at(world.second_client, 9), at(world.listen, 80));
    for first in [Draft::tcp(client, listen, SYN), Draft::udp(client, listen)] {
        let verdict = twins.cross(&by_wan(Entry::Tc, &first.packet()))?;
        assert!(matches!(verdict, Verdict::Forward(_)), "{verdict:?}");
    }
    Ok(twins)
}

fn by_wan(entry: Entry, packet: &[u8]) -> Crossing {
    Crossing::new(entry, WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet))
}

/// Packets of a client that finds no port: short and long, with all that may be in front of the transport header, and one that is a
/// fragment.
fn packets(world: &World, datagram: u32) -> Vec<Vec<u8>> {
    let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
    let plain = [
        Draft::tcp(client, listen, SYN),
        Draft::udp(client, listen).payload([]),
        Draft::udp(client, listen).payload([7; 1_400]),
    ];
    let mut packets: Vec<_> = plain.iter().map(Draft::packet).collect();
    if world.is_v4() {
        packets.extend((4..=40).step_by(4).map(|options| {
            let draft = plain[1].clone();
            let ip_options = vec![1; options];
            Draft {
                ip_options,
                ..draft
            }
            .packet()
        }));
    } else {
        // Destination options, once and several times.
        let mut packet = plain[0].packet();
        for _ in 0..5 {
            packet = with_options(&packet, 60);
            packets.push(packet.clone());
        }
    }
    packets.push(fragments(&plain[2].packet(), datagram, 1_000, 0).swap_remove(0));
    packets
}

#[test]
fn an_error_takes_a_packets_place_in_the_kernel_as_in_the_model() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut twins = used_up(&world)?;
            // The rest of a datagram goes where its first fragment goes: each has its own.
            for (datagram, entry) in (1..).zip([Entry::Tc, Entry::TcSlow]) {
                for packet in packets(&world, datagram) {
                    let verdict = twins.cross(&by_wan(entry, &packet))?;
                    assert_eq!(verdict, Verdict::Refuse(DropReason::NoPort));
                }
            }
            for packet in packets(&world, 3) {
                let verdict = twins.cross(&by_wan(Entry::Xdp, &packet))?;
                assert_eq!(verdict, Verdict::Pass(PassReason::SlowPath));
            }
            twins.compare_books()?;
        }
        Ok(())
    })?
}

/// Of a flow whose client is hidden, there and back: too big, and at the end of its hops, first packets and later ones.
#[test]
fn what_cannot_leave_gives_way_to_an_error_in_the_kernel_as_in_the_model() -> Result<()> {
    let spoiled = |draft: &Draft| {
        let draft = draft.clone();
        [
            draft.clone().hop_limit(1).packet(),
            draft.payload([7; 1_500]).packet(),
        ]
    };
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut twins = Twins::new(64, Sums::Unknown)?;
            let forwards = [Protocol::Tcp, Protocol::Udp].map(|protocol| {
                Forward::new(protocol, 80, at(world.target, 8080)).from(Source::Masquerade)
            });
            twins.set_rules(&Lowered::of(&forwards))?;
            let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
            let (target, seen) = (at(world.target, 8080), at(world.lan_address, 40_000));
            let flows = [
                (
                    Draft::tcp(client, listen, SYN),
                    Draft::tcp(target, seen, SYN_ACK),
                ),
                (Draft::udp(client, listen), Draft::udp(target, seen)),
            ];
            let expect = |verdict, entry| {
                let expected = match entry {
                    Entry::Xdp => Verdict::Pass(PassReason::SlowPath),
                    Entry::Tc | Entry::TcRaw | Entry::TcSlow | Entry::TcOut => {
                        Verdict::Refuse(DropReason::NoWayOut)
                    }
                };
                assert_eq!(verdict, expected);
            };
            for (there, back) in flows {
                for is_first in [true, false] {
                    for entry in [Entry::Xdp, Entry::Tc, Entry::TcSlow] {
                        for packet in spoiled(&there) {
                            expect(twins.cross(&by_wan(entry, &packet))?, entry);
                        }
                    }
                    if is_first {
                        let verdict = twins.cross(&by_wan(Entry::Tc, &there.packet()))?;
                        assert!(matches!(verdict, Verdict::Forward(_)), "{verdict:?}");
                    }
                }
                for entry in [Entry::Xdp, Entry::Tc, Entry::TcSlow] {
                    for packet in spoiled(&back) {
                        let frame = ethernet(LAN_MAC, BACKEND_MAC, &packet);
                        expect(twins.cross(&Crossing::new(entry, LAN, frame))?, entry);
                    }
                }
            }
            twins.compare_books()?;
        }
        Ok(())
    })?
}
