//! What happens when there is no room, or not for two.

use portfwd_common::{
    abi::Protocol,
    datapath::{DropReason, Event, Hook, PassReason, Tables as _},
    model::{frame::Draft, rules::Forward},
};

use crate::gateway::Gateway;
use portfwd_common::model::world::{World, at};

const SYN: u8 = 0x02;

fn full_gateway(world: &World, forwards: &[Forward]) -> Gateway {
    let mut gateway = Gateway::with_room(forwards, 4);
    for port in 1..=4 {
        // The second datagram takes the place in the table.
        for _ in 0..2 {
            let _ = gateway
                .wan(&Draft::udp(at(world.second_client, port), at(world.listen, 53)).packet())
                .departure();
        }
    }
    assert_eq!((gateway.flows(), gateway.proven()), (4, 4));
    gateway
}

/// Makes room where flows begin, as a flood would: nothing that has not proven itself is there any more.
fn flood(gateway: &mut Gateway) {
    gateway.model.flows.opening_v4.clear();
    gateway.model.flows.opening_v6.clear();
}

fn dns(world: &World) -> Forward {
    Forward::new(Protocol::Udp, 53, at(world.target, 1053))
}

#[test]
fn when_the_table_is_full_static_forwards_work_both_ways_without_a_place_in_it() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            for rule in [
                dns(&world),
                Forward::new(Protocol::Udp, 50, at(world.target, 1050)).to(59),
                Forward::new(Protocol::Udp, 53, at(world.target, 1053)).on(world.listen),
            ] {
                let mut gateway = full_gateway(&world, &[rule]).by(hook);
                let (client, listen, target) = (
                    at(world.client, 9),
                    at(world.listen, 53),
                    at(world.target, 1053),
                );
                for is_flooded in [false, false, true] {
                    gateway
                        .wan(&Draft::udp(client, listen).packet())
                        .reached_lan(&Draft::udp(client, target).hop().packet());
                    if is_flooded {
                        flood(&mut gateway);
                    }
                    gateway
                        .lan(&Draft::udp(target, client).packet())
                        .reached_wan(&Draft::udp(listen, client).hop().packet());
                }
                assert_eq!(gateway.proven(), 4);
                assert_eq!(gateway.model.maps.pressure().was_full, 1);
                let counters = gateway.books().counters;
                let (_, counted) = counters[0];
                assert_eq!(
                    (counted.to_target.packets, counted.to_client.packets),
                    (8 + 3, 3)
                );
            }
        }
    }
}

#[test]
fn when_the_table_is_full_live_flows_keep_their_entries() {
    for world in World::both() {
        let mut gateway = full_gateway(&world, &[dns(&world)]);
        for port in 100..200 {
            for _ in 0..2 {
                let sent = Draft::udp(at(world.client, port), at(world.listen, 53));
                let _ = gateway.wan(&sent.packet()).departure();
            }
        }
        for port in 1..=4 {
            let client = at(world.second_client, port);
            gateway
                .lan(&Draft::udp(at(world.target, 1053), client).packet())
                .reached_wan(&Draft::udp(at(world.listen, 53), client).hop().packet());
        }
        assert_eq!((gateway.flows(), gateway.proven()), (104, 4));
    }
}

#[test]
fn a_table_with_room_for_one_entry_only_takes_no_half_of_a_flow() {
    for world in World::both() {
        let mut gateway = full_gateway(&world, &[dns(&world)]);
        gateway.model.flows.capacity += 1;
        for _ in 0..3 {
            let _ = gateway
                .wan(&Draft::udp(at(world.client, 9), at(world.listen, 53)).packet())
                .departure();
            assert_eq!((gateway.flows(), gateway.model.flows.proven()), (5, 8));
        }
    }
}

#[test]
fn without_entry_a_backend_reaches_clients_only_not_the_lan() {
    for world in World::both() {
        let mut gateway = full_gateway(&world, &[dns(&world)]);
        let _ = gateway
            .wan(&Draft::udp(at(world.client, 9), at(world.listen, 53)).packet())
            .departure();
        for (what, source, destination) in [
            (
                "to a neighbour on the LAN",
                at(world.target, 1053),
                at(world.second_target, 9),
            ),
            (
                "from a port of no rule",
                at(world.target, 1054),
                at(world.client, 9),
            ),
            (
                "from a host of no rule",
                at(world.second_target, 1053),
                at(world.client, 9),
            ),
            (
                "to nowhere",
                at(world.target, 1053),
                at(world.lost_target, 9),
            ),
            (
                "to an interface that is not attached",
                at(world.target, 1053),
                at(world.far_target, 9),
            ),
        ] {
            println!("{what}");
            gateway
                .lan(&Draft::udp(source, destination).packet())
                .passed(PassReason::NoFlow);
        }
        let tcp = Draft::tcp(at(world.target, 1053), at(world.client, 9), 0x10);
        gateway.lan(&tcp.packet()).passed(PassReason::NoFlow);
    }
}

#[test]
fn rules_that_share_a_target_cannot_do_without_entries() {
    for world in World::both() {
        let mut gateway = full_gateway(
            &world,
            &[
                dns(&world),
                Forward::new(Protocol::Udp, 54, at(world.target, 1053)),
            ],
        );
        for port in [53, 54] {
            let question = Draft::udp(at(world.client, port), at(world.listen, port)).packet();
            // It may begin, but not stay.
            let _ = gateway.wan(&question).departure();
            gateway.wan(&question).refused(DropReason::TableFull);
        }
        assert_eq!(gateway.drops(DropReason::TableFull), 2);
        assert_eq!(gateway.model.maps.pressure().was_full, 1);
        let answer = Draft::udp(at(world.target, 1053), at(world.client, 53));
        // The client is told, the target is not: it has asked for nothing.
        gateway.lan(&answer.packet()).dropped(DropReason::TableFull);
        flood(&mut gateway);
        gateway
            .lan(&answer.packet())
            .dropped(DropReason::PrivateSource);
    }
}

#[test]
fn room_that_becomes_free_is_used() {
    for world in World::both() {
        let mut gateway = full_gateway(&world, &[dns(&world)]);
        gateway.wait(301);
        // Expired entries still take room until the sweep or a packet of theirs comes by; this one takes its own.
        let _ = gateway
            .wan(&Draft::udp(at(world.second_client, 1), at(world.listen, 53)).packet())
            .departure();
        assert_eq!(gateway.events(Event::FlowCreated), 5);
        assert_eq!((gateway.flows(), gateway.proven()), (4, 3));
        let _ = gateway
            .wan(&Draft::udp(at(world.second_client, 1), at(world.listen, 53)).packet())
            .departure();
        assert_eq!((gateway.flows(), gateway.proven()), (4, 4));
    }
}

#[test]
fn a_flood_of_connections_that_nobody_completes_takes_no_place_in_the_table() {
    for world in World::both() {
        let web = Forward::new(Protocol::Tcp, 80, at(world.target, 8080));
        for flags in [SYN, 0x12, 0x10, 0x11, 0x18] {
            let mut gateway = full_gateway(&world, &[dns(&world), web]);
            for port in 1_000..2_000 {
                let client = at(world.client, port);
                let sent = Draft::tcp(client, at(world.listen, 80), flags);
                let _ = gateway.wan(&sent.packet()).departure();
                // The backend answers each as stacks do: it would serve the one, and knows nothing of the other.
                let answer = if flags == SYN { 0x12 } else { 0x04 };
                let answer = Draft::tcp(at(world.target, 8080), client, answer);
                let _ = gateway.lan(&answer.packet()).departure();
            }
            assert_eq!(gateway.proven(), 4, "{flags:#x}");
            assert_eq!(gateway.model.maps.pressure().was_full, 0);
        }
    }
}

#[test]
fn two_listen_ports_of_one_target_never_share_a_connection_of_a_client() {
    for world in World::both() {
        let rules = [
            Forward::new(Protocol::Tcp, 80, at(world.target, 80)),
            Forward::new(Protocol::Tcp, 81, at(world.target, 80)),
        ];
        let mut gateway = Gateway::new(&rules);
        let client = at(world.client, 40_000);
        let _ = gateway
            .wan(&Draft::tcp(client, at(world.listen, 80), SYN).packet())
            .departure();
        for _ in 0..2 {
            gateway
                .wan(&Draft::tcp(client, at(world.listen, 81), SYN).packet())
                .dropped(DropReason::TupleClash);
        }
        assert_eq!(gateway.drops(DropReason::TupleClash), 2);
        assert_eq!(gateway.flows(), 1);
        // Another port of the client, or another client, is another connection.
        for other in [at(world.client, 40_001), at(world.second_client, 40_000)] {
            let _ = gateway
                .wan(&Draft::tcp(other, at(world.listen, 81), SYN).packet())
                .departure();
        }
        // The answer still goes where the first connection came from.
        gateway
            .lan(&Draft::tcp(at(world.target, 80), client, 0x12).packet())
            .reached_wan(
                &Draft::tcp(at(world.listen, 80), client, 0x12)
                    .hop()
                    .packet(),
            );
        // Once the first is expired, the second may have the place.
        gateway.wait(241);
        let _ = gateway
            .wan(&Draft::tcp(client, at(world.listen, 81), SYN).packet())
            .departure();
        gateway
            .lan(&Draft::tcp(at(world.target, 80), client, 0x12).packet())
            .reached_wan(
                &Draft::tcp(at(world.listen, 81), client, 0x12)
                    .hop()
                    .packet(),
            );
    }
}

#[test]
fn a_connection_that_is_over_makes_way_for_one_by_another_listen_port() {
    for world in World::both() {
        let rules = [
            Forward::new(Protocol::Tcp, 80, at(world.target, 80)),
            Forward::new(Protocol::Tcp, 81, at(world.target, 80)),
        ];
        let mut gateway = Gateway::new(&rules);
        let client = at(world.client, 40_000);
        let by = |port, flags| Draft::tcp(client, at(world.listen, port), flags).packet();
        let _ = gateway.wan(&by(80, SYN)).departure();
        // The client takes it back, right behind its SYN.
        let reset = Draft::tcp(client, at(world.listen, 80), 0x04).numbers(0x1234_5679, 0);
        let _ = gateway.wan(&reset.packet()).departure();
        // Anything but a SYN does not show that the client has given the old one up.
        gateway.wan(&by(81, 0x10)).dropped(DropReason::TupleClash);
        let _ = gateway.wan(&by(81, SYN)).departure();
        assert_eq!(gateway.flows(), 1);
        gateway
            .lan(&Draft::tcp(at(world.target, 80), client, 0x12).packet())
            .reached_wan(
                &Draft::tcp(at(world.listen, 81), client, 0x12)
                    .hop()
                    .packet(),
            );
    }
}

/// Takes the original half of the only flow away, as if another CPU had not inserted it yet, or had died in between.
fn orphan_reply(gateway: &mut Gateway) {
    gateway.model.flows.retain_marked(|marks| marks & 1 == 1);
    assert_eq!(gateway.model.flows.len(), 1);
}

#[test]
fn a_packet_that_loses_the_race_for_a_flow_is_carried_as_the_winner_would() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[dns(&world)]);
        let (client, listen, target) = (
            at(world.client, 9),
            at(world.listen, 53),
            at(world.target, 1053),
        );
        let _ = gateway
            .wan(&Draft::udp(client, listen).packet())
            .departure();
        orphan_reply(&mut gateway);
        gateway
            .wan(&Draft::udp(client, listen).packet())
            .reached_lan(&Draft::udp(client, target).hop().packet());
        assert_eq!(
            gateway.model.flows.len(),
            1,
            "the winner's half is still there"
        );
        assert_eq!(gateway.events(Event::Stateless), 1);
        // The winner never came: a second later its half gives way.
        gateway.wait(1);
        let _ = gateway
            .wan(&Draft::udp(client, listen).packet())
            .departure();
        assert_eq!(gateway.flows(), 1);
        gateway
            .lan(&Draft::udp(target, client).packet())
            .reached_wan(&Draft::udp(listen, client).hop().packet());
    }
}

#[test]
fn half_a_flow_is_no_flow() {
    for world in World::both() {
        for kept in [0, 1] {
            let mut gateway = Gateway::new(&[dns(&world)]);
            let (client, listen, target) = (
                at(world.client, 9),
                at(world.listen, 53),
                at(world.target, 1053),
            );
            let _ = gateway
                .wan(&Draft::udp(client, listen).packet())
                .departure();
            gateway.model.flows.retain_marked(|marks| marks & 1 == kept);
            gateway.wait(1);
            if kept == 0 {
                // The reply half is missing: the next packet enters both anew.
                let _ = gateway
                    .wan(&Draft::udp(client, listen).packet())
                    .departure();
                assert_eq!(gateway.flows(), 1);
                let _ = gateway
                    .lan(&Draft::udp(target, client).packet())
                    .departure();
            } else {
                // The original half is missing: what the backend sends enters both anew.
                let _ = gateway
                    .lan(&Draft::udp(target, client).packet())
                    .departure();
                assert_eq!(gateway.events(Event::FlowCreated), 2);
                assert_eq!(gateway.flows(), 1);
            }
        }
    }
}

#[test]
fn halves_of_two_lives_are_no_flow() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[dns(&world)]);
        let (client, listen) = (at(world.client, 9), at(world.listen, 53));
        let _ = gateway
            .wan(&Draft::udp(client, listen).packet())
            .departure();
        gateway.wait(1);
        let now = gateway.model.now;
        let flows = &mut gateway.model.flows;
        for entry in flows.opening_v4.values_mut() {
            if entry.marks & 1 == 0 {
                entry.created = now;
            }
        }
        for entry in flows.opening_v6.values_mut() {
            if entry.marks & 1 == 0 {
                entry.created = now;
            }
        }
        let _ = gateway
            .wan(&Draft::udp(client, listen).packet())
            .departure();
        assert_eq!(gateway.events(Event::FlowCreated), 2);
        assert_eq!(gateway.flows(), 1);
    }
}
