//! Endpoints over time: who stands for whom, for how long, and whatever else is going on.

use portfwd_common::{
    abi::{Protocol, Ticks},
    datapath::{Arrival, Event, Hook, PassReason},
    model::{
        effort::cases,
        frame::{Draft, ethernet},
        rules::{Forward, Source},
        world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};
use proptest::prelude::*;

use crate::gateway::{Gateway, Outcome, SECOND};

/// The source endpoint of a translated datagram.
fn source(outcome: &Outcome) -> std::net::SocketAddr {
    let _ = outcome.departure();
    let sliced = etherparse::SlicedPacket::from_ethernet(&outcome.after).unwrap();
    let address = match sliced.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => ip.header().source_addr().into(),
        etherparse::NetSlice::Ipv6(ip) => ip.header().source_addr().into(),
        etherparse::NetSlice::Arp(_) => panic!("ARP"),
    };
    let port = match sliced.transport.unwrap() {
        etherparse::TransportSlice::Udp(udp) => udp.source_port(),
        etherparse::TransportSlice::Tcp(tcp) => tcp.source_port(),
        etherparse::TransportSlice::Icmpv4(_)
        | etherparse::TransportSlice::Icmpv6(_)
        | etherparse::TransportSlice::Igmp(_) => panic!("neither UDP nor TCP"),
    };
    at(address, port)
}

/// Both protocols of two ports, to two targets, clients hidden.
fn hidden(world: &World) -> Vec<Forward> {
    [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .flat_map(|protocol| {
            [
                Forward::new(protocol, 80, at(world.target, 8080)),
                Forward::new(protocol, 81, at(world.second_target, 8081)),
            ]
        })
        .map(|forward| forward.from(Source::Masquerade))
        .collect()
}

/// RFC 4787 REQ-2: one address stands for a client in all its sessions.
#[test]
fn a_hidden_client_has_one_address_in_a_thousand_sessions() {
    for world in World::both() {
        let mut gateway = Gateway::with_room(&hidden(&world), 10_000);
        for port in 2_000..3_000 {
            // Two listen endpoints of one target would be one connection to it.
            for (listen, listen_port) in [(world.listen, 80), (world.second_listen, 81)] {
                let (client, listen) = (at(world.client, port), at(listen, listen_port));
                for sent in [Draft::udp(client, listen), Draft::tcp(client, listen, 0x02)] {
                    // RFC 4787 REQ-1: nor does the port depend on who is dialled.
                    let seen = source(&gateway.wan(&sent.packet()));
                    assert_eq!(seen, at(world.lan_address, port));
                }
            }
        }
    }
}

/// RFC 4787 REQ-11: neither the load nor a collision of ports makes a mapping depend on who is dialled.
#[test]
fn the_kind_of_mapping_is_the_same_at_any_load() {
    const ROOM: usize = 200;
    for world in World::both() {
        for percent in [0, 50, 99] {
            let mut gateway = Gateway::with_room(&hidden(&world), ROOM);
            // Others have the ports from 40,000 on, and places in the table.
            let others = ROOM * percent / 100;
            for port in (40_000..).take(others.saturating_sub(2)) {
                let other = Draft::udp(at(world.second_client, port), at(world.listen, 80));
                for _ in 0..2 {
                    let _ = gateway.wan(&other.packet()).departure();
                }
            }
            let client = at(world.client, 40_000);
            let dialled = [at(world.listen, 80), at(world.second_listen, 81)];
            let seen =
                dialled.map(|listen| source(&gateway.wan(&Draft::udp(client, listen).packet())));
            assert_eq!(seen[0], seen[1], "at {percent} %");
            assert_eq!(seen[0].port() == 40_000, percent == 0, "at {percent} %");
            assert_eq!(seen[0].port() % 2, 0);
            // Whoever comes to the forward from elsewhere is let in as ever.
            let stranger = Draft::udp(at(world.second_client, 9), at(world.listen, 80));
            let _ = gateway.wan(&stranger.packet()).departure();
        }
    }
}

/// A port that stands for a client is no forward: only the endpoint that was dialled for it may send there (RFC 4787 section 5,
/// address and port-dependent filtering).
#[test]
fn a_port_that_stands_for_a_client_answers_to_its_target_alone() {
    for world in World::both() {
        let mut gateway = Gateway::new(&hidden(&world));
        let sent = Draft::udp(at(world.client, 40_000), at(world.listen, 80));
        let seen = source(&gateway.wan(&sent.packet()));
        for stranger in [
            at(world.target, 8_081),
            at(world.lan_router, 8_080),
            at(world.narrow_target, 9),
        ] {
            gateway
                .lan(&Draft::udp(stranger, seen).packet())
                .passed(PassReason::NoFlow);
        }
        gateway
            .lan(&Draft::udp(at(world.target, 8_080), seen).packet())
            .reached_wan(&sent.between(sent.destination, sent.source).hop().packet());
    }
}

/// RFC 4787 REQ-4: an even port and the odd one above it (RTP and RTCP) stay a pair while both are free, and keep their parity
/// when they are not.
#[test]
fn a_pair_of_ports_stays_a_pair() {
    for world in World::both() {
        for is_taken in [false, true] {
            let mut gateway = Gateway::new(&hidden(&world));
            let listen = at(world.listen, 80);
            if is_taken {
                for port in [5_004, 5_005] {
                    let other = Draft::udp(at(world.second_client, port), listen);
                    let _ = gateway.wan(&other.packet()).departure();
                }
            }
            let [rtp, rtcp] = [5_004, 5_005].map(|port| {
                source(&gateway.wan(&Draft::udp(at(world.client, port), listen).packet())).port()
            });
            assert_eq!((rtp % 2, rtcp % 2), (0, 1));
            assert_eq!((rtp, rtcp) == (5_004, 5_005), !is_taken);
        }
    }
}

/// A client whose port changes in the middle (QUIC, RFC 9000 section 9, behind another NAT) is let in as anybody; the old flow
/// ends by itself and mixes with nothing.
#[test]
fn a_client_that_comes_from_another_port_is_let_in_and_the_old_flow_ends() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 443, at(world.target, 4433));
        let mut gateway = Gateway::new(&[rule]);
        let (listen, target) = (at(world.listen, 443), at(world.target, 4433));
        let talk = |gateway: &mut Gateway, port| {
            let client = at(world.client, port);
            gateway
                .wan(&Draft::udp(client, listen).packet())
                .reached_lan(&Draft::udp(client, target).hop().packet());
            gateway
                .lan(&Draft::udp(target, client).packet())
                .reached_wan(&Draft::udp(listen, client).hop().packet());
        };
        for port in [50_000, 50_001] {
            talk(&mut gateway, port);
        }
        assert_eq!(gateway.flows(), 2);
        for _ in 0..20 {
            gateway.wait(20);
            talk(&mut gateway, 50_001);
        }
        assert_eq!(gateway.events(Event::FlowCreated), 2);
        // 400 s later the old one is as good as gone.
        talk(&mut gateway, 50_000);
        assert_eq!(gateway.events(Event::FlowCreated), 3);
    }
}

/// RFC 4787 REQ-5a allows shorter lives for well-known ports. No port has one: all 65,535 are tried.
#[test]
fn datagrams_to_every_port_live_equally_long() {
    let world = World::v4();
    let rule = Forward::new(Protocol::Udp, 1, at(world.target, 1)).to(u16::MAX);
    // The second datagram takes a place in the table.
    let mut gateway = Gateway::with_room(&[rule], 1 << 16);
    for (wait, created) in [(0, 1), (300, 1), (301, 2)] {
        gateway.wait(wait);
        for port in 1..=u16::MAX {
            let sent = Draft::udp(at(world.client, 40_000), at(world.listen, port));
            let _ = gateway.wan(&sent.packet()).departure();
        }
        assert_eq!(gateway.events(Event::FlowCreated), created * 65_535);
    }
}

/// Datagrams that nobody answers (syslog) are carried for ever, with a place in the table or, when it is full, without.
#[test]
fn datagrams_without_answer_are_carried_for_ever() {
    for world in World::both() {
        for room in [16, 0] {
            let rule = Forward::new(Protocol::Udp, 514, at(world.target, 514));
            let mut gateway = Gateway::with_room(&[rule], room);
            let (client, target) = (at(world.client, 9), at(world.target, 514));
            let sent = Draft::udp(client, at(world.listen, 514));
            let delivered = sent.between(client, target).hop().packet();
            for second in 0..1_200 {
                gateway.wan(&sent.packet()).reached_lan(&delivered);
                gateway.wait(1);
                if second % 100 == 0 {
                    // Others drive it out of where flows begin.
                    gateway.model.flows.opening_v4.clear();
                    gateway.model.flows.opening_v6.clear();
                }
            }
            let (_, counted) = gateway.books().counters[0];
            assert_eq!(counted.to_target.packets, 1_200);
        }
    }
}

/// RFC 4787 section 5: what another port or host of the LAN sends to the client is no answer of the target (TFTP).
#[test]
fn an_answer_from_another_port_is_none_of_the_flow() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 69, at(world.target, 69));
        let mut gateway = Gateway::new(&[rule]);
        let client = at(world.client, 9);
        let _ = gateway
            .wan(&Draft::udp(client, at(world.listen, 69)).packet())
            .departure();
        for other in [at(world.target, 2_069), at(world.second_target, 69)] {
            gateway
                .lan(&Draft::udp(other, client).packet())
                .passed(PassReason::NoFlow);
        }
        // Nor is what the target sends to another port of the client's: that is a flow of its own, from the listen endpoint.
        let elsewhere = at(world.client, 10);
        gateway
            .lan(&Draft::udp(at(world.target, 69), elsewhere).packet())
            .reached_wan(&Draft::udp(at(world.listen, 69), elsewhere).hop().packet());
        assert_eq!(gateway.flows(), 2);
    }
}

/// Both sides send at the same time, each the other's reverse: one flow, both ports as they are, nothing lost, whoever is first.
#[test]
fn datagrams_that_cross_are_one_flow() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            for client_first in [true, false] {
                let rule = Forward::new(Protocol::Udp, 51_820, at(world.target, 51_820));
                let mut gateway = Gateway::new(&[rule]).by(hook);
                let (client, listen, target) = (
                    at(world.client, 51_820),
                    at(world.listen, 51_820),
                    at(world.target, 51_820),
                );
                for from_client in [client_first, !client_first, client_first] {
                    if from_client {
                        gateway
                            .wan(&Draft::udp(client, listen).packet())
                            .reached_lan(&Draft::udp(client, target).hop().packet());
                    } else {
                        gateway
                            .lan(&Draft::udp(target, client).packet())
                            .reached_wan(&Draft::udp(listen, client).hop().packet());
                    }
                }
                assert_eq!(gateway.flows(), 1);
                assert_eq!(gateway.events(Event::FlowCreated), 1);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(300)))]
    /// When an entry was last met is not written down for every packet. Still no flow ends before its time, less the second that
    /// this may cost, and none lives longer, whatever the gaps between packets were.
    #[test]
    fn no_gap_shorter_than_the_timeout_ends_a_flow(gaps in prop::collection::vec((0..305 * SECOND, 0..3_u32, any::<bool>()), 1..40)) {
        let world = World::v4();
        let rule = Forward::new(Protocol::Udp, 53, at(world.target, 53));
        let mut gateway = Gateway::new(&[rule]);
        let (client, listen, target) = (at(world.client, 5), at(world.listen, 53), at(world.target, 53));
        let _ = gateway.wan(&Draft::udp(client, listen).packet()).departure();
        for (ticks, small, from_client) in gaps {
            let gap = match small { 0 => ticks, 1 => ticks % (2 * SECOND), _ => 300 * SECOND - ticks % (2 * SECOND) };
            let created = gateway.events(Event::FlowCreated);
            gateway.model.advance(Ticks(gap));
            let outcome = if from_client {
                gateway.wan(&Draft::udp(client, listen).packet())
            } else {
                gateway.lan(&Draft::udp(target, client).packet())
            };
            let _ = outcome.departure();
            let is_new = gateway.events(Event::FlowCreated) != created;
            prop_assert!(!is_new || gap > 299 * SECOND, "ended after {gap} ticks");
            prop_assert!(is_new || gap <= 300 * SECOND, "lived for {gap} ticks");
        }
    }
}

/// Counters do not wrap at 2^32.
#[test]
fn more_than_four_gigabytes_are_counted() {
    let world = World::v4();
    let rule = Forward::new(Protocol::Tcp, 80, at(world.target, 8080));
    let mut gateway = Gateway::new(&[rule]);
    let sent = Draft::tcp(at(world.client, 4), at(world.listen, 80), 0x18).payload(vec![1; 60_000]);
    let packet = sent.packet();
    let arrival = Arrival {
        segment_size: 1,
        ..gateway.arrival(WAN)
    };
    let one = packet.len() as u64 + 59_999 * 40;
    for _ in 0..3_000 {
        let _ = gateway
            .arrive(&arrival, ethernet(WAN_MAC, UPSTREAM_MAC, &packet))
            .departure();
    }
    let (_, counted) = gateway.books().counters[0];
    assert_eq!(counted.to_target.packets, 3_000 * 60_000);
    assert_eq!(counted.to_target.bytes, 3_000 * one);
    assert!(counted.to_target.bytes > u64::from(u32::MAX));
}
