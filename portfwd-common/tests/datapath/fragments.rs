//! Datagrams in fragments: whatever order they come in, what leaves is the translated datagram, or nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portfwd_common::{
    abi::Protocol,
    datapath::{DropReason, Event, Hook, PassReason, Way},
    model::{
        frame::{Draft, Transport, fragment, fragments, with_options},
        rules::Forward,
        world::{LAN, TUNNEL, WAN, World, at},
    },
};

use crate::gateway::{Gateway, Outcome};

const ID: u32 = 0x1234_5678;

fn gateway(world: &World) -> Gateway {
    Gateway::new(&[
        Forward::new(Protocol::Udp, 53, at(world.target, 1053)),
        Forward::new(Protocol::Tcp, 80, at(world.target, 8080)),
        Forward::new(Protocol::Udp, 54, at(world.second_target, 53)),
        Forward::new(Protocol::Udp, 55, at(world.second_target, 53)),
        Forward::new(Protocol::Udp, 442, at(world.tunnel_target, 2)),
        Forward::new(Protocol::Echo, 0, at(world.target, 0)),
    ])
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
}

/// What the client sends, and what the target gets of it.
fn question(world: &World, len: usize) -> [Draft; 2] {
    let draft = Draft {
        dont_fragment: false,
        ..Draft::udp(at(world.client, 7), at(world.listen, 53)).payload(payload(len))
    };
    let delivered = draft.between(draft.source, at(world.target, 1053)).hop();
    [draft, delivered]
}

/// What the target answers, and what the client gets of it.
fn answer(world: &World, len: usize) -> [Draft; 2] {
    let draft = Draft {
        dont_fragment: false,
        ..Draft::udp(at(world.target, 1053), at(world.client, 7)).payload(payload(len))
    };
    let delivered = draft.between(at(world.listen, 53), draft.destination).hop();
    [draft, delivered]
}

fn cut(draft: &Draft, size: usize) -> Vec<Vec<u8>> {
    fragments(&draft.packet(), ID, size, 0)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum From {
    Wan,
    Lan,
}

/// Lets packets come in one after the other, and whatever waits to come in again. The packets that left, in order.
fn deliver(gateway: &mut Gateway, from: From, packets: &[&Vec<u8>]) -> Vec<Vec<u8>> {
    let mut left = Vec::new();
    for packet in packets {
        let outcome = match from {
            From::Wan => gateway.wan(packet),
            From::Lan => gateway.lan(packet),
        };
        let mut outcomes = vec![outcome];
        outcomes.extend(gateway.settle());
        left.extend(outcomes.iter().filter_map(|outcome| left_as(outcome, from)));
    }
    left
}

fn left_as(outcome: &Outcome, from: From) -> Option<Vec<u8>> {
    let portfwd_common::datapath::Verdict::Forward(departure) = outcome.verdict else {
        return None;
    };
    match departure.way {
        Way::Hold | Way::Again | Way::Cut => {
            assert!(outcome.after.len() >= 14);
            None
        }
        Way::Frame => {
            let expected = if from == From::Wan { LAN } else { WAN };
            assert_eq!(departure.ifindex, expected);
            Some(outcome.after[14..].to_vec())
        }
        Way::Raw | Way::NewHeader | Way::Resolve | Way::Stack => {
            panic!("left by {:?}", departure.way)
        }
    }
}

/// All orders of so many things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for shorter in orders(count - 1) {
        for at in 0..count {
            let mut order = shorter.clone();
            order.insert(at, count - 1);
            all.push(order);
        }
    }
    all
}

#[test]
fn fragments_in_any_order_leave_as_the_translated_datagram() {
    for world in World::both() {
        for (from, [sent, delivered]) in [
            (From::Wan, question(&world, 700)),
            (From::Lan, answer(&world, 700)),
        ] {
            for (count, size) in [(2, 400), (3, 240), (4, 184)] {
                let (pieces, expected) = (cut(&sent, size), cut(&delivered, size));
                assert_eq!(pieces.len(), count);
                for order in orders(count) {
                    for hook in [Hook::Tc, Hook::TcSlow] {
                        let mut gateway = gateway(&world).by(hook);
                        let packets: Vec<_> = order.iter().map(|at| &pieces[*at]).collect();
                        let left = deliver(&mut gateway, from, &packets);
                        assert_eq!(left, expected, "{from:?}, {order:?}, {hook:?}");
                        assert_eq!(gateway.flows(), 1);
                        assert!(gateway.model.flows.held.is_empty());
                        assert!(gateway.model.flows.datagrams.is_empty());
                        let held = gateway.events(Event::FragmentHeld);
                        assert_eq!(gateway.events(Event::FragmentReleased), held);
                        assert_eq!(gateway.events(Event::FragmentTranslated), count as u64 - 1);
                        let (_, counted) = gateway.books().counters[0];
                        let packets = counted.to_target.packets + counted.to_client.packets;
                        assert_eq!(packets, count as u64, "each is counted once");
                    }
                }
            }
        }
    }
}

#[test]
fn a_datagram_of_45_fragments_arrives_forwards_and_backwards() {
    for world in World::both() {
        let [sent, delivered] = question(&world, 64_000);
        let (pieces, expected) = (cut(&sent, 1_440), cut(&delivered, 1_440));
        assert_eq!(pieces.len(), 45);
        for reversed in [false, true] {
            let mut gateway = gateway(&world);
            let mut packets: Vec<_> = pieces.iter().collect();
            if reversed {
                packets.reverse();
            }
            assert_eq!(deliver(&mut gateway, From::Wan, &packets), expected);
        }
    }
}

#[test]
fn fragments_of_known_flows_of_connections_and_without_sums_are_carried() {
    for world in World::both() {
        for transport in [
            Transport::UdpWithoutSum,
            Transport::Udp,
            Transport::Tcp(0x18),
            Transport::Echo,
        ] {
            let (listen, target) = match transport {
                Transport::Tcp(_) => (at(world.listen, 80), at(world.target, 8080)),
                Transport::Udp | Transport::UdpWithoutSum => {
                    (at(world.listen, 53), at(world.target, 1053))
                }
                Transport::Echo => (at(world.listen, 0), at(world.target, 0)),
            };
            let client = at(world.client, 7);
            let mut gateway = gateway(&world);
            for _ in 0..2 {
                for (from, source, destination, to) in [
                    (From::Wan, client, listen, (client, target)),
                    (From::Lan, target, client, (listen, client)),
                ] {
                    let sent = Draft {
                        transport,
                        ..Draft::udp(source, destination).payload(payload(880))
                    };
                    let delivered = sent.between(to.0, to.1).hop();
                    let pieces = cut(&sent, 304);
                    let packets: Vec<_> = [2, 0, 1].iter().map(|at| &pieces[*at]).collect();
                    let left = deliver(&mut gateway, from, &packets);
                    assert_eq!(left, cut(&delivered, 304), "{transport:?}, {from:?}");
                }
            }
            assert_eq!(gateway.events(Event::FlowCreated), 1);
        }
    }
}

#[test]
fn xdp_leaves_fragments_to_tc() {
    for world in World::both() {
        let [sent, _] = question(&world, 700);
        for piece in cut(&sent, 400) {
            let mut gateway = gateway(&world).by(Hook::Xdp);
            gateway.wan(&piece).passed(PassReason::SlowPath);
            assert_eq!(gateway.flows(), 0);
        }
    }
}

#[test]
fn what_waits_for_too_long_is_forgotten_and_never_leaves() {
    for world in World::both() {
        let [sent, delivered] = question(&world, 700);
        let (pieces, expected) = (cut(&sent, 240), cut(&delivered, 240));
        for (seconds, arrives) in [(0, true), (2, true), (3, false)] {
            // The last one waits for the others.
            let mut gateway = self::gateway(&world);
            assert!(deliver(&mut gateway, From::Wan, &[&pieces[2]]).is_empty());
            gateway.wait(seconds);
            let left = deliver(&mut gateway, From::Wan, &[&pieces[0], &pieces[1]]);
            assert_eq!(left, expected[..if arrives { 3 } else { 2 }]);
            // The first one's translation waits for the others.
            let mut gateway = self::gateway(&world);
            let left = deliver(&mut gateway, From::Wan, &[&pieces[0]]);
            assert_eq!(left, expected[..1]);
            gateway.wait(seconds);
            let left = deliver(&mut gateway, From::Wan, &[&pieces[1], &pieces[2]]);
            assert_eq!(left, if arrives { &expected[1..] } else { &[] });
        }
    }
}

#[test]
fn a_fragment_that_comes_twice_leaves_once() {
    for world in World::both() {
        let [sent, delivered] = question(&world, 700);
        let (pieces, expected) = (cut(&sent, 240), cut(&delivered, 240));
        for order in [
            &[0, 0, 1, 1, 2][..],
            &[2, 2, 1, 1, 0],
            &[1, 0, 0, 2],
            &[0, 2, 2, 1],
        ] {
            let mut gateway = gateway(&world);
            let packets: Vec<_> = order.iter().map(|at| &pieces[*at]).collect();
            let left = deliver(&mut gateway, From::Wan, &packets);
            assert_eq!(left, expected, "{order:?}");
            let doubles = order.len() as u64 - 3;
            assert_eq!(
                gateway.drops(DropReason::FragmentOverlap),
                doubles,
                "{order:?}"
            );
        }
    }
}

/// The headers in front of a fragment's payload.
fn head(world: &World, draft: &Draft) -> Vec<u8> {
    draft.packet()[..if world.is_v4() { 20 } else { 40 }].to_vec()
}

#[test]
fn overlapping_fragments_do_not_leave_and_end_a_datagram_of_ipv6() {
    for world in World::both() {
        let [sent, delivered] = question(&world, 700);
        let (pieces, expected) = (cut(&sent, 240), cut(&delivered, 240));
        let head = head(&world, &sent);
        for (offset, len) in [(1, 240), (29, 8), (15, 480), (0, 248)] {
            let teardrop = fragment(&head, ID, offset, true, &vec![0xee; len]);
            let mut gateway = gateway(&world);
            let left = deliver(
                &mut gateway,
                From::Wan,
                &[&pieces[0], &teardrop, &pieces[1], &pieces[2]],
            );
            if world.is_v4() || offset == 0 {
                // What came first stays; the other first fragment has other ports.
                let replaced = offset == 0;
                assert_eq!(
                    gateway.drops(DropReason::FragmentOverlap),
                    u64::from(!replaced)
                );
                if !replaced {
                    assert_eq!(left, expected);
                }
            } else {
                assert_eq!(left, expected[..1]);
                assert_eq!(gateway.drops(DropReason::FragmentRefused), 2);
            }
        }
    }
}

#[test]
fn a_first_fragment_with_other_ports_never_takes_the_rest_of_another_datagram_along() {
    for world in World::both() {
        let [sent, delivered] = question(&world, 700);
        let other = Draft {
            dont_fragment: false,
            ..sent.between(at(world.client, 8), sent.destination)
        };
        let (pieces, others) = (cut(&sent, 240), cut(&other, 240));
        let mut gateway = gateway(&world);
        let left = deliver(
            &mut gateway,
            From::Wan,
            &[&pieces[0], &others[0], &pieces[1]],
        );
        // The latest first fragment counts: both are to the same target, with their own ports.
        let translated = other.between(other.source, at(world.target, 1053)).hop();
        assert_eq!(left[0], cut(&delivered, 240)[0]);
        assert_eq!(left[1], cut(&translated, 240)[0]);
        assert_eq!(left[2], cut(&delivered, 240)[1]);
        assert_eq!(gateway.events(Event::FragmentClash), 1);
    }
}

#[test]
fn fragments_that_no_sender_makes_are_dropped() {
    for world in World::both() {
        let [sent, _] = question(&world, 700);
        let segment = Draft {
            dont_fragment: false,
            ..Draft::tcp(at(world.client, 7), at(world.listen, 80), 0x02).payload(payload(100))
        };
        let transport = |draft: &Draft| draft.packet()[head(&world, draft).len()..].to_vec();
        let whole = transport(&segment);
        for (what, draft, offset, more, part) in [
            (
                "eight bytes of a TCP header",
                &segment,
                0,
                true,
                &whole[..8],
            ),
            (
                "sixteen bytes of a TCP header",
                &segment,
                0,
                true,
                &whole[..16],
            ),
            (
                "no multiple of eight",
                &sent,
                0,
                true,
                &transport(&sent)[..41],
            ),
            ("nothing", &sent, 0, true, &[]),
            ("nothing, later", &sent, 10, true, &[]),
            (
                "a later one, no multiple of eight",
                &sent,
                10,
                true,
                &[1; 9],
            ),
            ("beyond 65,535 bytes", &sent, 8_190, false, &[1; 16]),
        ] {
            println!("{what}");
            let mut gateway = gateway(&world);
            let packet = fragment(&head(&world, draft), ID, offset, more, part);
            gateway.wan(&packet).dropped(DropReason::BadFragment);
            assert_eq!(gateway.flows(), 0);
            // Nothing that follows is let through.
            let next = fragment(&head(&world, draft), ID, 1, false, &[7; 20]);
            assert!(deliver(&mut gateway, From::Wan, &[&next]).is_empty());
        }
    }
}

#[test]
fn a_fragment_over_the_flags_of_a_connection_is_never_carried() {
    for world in World::both() {
        let segment = Draft {
            dont_fragment: false,
            ..Draft::tcp(at(world.client, 7), at(world.listen, 80), 0x02).payload(payload(100))
        };
        let first = cut(&segment, 40)[0].clone();
        let over = fragment(&head(&world, &segment), ID, 1, true, &[0xff; 32]);
        for packets in [[&first, &over], [&over, &first]] {
            let mut gateway = gateway(&world);
            assert_eq!(deliver(&mut gateway, From::Wan, &packets).len(), 1);
        }
    }
}

#[test]
fn the_rest_of_a_datagram_goes_where_its_first_fragment_went() {
    for world in World::both() {
        // To a port without rule: the kernel's, in whatever order.
        let own = Draft {
            dont_fragment: false,
            ..Draft::udp(at(world.client, 7), at(world.listen, 99)).payload(payload(700))
        };
        let pieces = cut(&own, 240);
        for order in orders(3) {
            let mut gateway = gateway(&world);
            let mut passed = Vec::new();
            for at in &order {
                let mut outcomes = vec![gateway.wan(&pieces[*at])];
                outcomes.extend(gateway.settle());
                for outcome in outcomes {
                    if let portfwd_common::datapath::Verdict::Pass(reason) = outcome.verdict {
                        let reason_is_right =
                            matches!(reason, PassReason::NoRule | PassReason::Fragment);
                        assert!(reason_is_right, "{reason:?}");
                        passed.push(outcome.after[14..].to_vec());
                    }
                }
            }
            passed.sort_by_key(|packet| pieces.iter().position(|piece| piece == packet));
            assert_eq!(passed, pieces, "{order:?}");
        }
        // From a target of two rules: dropped, and so is the rest.
        let private = Draft {
            dont_fragment: false,
            ..Draft::udp(at(world.second_target, 53), at(world.client, 7)).payload(payload(700))
        };
        let pieces = cut(&private, 240);
        let mut gateway = gateway(&world);
        gateway.lan(&pieces[0]).dropped(DropReason::PrivateSource);
        gateway.lan(&pieces[1]).dropped(DropReason::FragmentRefused);
        gateway.lan(&pieces[2]).dropped(DropReason::FragmentRefused);
    }
}

#[test]
fn fragments_between_others_pass_at_once() {
    for world in World::both() {
        let neighbours = Draft {
            dont_fragment: false,
            ..Draft::udp(at(world.target, 1053), at(world.narrow_target, 7)).payload(payload(700))
        };
        let transit = Draft {
            dont_fragment: false,
            ..Draft::udp(at(world.client, 7), at(world.target, 7)).payload(payload(700))
        };
        for at in [2, 1, 0] {
            let mut gateway = gateway(&world);
            let (lan, wan) = (&cut(&neighbours, 240)[at], &cut(&transit, 240)[at]);
            let (by_lan, by_wan) = if at == 0 {
                (PassReason::NoFlow, PassReason::NoRule)
            } else {
                (PassReason::Fragment, PassReason::Fragment)
            };
            gateway.lan(lan).passed(by_lan);
            gateway.wan(wan).passed(by_wan);
        }
    }
}

/// The model held it, and the kernel, whose routes know no such source, left it to the stack: it is nobody's that leaves by the WAN.
#[test]
fn a_fragment_from_a_group_waits_for_nobody() {
    for world in World::both() {
        let mut gateway = gateway(&world);
        let group: IpAddr = match world.listen {
            IpAddr::V4(_) => Ipv4Addr::new(224, 0, 0, 5).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0xff01, 0xdb8, 4, 0, 0, 0, 0, 10).into(),
        };
        let sent = Draft {
            dont_fragment: false,
            ..Draft::udp(at(group, 5_000), at(world.client, 40_000)).payload(payload(64))
        };
        let pieces = cut(&sent, 32);
        let last = pieces.last().expect("there are two");
        gateway.lan(last).passed(PassReason::Fragment);
    }
}

#[test]
fn an_identification_is_free_again_after_the_last_fragment() {
    for world in World::both() {
        let mut gateway = gateway(&world);
        for port in [7, 8] {
            let sent = Draft {
                dont_fragment: false,
                ..Draft::udp(at(world.client, port), at(world.listen, 53)).payload(payload(700))
            };
            let delivered = sent.between(sent.source, at(world.target, 1053)).hop();
            let pieces = cut(&sent, 240);
            let packets: Vec<_> = pieces.iter().collect();
            assert_eq!(
                deliver(&mut gateway, From::Wan, &packets),
                cut(&delivered, 240)
            );
        }
        assert_eq!(gateway.events(Event::FragmentClash), 0);
    }
}

#[test]
fn options_only_in_the_first_fragment_do_not_hide_its_ports() {
    let world = World::v4();
    let [sent, delivered] = question(&world, 700);
    let with = |draft: &Draft| {
        let with = Draft {
            ip_options: vec![1; 12],
            ..draft.clone()
        };
        let mut pieces = cut(draft, 240);
        pieces[0] = fragments(&with.packet(), ID, 240, 0)[0].clone();
        pieces
    };
    let (pieces, expected) = (with(&sent), with(&delivered));
    let packets: Vec<_> = [1, 0, 2].iter().map(|at| &pieces[*at]).collect();
    let left = deliver(&mut gateway(&world), From::Wan, &packets);
    assert_eq!(left, expected);
}

#[test]
fn fragments_that_must_not_be_fragmented_are_legal() {
    let world = World::v4();
    let [sent, delivered] = question(&world, 700);
    let keep_whole = |pieces: Vec<Vec<u8>>| -> Vec<Vec<u8>> {
        let set = |mut packet: Vec<u8>| {
            packet[6] |= 0x40;
            // What that changes in the header's sum (RFC 1624).
            let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]]));
            let sum = (!sum & 0xffff) + 0x4000;
            let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet
        };
        pieces.into_iter().map(set).collect()
    };
    let pieces = keep_whole(cut(&sent, 240));
    let packets: Vec<_> = pieces.iter().collect();
    let left = deliver(&mut gateway(&world), From::Wan, &packets);
    assert_eq!(left, keep_whole(cut(&delivered, 240)));
}

#[test]
fn every_offset_and_flag_of_a_fragment_is_read_as_it_is() {
    let world = World::v4();
    let [sent, _] = question(&world, 16);
    let packet = sent.packet();
    for field in 0..=u16::MAX {
        let mut gateway = gateway(&world);
        let mut packet = packet.clone();
        packet[6..8].copy_from_slice(&field.to_be_bytes());
        let outcome = gateway.wan(&packet);
        let (offset, more) = (usize::from(field & 0x1fff), field & 0x2000 != 0);
        let ends = offset * 8 + 24;
        if offset == 0 {
            assert_eq!(outcome.departure().way, Way::Frame, "{field:#06x}");
        } else if ends > 0xffff {
            outcome.dropped(DropReason::BadFragment);
        } else {
            assert_eq!(outcome.departure().way, Way::Hold, "{field:#06x}");
        }
        assert_eq!(
            gateway.model.flows.datagrams.len(),
            usize::from(offset == 0 && more)
        );
    }
}

#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    let world = World::v6();
    let [sent, delivered] = question(&world, 100);
    let atomic = |draft: &Draft| fragments(&draft.packet(), ID, 1_000, 0)[0].clone();
    for hook in [Hook::Xdp, Hook::Tc] {
        let mut gateway = gateway(&world).by(hook);
        gateway.wan(&atomic(&sent)).reached_lan(&atomic(&delivered));
        gateway.wan(&atomic(&sent)).reached_lan(&atomic(&delivered));
    }
    // Even if fragments with its identification are on their way (RFC 6946).
    let [large, large_delivered] = question(&world, 700);
    let (pieces, expected) = (cut(&large, 240), cut(&large_delivered, 240));
    let mut gateway = gateway(&world);
    let left = deliver(
        &mut gateway,
        From::Wan,
        &[&pieces[0], &atomic(&sent), &pieces[1], &pieces[2]],
    );
    assert_eq!(left.len(), 4);
    assert_eq!(left[1], atomic(&delivered));
    assert_eq!([&left[..1], &left[2..]].concat(), expected);
}

#[test]
fn extension_headers_around_a_fragment_header_are_stepped_over() {
    const HOP_BY_HOP: u8 = 0;
    const DESTINATION: u8 = 60;
    let world = World::v6();
    let [sent, delivered] = question(&world, 700);
    // In front of the fragment header, and behind it in the first fragment.
    let before = |draft: &Draft| fragments(&with_options(&draft.packet(), HOP_BY_HOP), ID, 240, 8);
    let behind = |draft: &Draft| fragments(&with_options(&draft.packet(), DESTINATION), ID, 240, 0);
    for (pieces, expected) in [
        (before(&sent), before(&delivered)),
        (behind(&sent), behind(&delivered)),
    ] {
        let packets: Vec<_> = [1, 2, 0].iter().map(|at| &pieces[*at]).collect();
        let left = deliver(&mut gateway(&world), From::Wan, &packets);
        assert_eq!(left, expected);
    }
    // The first fragment must have the whole chain (RFC 7112): here the transport header is in the second.
    let pieces = fragments(&with_options(&sent.packet(), DESTINATION), ID, 8, 0);
    gateway(&world)
        .wan(&pieces[0])
        .dropped(DropReason::BadFragment);
    // A fragment in a fragment is none.
    let twice = fragments(&cut(&sent, 240)[0], ID, 1_000, 0);
    gateway(&world).wan(&twice[0]).passed(PassReason::Malformed);
}

#[test]
fn a_datagram_too_big_for_its_way_out_leaves_in_fragments() {
    let world = World::v4();
    for (from, [sent, delivered]) in [
        (From::Wan, question(&world, 1_400)),
        (From::Lan, answer(&world, 1_400)),
    ] {
        let mut gateway = gateway(&world);
        for (destination, ifindex) in [(world.client, WAN), (world.target, LAN)] {
            gateway.model.maps.set_route(
                destination,
                32,
                portfwd_common::datapath::Route::Via {
                    ifindex,
                    next_hop: [1, 2, 3],
                    mtu: 600,
                },
            );
        }
        let left = deliver(&mut gateway, from, &[&sent.packet()]);
        assert_eq!(left, fragments(&delivered.packet(), 0x4321, 576, 0));
        assert_eq!(gateway.events(Event::Fragmented), 1);
        // Fragments are cut again, and the rest of the datagram follows.
        let (pieces, whole) = (cut(&sent, 984), cut(&delivered, 984));
        let packets: Vec<_> = pieces.iter().collect();
        let left = deliver(&mut gateway, from, &packets);
        let expected: Vec<_> = [&whole[0][20..596], &whole[0][596..], &whole[1][20..]].to_vec();
        let got: Vec<_> = left.iter().map(|packet| &packet[20..]).collect();
        assert_eq!(got, expected);
        let fields: Vec<_> = left.iter().map(|packet| [packet[6], packet[7]]).collect();
        assert_eq!(fields, [[0x20, 0], [0x20, 72], [0, 123]]);
        for packet in &left {
            assert!(etherparse::Ipv4HeaderSlice::from_slice(packet).is_ok());
            let header = etherparse::Ipv4Header::from_slice(packet).unwrap().0;
            assert_eq!(header.header_checksum, header.calc_header_checksum());
        }
    }
}

#[test]
fn fragments_too_large_to_be_held_are_counted() {
    let world = World::v4();
    let [sent, _] = question(&world, 8_000);
    let pieces = cut(&sent, 2_400);
    let mut gateway = gateway(&world);
    gateway
        .wan(&pieces[1])
        .dropped(DropReason::FragmentTooLarge);
}

#[test]
fn fragments_from_behind_a_tunnel_leave_from_the_listen_endpoint() {
    for world in World::both() {
        let sent = Draft {
            dont_fragment: false,
            ..Draft::udp(at(world.tunnel_target, 2), at(world.client, 7)).payload(payload(700))
        };
        let delivered = sent.between(at(world.listen, 442), sent.destination).hop();
        let (pieces, expected) = (cut(&sent, 240), cut(&delivered, 240));
        let mut gateway = gateway(&world);
        let mut left = Vec::new();
        for at in [1, 0, 2] {
            let mut outcomes = vec![gateway.tunnel(TUNNEL, &pieces[at])];
            outcomes.extend(gateway.settle());
            left.extend(
                outcomes
                    .iter()
                    .filter(|outcome| outcome.departure().way == Way::NewHeader)
                    .map(|outcome| outcome.after[14..].to_vec()),
            );
        }
        assert_eq!(left, expected);
    }
}
