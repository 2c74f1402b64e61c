//! What the sender of a packet is told that is dropped for want of room, or that could not leave: an ICMP error in the place of its
//! packet, and not too many of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{IpNumber, Ipv4Header, Ipv6Header};
use portfwd_common::{
    abi::{ERROR_BUDGETS, FlowDir, Limits, PoolRange, Protocol, Rate},
    datapath::{
        Arrival, DropReason, Event, Hook, PassReason,
        refusal::{ERROR_RATE, QUOTED_BYTES},
    },
    model::{
        frame::{Draft, Transport, error, ethernet, fragments, with_options},
        rules::{Forward, Source},
        world::{
            ARM_MAC, BACKEND_MAC, LAN_MAC, MTU, NARROW_MTU, UPSTREAM_MAC, WAN, WAN_MAC, WAN_TUNNEL,
            World, at,
        },
    },
};

use crate::gateway::{Gateway, Outcome, SECOND, hex};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
const SYN_ACK: u8 = 0x12;
const ROUTER_OPTIONS: u8 = 60;

/// The only port that stands for clients.
const RANGE: PoolRange = PoolRange {
    first: 3_000,
    last: 3_000,
};

fn forwards(world: &World) -> [Forward; 2] {
    [Protocol::Tcp, Protocol::Udp].map(|protocol| {
        Forward::new(protocol, 80, at(world.target, 8080))
            .from(Source::Snat(world.lan_address, RANGE))
    })
}

/// A gateway whose only port stands for a client of each protocol.
fn used_up(world: &World, hook: Hook) -> Gateway {
    used_up_by(world, hook, &forwards(world))
}

fn used_up_by(world: &World, hook: Hook, forwards: &[Forward]) -> Gateway {
    let mut gateway = Gateway::new(forwards).by(hook);
    for transport in [Transport::Tcp(SYN), Transport::Udp] {
        let sent = draft(transport, at(world.second_client, 9), at(world.listen, 80));
        let _ = gateway.wan(&sent.packet()).departure();
    }
    assert_eq!(gateway.flows(), 2);
    gateway
}

fn draft(transport: Transport, client: SocketAddr, listen: SocketAddr) -> Draft {
    Draft {
        transport,
        ..Draft::udp(client, listen)
    }
}

/// A datagram of a client that finds no port.
fn datagram(world: &World) -> Draft {
    Draft::udp(at(world.client, 40_000), at(world.listen, 80))
}

/// Has the kernel take addresses that begin like this one for clients.
fn route_to_wan(gateway: &mut Gateway, world: &World, network: IpAddr, length: u32) {
    let (_, _, wan) = world.routes()[0];
    gateway.model.maps.set_route(network, length, wan);
}

/// What an error says.
#[derive(Clone, Copy, Debug)]
enum Message {
    NoRoom,
    HopLimit,
    TooBig { mtu: u32 },
}

/// The packet that tells `client` that `quoted`, sent to `listen`, has not found room; made by etherparse.
fn told(listen: IpAddr, client: IpAddr, quoted: &[u8]) -> Vec<u8> {
    told_that(Message::NoRoom, listen, client, quoted)
}

/// The packet that tells `client` something about `quoted`, sent to `listen`; made by etherparse. Numbers from RFC 792, RFC 1191
/// and RFC 4443.
fn told_that(message: Message, listen: IpAddr, client: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let (kind, code, rest) = match (message, listen) {
        (Message::NoRoom, IpAddr::V4(_)) => (3, 1, 0),
        (Message::NoRoom, IpAddr::V6(_)) => (1, 3, 0),
        (Message::HopLimit, IpAddr::V4(_)) => (11, 0, 0),
        (Message::HopLimit, IpAddr::V6(_)) => (3, 0, 0),
        (Message::TooBig { mtu }, IpAddr::V4(_)) => (3, 4, mtu),
        (Message::TooBig { mtu }, IpAddr::V6(_)) => (2, 0, mtu),
    };
    let packet = error(listen, client, kind, code, rest.to_be_bytes(), quoted);
    // The frame builder marks its own headers; what the gateway composes has plain ones.
    match (listen, client) {
        (IpAddr::V4(listen), IpAddr::V4(client)) => {
            let message = &packet[20..];
            let (source, destination) = (listen.octets(), client.octets());
            let len = message.len() as u16;
            let mut header = Ipv4Header::new(len, 64, IpNumber::ICMP, source, destination).unwrap();
            header.dscp = 48.try_into().unwrap();
            header.dont_fragment = true;
            header.header_checksum = header.calc_header_checksum();
            [&header.to_bytes()[..], message].concat()
        }
        (IpAddr::V6(listen), IpAddr::V6(client)) => {
            let message = &packet[40..];
            let header = Ipv6Header {
                payload_length: message.len() as u16,
                next_header: IpNumber::IPV6_ICMP,
                hop_limit: 64,
                source: listen.octets(),
                destination: client.octets(),
                ..Ipv6Header::default()
            };
            [&header.to_bytes()[..], message].concat()
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            panic!("{listen} and {client} are of two families")
        }
    }
}

const fn header_len(world: &World) -> usize {
    if world.is_v4() { 20 } else { 40 }
}

/// RFC 6888 REQ-11, RFC 5508 REQ-8: the host is unreachable, from the address that was dialled, with the client's own packet.
#[test]
fn who_finds_no_port_is_told_by_an_error_about_its_own_packet() {
    for world in World::both() {
        for hook in [Hook::Tc, Hook::TcSlow] {
            for transport in [
                Transport::Tcp(SYN),
                Transport::Tcp(ACK),
                Transport::Udp,
                Transport::UdpWithoutSum,
            ] {
                let mut gateway = used_up(&world, hook);
                let before = gateway.books();
                let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
                let sent = draft(transport, client, listen).payload([7; 600]).packet();
                let outcome = gateway.wan(&sent);
                outcome.refused(DropReason::NoPort);
                let quoted = &sent[..header_len(&world) + 8];
                let expected = told(world.listen, world.client, quoted);
                let frame = ethernet(UPSTREAM_MAC, WAN_MAC, &expected);
                assert_eq!(hex(&outcome.after), hex(&frame));
                assert_eq!(gateway.books(), before, "no flow comes, none goes");
                assert_eq!(
                    (
                        gateway.drops(DropReason::NoPort),
                        gateway.events(Event::ErrorSent)
                    ),
                    (1, 1)
                );
            }
        }
    }
}

/// ATK-15: somebody who sends in another's name has the gateway send no more than what it got and two headers.
#[test]
fn no_error_is_longer_than_what_it_is_about_and_its_own_headers() {
    for world in World::both() {
        for draft in [
            datagram(&world).payload([]),
            datagram(&world).payload([7; 1_400]),
            Draft::tcp(at(world.client, 7), at(world.listen, 80), SYN),
        ] {
            let mut gateway = used_up(&world, Hook::Tc);
            let outcome = gateway.wan(&draft.packet());
            outcome.refused(DropReason::NoPort);
            let grown = outcome.after.len() as i64 - outcome.before.len() as i64;
            assert!(grown <= (header_len(&world) + 8) as i64, "{grown} bytes");
        }
    }
}

#[test]
fn a_full_table_is_told_to_the_client_and_not_to_the_target() {
    for world in World::both() {
        // Which of the two an answer belongs to, only an entry can tell.
        let forwards = [53, 54].map(|port| Forward::new(Protocol::Udp, port, at(world.target, 53)));
        let mut gateway = Gateway::with_room(&forwards, 0);
        let (client, listen) = (at(world.client, 9), at(world.listen, 53));
        let sent = Draft::udp(client, listen).packet();
        let _ = gateway.wan(&sent).departure();
        let outcome = gateway.wan(&sent);
        outcome.refused(DropReason::TableFull);
        let expected = told(world.listen, world.client, &sent[..header_len(&world) + 8]);
        assert_eq!(
            hex(&outcome.after),
            hex(&ethernet(UPSTREAM_MAC, WAN_MAC, &expected))
        );
        let answer = Draft::udp(at(world.target, 53), client).packet();
        gateway.lan(&answer).dropped(DropReason::TableFull);
        assert_eq!(gateway.events(Event::ErrorSent), 1);
    }
}

/// The masqueraded connection that the table has no room for, whose SYN is the packet.
#[test]
fn a_hidden_client_is_told_of_a_full_table_with_its_first_packet() {
    for world in World::both() {
        let forward = Forward::new(Protocol::Tcp, 80, at(world.target, 8080));
        let mut gateway = Gateway::with_room(&[forward.from(Source::Masquerade)], 0);
        let syn = Draft::tcp(at(world.client, 9), at(world.listen, 80), SYN);
        gateway.wan(&syn.packet()).refused(DropReason::TableFull);
    }
}

/// The error leaves as the packet came: by the same interface, to the station that sent the frame, or without link header.
#[test]
fn an_error_goes_back_where_the_packet_came_from() {
    for world in World::both() {
        let sent = datagram(&world).packet();
        let quoted = &sent[..header_len(&world) + 8];
        let expected = told(world.listen, world.client, quoted);
        let mut gateway = used_up(&world, Hook::Tc);
        let outcome = gateway.tunnel(WAN_TUNNEL, &sent);
        outcome.refused(DropReason::NoPort);
        assert_eq!(hex(&outcome.after), hex(&expected));

        // A client on the LAN dials the WAN's address.
        let sent = Draft::udp(at(world.second_target, 5), at(world.listen, 80)).packet();
        let outcome = gateway.lan(&sent);
        outcome.refused(DropReason::NoPort);
        let expected = told(
            world.listen,
            world.second_target,
            &sent[..header_len(&world) + 8],
        );
        assert_eq!(
            hex(&outcome.after),
            hex(&ethernet(BACKEND_MAC, LAN_MAC, &expected))
        );

        // With one arm, by that.
        let forward = Forward::new(Protocol::Udp, 80, at(world.arm_target, 80));
        let forward = forward.from(Source::Snat(world.arm_listen, RANGE));
        let mut gateway = Gateway::new(&[forward]);
        let first = Draft::udp(at(world.arm_neighbour, 5), at(world.arm_listen, 80));
        let _ = gateway.arm(&first.packet()).departure();
        let second = Draft::udp(at(world.arm_neighbour, 6), at(world.arm_listen, 80)).packet();
        let outcome = gateway.arm(&second);
        outcome.refused(DropReason::NoPort);
        let quoted = &second[..header_len(&world) + 8];
        let expected = told(world.arm_listen, world.arm_neighbour, quoted);
        assert_eq!(
            hex(&outcome.after),
            hex(&ethernet(BACKEND_MAC, ARM_MAC, &expected))
        );
    }
}

/// Options and extension headers are quoted, as far as there is room: the client finds its socket by what is behind them.
#[test]
fn what_is_in_front_of_the_transport_header_is_quoted_with_it() {
    let world = World::v4();
    for options in (0..=40).step_by(4) {
        let mut gateway = used_up(&world, Hook::Tc);
        let sent = Draft {
            ip_options: vec![1; options],
            ..datagram(&world)
        };
        let sent = sent.packet();
        let outcome = gateway.wan(&sent);
        outcome.refused(DropReason::NoPort);
        let expected = told(world.listen, world.client, &sent[..20 + options + 8]);
        assert_eq!(
            hex(&outcome.after),
            hex(&ethernet(UPSTREAM_MAC, WAN_MAC, &expected))
        );
    }
    let world = World::v6();
    let mut gateway = used_up(&world, Hook::Tc);
    let plain = datagram(&world).packet();
    let with_one = with_options(&plain, ROUTER_OPTIONS);
    // Longer than what is quoted: 248 bytes more of padding.
    let mut long = plain[..40].to_vec();
    let next = std::mem::replace(&mut long[6], ROUTER_OPTIONS);
    let len = (plain.len() - 40 + 256) as u16;
    long[4..6].copy_from_slice(&len.to_be_bytes());
    long.extend([next, 31, 1, 252]);
    long.extend([0; 252]);
    long.extend(&plain[40..]);
    for (sent, quoted) in [(&with_one, 40 + 8 + 8), (&long, QUOTED_BYTES)] {
        let outcome = gateway.wan(sent);
        outcome.refused(DropReason::NoPort);
        let expected = told(world.listen, world.client, &sent[..quoted]);
        assert_eq!(
            hex(&outcome.after),
            hex(&ethernet(UPSTREAM_MAC, WAN_MAC, &expected))
        );
    }
}

/// RFC 1812 section 4.3.2.7: about the first fragment only.
#[test]
fn of_a_datagram_in_fragments_only_the_first_is_told_of() {
    for world in World::both() {
        let mut gateway = used_up(&world, Hook::Tc);
        let whole = datagram(&world).payload([7; 64]).packet();
        let pieces = fragments(&whole, 77, 32, 0);
        let outcome = gateway.wan(&pieces[0]);
        outcome.refused(DropReason::NoPort);
        let headers = pieces[0].len() - 32;
        let expected = told(world.listen, world.client, &pieces[0][..headers + 8]);
        assert_eq!(
            hex(&outcome.after),
            hex(&ethernet(UPSTREAM_MAC, WAN_MAC, &expected))
        );
        for piece in &pieces[1..] {
            gateway.wan(piece).dropped(DropReason::FragmentRefused);
        }
        assert_eq!(gateway.events(Event::ErrorSent), 1);
    }
}

/// RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e): whose source is nobody, or many, is told nothing.
#[test]
fn nothing_is_told_to_many_or_to_nobody() {
    for world in World::both() {
        let dropped = |outcome: Outcome, gateway: &Gateway| {
            outcome.dropped(DropReason::NoPort);
            assert_eq!(outcome.before, outcome.after);
            assert_eq!(gateway.events(Event::ErrorSent), 0);
        };
        let mut gateway = used_up(&world, Hook::Tc);
        let sent = datagram(&world);
        let group = [3, 0, 0, 0, 0, 1];
        let outcome = gateway.frame(WAN, ethernet(WAN_MAC, group, &sent.packet()));
        dropped(outcome, &gateway);
        // From an address of the gateway itself.
        let own = at(world.lan_address, 40_000);
        route_to_wan(&mut gateway, &world, own.ip(), world.bits());
        let outcome = gateway.wan(&sent.between(own, sent.destination).packet());
        dropped(outcome, &gateway);
        // Several datagrams in one.
        let arrival = Arrival {
            segment_size: 100,
            ..gateway.arrival(WAN)
        };
        let packet = sent.clone().payload([7; 200]).packet();
        let outcome = gateway.arrive(&arrival, ethernet(WAN_MAC, UPSTREAM_MAC, &packet));
        dropped(outcome, &gateway);
        if let IpAddr::V4(listen) = world.listen {
            let [a, b, c, _] = listen.octets();
            let broadcast = at(Ipv4Addr::new(a, b, c, 255).into(), 40_000);
            route_to_wan(&mut gateway, &world, broadcast.ip(), world.bits());
            let outcome = gateway.wan(&sent.between(broadcast, sent.destination).packet());
            dropped(outcome, &gateway);
        }
        let nobody: IpAddr = match world.listen {
            IpAddr::V4(_) => Ipv4Addr::new(224, 0, 0, 1).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).into(),
        };
        let multicast = sent.between(at(nobody, 40_000), sent.destination);
        gateway
            .wan(&multicast.packet())
            .passed(PassReason::NotUnicast);
        // An error about an error, and an answer to a reset, there is none either.
        let quoted = Draft::udp(sent.destination, sent.source).packet();
        let about = error(world.client, world.listen, 3, 3, [0; 4], &quoted);
        let code = if world.is_v4() {
            about
        } else {
            error(world.client, world.listen, 1, 4, [0; 4], &quoted)
        };
        gateway.wan(&code).passed(PassReason::NoQuotedFlow);
        let reset = draft(Transport::Tcp(RST), sent.source, sent.destination);
        gateway.wan(&reset.packet()).passed(PassReason::NoFlow);
        assert_eq!(gateway.events(Event::ErrorSent), 0);
    }
}

/// RFC 1812 section 4.3.2.8: as many at once as the burst, and then as many as the rate.
#[test]
fn a_client_gets_no_more_errors_than_the_rate_allows_and_others_theirs() {
    for world in World::both() {
        let mut gateway = used_up(&world, Hook::Tc);
        let sent = datagram(&world).packet();
        let errors = |gateway: &Gateway| gateway.events(Event::ErrorSent);
        for _ in 0..1_000 {
            let _ = gateway.wan(&sent);
        }
        let burst = u64::from(ERROR_RATE.burst);
        assert_eq!(errors(&gateway), burst);
        // Over ten seconds, a thousand in each.
        for _ in 0..10 * SECOND {
            gateway.model.advance(portfwd_common::abi::Ticks(1));
            for _ in 0..4 {
                let _ = gateway.wan(&sent);
            }
        }
        let more = u64::from(10 * ERROR_RATE.flows);
        assert_eq!(errors(&gateway), burst + more);
        assert_eq!(
            gateway.drops(DropReason::NoPort),
            1_000 + 40 * u64::from(SECOND)
        );
        // Somebody else of another network.
        let other = Draft::udp(at(world.upstream, 1), at(world.listen, 80)).packet();
        gateway.wan(&other).refused(DropReason::NoPort);
        gateway.wan(&sent).dropped(DropReason::NoPort);
    }
}

/// There are 256 words for all clients, dealt out evenly by a secret; over IPv6 a client is a network of 64 bits.
#[test]
fn clients_share_a_bounded_number_of_errors_evenly() {
    const CLIENTS: u64 = 2_000;
    for world in World::both() {
        let mut gateway = used_up(&world, Hook::Tc);
        route_to_wan(&mut gateway, &world, world.client, 0);
        let clients = (0..CLIENTS).map(|number| -> IpAddr {
            match world.client {
                IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ (number as u32) << 8).into(),
                IpAddr::V6(v6) => {
                    Ipv6Addr::from_bits(v6.to_bits() ^ u128::from(number) << 64).into()
                }
            }
        });
        for client in clients {
            for _ in 0..ERROR_RATE.burst {
                let sent = Draft::udp(at(client, 40_000), at(world.listen, 80));
                let _ = gateway.wan(&sent.packet());
            }
        }
        let most = u64::from(ERROR_BUDGETS * ERROR_RATE.burst);
        let told = gateway.events(Event::ErrorSent);
        assert!((most * 95 / 100..=most).contains(&told), "{told} of {most}");
    }
    let world = World::v6();
    let mut gateway = used_up(&world, Hook::Tc);
    for client in [world.client, world.second_client] {
        for _ in 0..ERROR_RATE.burst {
            let sent = Draft::udp(at(client, 40_000), at(world.listen, 80));
            let _ = gateway.wan(&sent.packet());
        }
        assert_eq!(
            gateway.events(Event::ErrorSent),
            u64::from(ERROR_RATE.burst)
        );
    }
}

/// XDP leaves what is to be told of to its companion, which counts the drop; without an error to be sent it drops by itself.
#[test]
fn xdp_leaves_to_tc_only_what_somebody_is_told_of() {
    for world in World::both() {
        let mut gateway = used_up(&world, Hook::Xdp);
        let sent = datagram(&world).packet();
        for _ in 0..ERROR_RATE.burst {
            gateway.hook = Hook::Xdp;
            gateway.wan(&sent).passed(PassReason::SlowPath);
            gateway.hook = Hook::TcSlow;
            gateway.wan(&sent).refused(DropReason::NoPort);
        }
        gateway.hook = Hook::Xdp;
        gateway.wan(&sent).dropped(DropReason::NoPort);
        assert_eq!(
            (
                gateway.drops(DropReason::NoPort),
                gateway.events(Event::ErrorSent)
            ),
            (u64::from(ERROR_RATE.burst) + 1, u64::from(ERROR_RATE.burst))
        );
    }
}

/// Between XDP and its companion, a refused flow takes of its rule's limits what it takes where one program does it all.
#[test]
fn two_hooks_take_no_more_of_a_limit_than_one() {
    let rate = Rate {
        flows: 1,
        seconds: 3_600,
        burst: 100,
    };
    let limits = Limits {
        rate,
        source_rate: rate,
        flows: 100,
        source_flows: 100,
        source_bits: 128,
    };
    for world in World::both() {
        let forwards = forwards(&world).map(|forward| forward.limited(limits));
        let mut one = used_up_by(&world, Hook::Tc, &forwards);
        let mut two = used_up_by(&world, Hook::Xdp, &forwards);
        let sent = datagram(&world).packet();
        for _ in 0..3 {
            one.wan(&sent).refused(DropReason::NoPort);
            two.hook = Hook::Xdp;
            two.wan(&sent).passed(PassReason::SlowPath);
            two.hook = Hook::TcSlow;
            two.wan(&sent).refused(DropReason::NoPort);
        }
        let usages = |gateway: &Gateway| {
            let usages = &gateway.model.maps.usages;
            (usages.rules(), usages.sources())
        };
        assert_eq!(usages(&one), usages(&two));
        assert_eq!(one.books().counters, two.books().counters);
    }
}

/// A connection that both sides know of, and the table has no room for: the client is told, and it is a soft error to it.
#[test]
fn a_connection_that_cannot_stay_is_told_of() {
    for world in World::both() {
        let forwards =
            [80, 81].map(|port| Forward::new(Protocol::Tcp, port, at(world.target, 8080)));
        let mut gateway = Gateway::with_room(&forwards, 0);
        let (client, listen, target) = (
            at(world.client, 9),
            at(world.listen, 80),
            at(world.target, 8080),
        );
        let syn = Draft::tcp(client, listen, SYN).numbers(100, 0);
        let _ = gateway.wan(&syn.packet()).departure();
        let answer = Draft::tcp(target, client, SYN_ACK).numbers(500, 101);
        let _ = gateway.lan(&answer.packet()).departure();
        let third = Draft::tcp(client, listen, ACK).numbers(101, 501);
        gateway.wan(&third.packet()).refused(DropReason::TableFull);
        let entries = gateway.books();
        let directions = entries.v4.len() + entries.v6.len();
        assert_eq!(directions, [FlowDir::Original, FlowDir::Reply].len());
    }
}

/// What has a packet that can leave not do so.
type Spoil = fn(Draft) -> Draft;

/// Both kinds of packets that cannot leave, and what their senders are told.
fn obstacles() -> [(Message, Spoil); 2] {
    [
        (Message::HopLimit, |draft| draft.hop_limit(1)),
        (Message::TooBig { mtu: MTU }, |draft| {
            draft.payload([7; MTU as usize])
        }),
    ]
}

/// Asks for an error in the place of a packet, about that packet, back where it came from.
#[track_caller]
fn expect_told(
    outcome: &Outcome,
    message: Message,
    sent: &[u8],
    [from, to]: [IpAddr; 2],
    macs: [[u8; 6]; 2],
) {
    outcome.refused(DropReason::NoWayOut);
    let headers = match from {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    };
    let expected = told_that(message, from, to, &sent[..headers + 8]);
    let [dst, src] = macs;
    assert_eq!(hex(&outcome.after), hex(&ethernet(dst, src, &expected)));
}

/// MTU-01, FIB-04: the kernel would take the packet, translated, for its own, so its sender would wait in vain: for a smaller MTU to
/// be told (RFC 1191, RFC 8201), or for a hop of its traceroute.
#[test]
fn who_is_hidden_and_who_answers_hear_of_what_cannot_leave() {
    for world in World::both() {
        for hook in [Hook::Tc, Hook::TcSlow] {
            for transport in [
                Transport::Tcp(SYN),
                Transport::Udp,
                Transport::UdpWithoutSum,
            ] {
                let forwards = [Protocol::Tcp, Protocol::Udp].map(|protocol| {
                    Forward::new(protocol, 80, at(world.target, 8080)).from(Source::Masquerade)
                });
                let mut gateway = Gateway::new(&forwards).by(hook);
                let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
                let (target, seen) = (at(world.target, 8080), at(world.lan_address, 40_000));
                let there = draft(transport, client, listen);
                // A first packet, which begins no flow, and one of a flow.
                for flows in [0, 1] {
                    for (message, spoil) in obstacles() {
                        let sent = spoil(there.clone()).packet();
                        let outcome = gateway.wan(&sent);
                        let (way, macs) = ([listen.ip(), client.ip()], [UPSTREAM_MAC, WAN_MAC]);
                        expect_told(&outcome, message, &sent, way, macs);
                        assert_eq!(gateway.flows(), flows);
                    }
                    let _ = gateway.wan(&there.packet()).departure();
                }
                let back = match transport {
                    Transport::Tcp(_) => draft(Transport::Tcp(SYN_ACK), target, seen),
                    Transport::Udp | Transport::UdpWithoutSum | Transport::Echo => {
                        draft(transport, target, seen)
                    }
                };
                for (message, spoil) in obstacles() {
                    let sent = spoil(back.clone()).packet();
                    let outcome = gateway.lan(&sent);
                    let (way, macs) = ([seen.ip(), target.ip()], [BACKEND_MAC, LAN_MAC]);
                    expect_told(&outcome, message, &sent, way, macs);
                }
                assert_eq!(
                    (
                        gateway.drops(DropReason::NoWayOut),
                        gateway.events(Event::ErrorSent)
                    ),
                    (6, 6)
                );
            }
        }
    }
}

/// What several segments were put together into, as TC has them, is too big if one of them is; the kernel quotes it as it is, too.
#[test]
fn segments_that_came_as_one_are_told_of_as_one() {
    for world in World::both() {
        let forward = Forward::new(Protocol::Tcp, 80, at(world.narrow_target, 8080));
        let mut gateway = Gateway::new(&[forward.from(Source::Masquerade)]).by(Hook::Tc);
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let _ = gateway
            .wan(&Draft::tcp(client, listen, SYN).packet())
            .departure();
        let arrival = Arrival {
            segment_size: 1_440,
            ..gateway.arrival(WAN)
        };
        let sent = Draft::tcp(client, listen, ACK).payload([7; 4_000]).packet();
        let outcome = gateway.arrive(&arrival, ethernet(WAN_MAC, UPSTREAM_MAC, &sent));
        let (way, macs) = ([listen.ip(), client.ip()], [UPSTREAM_MAC, WAN_MAC]);
        let message = Message::TooBig { mtu: NARROW_MTU };
        expect_told(&outcome, message, &sent, way, macs);
    }
}

/// RFC 1122 section 3.2.2: an ICMP error that cannot leave is dropped.
#[test]
fn nothing_is_told_of_errors_that_cannot_leave() {
    for world in World::both() {
        let forward = Forward::new(Protocol::Udp, 80, at(world.target, 8080));
        let mut gateway = Gateway::new(&[forward.from(Source::Masquerade)]).by(Hook::Tc);
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let (target, seen) = (at(world.target, 8080), at(world.lan_address, 40_000));
        let _ = gateway
            .wan(&Draft::udp(client, listen).packet())
            .departure();
        let quoted = Draft::udp(seen, target).packet();
        let (kind, code) = if world.is_v4() { (3, 3) } else { (1, 4) };
        let mut about = error(target.ip(), seen.ip(), kind, code, [0; 4], &quoted);
        end_hops(&mut about);
        gateway.lan(&about).dropped(DropReason::NoWayOut);
        assert_eq!(gateway.events(Event::ErrorSent), 0);
    }
}

/// Has a packet's TTL or hop limit end at the next hop.
fn end_hops(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        packet[8] = 1;
        let mut header = Ipv4Header::from_slice(packet).unwrap().0;
        header.header_checksum = header.calc_header_checksum();
        packet[..20].copy_from_slice(&header.to_bytes());
    } else {
        packet[7] = 1;
    }
}
