//! Flows whose target takes the gateway for the client: masquerade, SNAT, hairpin, and the gateway with one arm.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use portfwd_common::{
    abi::{Pool, PoolRange, Protocol, Ticks},
    datapath::{DropReason, Event, Hook, PassReason, Verdict},
    model::{
        frame::{Draft, Transport, after_hop, error},
        maps::pool_key,
        rules::{Forward, Source},
        world::{World, at},
    },
};

use crate::gateway::{Gateway, Outcome, SECOND};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const RST: u8 = 0x04;

/// A rule of both worlds, for each transport.
fn gateway(world: &World, source: Source) -> Gateway {
    Gateway::new(&rules(world.target, source))
}

fn rules(target: IpAddr, source: Source) -> [Forward; 2] {
    [Protocol::Tcp, Protocol::Udp].map(|p| Forward::new(p, 80, at(target, 8080)).from(source))
}

fn transports() -> [Transport; 3] {
    [
        Transport::Tcp(SYN),
        Transport::Udp,
        Transport::UdpWithoutSum,
    ]
}

fn first(transport: Transport, client: SocketAddr, listen: SocketAddr) -> Draft {
    Draft {
        transport,
        ..Draft::udp(client, listen)
    }
}

/// The source that a translated packet shows.
fn source_port(outcome: &Outcome) -> u16 {
    let packet = &outcome.after[14..];
    let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
    u16::from_be_bytes([packet[header], packet[header + 1]])
}

#[test]
fn a_masqueraded_client_has_the_egress_interfaces_address_and_its_own_port() {
    for world in World::both() {
        for transport in transports() {
            for hook in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
                let mut gateway = gateway(&world, Source::Masquerade).by(hook);
                let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
                let (target, seen) = (at(world.target, 8080), at(world.lan_address, 40_000));
                let sent = first(transport, client, listen);
                for _ in 0..2 {
                    gateway
                        .wan(&sent.packet())
                        .reached_lan(&sent.between(seen, target).hop().packet());
                    gateway
                        .lan(&sent.between(target, seen).packet())
                        .reached_wan(&sent.between(listen, client).hop().packet());
                }
                assert_eq!(gateway.flows(), 1);
                assert_eq!(gateway.events(Event::Bound), 1);
            }
        }
    }
}

#[test]
fn snat_shows_the_rules_address_and_a_port_of_its_range() {
    for world in World::both() {
        let range = PoolRange {
            first: 2_000,
            last: 2_009,
        };
        // Not an address of any interface.
        let address = World::beside(world.lost_target);
        let mut gateway = gateway(&world, Source::Snat(address, range));
        gateway.model.maps.add_pools(address);
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let sent = first(Transport::Udp, client, listen);
        let outcome = gateway.wan(&sent.packet());
        let port = source_port(&outcome);
        assert!(range.has(port) && port.is_multiple_of(2), "{port}");
        let (seen, target) = (at(address, port), at(world.target, 8080));
        outcome.reached_lan(&sent.between(seen, target).hop().packet());
        gateway
            .lan(&sent.between(target, seen).packet())
            .reached_wan(&sent.between(listen, client).hop().packet());
    }
}

/// RFC 4787 REQ-9 and REQ-9a: also where the client is the target itself, whose source and destination then differ.
#[test]
fn a_lan_client_that_dials_the_wan_address_is_seen_with_that_address() {
    for world in World::both() {
        for transport in transports() {
            for host in [world.second_target, world.target] {
                let mut gateway = gateway(&world, Source::Client);
                let (client, listen) = (at(host, 40_000), at(world.listen, 80));
                let (target, seen) = (at(world.target, 8080), at(world.listen, 40_000));
                let sent = first(transport, client, listen);
                for _ in 0..2 {
                    gateway
                        .lan(&sent.packet())
                        .reached_lan(&sent.between(seen, target).hop().packet());
                    gateway
                        .lan(&sent.between(target, seen).packet())
                        .reached_lan(&sent.between(listen, client).hop().packet());
                }
                assert_eq!(gateway.flows(), 1);
            }
        }
    }
}

#[test]
fn the_rules_own_source_goes_before_hairpin() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let (client, listen) = (at(world.second_target, 40_000), at(world.listen, 80));
        let (target, seen) = (at(world.target, 8080), at(world.lan_address, 40_000));
        let sent = first(Transport::Udp, client, listen);
        gateway
            .lan(&sent.packet())
            .reached_lan(&sent.between(seen, target).hop().packet());
    }
}

/// What no rule listens on is the gateway's own, or goes on to where it is routed.
#[test]
fn the_lan_reaches_the_gateways_own_services() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Client);
        for (listen, port) in [
            (world.listen, 22),
            (world.lan_address, 80),
            (world.client, 80),
            (World::beside(world.lost_target), 80),
        ] {
            for transport in transports() {
                let sent = first(transport, at(world.second_target, 40_000), at(listen, port));
                gateway.lan(&sent.packet()).passed(PassReason::NoFlow);
            }
        }
        assert_eq!(gateway.flows(), 0);
    }
}

/// RFC 4787 REQ-1 and REQ-3, NAT-35: one port per client endpoint, whatever it dials, and never two endpoints on one port.
#[test]
fn a_client_endpoint_keeps_its_port_and_shares_it_with_nobody() {
    for world in World::both() {
        let forwards: Vec<_> = (80..90)
            .map(|port| {
                let rule = Forward::new(Protocol::Udp, port, at(world.target, 8_000 + port));
                rule.from(Source::Masquerade)
            })
            .collect();
        let mut gateway = Gateway::with_room(&forwards, 1_000);
        let mut ports: HashMap<SocketAddr, HashSet<u16>> = HashMap::new();
        for host in [world.client, world.second_client] {
            for port in [1_000, 40_000, 40_001] {
                for listen in 80..90 {
                    let client = at(host, port);
                    let sent = first(Transport::Udp, client, at(world.listen, listen));
                    let seen = source_port(&gateway.wan(&sent.packet()));
                    ports.entry(client).or_default().insert(seen);
                }
            }
        }
        let all: HashSet<u16> = ports.values().flatten().copied().collect();
        assert!(ports.values().all(|of| of.len() == 1), "{ports:?}");
        assert_eq!(all.len(), 6, "{ports:?}");
        for (client, of) in ports {
            let port = *of.iter().next().unwrap();
            assert_eq!(port < 1_024, client.port() < 1_024, "{client} as {port}");
            assert_eq!(port % 2, client.port() % 2, "{client} as {port}");
        }
        assert_eq!(gateway.flows(), 60);
    }
}

/// Seen by reading: a socket that the gateway had bound since the daemon last looked shared its port with a client, whose target's
/// answers it was sent, or whose answers it got.
#[test]
fn a_port_that_a_socket_of_the_gateway_has_by_now_stands_for_no_client() {
    for (world, protocol) in World::both()
        .into_iter()
        .flat_map(|world| [Protocol::Tcp, Protocol::Udp].map(|protocol| (world, protocol)))
    {
        let (listen, target) = (at(world.listen, 80), at(world.target, 8080));
        let rule = Forward::new(protocol, 80, target).from(Source::Masquerade);
        let mut gateway = Gateway::new(&[rule]);
        let own = at(world.lan_address, 40_000);
        let transport = match protocol {
            Protocol::Tcp => Transport::Tcp(SYN),
            Protocol::Udp | Protocol::Echo => Transport::Udp,
        };
        // One that is bound there, and one that only talks to somebody else.
        gateway.model.maps.add_socket(protocol, own, None);
        let talking = at(world.lan_address, 41_000);
        let elsewhere = at(world.second_target, 8080);
        gateway
            .model
            .maps
            .add_socket(protocol, talking, Some(elsewhere));
        for (port, is_own) in [(40_000, false), (41_000, true)] {
            let sent = first(transport, at(world.client, port), listen);
            let seen = source_port(&gateway.wan(&sent.packet()));
            assert_eq!(seen == port, is_own, "{port} as {seen}");
            assert_eq!(seen % 2, port % 2);
        }
        // Another client has no better luck with the port.
        let sent = first(transport, at(world.second_client, 40_000), listen);
        assert_ne!(source_port(&gateway.wan(&sent.packet())), 40_000);
    }
}

/// RFC 6888 REQ-11: a new flow is refused, and nobody is evicted.
#[test]
fn without_a_free_port_a_new_flow_is_refused_and_the_others_go_on() {
    for world in World::both() {
        let range = PoolRange {
            first: 3_000,
            last: 3_009,
        };
        let mut gateway = gateway(&world, Source::Snat(world.lan_address, range));
        let (listen, target) = (at(world.listen, 80), at(world.target, 8080));
        let mut seen = HashMap::new();
        for port in 0..10 {
            let sent = first(Transport::Udp, at(world.client, 40_000 + port), listen);
            let outcome = gateway.wan(&sent.packet());
            assert!(seen.insert(source_port(&outcome), sent.source).is_none());
        }
        for port in 10..20 {
            gateway.refill_error_budgets();
            let sent = first(Transport::Udp, at(world.client, 40_000 + port), listen);
            gateway.wan(&sent.packet()).refused(DropReason::NoPort);
        }
        assert_eq!(
            (gateway.flows(), gateway.drops(DropReason::NoPort)),
            (10, 10)
        );
        for (port, client) in seen {
            let answer = first(Transport::Udp, target, at(world.lan_address, port));
            gateway
                .lan(&answer.packet())
                .reached_wan(&answer.between(listen, client).hop().packet());
        }
    }
}

#[test]
fn a_port_that_the_gateway_keeps_is_never_given_out() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let mut pool = Pool::FREE;
        (1_024..=u16::MAX)
            .filter(|port| *port != 7_777)
            .for_each(|port| pool.take(port));
        let key = pool_key(world.lan_address, Protocol::Udp);
        gateway.model.maps.pools.set(key, &pool);
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let sent = first(Transport::Udp, client, listen);
        assert_eq!(source_port(&gateway.wan(&sent.packet())), 7_777);
        let sent = first(Transport::Udp, at(world.client, 7_776), listen);
        gateway.wan(&sent.packet()).refused(DropReason::NoPort);
    }
}

#[test]
fn a_way_out_without_address_hides_nobody() {
    for world in World::both() {
        let mut gateway = Gateway::new(&rules(world.far_target, Source::Masquerade));
        let sent = first(
            Transport::Udp,
            at(world.client, 40_000),
            at(world.listen, 80),
        );
        gateway.wan(&sent.packet()).dropped(DropReason::NoSource);
        assert_eq!(gateway.flows(), 0);
    }
}

/// The kernel would take the one for spoofed and answer the other with a RST of its own.
#[test]
fn what_cannot_simply_leave_is_dropped_and_never_shown_to_the_stack() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let (target, seen) = (at(world.target, 8080), at(world.lan_address, 40_000));
        let sent = first(Transport::Udp, client, listen);
        gateway
            .wan(&sent.clone().hop_limit(1).packet())
            .refused(DropReason::NoWayOut);
        let _ = gateway.wan(&sent.packet()).departure();
        let answer = sent.between(target, seen);
        gateway
            .lan(&answer.clone().hop_limit(1).packet())
            .refused(DropReason::NoWayOut);
        gateway
            .lan(&answer.clone().payload([7; 1_600]).packet())
            .refused(DropReason::NoWayOut);
        gateway.hook = Hook::Xdp;
        gateway
            .lan(&answer.hop_limit(1).packet())
            .passed(PassReason::SlowPath);
    }
}

/// A RST of nobody's begins nothing and takes no port.
#[test]
fn a_reset_takes_no_port() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let sent = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), RST);
        gateway.wan(&sent.packet()).passed(PassReason::NoFlow);
        assert_eq!((gateway.flows(), gateway.events(Event::Bound)), (0, 0));
    }
}

#[test]
fn without_room_in_the_table_a_hidden_flow_is_refused() {
    for world in World::both() {
        let mut gateway = Gateway::with_room(&rules(world.target, Source::Masquerade), 1);
        for (port, fits) in [(1, true), (2, false)] {
            let sent = first(Transport::Udp, at(world.client, port), at(world.listen, 80));
            let outcome = gateway.wan(&sent.packet());
            if fits {
                let _ = outcome.departure();
            } else {
                outcome.refused(DropReason::TableFull);
            }
        }
    }
}

/// A change of what stands for clients ends flows: the target would see another client from one packet to the next.
#[test]
fn a_flow_ends_when_its_rule_hides_clients_otherwise() {
    for world in World::both() {
        let range = PoolRange {
            first: 3_000,
            last: 3_999,
        };
        let snat = Source::Snat(world.lan_address, range);
        let sources = [Source::Client, Source::Masquerade, snat];
        for (before, after) in sources
            .iter()
            .flat_map(|b| sources.iter().map(move |a| (*b, *a)))
        {
            let mut gateway = gateway(&world, before);
            let sent = first(
                Transport::Udp,
                at(world.client, 3_100),
                at(world.listen, 80),
            );
            let _ = gateway.wan(&sent.packet()).departure();
            gateway.set_rules(&rules(world.target, after));
            gateway.wait(2);
            let _ = gateway.wan(&sent.packet()).departure();
            let expected = match (before, after) {
                _ if before == after => 1,
                // The same address, and the port kept: nobody sees a difference.
                (Source::Masquerade, Source::Snat(..)) | (Source::Snat(..), Source::Masquerade) => {
                    1
                }
                _ => 2,
            };
            assert_eq!(
                gateway.events(Event::FlowCreated),
                expected,
                "{before:?} {after:?}"
            );
        }
    }
}

/// The egress interface has lost the address: its flows would show one that is nobody's.
#[test]
fn a_masqueraded_flow_ends_with_the_address_that_stood_for_its_client() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let sent = first(
            Transport::Udp,
            at(world.client, 40_000),
            at(world.listen, 80),
        );
        let _ = gateway.wan(&sent.packet()).departure();
        gateway.model.maps.remove_address(world.lan_address);
        gateway.bump_generation();
        let answer = first(
            Transport::Udp,
            at(world.target, 8080),
            at(world.lan_address, 40_000),
        );
        gateway.lan(&answer.packet()).passed(PassReason::NoFlow);
        assert_eq!(gateway.flows(), 0);
    }
}

/// RFC 5508 REQ-7: errors about hidden flows, both ways, quote what their receiver sent.
#[test]
fn errors_about_hidden_flows_are_translated() {
    for world in World::both() {
        for (host, source, address) in [
            (world.second_target, Source::Client, world.listen),
            (world.target, Source::Client, world.listen),
            (world.second_target, Source::Masquerade, world.lan_address),
        ] {
            let mut gateway = gateway(&world, source);
            let (client, listen) = (at(host, 40_000), at(world.listen, 80));
            let (target, seen) = (at(world.target, 8080), at(address, 40_000));
            let sent = first(Transport::Udp, client, listen);
            let _ = gateway.lan(&sent.packet()).departure();
            let kind = if world.is_v4() { 3 } else { 1 };
            let quote = |from: IpAddr, to: IpAddr, draft: Draft| {
                error(from, to, kind, 1, [0; 4], &after_hop(draft.packet()))
            };
            // The target refuses: the client hears it from the address that it dialled.
            let about = quote(world.target, seen.ip(), sent.between(seen, target).hop());
            let heard = quote(listen.ip(), client.ip(), sent.clone().hop());
            gateway.lan(&about).reached_lan(&after_hop(heard));
            // The client refuses the answer: the target hears it from whom it takes for the client.
            let answer = sent.between(target, seen);
            let about = quote(client.ip(), listen.ip(), sent.between(listen, client).hop());
            let heard = quote(seen.ip(), target.ip(), answer.hop());
            gateway.lan(&about).reached_lan(&after_hop(heard));
        }
    }
}

#[test]
fn with_one_arm_packets_leave_by_the_interface_they_came_by() {
    for world in World::both() {
        for (host, source, seen) in [
            // The target answers by way of the gateway, which is its router.
            (
                world.arm_client,
                Source::Client,
                at(world.arm_client, 40_000),
            ),
            // The target would answer its neighbour directly.
            (
                world.arm_neighbour,
                Source::Client,
                at(world.arm_listen, 40_000),
            ),
            (
                world.arm_target,
                Source::Client,
                at(world.arm_listen, 40_000),
            ),
            // The target's router is another.
            (
                world.arm_client,
                Source::Masquerade,
                at(world.arm_listen, 40_000),
            ),
        ] {
            for transport in transports() {
                let mut gateway = Gateway::new(&rules(world.arm_target, source));
                let (client, listen) = (at(host, 40_000), at(world.arm_listen, 80));
                let target = at(world.arm_target, 8080);
                let sent = first(transport, client, listen);
                for _ in 0..2 {
                    gateway
                        .arm(&sent.packet())
                        .reached_arm(&sent.between(seen, target).hop().packet());
                    let answer = gateway.arm(&sent.between(target, seen).packet());
                    let received = sent.between(listen, client).hop().packet();
                    if host == world.arm_client {
                        answer.reached_arm_router(&received);
                    } else {
                        answer.reached_arm(&received);
                    }
                }
                assert_eq!(gateway.flows(), 1);
            }
        }
    }
}

/// ATK-18: a rule whose target is an own address that another rule listens on translates once.
#[test]
fn rules_that_lead_to_each_other_do_not_loop() {
    for world in World::both() {
        let to = |listen, target| Forward::new(Protocol::Udp, 80, at(target, 80)).on(listen);
        let mut gateway = Gateway::new(&[
            to(world.listen, world.second_listen),
            to(world.second_listen, world.listen),
        ]);
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let sent = first(Transport::Udp, client, listen);
        // Up the stack, translated once, whoever sent it; the gateway's own packets are never forwarded.
        assert!(matches!(
            gateway.wan(&sent.packet()).verdict,
            Verdict::Forward(_)
        ));
        let sent = first(Transport::Udp, at(world.target, 40_000), listen);
        gateway.lan(&sent.packet()).dropped(DropReason::NoWayOut);
    }
}

/// Another flow of the same endpoint finds the port that was bound, for as long as the binding is there, and says that it is
/// used.
#[test]
fn a_binding_outlives_its_flow_until_it_is_swept() {
    for world in World::both() {
        let mut gateway = gateway(&world, Source::Masquerade);
        let sent = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), SYN);
        let _ = gateway.wan(&sent.packet()).departure();
        let answer = Draft::tcp(
            at(world.target, 8080),
            at(world.lan_address, 40_000),
            SYN_ACK,
        );
        let _ = gateway.lan(&answer.packet()).departure();
        let before = *gateway.model.maps.pools.bindings().values().next().unwrap();
        gateway.model.advance(Ticks(8_000 * SECOND));
        let again = gateway.wan(&sent.packet());
        assert_eq!(source_port(&again), 40_000);
        let after = *gateway.model.maps.pools.bindings().values().next().unwrap();
        assert_eq!((after.port, after.used), (before.port, gateway.model.now));
        assert_eq!(gateway.events(Event::Bound), 1);
    }
}
