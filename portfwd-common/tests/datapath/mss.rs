//! MSS clamping: neither side is told of segments that do not fit through the gateway.

use std::net::IpAddr;

use portfwd_common::model::effort::cases;
use portfwd_common::{
    abi::{Config, Interface, Protocol},
    datapath::{Event, Hook, Route},
    model::{
        frame::{Draft, Transport, ethernet, fragments, mac_words},
        rules::Forward,
        world::{
            BACKEND_MAC, LAN, LAN_MAC, MTU, NARROW, NARROW_MAC, NARROW_MTU, SLOW_MTU, UPSTREAM_MAC,
            WAN, WAN_TUNNEL, World, at, interfaces,
        },
    },
    net::headers::Hop,
};
use proptest::prelude::*;

use crate::gateway::{Gateway, Outcome, hex};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = SYN | ACK;

/// Where the segment size is that a receiver goes by, in the options of a SYN: the last one before the end of what makes sense.
pub fn size_in(options: &[u8]) -> Option<usize> {
    let (mut at, mut found) = (0, None);
    loop {
        let rest = &options[at..];
        at += match rest {
            [1, ..] => 1,
            [] | [0, ..] | [_] | [_, 0 | 1, ..] => return found,
            [_, length, ..] if usize::from(*length) > rest.len() => return found,
            [2, 4, ..] => {
                found = Some(at + 2);
                4
            }
            [_, length, ..] => usize::from(*length),
        };
    }
}

/// The same segment as it leaves where no more than `largest` bytes fit.
pub fn clamped(mut draft: Draft, largest: u16) -> Draft {
    if let Transport::Tcp(flags) = draft.transport
        && flags & SYN != 0
        && let Some(at) = size_in(&draft.tcp_options)
    {
        let value = &mut draft.tcp_options[at..at + 2];
        let said = u16::from_be_bytes([value[0], value[1]]);
        value.copy_from_slice(&said.min(largest).to_be_bytes());
    }
    draft
}

/// What an MTU leaves of a segment.
pub fn largest(world: &World, mtu: u32) -> u16 {
    (mtu - if world.is_v4() { 40 } else { 60 }) as u16
}

/// It left as this segment, whatever its link header.
#[track_caller]
fn left_as(outcome: &Outcome, draft: Draft) {
    let draft = match outcome.departure().hop() {
        Hop::Taken => draft.hop(),
        Hop::LeftToStack => draft,
    };
    let packet = draft.packet();
    let link = outcome.after.len() - packet.len();
    assert!(link == 0 || link == 14, "{link} bytes before the packet");
    assert_eq!(hex(&outcome.after[link..]), hex(&packet));
}

fn rule(target: IpAddr) -> Forward {
    Forward::new(Protocol::Tcp, 80, at(target, 8080))
}

fn syn(world: &World, options: &[u8]) -> Draft {
    Draft {
        tcp_options: options.to_vec(),
        ..Draft::tcp(at(world.client, 40_000), at(world.listen, 80), SYN)
    }
}

/// An option that says a size.
fn size(value: u16) -> [u8; 4] {
    let [high, low] = value.to_be_bytes();
    [2, 4, high, low]
}

/// A SYN goes through and its answer comes back, both with these options; both leave with no more than `largest`. Returns what
/// became of both.
#[track_caller]
fn handshake(
    gateway: &mut Gateway,
    world: &World,
    target: IpAddr,
    options: &[u8],
    largest: u16,
) -> [Outcome; 2] {
    let sent = syn(world, options);
    let target = at(target, 8080);
    let outcome = gateway.wan(&sent.packet());
    left_as(
        &outcome,
        clamped(sent.between(sent.source, target), largest),
    );
    let answer = Draft {
        transport: Transport::Tcp(SYN_ACK),
        ..sent
            .between(target, sent.source)
            .numbers(77, sent.sequence.wrapping_add(1))
    };
    let answered = gateway.lan(&answer.packet());
    left_as(
        &answered,
        clamped(answer.between(sent.destination, sent.source), largest),
    );
    [outcome, answered]
}

/// At an odd offset the bytes of the size are in two words of the checksum.
#[test]
fn a_size_at_any_offset_is_lowered_to_what_fits_and_never_raised() {
    for world in World::both() {
        let fits = largest(&world, MTU);
        let values = [
            0,
            1,
            0x00ff,
            536,
            0x0500,
            fits - 1,
            fits,
            fits + 1,
            0x05ff,
            0x0600,
            8_960,
            0xff00,
            0xffff,
        ];
        for hook in [Hook::Xdp, Hook::Tc] {
            for before in 0..=36_usize {
                for value in values {
                    let mut options = [vec![1; before], size(value).to_vec()].concat();
                    options.resize(options.len().next_multiple_of(4), 1);
                    let mut gateway = Gateway::new(&[rule(world.target)]).by(hook);
                    handshake(&mut gateway, &world, world.target, &options, fits);
                    let lowered = if value > fits { 2 } else { 0 };
                    assert_eq!(gateway.events(Event::MssClamped), lowered);
                }
            }
        }
    }
}

#[test]
fn a_syn_without_size_is_left_as_it_is() {
    for world in World::both() {
        for options in [
            &[][..],
            &[1, 3, 3, 7],
            &[4, 2, 0, 0],
            &[2, 3, 255, 1],
            &[2, 0, 255, 255],
        ] {
            let mut gateway = Gateway::new(&[rule(world.target)]);
            handshake(&mut gateway, &world, world.target, options, u16::MAX);
            assert_eq!(gateway.events(Event::MssClamped), 0);
        }
    }
}

/// A piece of the options of a SYN: what stacks send, what nobody sends, and every length that an option must not have.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => any::<u16>().prop_map(|value| size(value).to_vec()),
        1 => (1400..1500_u16).prop_map(|value| size(value).to_vec()),
        3 => prop::collection::vec(Just(1), 1..4),
        1 => any::<u8>().prop_map(|scale| vec![3, 3, scale]),
        1 => Just(vec![4, 2]),
        1 => prop::collection::vec(any::<u8>(), 8).prop_map(|stamps| [vec![8, 10], stamps].concat()),
        1 => (any::<u8>(), 2..12_usize, any::<u8>())
            .prop_map(|(kind, length, byte)| {
                let mut option = vec![byte; length];
                (option[0], option[1]) = (kind, length as u8);
                option
            }),
        1 => prop::collection::vec(any::<u8>(), 1..6),
        1 => (0..=255_u8).prop_map(|length| vec![2, length, 255, 255]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(10_000)))]
    #[test]
    fn any_mix_of_options_leaves_as_a_plain_walk_over_them_says(
        v6: bool, xdp: bool, pieces in prop::collection::vec(any_option(), 0..10), mtu in 1_280..9_000_u32,
    ) {
        let world = World::both()[usize::from(v6)];
        let mut options = pieces.concat();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
        let mut gateway = Gateway::new(&[rule(world.target)]).by(if xdp { Hook::Xdp } else { Hook::Tc });
        set_wan_mtu(&mut gateway, &world, mtu);
        let _ = handshake(&mut gateway, &world, world.target, &options, largest(&world, mtu.min(MTU)));
    }
}

/// Gives the WAN another MTU, and its routes with it.
fn set_wan_mtu(gateway: &mut Gateway, world: &World, mtu: u32) {
    for interface in interfaces() {
        if interface.ifindex == WAN {
            gateway
                .model
                .maps
                .set_interface(Interface { mtu, ..interface });
        }
    }
    let via = Route::Via {
        ifindex: WAN,
        next_hop: mac_words(UPSTREAM_MAC),
        mtu,
    };
    let network = World::network(world.client);
    gateway
        .model
        .maps
        .set_route(network, world.network_bits(), via);
}

#[test]
fn the_smaller_mtu_of_both_sides_counts_in_either_direction() {
    type Target = fn(&World) -> IpAddr;
    let rows: [(&str, Target, u32, [u32; 2]); 6] = [
        ("the same on both sides", |w| w.target, LAN, [MTU, MTU]),
        (
            "a narrow LAN",
            |w| w.narrow_target,
            NARROW,
            [NARROW_MTU, NARROW_MTU],
        ),
        // Its answer comes in by the interface, which says nothing of the route.
        ("a narrow route", |w| w.slow_target, LAN, [SLOW_MTU, MTU]),
        (
            "a next hop that is not resolved",
            |w| w.silent_target,
            LAN,
            [MTU, MTU],
        ),
        (
            "an interface without program",
            |w| w.far_target,
            LAN,
            [MTU, MTU],
        ),
        ("no route at all", |w| w.lost_target, LAN, [MTU, MTU]),
    ];
    for world in World::both() {
        for (what, target, ifindex, [there, back]) in rows {
            println!("{what}");
            let target = target(&world);
            let mut gateway = Gateway::new(&[rule(target)]);
            let sent = syn(&world, &size(0xffff));
            let answer = Draft {
                transport: Transport::Tcp(SYN_ACK),
                ..sent
                    .between(at(target, 8080), sent.source)
                    .numbers(77, sent.sequence.wrapping_add(1))
            };
            // Sent again, it is a packet of a flow that there is.
            for _ in 0..2 {
                let there = clamped(
                    sent.between(sent.source, at(target, 8080)),
                    largest(&world, there),
                );
                left_as(&gateway.wan(&sent.packet()), there);
            }
            let frame = lan_frame(ifindex, &answer);
            let back = clamped(
                answer.between(sent.destination, sent.source),
                largest(&world, back),
            );
            left_as(&gateway.frame(ifindex, frame), back);
        }
    }
}

/// The answer of a backend behind an interface.
fn lan_frame(ifindex: u32, answer: &Draft) -> Vec<u8> {
    let own = if ifindex == NARROW {
        NARROW_MAC
    } else {
        LAN_MAC
    };
    ethernet(own, BACKEND_MAC, &answer.packet())
}

/// What a target that answers a SYN which nobody here has seen says, and its answer to one that has no entry.
#[test]
fn an_answer_without_flow_is_lowered_too() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.target)]);
        let answer = Draft {
            tcp_options: size(9_000).to_vec(),
            ..Draft::tcp(at(world.target, 8080), at(world.client, 40_000), SYN_ACK)
        };
        let outcome = gateway.lan(&answer.packet());
        let translated = answer.between(at(world.listen, 80), answer.destination);
        left_as(&outcome, clamped(translated, largest(&world, MTU)));
    }
}

#[test]
fn the_interface_that_the_answer_leaves_by_counts() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.target)]);
        let client = at(world.tunnel_client, 40_000);
        let sent = Draft {
            tcp_options: size(1_460).to_vec(),
            ..Draft::tcp(client, at(world.listen, 80), SYN)
        };
        let outcome = gateway.tunnel(WAN_TUNNEL, &sent.packet());
        let there = sent.between(client, at(world.target, 8080));
        left_as(&outcome, clamped(there, largest(&world, NARROW_MTU)));
    }
}

#[test]
fn who_does_not_want_it_has_sizes_left_as_they_are() {
    for world in World::both() {
        let mut by_rule = Gateway::new(&[rule(world.target).keeping_mss()]);
        let mut by_gateway = Gateway::new(&[rule(world.target)]);
        by_gateway.model.maps.config.as_mut().unwrap().flags = Config::KEEPS_MSS;
        for gateway in [&mut by_rule, &mut by_gateway] {
            handshake(gateway, &world, world.target, &size(0xffff), u16::MAX);
            assert_eq!(gateway.events(Event::MssClamped), 0);
        }
    }
}

/// What is known of one packet's rule says nothing of the next one's.
#[test]
fn every_packet_goes_by_its_own_rule() {
    for world in World::both() {
        let rules = [
            rule(world.target).keeping_mss(),
            Forward::new(Protocol::Tcp, 81, at(world.target, 8081)),
        ];
        let mut gateway = Gateway::new(&rules);
        let connections = [(80, 8080, u16::MAX), (81, 8081, largest(&world, MTU))];
        let sent = syn(&world, &size(0xffff));
        // Both SYNs, then both answers.
        for (listen, target, largest) in connections {
            let sent = sent.between(sent.source, at(world.listen, listen));
            let there = sent.between(sent.source, at(world.target, target));
            left_as(&gateway.wan(&sent.packet()), clamped(there, largest));
        }
        for (listen, target, largest) in connections {
            let answer = Draft {
                transport: Transport::Tcp(SYN_ACK),
                ..sent
                    .between(at(world.target, target), sent.source)
                    .numbers(77, sent.sequence.wrapping_add(1))
            };
            let back = answer.between(at(world.listen, listen), sent.source);
            left_as(&gateway.lan(&answer.packet()), clamped(back, largest));
        }
        assert_eq!(gateway.events(Event::MssClamped), 2);
    }
}

/// Bytes that would be a size in a SYN are none in any other segment.
#[test]
fn segments_that_open_nothing_are_left_as_they_are() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.target)]);
        handshake(
            &mut gateway,
            &world,
            world.target,
            &size(0xffff),
            largest(&world, MTU),
        );
        for flags in [ACK, 0x18, 0x11, 0x14] {
            let data = Draft {
                transport: Transport::Tcp(flags),
                ..syn(&world, &size(0xffff)).numbers(0x1234_5679, 78)
            };
            let there = data.between(data.source, at(world.target, 8080));
            left_as(&gateway.wan(&data.packet()), there);
        }
    }
}

/// No header fits, let alone a segment: a size of nothing would help nobody.
#[test]
fn an_mtu_without_room_for_a_segment_lowers_nothing() {
    for world in World::both() {
        let headers = if world.is_v4() { 40 } else { 60 };
        for (mtu, largest) in [(1, u16::MAX), (headers, u16::MAX), (headers + 1, 1)] {
            let mut gateway = Gateway::new(&[rule(world.target)]);
            set_wan_mtu(&mut gateway, &world, mtu);
            let sent = syn(&world, &size(1_000));
            let there = sent.between(sent.source, at(world.target, 8080));
            left_as(&gateway.wan(&sent.packet()), clamped(there, largest));
        }
    }
}

/// A SYN with data may come in fragments; its options are in the first.
#[test]
fn a_syn_in_fragments_is_lowered_in_its_first() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[rule(world.target)]);
        let sent = Draft {
            dont_fragment: false,
            ..syn(&world, &size(0xffff)).payload([7; 600])
        };
        let there = sent.between(sent.source, at(world.target, 8080)).hop();
        let expected = clamped(there, largest(&world, MTU)).packet();
        let pieces = fragments(&sent.packet(), 9, 400, 0);
        for (piece, expected) in pieces.iter().zip(fragments(&expected, 9, 400, 0)) {
            gateway.wan(piece).reached_lan(&expected);
        }
        assert_eq!(gateway.events(Event::MssClamped), 1);
    }
}
