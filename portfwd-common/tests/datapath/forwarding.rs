//! Packets of clients reach targets, answers reach clients.

use portfwd_common::{
    abi::{PortCounters, Protocol, Traffic},
    datapath::{Event, Hook},
    model::{
        frame::{Draft, Transport},
        rules::Forward,
    },
};

use crate::gateway::Gateway;
use portfwd_common::model::world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;

/// A packet there and one back, each twice: the second time by the entry alone.
fn there_and_back(gateway: &mut Gateway, there: &[Draft], target: std::net::SocketAddr) {
    for draft in there {
        let client = draft.source;
        gateway
            .wan(&draft.packet())
            .reached_lan(&draft.between(client, target).hop().packet());
    }
    for draft in there {
        let (client, listen) = (draft.source, draft.destination);
        gateway
            .lan(&draft.between(target, client).packet())
            .reached_wan(&draft.between(listen, client).hop().packet());
    }
}

/// What a client says first, and then, by every transport.
fn talk(client: std::net::SocketAddr, listen: std::net::SocketAddr) -> [(Protocol, Vec<Draft>); 3] {
    let udp = Draft::udp(client, listen);
    let unsummed = Draft {
        transport: Transport::UdpWithoutSum,
        ..udp.clone()
    };
    [
        (
            Protocol::Tcp,
            vec![
                Draft::tcp(client, listen, SYN),
                Draft::tcp(client, listen, ACK).payload("GET / HTTP/1.0\r\n\r\n"),
            ],
        ),
        (Protocol::Udp, vec![udp.clone(), udp.payload("odd")]),
        (Protocol::Udp, vec![unsummed.clone(), unsummed]),
    ]
}

#[test]
fn every_form_of_rule_carries_packets_there_and_answers_back() {
    type Rule = fn(&World, Protocol) -> Forward;
    let rows: [(&str, Rule, u16, u16); 9] = [
        (
            "the port kept",
            |w, p| Forward::new(p, 80, at(w.target, 80)),
            80,
            80,
        ),
        (
            "the port changed",
            |w, p| Forward::new(p, 80, at(w.target, 8080)),
            80,
            8080,
        ),
        (
            "the lowest port to the highest",
            |w, p| Forward::new(p, 1, at(w.target, 65535)),
            1,
            65535,
        ),
        (
            "the first port of a range",
            |w, p| Forward::new(p, 1000, at(w.target, 2000)).to(1999),
            1000,
            2000,
        ),
        (
            "the last port of a range",
            |w, p| Forward::new(p, 1000, at(w.target, 2000)).to(1999),
            1999,
            2999,
        ),
        (
            "the last port of all",
            |w, p| Forward::new(p, 1, at(w.target, 1)).to(65535),
            65535,
            65535,
        ),
        (
            "a range that ends with the last port",
            |w, p| Forward::new(p, 100, at(w.target, 65436)).to(199),
            199,
            65535,
        ),
        (
            "one listen address",
            |w, p| Forward::new(p, 80, at(w.target, 80)).on(w.listen),
            80,
            80,
        ),
        (
            "a range on one listen address",
            |w, p| Forward::new(p, 80, at(w.target, 180)).to(89).on(w.listen),
            85,
            185,
        ),
    ];
    for world in World::both() {
        for (name, rule, listen, target) in rows {
            for hook in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
                for (protocol, drafts) in talk(at(world.client, 40_000), at(world.listen, listen)) {
                    println!(
                        "{name}: {listen} to {target}, {protocol:?} by {hook:?}, {}",
                        world.client
                    );
                    let mut gateway = Gateway::new(&[rule(&world, protocol)]).by(hook);
                    there_and_back(&mut gateway, &drafts, at(world.target, target));
                    assert_eq!(gateway.flows(), 1);
                }
            }
        }
    }
}

#[test]
fn every_listen_address_answers_for_itself() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 53, at(world.target, 53));
        let mut gateway = Gateway::new(&[rule]);
        for (client_port, listen) in [(1001, world.listen), (1002, world.second_listen)] {
            let draft = Draft::udp(at(world.client, client_port), at(listen, 53));
            there_and_back(&mut gateway, &[draft], at(world.target, 53));
        }
        assert_eq!(gateway.flows(), 2);
    }
}

#[test]
fn both_protocols_of_a_port_are_two_rules() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[
            Forward::new(Protocol::Tcp, 53, at(world.target, 1053)),
            Forward::new(Protocol::Udp, 53, at(world.second_target, 2053)),
        ]);
        let (client, listen) = (at(world.client, 5353), at(world.listen, 53));
        there_and_back(
            &mut gateway,
            &[Draft::tcp(client, listen, SYN)],
            at(world.target, 1053),
        );
        there_and_back(
            &mut gateway,
            &[Draft::udp(client, listen)],
            at(world.second_target, 2053),
        );
    }
}

#[test]
fn ip_options_of_every_length_stay_as_they_are() {
    let world = World::both()[0];
    for ihl in 5..=15_usize {
        for (protocol, drafts) in talk(at(world.client, 40_000), at(world.listen, 80)) {
            let rule = Forward::new(protocol, 80, at(world.target, 8080));
            let mut gateway = Gateway::new(&[rule]);
            let drafts: Vec<_> = drafts
                .into_iter()
                .map(|draft| Draft {
                    ip_options: ip_options(ihl),
                    ..draft
                })
                .collect();
            there_and_back(&mut gateway, &drafts, at(world.target, 8080));
        }
    }
}

/// Options that fill an IPv4 header to `ihl` words: router alert, record route, no-operation, end of list.
fn ip_options(ihl: usize) -> Vec<u8> {
    let room = (ihl - 5) * 4;
    let mut options = Vec::new();
    if room >= 4 {
        options.extend([0x94, 4, 0, 0]);
    }
    if room >= 12 {
        options.extend([0x07, 7, 4, 192, 0, 2, 33]);
    }
    while options.len() + 1 < room {
        options.push(1);
    }
    options.resize(room, 0);
    options
}

#[test]
fn tcp_options_of_every_length_stay_as_they_are() {
    for world in World::both() {
        for words in 0..=10 {
            let draft = Draft {
                tcp_options: vec![1; words * 4],
                ..Draft::tcp(at(world.client, 40_000), at(world.listen, 80), SYN)
            };
            let mut gateway =
                Gateway::new(&[Forward::new(Protocol::Tcp, 80, at(world.target, 8080))]);
            there_and_back(&mut gateway, &[draft], at(world.target, 8080));
        }
    }
}

#[test]
fn padding_behind_a_short_packet_is_neither_counted_nor_touched() {
    for world in World::both() {
        for padding in [1, 6, 18, 46] {
            let rule = Forward::new(Protocol::Tcp, 80, at(world.target, 8080));
            let mut gateway = Gateway::new(&[rule]);
            let draft = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), SYN);
            let tail: Vec<u8> = (0..padding).map(|n| n ^ 0xa5).collect();
            let padded = |draft: &Draft| [draft.packet(), tail.clone()].concat();
            gateway.wan(&padded(&draft)).reached_lan(&padded(
                &draft.between(draft.source, at(world.target, 8080)).hop(),
            ));
            assert_eq!(
                gateway.books().counters[0].1.to_target.bytes,
                draft.packet().len() as u64
            );
        }
    }
}

#[test]
fn datagrams_of_every_small_size_and_the_largest_are_carried() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 80, at(world.target, 8080));
        let mut gateway = Gateway::new(&[rule]);
        for size in (0..=64).chain([1_440, 1_452]) {
            let payload: Vec<u8> = (0..size).map(|n| (n * 7) as u8).collect();
            let draft = Draft::udp(at(world.client, 40_000), at(world.listen, 80)).payload(payload);
            there_and_back(&mut gateway, &[draft], at(world.target, 8080));
        }
    }
}

#[test]
fn a_datagram_shorter_than_its_packet_keeps_what_follows_it() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 80, at(world.target, 8080));
        let mut gateway = Gateway::new(&[rule]);
        let draft = Draft::udp(at(world.client, 40_000), at(world.listen, 80));
        let lengthen = |draft: &Draft| {
            let mut packet = [draft.packet(), b"trailer!".to_vec()].concat();
            relength(&mut packet);
            packet
        };
        gateway.wan(&lengthen(&draft)).reached_lan(&lengthen(
            &draft.between(draft.source, at(world.target, 8080)).hop(),
        ));
    }
}

/// Makes the IP header's length that of the packet.
fn relength(packet: &mut [u8]) {
    let len = packet.len() as u16;
    if packet[0] >> 4 == 4 {
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[10..12].fill(0);
        let header = etherparse::Ipv4Header::from_slice(packet).unwrap().0;
        packet[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    } else {
        packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
    }
}

#[test]
fn packets_and_bytes_are_counted_per_port_and_direction() {
    for world in World::both() {
        let rules = [
            Forward::new(Protocol::Udp, 10, at(world.target, 10)),
            Forward::new(Protocol::Udp, 100, at(world.target, 100)).to(109),
        ];
        let mut gateway = Gateway::new(&rules);
        let client = at(world.client, 40_000);
        let mut expected = [PortCounters::default(); 11];
        for port in [10, 103, 109, 103, 103] {
            let listen = at(world.listen, port);
            let there = Draft::udp(client, listen).payload(vec![0; usize::from(port)]);
            let back = there
                .between(at(world.target, port), client)
                .payload("pong");
            gateway.wan(&there.packet());
            gateway.lan(&back.packet());
            gateway.lan(&back.packet());
            let element = if port == 10 {
                0
            } else {
                1 + usize::from(port - 100)
            };
            let counters = &mut expected[element];
            let bytes = |draft: &Draft, packets| Traffic {
                packets,
                bytes: packets * draft.packet().len() as u64,
            };
            counters.to_target.add(bytes(&there, 1));
            counters.to_client.add(bytes(&back, 2));
        }
        for (element, counters) in (0..).zip(expected) {
            let got = gateway
                .model
                .maps
                .counters()
                .get(&element)
                .copied()
                .unwrap_or_default();
            assert_eq!(got, counters, "element {element}");
        }
        assert_eq!(gateway.events(Event::FlowCreated), 3);
    }
}

/// Linux counts no segments of what comes from outside: packets of virtio cards and taps have the size of their segments alone.
#[test]
fn a_super_packet_counts_as_the_segments_it_stands_for() {
    for (payload, segments) in [
        (0, 1),
        (1, 1),
        (1_400, 1),
        (1_401, 2),
        (4_000, 3),
        (4_200, 3),
        (60_000, 43),
    ] {
        expect_super_packet_to_count(payload, segments);
    }
}

/// Of a payload in segments of 1,400 bytes.
fn expect_super_packet_to_count(payload: usize, segments: u64) {
    for world in World::both() {
        let mut gateway = Gateway::new(&[Forward::new(Protocol::Tcp, 80, at(world.target, 80))]);
        let draft = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), ACK)
            .payload(vec![7; payload]);
        let frame = portfwd_common::model::frame::ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet());
        let arrival = portfwd_common::datapath::Arrival {
            segment_size: 1_400,
            ..gateway.arrival(WAN)
        };
        gateway.arrive(&arrival, frame).reached_lan(
            &draft
                .between(draft.source, at(world.target, 80))
                .hop()
                .packet(),
        );
        let counted = gateway.books().counters[0].1.to_target;
        assert_eq!(counted.packets, segments, "{payload} bytes");
        let headers = segments * draft.headers_len() as u64;
        assert_eq!(counted.bytes, headers + payload as u64, "{payload} bytes");
    }
}

#[test]
fn a_whole_connection_goes_through_xdp_and_tc_together() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[Forward::new(Protocol::Tcp, 80, at(world.target, 8080))]);
        let (client, listen, target) = (
            at(world.client, 40_000),
            at(world.listen, 80),
            at(world.target, 8080),
        );
        for (flags_there, flags_back) in [
            (SYN, SYN_ACK),
            (ACK, ACK),
            (0x18, 0x18),
            (0x11, 0x11),
            (ACK, ACK),
        ] {
            gateway.hook = Hook::Xdp;
            gateway
                .wan(&Draft::tcp(client, listen, flags_there).packet())
                .reached_lan(&Draft::tcp(client, target, flags_there).hop().packet());
            gateway.hook = Hook::Tc;
            gateway
                .lan(&Draft::tcp(target, client, flags_back).packet())
                .reached_wan(&Draft::tcp(listen, client, flags_back).hop().packet());
        }
        assert_eq!(gateway.flows(), 1);
    }
}
