//! What targets of rules say without being asked: it leaves from the listen endpoint, or not at all.

use portfwd_common::{
    abi::Protocol,
    datapath::{DropReason, Event, Hook, PassReason, Tables},
    model::{
        frame::{Draft, error},
        rules::Forward,
        world::{TUNNEL, World, at},
    },
};

use crate::gateway::Gateway;

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const RST: u8 = 0x04;

fn rules(world: &World) -> Vec<Forward> {
    vec![
        Forward::new(Protocol::Udp, 51820, at(world.target, 820)),
        Forward::new(Protocol::Tcp, 80, at(world.target, 8080)).on(world.second_listen),
        // Nobody knows for whom of the two this target speaks.
        Forward::new(Protocol::Udp, 53, at(world.second_target, 53)),
        Forward::new(Protocol::Udp, 54, at(world.second_target, 53)),
    ]
}

#[test]
fn a_datagram_that_the_target_sends_first_leaves_from_the_listen_endpoint_and_begins_a_flow() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            let mut gateway = Gateway::new(&rules(&world)).by(hook);
            let (client, listen, target) = (
                at(world.client, 7),
                at(world.listen, 51820),
                at(world.target, 820),
            );
            gateway
                .lan(&Draft::udp(target, client).packet())
                .reached_wan(&Draft::udp(listen, client).hop().packet());
            assert_eq!(gateway.flows(), 1);
            assert_eq!(gateway.events(Event::FlowCreated), 1);
            // What follows is of this flow, on either way.
            gateway
                .wan(&Draft::udp(client, listen).packet())
                .reached_lan(&Draft::udp(client, target).hop().packet());
            gateway
                .lan(&Draft::udp(target, client).packet())
                .reached_wan(&Draft::udp(listen, client).hop().packet());
            assert_eq!(gateway.flows(), 1);
            assert_eq!(gateway.events(Event::FlowCreated), 1);
            let (_, counted) = gateway.books().counters[0];
            assert_eq!(
                (counted.to_target.packets, counted.to_client.packets),
                (1, 2)
            );
        }
    }
}

#[test]
fn without_room_a_target_speaks_by_the_rule_alone() {
    for world in World::both() {
        for room in [0, 1] {
            let mut gateway = Gateway::new(&rules(&world));
            gateway.model.flows.capacity = room;
            let (client, target) = (at(world.client, 7), at(world.target, 820));
            for _ in 0..3 {
                gateway
                    .lan(&Draft::udp(target, client).packet())
                    .reached_wan(&Draft::udp(at(world.listen, 51820), client).hop().packet());
            }
            assert_eq!(gateway.proven(), 0);
            assert_eq!(gateway.model.maps.pressure().was_full, 1);
        }
    }
}

#[test]
fn a_segment_without_flow_leaves_from_the_listen_endpoint_whatever_its_flags() {
    for world in World::both() {
        for flags in 0..=u8::MAX {
            let mut gateway = Gateway::new(&rules(&world));
            let (client, listen, target) = (
                at(world.client, 7),
                at(world.second_listen, 80),
                at(world.target, 8080),
            );
            gateway
                .lan(&Draft::tcp(target, client, flags).packet())
                .reached_wan(&Draft::tcp(listen, client, flags).hop().packet());
            assert_eq!(gateway.flows(), 0, "{flags:#04x}");
        }
    }
}

#[test]
fn what_a_server_sends_long_after_a_reset_does_not_leave_with_its_own_address() {
    for world in World::both() {
        let mut gateway = Gateway::new(&rules(&world));
        let (client, listen, target) = (
            at(world.client, 7),
            at(world.second_listen, 80),
            at(world.target, 8080),
        );
        let _ = gateway
            .wan(&Draft::tcp(client, listen, SYN).packet())
            .departure();
        let _ = gateway
            .lan(&Draft::tcp(target, client, SYN_ACK).packet())
            .departure();
        let _ = gateway
            .wan(&Draft::tcp(client, listen, RST).packet())
            .departure();
        for seconds in [0, 1, 240, 100_000] {
            gateway.wait(seconds);
            gateway
                .lan(&Draft::tcp(target, client, 0x18).packet())
                .reached_wan(&Draft::tcp(listen, client, 0x18).hop().packet());
        }
    }
}

#[test]
fn a_connection_that_a_target_opens_comes_to_be_a_flow_with_the_answer() {
    for world in World::both() {
        let mut gateway = Gateway::new(&rules(&world));
        let (client, listen, target) = (
            at(world.client, 7),
            at(world.second_listen, 80),
            at(world.target, 8080),
        );
        gateway
            .lan(&Draft::tcp(target, client, SYN).packet())
            .reached_wan(&Draft::tcp(listen, client, SYN).hop().packet());
        gateway
            .wan(&Draft::tcp(client, listen, SYN_ACK).packet())
            .reached_lan(&Draft::tcp(client, target, SYN_ACK).hop().packet());
        gateway
            .lan(&Draft::tcp(target, client, 0x10).packet())
            .reached_wan(&Draft::tcp(listen, client, 0x10).hop().packet());
    }
}

#[test]
fn a_target_of_several_rules_is_not_guessed_at() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            let mut gateway = Gateway::new(&rules(&world)).by(hook);
            gateway
                .lan(&Draft::udp(at(world.second_target, 53), at(world.client, 7)).packet())
                .dropped(DropReason::PrivateSource);
            assert_eq!(gateway.drops(DropReason::PrivateSource), 1);
            // To the LAN it may speak as itself.
            gateway
                .lan(&Draft::udp(at(world.second_target, 53), at(world.narrow_target, 7)).packet())
                .passed(PassReason::NoFlow);
        }
    }
}

#[test]
fn a_header_that_makes_no_sense_does_not_carry_a_target_address_out() {
    for world in World::both() {
        let ip = if world.is_v4() { 20 } else { 40 };
        let client = at(world.client, 7);
        let mut datagram = Draft::udp(at(world.target, 820), client).packet();
        datagram[ip + 4..ip + 6].copy_from_slice(&[0xff, 0xff]);
        let mut segment = Draft::tcp(at(world.target, 8080), client, SYN).packet();
        segment[ip + 12] = 0x10;
        let mut gateway = Gateway::new(&rules(&world));
        for packet in [datagram, segment] {
            gateway.lan(&packet).dropped(DropReason::PrivateSource);
        }
        // Of a port of no rule, or to the LAN, it is the kernel's.
        let mut other = Draft::udp(at(world.target, 821), client).packet();
        other[ip + 4..ip + 6].copy_from_slice(&[0xff, 0xff]);
        let mut inside = Draft::udp(at(world.target, 820), at(world.narrow_target, 7)).packet();
        inside[ip + 4..ip + 6].copy_from_slice(&[0xff, 0xff]);
        for packet in [other, inside] {
            gateway.lan(&packet).passed(PassReason::Malformed);
        }
    }
}

#[test]
fn an_error_about_a_flow_that_is_gone_leaves_by_the_rule_or_not_at_all() {
    for world in World::both() {
        let kind = if world.is_v4() { 3 } else { 1 };
        let unreachable = |source, target, client| {
            let delivered = Draft::udp(client, target).hop().packet();
            error(source, world.client, kind, 3, [0; 4], &delivered)
        };
        let client = at(world.client, 7);
        let mut gateway = Gateway::new(&rules(&world));
        // As if from the listen endpoint, about what was sent there.
        let quoted = Draft::udp(client, at(world.listen, 51820)).hop().packet();
        let expected = error(world.listen, world.client, kind, 3, [0; 4], &quoted);
        let expected = portfwd_common::model::frame::after_hop(expected);
        gateway
            .lan(&unreachable(world.target, at(world.target, 820), client))
            .reached_wan(&expected);
        assert_eq!(gateway.flows(), 0);
        gateway
            .lan(&unreachable(
                world.second_target,
                at(world.second_target, 53),
                client,
            ))
            .dropped(DropReason::PrivateSource);
        gateway
            .lan(&unreachable(world.target, at(world.target, 821), client))
            .passed(PassReason::NoQuotedFlow);
    }
}

#[test]
fn a_target_behind_a_tunnel_speaks_too() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 500, at(world.tunnel_target, 500));
        let mut gateway = Gateway::new(&[rule]);
        let sent = Draft::udp(at(world.tunnel_target, 500), at(world.client, 7));
        let outcome = gateway.tunnel(TUNNEL, &sent.packet());
        let _ = outcome.departure();
        let expected = Draft::udp(at(world.listen, 500), at(world.client, 7)).hop();
        assert_eq!(outcome.after[14..], expected.packet());
        assert_eq!(gateway.flows(), 1);
    }
}
