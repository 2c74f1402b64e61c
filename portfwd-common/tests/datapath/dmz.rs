//! Rules for what is nobody else's: who else there is, and what is left.

use std::net::{IpAddr, SocketAddr};

use portfwd_common::{
    abi::{Config, Protocol},
    datapath::{Arrival, DropReason, Hook, PassReason},
    model::{
        frame::{Draft, Transport, error, ethernet, fragments},
        rules::{Forward, Lowered},
        world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::gateway::{Gateway, Outcome, SECOND};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;

/// The three elements of a rule for everything else.
fn dmz(target: IpAddr) -> Vec<Forward> {
    Protocol::ALL
        .into_iter()
        .map(|protocol| Forward::rest(protocol, target))
        .collect()
}

/// A gateway with rules, some of them for everything else.
fn gateway(forwards: &[Forward]) -> Gateway {
    let mut gateway = Gateway::new(forwards);
    remember(&mut gateway);
    gateway
}

/// As the daemon does, before such a rule is found.
fn remember(gateway: &mut Gateway) {
    let config = gateway.model.maps.config.as_mut().unwrap();
    config.flags |= Config::HAS_RESTS;
}

/// A packet that the kernel forwards leaves by the WAN.
fn forwarded(gateway: &mut Gateway, packet: &[u8]) {
    let arrival = Arrival {
        hook: Hook::TcOut,
        ..gateway.arrival(WAN)
    };
    let before = ethernet(UPSTREAM_MAC, WAN_MAC, packet);
    let mut after = before.clone();
    gateway.model.sees_off(&mut after, &arrival);
    assert_eq!(before, after);
}

fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Draft {
    Draft::tcp(source, destination, flags)
}

/// What TCP and UDP would begin with, from one endpoint to another.
fn beginnings(source: SocketAddr, destination: SocketAddr) -> [Draft; 2] {
    [
        tcp(source, destination, SYN),
        Draft::udp(source, destination),
    ]
}

fn client(world: &World) -> SocketAddr {
    at(world.client, 40_000)
}

/// An error: nobody listens where a packet was sent.
fn unreachable(source: IpAddr, destination: IpAddr, about: &Draft) -> Vec<u8> {
    let (kind, code) = if source.is_ipv4() { (3, 3) } else { (1, 4) };
    error(source, destination, kind, code, [0; 4], &about.packet())
}

/// Where a packet from the client came out: at a target with its port kept.
#[track_caller]
fn reached(outcome: &Outcome, sent: &Draft, target: SocketAddr) {
    let delivered = sent.clone().hop().between(sent.source, target);
    outcome.reached_lan(&delivered.packet());
}

#[test]
fn any_port_goes_there_with_its_number_and_comes_back() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            for port in [1, 22, 80, 1023, 1024, 33_333, u16::MAX] {
                let mut gateway = gateway(&dmz(world.target)).by(hook);
                let (dialled, target) = (at(world.listen, port), at(world.target, port));
                for sent in beginnings(client(&world), dialled) {
                    reached(&gateway.wan(&sent.packet()), &sent, target);
                    let answer = match sent.transport {
                        Transport::Tcp(_) => tcp(target, client(&world), SYN_ACK).numbers(9, 1),
                        Transport::Udp | Transport::UdpWithoutSum | Transport::Echo => {
                            Draft::udp(target, client(&world))
                        }
                    };
                    let heard = answer.clone().hop().between(dialled, client(&world));
                    gateway.lan(&answer.packet()).reached_wan(&heard.packet());
                }
                assert_eq!(gateway.flows(), 2);
                // Whatever the port, they are counted as one.
                let counters: Vec<_> = gateway.books().counters;
                assert_eq!(counters.len(), 2, "{counters:?}");
                assert!(counters.iter().all(|(_, c)| c.to_target.packets == 1));
            }
        }
    }
}

#[test]
fn port_0_and_other_addresses_are_not_taken() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        for sent in beginnings(client(&world), at(world.listen, 0)) {
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
        for sent in beginnings(client(&world), at(world.second_target, 80)) {
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
        assert_eq!(gateway.flows(), 0);
    }
}

/// The datapath asks for such rules only if it is told that there are any.
#[test]
fn nothing_is_asked_or_remembered_without_the_flag() {
    for world in World::both() {
        let mut gateway = Gateway::new(&dmz(world.target));
        for sent in beginnings(client(&world), at(world.listen, 80)) {
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
        for sent in beginnings(at(world.listen, 5000), client(&world)) {
            let _ = gateway.sends(&sent.packet());
            forwarded(&mut gateway, &sent.packet());
        }
        assert_eq!(gateway.model.maps.awaited(), 0);
    }
}

#[test]
fn ping_is_answered_by_the_target_unless_a_rule_has_it() {
    for world in World::both() {
        let sent = Draft::echo(world.client, 7, world.listen);
        let mut rules = dmz(world.target);
        let mut dmz_alone = gateway(&rules);
        reached(&dmz_alone.wan(&sent.packet()), &sent, at(world.target, 0));
        rules.push(Forward::new(Protocol::Echo, 0, at(world.second_target, 0)));
        let mut gateway = gateway(&rules);
        reached(
            &gateway.wan(&sent.packet()),
            &sent,
            at(world.second_target, 0),
        );
        // What answers the gateway's own request begins nothing.
        let reply = Draft::echo(world.listen, 8, world.client)
            .between(at(world.client, 0), at(world.listen, 8));
        gateway.wan(&reply.packet()).passed(PassReason::NoRule);
    }
}

/// A range without address goes before a rule for everything else on the very address.
#[test]
fn every_other_rule_goes_first() {
    for world in World::both() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let others = [
                Forward::new(protocol, 80, at(world.second_target, 8080)),
                Forward::new(protocol, 1000, at(world.second_target, 1000)).to(1999),
                Forward::new(protocol, 443, at(world.second_target, 443)).on(world.listen),
            ];
            let here: Vec<_> = dmz(world.target)
                .into_iter()
                .map(|rule| rule.on(world.listen))
                .collect();
            for rest in [dmz(world.target), here] {
                let rules = [&others[..], &rest].concat();
                let mut gateway = gateway(&rules);
                for (dialled, target) in [
                    (80, at(world.second_target, 8080)),
                    (1000, at(world.second_target, 1000)),
                    (1999, at(world.second_target, 1999)),
                    (443, at(world.second_target, 443)),
                    (81, at(world.target, 81)),
                    (999, at(world.target, 999)),
                    (2000, at(world.target, 2000)),
                ] {
                    let [segment, datagram] = beginnings(client(&world), at(world.listen, dialled));
                    let sent = match protocol {
                        Protocol::Tcp => segment,
                        Protocol::Udp | Protocol::Echo => datagram,
                    };
                    reached(&gateway.wan(&sent.packet()), &sent, target);
                }
            }
        }
    }
}

#[test]
fn the_rule_of_an_address_goes_before_that_of_all() {
    for world in World::both() {
        let second = dmz(world.second_target)
            .into_iter()
            .map(|rule| rule.on(world.second_listen));
        let rules: Vec<_> = dmz(world.target).into_iter().chain(second).collect();
        let mut gateway = gateway(&rules);
        for (listen, target) in [
            (world.listen, world.target),
            (world.second_listen, world.second_target),
        ] {
            for sent in beginnings(client(&world), at(listen, 5_555)) {
                reached(&gateway.wan(&sent.packet()), &sent, at(target, 5_555));
            }
        }
    }
}

/// Also where the rule of all addresses has no such exception: the port of this address is the gateway's own.
#[test]
fn exceptions_are_left_to_the_gateway() {
    for world in World::both() {
        let [segment, _, echo] = dmz(world.target).try_into().unwrap();
        let here = segment.on(world.second_listen);
        let mut gateway = Gateway::new(&[segment, echo, here]);
        remember(&mut gateway);
        gateway.model.maps.rules = Lowered::of(&[segment, echo, here])
            .excepting(&segment, 22)
            .excepting(&here, 25)
            .excepting(&echo, 0);
        for (listen, port, is_excepted) in [
            (world.listen, 22, true),
            (world.listen, 23, false),
            (world.listen, 25, false),
            (world.second_listen, 22, false),
            (world.second_listen, 25, true),
        ] {
            let sent = tcp(client(&world), at(listen, port), SYN);
            let outcome = gateway.wan(&sent.packet());
            if is_excepted {
                outcome.passed(PassReason::NoRule);
            } else {
                reached(&outcome, &sent, at(world.target, port));
            }
        }
        let ping = Draft::echo(world.client, 7, world.listen);
        gateway.wan(&ping.packet()).passed(PassReason::NoRule);
    }
}

/// A connection may be anybody's that is met in its middle.
#[test]
fn tcp_begins_with_a_syn_alone() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let dialled = at(world.listen, 80);
        for flags in 0..=u8::MAX {
            let sent = tcp(client(&world), dialled, flags);
            if flags & 0b1_0111 == SYN {
                continue;
            }
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
        assert_eq!(gateway.flows(), 0);
        // With whatever else a SYN may carry (ECN, RFC 3168 section 6.1.1).
        let sent = tcp(client(&world), dialled, 0xc2);
        reached(&gateway.wan(&sent.packet()), &sent, at(world.target, 80));
        let next = tcp(client(&world), dialled, ACK);
        reached(&gateway.wan(&next.packet()), &next, at(world.target, 80));
    }
}

#[test]
fn sockets_of_the_gateway_go_first() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let [web, chat] = [80, 9_000].map(|port| at(world.listen, port));
        let maps = &mut gateway.model.maps;
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            maps.add_socket(protocol, web, None);
            maps.add_socket(protocol, chat, Some(client(&world)));
        }
        let stranger = at(world.second_client, 40_000);
        for (source, dialled, is_own) in [
            (client(&world), web, true),
            (stranger, web, true),
            (client(&world), chat, true),
            (stranger, chat, false),
            (client(&world), at(world.second_listen, 80), false),
        ] {
            for sent in beginnings(source, dialled) {
                let outcome = gateway.wan(&sent.packet());
                if is_own {
                    outcome.passed(PassReason::OwnSocket);
                } else {
                    reached(&outcome, &sent, at(world.target, dialled.port()));
                }
            }
        }
        // A rule of its own says that the service is not meant.
        let web_rule = Forward::new(Protocol::Tcp, 80, at(world.second_target, 80));
        let rules: Vec<_> = dmz(world.target).into_iter().chain([web_rule]).collect();
        gateway.set_rules(&rules);
        let sent = tcp(client(&world), web, SYN);
        reached(
            &gateway.wan(&sent.packet()),
            &sent,
            at(world.second_target, 80),
        );
    }
}

/// Of the gateway itself, and of whom the kernel masquerades: both look the same behind its NAT.
#[test]
fn what_answers_a_packet_that_left_is_passed() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let own = [5_000, 6_000].map(|port| at(world.listen, port));
        for sent in beginnings(own[0], client(&world)) {
            gateway.sends(&sent.packet()).passed(PassReason::NoFlow);
        }
        for sent in beginnings(own[1], client(&world)) {
            forwarded(&mut gateway, &sent.packet());
        }
        assert_eq!(gateway.model.maps.awaited(), 4);
        for own in own {
            for answer in beginnings(client(&world), own) {
                gateway.wan(&answer.packet()).passed(PassReason::Answer);
            }
            // Another endpoint answers nothing.
            for other in beginnings(at(world.client, 40_001), own) {
                reached(
                    &gateway.wan(&other.packet()),
                    &other,
                    at(world.target, own.port()),
                );
            }
        }
    }
}

#[test]
fn an_answer_is_waited_for_as_long_as_a_flow_would_live() {
    for world in World::both() {
        for (number, seconds) in [(0, 7_440), (1, 300)] {
            let mut gateway = gateway(&dmz(world.target));
            let own = at(world.listen, 5_000);
            let sent = beginnings(own, client(&world))[number].packet();
            let answer = &beginnings(client(&world), own)[number];
            forwarded(&mut gateway, &sent);
            gateway.wait(seconds - 1);
            gateway.wan(&answer.packet()).passed(PassReason::Answer);
            // Which has it last on.
            gateway.wait(seconds - 1);
            gateway.wan(&answer.packet()).passed(PassReason::Answer);
            gateway.wait(seconds - 1);
            forwarded(&mut gateway, &sent);
            gateway.wait(seconds);
            reached(
                &gateway.wan(&answer.packet()),
                answer,
                at(world.target, 5_000),
            );
        }
    }
}

/// Written again when it is a second old, not with every packet.
#[test]
fn what_leaves_is_noted_once_a_second() {
    let world = World::v4();
    let mut gateway = gateway(&dmz(world.target));
    let own = at(world.listen, 5_000);
    let sent = Draft::udp(own, client(&world)).packet();
    let answer = Draft::udp(client(&world), own);
    forwarded(&mut gateway, &sent);
    gateway
        .model
        .advance(portfwd_common::abi::Ticks(SECOND - 1));
    // Not noted: what was noted first decides.
    forwarded(&mut gateway, &sent);
    gateway.wait(299);
    gateway.model.advance(portfwd_common::abi::Ticks(1));
    reached(
        &gateway.wan(&answer.packet()),
        &answer,
        at(world.target, 5_000),
    );
}

/// What TC redirects passes the hook on the way out, too. It is not left to the kernel when the flow is over.
#[test]
fn what_portfwd_sends_on_itself_is_not_remembered() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let (dialled, target) = (at(world.listen, 80), at(world.target, 80));
        let sent = Draft::udp(client(&world), dialled);
        reached(&gateway.wan(&sent.packet()), &sent, target);
        let answer = Draft::udp(target, client(&world));
        let heard = answer.clone().hop().between(dialled, client(&world));
        gateway.lan(&answer.packet()).reached_wan(&heard.packet());
        forwarded(&mut gateway, &heard.packet());
        assert_eq!(gateway.model.maps.awaited(), 0);
        gateway.wait(301);
        reached(&gateway.wan(&sent.packet()), &sent, target);
    }
}

/// The kernel resets a connection that was under way when the tables were lost. The client may begin it anew.
#[test]
fn nothing_answers_a_reset() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let dialled = at(world.listen, 80);
        for flags in [0x04, 0x14] {
            let reset = tcp(dialled, client(&world), flags);
            gateway.sends(&reset.packet()).passed(PassReason::NoFlow);
        }
        assert_eq!(gateway.model.maps.awaited(), 0);
        let sent = tcp(client(&world), dialled, SYN);
        reached(&gateway.wan(&sent.packet()), &sent, at(world.target, 80));
    }
}

/// What has no address of the gateway is routed: nothing that answers it comes to a rule.
#[test]
fn what_is_only_routed_is_not_remembered() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        for sent in beginnings(at(world.second_target, 5_000), client(&world)) {
            forwarded(&mut gateway, &sent.packet());
        }
        assert_eq!(gateway.model.maps.awaited(), 0);
        // Unless a rule is for that very address.
        let here = Forward::rest(Protocol::Udp, world.target).on(world.lost_target);
        gateway.set_rules(&[here]);
        let own = at(world.lost_target, 5_000);
        forwarded(&mut gateway, &Draft::udp(own, client(&world)).packet());
        assert_eq!(gateway.model.maps.awaited(), 1);
        let answer = Draft::udp(client(&world), own);
        gateway.wan(&answer.packet()).passed(PassReason::Answer);
    }
}

/// The kernel's masquerade translates it, and its answers are told from everything else.
#[test]
fn what_the_target_begins_itself_is_the_kernels() {
    for world in World::both() {
        let web = Forward::new(Protocol::Tcp, 80, at(world.target, 80));
        let rules: Vec<_> = dmz(world.target).into_iter().chain([web]).collect();
        let mut gateway = gateway(&rules);
        for sent in beginnings(at(world.target, 50_000), client(&world)) {
            gateway.lan(&sent.packet()).passed(PassReason::NoFlow);
        }
        for sent in beginnings(at(world.listen, 50_000), client(&world)) {
            forwarded(&mut gateway, &sent.packet());
        }
        for answer in beginnings(client(&world), at(world.listen, 50_000)) {
            gateway.wan(&answer.packet()).passed(PassReason::Answer);
        }
        // The target of another rule, all the same.
        let sent = tcp(at(world.target, 80), client(&world), ACK);
        let heard = sent
            .clone()
            .hop()
            .between(at(world.listen, 80), sent.destination);
        gateway.lan(&sent.packet()).reached_wan(&heard.packet());
        assert_eq!(gateway.flows(), 0);
    }
}

/// The kernel would let it leave as it is. What the gateway keeps for itself, it may forward by its own NAT.
#[test]
fn an_answer_whose_flow_has_made_room_does_not_leave() {
    for world in World::both() {
        let segment = Forward::rest(Protocol::Tcp, world.target);
        let mut gateway = gateway(&[segment]);
        gateway.model.maps.rules = Lowered::of(&[segment]).excepting(&segment, 443);
        let late = |source, flags| tcp(source, client(&world), flags).numbers(9, 1);
        for (source, flags, is_dropped) in [
            (at(world.target, 80), SYN_ACK, true),
            (at(world.target, 80), SYN, false),
            (at(world.target, 80), ACK, false),
            (at(world.target, 80), 0x04, false),
            (at(world.target, 443), SYN_ACK, false),
            (at(world.second_target, 80), SYN_ACK, false),
        ] {
            let outcome = gateway.lan(&late(source, flags).packet());
            if is_dropped {
                outcome.dropped(DropReason::PrivateSource);
            } else {
                outcome.passed(PassReason::NoFlow);
            }
        }
        // On the LAN it may speak as it likes.
        let inside = tcp(at(world.target, 80), at(world.narrow_target, 9), SYN_ACK);
        gateway.lan(&inside.packet()).passed(PassReason::NoFlow);
    }
}

#[test]
fn a_lan_client_dials_the_wan_address() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let source = at(world.second_target, 40_000);
        for sent in beginnings(source, at(world.listen, 1_234)) {
            let departure = gateway.lan(&sent.packet()).departure();
            assert_eq!(departure.ifindex, portfwd_common::model::world::LAN);
        }
        // What goes through the gateway is no rule's.
        for sent in beginnings(source, client(&world)) {
            gateway.lan(&sent.packet()).passed(PassReason::NoFlow);
        }
    }
}

#[test]
fn its_sources_are_asked_when_nobody_else_is_left() {
    for world in World::both() {
        let rule = Forward::rest(Protocol::Udp, world.target);
        let mut gateway = gateway(&[rule]);
        let only = [(
            world.client,
            world.bits(),
            portfwd_common::abi::Admission::Allowed,
        )];
        gateway.model.maps.rules =
            Lowered::of(&[rule]).admitting(1, portfwd_common::abi::Admission::Denied, &only);
        let own = at(world.listen, 9_000);
        gateway.model.maps.add_socket(Protocol::Udp, own, None);
        let stranger = at(world.second_client, 40_000);
        let refused = Draft::udp(stranger, at(world.listen, 80));
        gateway
            .wan(&refused.packet())
            .dropped(DropReason::SourceRefused);
        gateway
            .wan(&Draft::udp(stranger, own).packet())
            .passed(PassReason::OwnSocket);
        let sent = Draft::udp(client(&world), at(world.listen, 80));
        reached(&gateway.wan(&sent.packet()), &sent, at(world.target, 80));
    }
}

#[test]
fn errors_about_its_flows_are_translated_and_others_pass() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let (dialled, target) = (at(world.listen, 53), at(world.target, 53));
        let sent = Draft::udp(client(&world), dialled);
        let delivered = sent.clone().hop().between(sent.source, target);
        gateway.wan(&sent.packet()).reached_lan(&delivered.packet());
        let refusal = unreachable(world.target, world.client, &delivered);
        let _ = gateway.lan(&refusal).departure();
        let own = Draft::udp(at(world.listen, 54), client(&world));
        let about_others = unreachable(world.client, world.listen, &own);
        gateway.wan(&about_others).passed(PassReason::NoQuotedFlow);
    }
}

/// The first fragment decides for the datagram.
#[test]
fn fragments_go_the_same_ways() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let own = at(world.listen, 5_000);
        forwarded(&mut gateway, &Draft::udp(own, client(&world)).packet());
        let large = |draft: Draft| draft.payload(vec![7; 2_400]);
        let answer = large(Draft::udp(client(&world), own)).packet();
        let parts = fragments(&answer, 1, 1_200, 0);
        gateway.wan(&parts[0]).passed(PassReason::Answer);
        for part in &parts[1..] {
            gateway.wan(part).passed(PassReason::Fragment);
        }
        let other = large(Draft::udp(client(&world), at(world.listen, 5_001))).packet();
        for part in fragments(&other, 2, 1_200, 0) {
            let _ = gateway.wan(&part).departure();
        }
    }
}

/// One without a rule goes, as it does for every other rule.
#[test]
fn flows_end_with_the_rule() {
    for world in World::both() {
        let mut gateway = gateway(&dmz(world.target));
        let dialled = at(world.listen, 80);
        for sent in beginnings(client(&world), dialled) {
            reached(&gateway.wan(&sent.packet()), &sent, at(world.target, 80));
        }
        gateway.set_rules(&[]);
        for sent in beginnings(client(&world), dialled) {
            gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        }
        assert_eq!(gateway.flows(), 0);
    }
}
