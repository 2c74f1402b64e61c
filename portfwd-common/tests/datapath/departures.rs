//! How translated packets leave, or why they do not.

use std::net::IpAddr;

use portfwd_common::{
    abi::{Interface, NextHop, Protocol, Ticks, next_hop::Hold},
    datapath::{Arrival, Departure, Event, Hook, PassReason, Route, Tables as _, Way},
    model::{
        frame::{Draft, Mac, ethernet, mac_words},
        rules::Forward,
    },
};

use crate::gateway::{Gateway, Outcome, SECOND};
use portfwd_common::model::world::{
    BACKEND_MAC, ELSEWHERE, LAN, LAN_MAC, NARROW, NARROW_MAC, TUNNEL, UPSTREAM_MAC, WAN, WAN_MAC,
    WAN_TUNNEL, World, at,
};

#[derive(Clone, Copy, Debug)]
enum Expected {
    Leaves(Way, u32),
    Passes(PassReason),
    Cuts(u16),
}

use Expected::{Cuts, Leaves, Passes};

const SLOW: Expected = Passes(PassReason::SlowPath);
const STACK: Expected = Leaves(Way::Stack, 0);

fn expect(outcome: &Outcome, expected: Expected) {
    match expected {
        Leaves(way, ifindex) => {
            let departure = outcome.departure();
            assert_eq!((departure.way, departure.ifindex), (way, ifindex));
        }
        Passes(reason) => outcome.passed(reason),
        Cuts(mtu) => assert_eq!(outcome.departure(), Departure::cut(mtu)),
    }
}

/// A packet of `len` bytes.
fn sized(draft: &Draft, len: usize) -> Draft {
    draft
        .clone()
        .payload(vec![0x5a; len - draft.clone().payload([]).packet().len()])
}

fn rule(target: IpAddr) -> Forward {
    Forward::new(Protocol::Udp, 53, at(target, 1053))
}

fn question(world: &World) -> Draft {
    Draft::udp(at(world.client, 5_353), at(world.listen, 53))
}

fn fragmentable(draft: Draft) -> Draft {
    Draft {
        dont_fragment: false,
        ..draft
    }
}

#[test]
fn first_packets_leave_as_their_route_says() {
    type Packet = fn(&World) -> Draft;
    type Target = fn(&World) -> IpAddr;
    let plain: Packet = question;
    let rows: [(&str, Target, Packet, Expected, Expected); 15] = [
        (
            "to a backend on the LAN",
            |w| w.target,
            plain,
            Leaves(Way::Frame, LAN),
            Leaves(Way::Frame, LAN),
        ),
        (
            "by an interface that takes nothing from XDP",
            |w| w.narrow_target,
            plain,
            SLOW,
            Leaves(Way::Frame, NARROW),
        ),
        (
            "by an interface without link header",
            |w| w.tunnel_target,
            plain,
            SLOW,
            Leaves(Way::Raw, TUNNEL),
        ),
        (
            "to a backend whose MAC address is not known",
            |w| w.silent_target,
            plain,
            SLOW,
            Leaves(Way::Resolve, LAN),
        ),
        (
            "by an interface of no program",
            |w| w.far_target,
            plain,
            SLOW,
            Leaves(Way::Resolve, ELSEWHERE),
        ),
        ("without a route", |w| w.lost_target, plain, SLOW, STACK),
        (
            "with its last hop but one",
            |w| w.target,
            |w| question(w).hop_limit(2),
            Leaves(Way::Frame, LAN),
            Leaves(Way::Frame, LAN),
        ),
        (
            "with its last hop",
            |w| w.target,
            |w| question(w).hop_limit(1),
            SLOW,
            STACK,
        ),
        (
            "with no hop left",
            |w| w.target,
            |w| question(w).hop_limit(0),
            SLOW,
            STACK,
        ),
        (
            "with its last hop and no route",
            |w| w.lost_target,
            |w| question(w).hop_limit(1),
            SLOW,
            STACK,
        ),
        (
            "as large as the interface takes",
            |w| w.narrow_target,
            |w| sized(&question(w), 1400),
            SLOW,
            Leaves(Way::Frame, NARROW),
        ),
        (
            "larger than the interface takes",
            |w| w.narrow_target,
            |w| sized(&question(w), 1401),
            SLOW,
            STACK,
        ),
        (
            "as large as the route takes",
            |w| w.slow_target,
            |w| sized(&question(w), 1300),
            Leaves(Way::Frame, LAN),
            Leaves(Way::Frame, LAN),
        ),
        (
            "larger than the route takes",
            |w| w.slow_target,
            |w| sized(&question(w), 1301),
            SLOW,
            STACK,
        ),
        (
            "larger than the route takes, but not to be kept whole",
            |w| w.slow_target,
            |w| fragmentable(sized(&question(w), 1301)),
            SLOW,
            Cuts(1300),
        ),
    ];
    for world in World::both() {
        for (name, target, packet, by_xdp, by_tc) in rows {
            for (hook, mut expected) in [
                (Hook::Xdp, by_xdp),
                (Hook::Tc, by_tc),
                (Hook::TcSlow, by_tc),
            ] {
                println!("{name}, by {hook:?}");
                if world.client.is_ipv6() && matches!(expected, Cuts(_)) {
                    // Routers never fragment IPv6.
                    expected = STACK;
                }
                let mut gateway = Gateway::new(&[rule(target(&world))]).by(hook);
                let draft = packet(&world);
                // The second packet finds an entry, with or without a route in it.
                for _ in 0..2 {
                    let outcome = gateway.wan(&draft.packet());
                    expect(&outcome, expected);
                    let Leaves(way, _) = expected else {
                        assert_eq!(gateway.flows(), 0);
                        continue;
                    };
                    let translated = draft.between(draft.source, at(target(&world), 1053));
                    let (macs, packet): ([Mac; 2], _) = match way {
                        Way::Frame if target(&world) == world.narrow_target => {
                            ([BACKEND_MAC, NARROW_MAC], translated.hop())
                        }
                        Way::Frame => ([BACKEND_MAC, LAN_MAC], translated.hop()),
                        // The frame's header stays: whoever sends it on takes it off or replaces it.
                        Way::Raw | Way::Resolve => ([WAN_MAC, UPSTREAM_MAC], translated.hop()),
                        Way::Stack => ([WAN_MAC, UPSTREAM_MAC], translated),
                        Way::NewHeader => panic!("the frame has a header"),
                        Way::Hold | Way::Again | Way::Cut => panic!("it has not left"),
                    };
                    assert_eq!(outcome.after, ethernet(macs[0], macs[1], &packet.packet()));
                    assert_eq!(gateway.flows(), 1);
                }
                let counted = |way| {
                    if matches!(expected, Leaves(w, _) if w == way) {
                        2
                    } else {
                        0
                    }
                };
                assert_eq!(gateway.events(Event::Stack), counted(Way::Stack));
                assert_eq!(gateway.events(Event::Resolved), counted(Way::Resolve));
            }
        }
    }
}

#[test]
fn replies_leave_as_their_route_says_and_never_go_up_translated() {
    type Reroute = fn(&World) -> Option<Route>;
    type Packet = fn(Draft) -> Draft;
    let same: Packet = |draft| draft;
    let by_wan: Reroute = |_| None;
    let narrow: Reroute = |_| {
        Some(Route::Via {
            ifindex: WAN,
            next_hop: mac_words(UPSTREAM_MAC),
            mtu: 1300,
        })
    };
    let too_big_v6 = Passes(PassReason::PacketTooBig);
    let rows: [(&str, Reroute, Packet, Expected, Expected); 9] = [
        (
            "to a client",
            by_wan,
            same,
            Leaves(Way::Frame, WAN),
            Leaves(Way::Frame, WAN),
        ),
        (
            "to a client behind a link without header",
            |_| {
                Some(Route::Unresolved {
                    ifindex: WAN_TUNNEL,
                })
            },
            same,
            SLOW,
            Leaves(Way::Raw, WAN_TUNNEL),
        ),
        (
            "to a router whose MAC address is not known",
            |_| Some(Route::Unresolved { ifindex: WAN }),
            same,
            SLOW,
            Leaves(Way::Resolve, WAN),
        ),
        (
            "without a route",
            |_| Some(Route::Stack),
            same,
            SLOW,
            Passes(PassReason::NoRoute),
        ),
        (
            "with its last hop",
            by_wan,
            |draft| draft.hop_limit(1),
            SLOW,
            Passes(PassReason::HopLimit),
        ),
        (
            "with its last hop and no route",
            |_| Some(Route::Stack),
            |draft| draft.hop_limit(1),
            SLOW,
            Passes(PassReason::HopLimit),
        ),
        (
            "as large as the route takes",
            narrow,
            |draft| sized(&draft, 1300),
            Leaves(Way::Frame, WAN),
            Leaves(Way::Frame, WAN),
        ),
        (
            "larger than the route takes",
            narrow,
            |draft| sized(&draft, 1301),
            SLOW,
            too_big_v6,
        ),
        (
            "larger than the route takes, but not to be kept whole",
            narrow,
            |draft| fragmentable(sized(&draft, 1301)),
            SLOW,
            Cuts(1300),
        ),
    ];
    for world in World::both() {
        let answer = Draft::udp(at(world.target, 1053), at(world.client, 5_353));
        for (name, reroute, packet, by_xdp, by_tc) in rows {
            for (hook, mut expected) in [
                (Hook::Xdp, by_xdp),
                (Hook::Tc, by_tc),
                (Hook::TcSlow, by_tc),
            ] {
                println!("{name}, by {hook:?}");
                if world.client.is_ipv6() && matches!(expected, Cuts(_)) {
                    // Routers never fragment IPv6.
                    expected = too_big_v6;
                }
                let mut gateway = Gateway::new(&[rule(world.target)]);
                let _ = gateway.wan(&question(&world).packet()).departure();
                gateway.hook = hook;
                if let Some(route) = reroute(&world) {
                    let host = if world.client.is_ipv4() { 32 } else { 128 };
                    gateway.model.maps.set_route(world.client, host, route);
                }
                let draft = packet(answer.clone());
                for _ in 0..2 {
                    let outcome = gateway.lan(&draft.packet());
                    expect(&outcome, expected);
                    if let Leaves(..) = expected {
                        let translated =
                            draft.between(at(world.listen, 53), draft.destination).hop();
                        assert_eq!(outcome.after[14..], translated.packet());
                    }
                }
                let counted = gateway.books().counters[0].1.to_client.packets;
                assert_eq!(counted, if matches!(expected, Leaves(..)) { 2 } else { 0 });
            }
        }
    }
}

#[test]
fn packets_without_link_header_get_one_where_they_need_one() {
    type Row = (&'static str, IpAddr, Way, u32, Option<[Mac; 2]>);
    for world in World::both() {
        let rows: [Row; 4] = [
            (
                "from a tunnel to the LAN",
                world.target,
                Way::NewHeader,
                LAN,
                Some([BACKEND_MAC, LAN_MAC]),
            ),
            (
                "from a tunnel to a tunnel",
                world.tunnel_target,
                Way::Raw,
                TUNNEL,
                None,
            ),
            (
                "from a tunnel to an unknown MAC address",
                world.silent_target,
                Way::Resolve,
                LAN,
                Some([[0; 6]; 2]),
            ),
            (
                "from a tunnel to nowhere",
                world.lost_target,
                Way::Stack,
                0,
                None,
            ),
        ];
        for (name, target, way, ifindex, header) in rows {
            println!("{name}");
            let mut gateway = Gateway::new(&[rule(target)]);
            let draft = Draft::udp(at(world.tunnel_client, 5_353), at(world.listen, 53));
            for _ in 0..2 {
                let outcome = gateway.tunnel(WAN_TUNNEL, &draft.packet());
                expect(&outcome, Leaves(way, ifindex));
                let translated = draft.between(draft.source, at(target, 1053));
                let packet = match way {
                    Way::Stack => translated.packet(),
                    Way::Frame | Way::Raw | Way::NewHeader | Way::Resolve => {
                        translated.hop().packet()
                    }
                    Way::Hold | Way::Again | Way::Cut => panic!("it has not left"),
                };
                let frame = match header {
                    Some([dst, src]) => ethernet(dst, src, &packet),
                    None => packet,
                };
                assert_eq!(outcome.after, frame);
            }
        }
    }
}

#[test]
fn the_segments_of_a_super_packet_must_fit_not_the_whole() {
    for world in World::both() {
        let draft = sized(&question(&world), 4_000);
        let headers = draft.headers_len() as u32;
        for (segment_size, expected) in [
            (1_300 - headers, Leaves(Way::Frame, LAN)),
            (1_301 - headers, STACK),
        ] {
            let mut gateway = Gateway::new(&[rule(world.slow_target)]);
            let arrival = Arrival {
                segment_size,
                ..gateway.arrival(WAN)
            };
            let frame = ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet());
            expect(&gateway.arrive(&arrival, frame), expected);
        }
    }
}

/// The backend moves to the interface NARROW.
fn move_backend(gateway: &mut Gateway, world: &World) {
    let host = if world.client.is_ipv4() { 32 } else { 128 };
    let route = Route::Via {
        ifindex: NARROW,
        next_hop: mac_words(BACKEND_MAC),
        mtu: 1400,
    };
    gateway.model.maps.set_route(world.target, host, route);
}

#[test]
fn a_new_route_is_taken_with_the_next_generation_or_within_a_second() {
    for world in World::both() {
        let leaves = |gateway: &mut Gateway, ifindex| {
            expect(
                &gateway.wan(&question(&world).packet()),
                Leaves(Way::Frame, ifindex),
            );
        };
        // The second datagram proves the flow: from then on its entry is used as it is.
        let mut gateway = Gateway::new(&[rule(world.target)]);
        leaves(&mut gateway, LAN);
        leaves(&mut gateway, LAN);
        move_backend(&mut gateway, &world);
        leaves(&mut gateway, LAN);
        gateway.bump_generation();
        leaves(&mut gateway, NARROW);

        let mut gateway = Gateway::new(&[rule(world.target)]);
        leaves(&mut gateway, LAN);
        leaves(&mut gateway, LAN);
        move_backend(&mut gateway, &world);
        // The entry's age counts from its validation, not from its last packet.
        for _ in 0..249 {
            gateway.model.advance(Ticks(1));
            leaves(&mut gateway, LAN);
        }
        gateway.model.advance(Ticks(1));
        leaves(&mut gateway, NARROW);
        assert_eq!(gateway.flows(), 1);
        assert_eq!(gateway.books().counters[0].1.to_target.packets, 252);
    }
}

#[test]
fn a_neighbour_that_answers_is_used_with_the_next_packet() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.silent_target)]);
        for _ in 0..3 {
            expect(
                &gateway.wan(&question(&world).packet()),
                Leaves(Way::Resolve, LAN),
            );
        }
        let host = if world.client.is_ipv4() { 32 } else { 128 };
        let route = Route::Via {
            ifindex: LAN,
            next_hop: mac_words(BACKEND_MAC),
            mtu: 1500,
        };
        gateway
            .model
            .maps
            .set_route(world.silent_target, host, route);
        expect(
            &gateway.wan(&question(&world).packet()),
            Leaves(Way::Frame, LAN),
        );
        assert_eq!(gateway.events(Event::FlowCreated), 1);
    }
}

#[test]
fn an_interface_that_changes_its_mac_address_is_followed_with_the_next_generation_or_within_a_second()
 {
    const NEW_MAC: Mac = [2, 0, 0, 0, 7, 7];
    for world in World::both() {
        for daemon_runs in [true, false] {
            let mut gateway = Gateway::new(&[rule(world.target)]);
            let _ = gateway.wan(&question(&world).packet()).departure();
            let lan = *gateway.model.maps.interface(LAN as u16).unwrap();
            gateway.model.maps.set_interface(Interface {
                mac: mac_words(NEW_MAC),
                ..lan
            });
            if daemon_runs {
                gateway.bump_generation();
            } else {
                gateway.wait(1);
            }
            let outcome = gateway.wan(&question(&world).packet());
            assert_eq!(outcome.after[..12], [BACKEND_MAC, NEW_MAC].concat());
        }
    }
}

/// Elements of NEXT_HOPS that flows of one route may have.
const PROBES: u16 = 4;

#[test]
fn flows_that_leave_alike_share_the_number_of_their_way_out() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.target)]);
        for port in 1..=8 {
            let client = at(world.client, port);
            let sent = Draft::udp(client, at(world.listen, 53));
            let _ = gateway.wan(&sent.packet()).departure();
            let _ = gateway
                .lan(&sent.between(at(world.target, 1053), client).packet())
                .departure();
        }
        assert_eq!(gateway.model.maps.next_hops().len(), 2, "one way, one back");
    }
}

#[test]
fn a_way_out_that_nobody_has_used_for_long_gives_its_number_to_another() {
    for world in World::both() {
        // Within four periods of validity an entry may still refer to it, or two of the one for which the daemon vouches.
        for (leased, rest) in [(0, 4), (30, 60)] {
            let mut gateway = Gateway::new(&[rule(world.target)]);
            let config = gateway.model.maps.config.as_mut().unwrap();
            config.leased_validity = Ticks(leased * SECOND);
            let question = question(&world).packet();
            let _ = gateway.wan(&question).departure();
            let (slot, hop) = gateway.model.maps.next_hops().pop_first().unwrap();
            // Four others are where it could be, and in use: packets leave all the same, each by the slow path.
            let other = NextHop { mac: [9; 3], ..hop };
            gateway.bump_generation();
            for probe in 0..PROBES {
                gateway.model.maps.set_next_hop(slot + probe, other);
            }
            for _ in 0..3 {
                expect(&gateway.wan(&question), Leaves(Way::Frame, LAN));
            }
            let is_other = |hop: &NextHop| *hop == other;
            assert!(gateway.model.maps.next_hops().values().all(is_other));
            gateway.wait(rest);
            expect(&gateway.wan(&question), Leaves(Way::Frame, LAN));
            assert!(gateway.model.maps.next_hops().values().all(is_other));
            gateway.wait(1);
            expect(&gateway.wan(&question), Leaves(Way::Frame, LAN));
            assert_eq!(gateway.model.maps.next_hops()[&slot].mac, hop.mac);
        }
    }
}

#[test]
fn a_way_out_that_another_cpu_is_writing_to_is_left_alone() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.target)]);
        let question = question(&world).packet();
        let _ = gateway.wan(&question).departure();
        let (slot, hop) = gateway.model.maps.next_hops().pop_first().unwrap();
        let half_written = NextHop {
            hold: Hold::WRITING,
            ..hop
        };
        gateway.model.maps.set_next_hop(slot, half_written);
        gateway.bump_generation();
        expect(&gateway.wan(&question), Leaves(Way::Frame, LAN));
        let hops = gateway.model.maps.next_hops();
        assert_eq!(hops[&slot], half_written);
        assert!(hops[&(slot + 1)].is_same_way(&hop), "the next one was free");
    }
}
