//! Echo of ICMP and ICMPv6 (RFC 5508 section 3): an identifier in the place of a port, and a header sum without pseudo-header over
//! IPv4, with one over IPv6.

use portfwd_common::{
    abi::Protocol,
    datapath::{Event, Hook, PassReason, conntrack::ECHO_SECONDS},
    model::{
        frame::{Draft, error, fragments},
        rules::{Forward, Source},
        world::{World, at},
    },
};

use crate::gateway::{Gateway, Outcome, SECOND};

const IDENTIFIER: u16 = 0x1234;

fn gateway(world: &World, source: Source) -> Gateway {
    Gateway::new(&[Forward::new(Protocol::Echo, 0, at(world.target, 0)).from(source)])
}

/// What the client asks, and what the target is asked.
fn asked(world: &World, identifier: u16) -> [Draft; 2] {
    let sent = Draft::echo(world.client, identifier, world.listen);
    let delivered = sent.between(sent.source, at(world.target, 0)).hop();
    [sent, delivered]
}

/// What the target answers, and what the client hears.
fn answered(world: &World, identifier: u16) -> [Draft; 2] {
    let client = at(world.client, identifier);
    let sent =
        Draft::echo(world.client, identifier, world.target).between(at(world.target, 0), client);
    let delivered = sent.between(at(world.listen, 0), client).hop();
    [sent, delivered]
}

/// The identifier that a translated packet shows.
fn identifier(outcome: &Outcome) -> u16 {
    let packet = &outcome.after[14..];
    let icmp = if packet[0] >> 4 == 4 { 20 } else { 40 };
    u16::from_be_bytes([packet[icmp + 4], packet[icmp + 5]])
}

#[test]
fn who_asks_the_gateway_is_answered_by_the_target() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
            let mut gateway = gateway(&world, Source::Client).by(hook);
            let ([sent, delivered], [answer, heard]) =
                (asked(&world, IDENTIFIER), answered(&world, IDENTIFIER));
            for _ in 0..3 {
                gateway.wan(&sent.packet()).reached_lan(&delivered.packet());
                gateway.lan(&answer.packet()).reached_wan(&heard.packet());
            }
            assert_eq!((gateway.flows(), gateway.proven()), (1, 1));
            let counters = gateway.books().counters;
            let [(_, counted)] = counters.as_slice() else {
                panic!("one port is counted, not {counters:?}");
            };
            assert_eq!(counted.to_target.packets, 3);
            assert_eq!(counted.to_client.packets, 3);
        }
    }
}

/// Identifier 0 too, of which nothing tells a request from a reply but the type.
#[test]
fn every_identifier_goes_there_and_comes_back() {
    for world in World::both() {
        for identifier in 0..=u16::MAX {
            let mut gateway = gateway(&world, Source::Client);
            let [sent, delivered] = asked(&world, identifier);
            gateway.wan(&sent.packet()).reached_lan(&delivered.packet());
            let replies = answered(&world, identifier).map(|draft| draft.packet());
            let [answer, heard] = match identifier {
                0 => replies.map(as_reply),
                _ => replies,
            };
            gateway.lan(&answer).reached_wan(&heard);
        }
    }
}

/// A reply begins no flow, not even one with identifier 0, which has the ports of a request.
#[test]
fn an_answer_to_the_gateway_itself_is_the_gateways() {
    for world in World::both() {
        for identifier in [0, 1, IDENTIFIER, u16::MAX] {
            let mut gateway = gateway(&world, Source::Client);
            let request = Draft::echo(world.listen, identifier, world.client);
            let reply = request
                .between(at(world.client, 0), at(world.listen, identifier))
                .packet();
            let reply = match identifier {
                0 => as_reply(reply),
                _ => reply,
            };
            gateway.wan(&reply).passed(PassReason::NoRule);
            assert_eq!(gateway.flows(), 0);
        }
    }
}

/// A request without identifier made a reply: type and sum.
fn as_reply(mut request: Vec<u8>) -> Vec<u8> {
    let (icmp, kind) = if request[0] >> 4 == 4 {
        (20, 0_u8)
    } else {
        (40, 129)
    };
    let sum = u16::from_be_bytes([request[icmp + 2], request[icmp + 3]]);
    // One's complement: what the first byte loses, the sum gains.
    let change = i32::from(request[icmp]) - i32::from(kind);
    let sum = i32::from(sum) + (change << 8);
    let sum = (sum.rem_euclid(0xffff)) as u16;
    request[icmp] = kind;
    request[icmp + 2..icmp + 4].copy_from_slice(&sum.to_be_bytes());
    request
}

#[test]
fn without_such_a_rule_the_gateway_answers_itself() {
    for world in World::both() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let all = Forward::new(protocol, 1, at(world.target, 1)).to(u16::MAX);
            let mut gateway = Gateway::new(&[all]);
            let [sent, _] = asked(&world, IDENTIFIER);
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
        let mut gateway = gateway(&world, Source::Client);
        for address in [world.lan_address, world.second_client] {
            let sent = Draft::echo(world.client, IDENTIFIER, address);
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
    }
}

/// What a target asks on its own account is not the rule's.
#[test]
fn what_a_target_asks_itself_is_left_to_the_kernel() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Client);
        let sent = Draft::echo(world.target, IDENTIFIER, world.client);
        gateway.lan(&sent.packet()).passed(PassReason::NoFlow);
    }
}

#[test]
fn two_clients_with_one_identifier_are_two_to_the_target() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let clients = [world.client, world.second_client];
        let mut seen = Vec::new();
        for client in clients {
            let sent = Draft::echo(client, IDENTIFIER, world.listen);
            let outcome = gateway.wan(&sent.packet());
            let shown = identifier(&outcome);
            let delivered = sent.between(at(world.lan_address, shown), at(world.target, 0));
            outcome.reached_lan(&delivered.hop().packet());
            seen.push(shown);
        }
        assert_ne!(seen[0], seen[1]);
        assert_eq!(gateway.events(Event::Bound), 2);
        for (client, shown) in clients.into_iter().zip(seen) {
            let answer = Draft::echo(client, IDENTIFIER, world.target)
                .between(at(world.target, 0), at(world.lan_address, shown));
            let heard = answer.between(at(world.listen, 0), at(client, IDENTIFIER));
            gateway
                .lan(&answer.packet())
                .reached_wan(&heard.hop().packet());
        }
    }
}

/// RFC 5508 REQ-1: one identifier, whatever address is asked.
#[test]
fn a_client_keeps_its_identifier_at_every_address() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let shown = [world.listen, world.second_listen]
            .map(|listen| Draft::echo(world.client, IDENTIFIER, listen))
            .map(|sent| gateway.wan(&sent.packet()))
            .map(|outcome| identifier(&outcome));
        assert_eq!(shown, [IDENTIFIER; 2]);
    }
}

#[test]
fn the_lan_and_the_target_itself_ask_the_wan_address() {
    for world in World::both() {
        for host in [world.second_target, world.target] {
            let mut gateway = gateway(&world, Source::Client);
            let sent = Draft::echo(host, IDENTIFIER, world.listen);
            let (seen, target) = (at(world.listen, IDENTIFIER), at(world.target, 0));
            gateway
                .lan(&sent.packet())
                .reached_lan(&sent.between(seen, target).hop().packet());
            let answer = sent.between(target, seen);
            let heard = answer.between(at(world.listen, 0), sent.source);
            gateway
                .lan(&answer.packet())
                .reached_lan(&heard.hop().packet());
        }
    }
}

/// RFC 5508 REQ-2: at least a minute.
#[test]
fn a_silent_flow_lives_for_a_minute_and_not_a_tick_longer() {
    for world in World::both() {
        for (late, lives) in [(0, true), (1, false)] {
            let mut gateway = gateway(&world, Source::Masquerade);
            let [sent, _] = asked(&world, IDENTIFIER);
            let _ = gateway.wan(&sent.packet()).departure();
            gateway
                .model
                .advance(portfwd_common::abi::Ticks(ECHO_SECONDS * SECOND + late));
            let answer = sent.between(at(world.target, 0), at(world.lan_address, IDENTIFIER));
            let outcome = gateway.lan(&answer.packet());
            if lives {
                let heard = answer.between(at(world.listen, 0), sent.source);
                outcome.reached_wan(&heard.hop().packet());
            } else {
                outcome.passed(PassReason::NoFlow);
            }
        }
    }
}

/// RFC 5508 section 4: a quoted query has its identifier restored, and its own sum.
#[test]
fn an_error_about_a_hidden_query_quotes_what_its_client_sent() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        // The second of two clients: its identifier is another one behind the gateway.
        let first = Draft::echo(world.second_client, IDENTIFIER, world.listen);
        let _ = gateway.wan(&first.packet()).departure();
        let [sent, _] = asked(&world, IDENTIFIER);
        let outcome = gateway.wan(&sent.packet());
        let shown = identifier(&outcome);
        let delivered = sent
            .between(at(world.lan_address, shown), at(world.target, 0))
            .hop();
        let kind = if world.client.is_ipv4() { 11 } else { 3 };
        let (router, rest) = (world.lan_router, [0; 4]);
        let quoted = delivered.packet();
        let arrived = error(router, world.lan_address, kind, 0, rest, &quoted);
        // The client takes the address that it asked for the router's: the rule hides that side.
        let restored = sent.clone().hop().packet();
        let expected = error(world.listen, world.client, kind, 0, rest, &restored);
        gateway.lan(&arrived).reached_wan(&hop(expected));
    }
}

fn hop(packet: Vec<u8>) -> Vec<u8> {
    portfwd_common::model::frame::after_hop(packet)
}

/// RFC 4787 REQ-14: larger than a packet, in both directions and in any order.
#[test]
fn a_large_echo_in_fragments_is_carried_both_ways() {
    for world in World::both() {
        for reversed in [false, true] {
            let mut gateway = gateway(&world, Source::Client);
            let large = |draft: &Draft| {
                let payload: Vec<u8> = (0..8_000_u32).map(|n| (n * 7 + n / 251) as u8).collect();
                let draft = Draft {
                    dont_fragment: false,
                    ..draft.clone()
                };
                fragments(&draft.payload(payload).packet(), 0x1234_5678, 1_400, 0)
            };
            let ([sent, delivered], [answer, heard]) =
                (asked(&world, IDENTIFIER), answered(&world, IDENTIFIER));
            let arrived = carry(&mut gateway, Gateway::wan, large(&sent), reversed);
            assert_eq!(arrived, large(&delivered));
            let arrived = carry(&mut gateway, Gateway::lan, large(&answer), reversed);
            assert_eq!(arrived, large(&heard));
        }
    }
}

/// What leaves of packets that come in one after the other.
fn carry(
    gateway: &mut Gateway,
    come: fn(&mut Gateway, &[u8]) -> Outcome,
    mut packets: Vec<Vec<u8>>,
    reversed: bool,
) -> Vec<Vec<u8>> {
    if reversed {
        packets.reverse();
    }
    let mut left = Vec::new();
    for packet in packets {
        let outcome = come(gateway, &packet);
        let outcomes = std::iter::once(outcome).chain(gateway.settle());
        left.extend(
            outcomes
                .filter(|outcome| outcome.departure().way == portfwd_common::datapath::Way::Frame)
                .map(|outcome| outcome.after[14..].to_vec()),
        );
    }
    left
}
