//! A client must be able to be where its packet came from.

use std::net::{IpAddr, Ipv4Addr};

use portfwd_common::{
    abi::{Config, Limits, Protocol, Rate},
    datapath::{DropReason, Event, Hook, Route},
    model::{
        frame::{Draft, ethernet},
        rules::Forward,
        world::{LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, WAN_TUNNEL, World, at},
    },
};

use crate::gateway::Gateway;

const PORT: u16 = 80;
const SYN: u8 = 0x02;

fn gateway(world: &World) -> Gateway {
    Gateway::new(&[
        Forward::new(Protocol::Tcp, PORT, at(world.target, 8080)),
        Forward::new(Protocol::Udp, PORT, at(world.target, 8080)),
        Forward::new(Protocol::Udp, 81, at(world.arm_target, 8080)).on(world.arm_listen),
    ])
}

/// First packets of a source.
fn first_packets(world: &World, source: IpAddr) -> [Draft; 2] {
    let (source, listen) = (at(source, 40_000), at(world.listen, PORT));
    [
        Draft::tcp(source, listen, SYN),
        Draft::udp(source, listen).payload(*b"hello"),
    ]
}

/// Who cannot come in by the WAN.
fn forged(world: &World) -> Vec<(&'static str, IpAddr)> {
    let mut sources = vec![
        ("the gateway's LAN address", world.lan_address),
        (
            "another address of the gateway's WAN interface",
            world.second_listen,
        ),
        (
            "the gateway's address of another interface",
            world.arm_listen,
        ),
        ("the target itself", world.target),
        ("a host of the LAN", world.second_target),
        (
            "a host of the LAN that nobody has heard of yet",
            world.silent_target,
        ),
        ("a host of another LAN", world.narrow_target),
        (
            "a host behind an interface without link header",
            world.tunnel_target,
        ),
        ("an address without route", world.lost_target),
    ];
    if let IpAddr::V4(target) = world.target {
        let [a, b, c, _] = target.octets();
        let broadcast = Ipv4Addr::new(a, b, c, 255);
        sources.push(("the broadcast address of the LAN", broadcast.into()));
    }
    sources
}

#[test]
fn a_source_that_cannot_be_there_makes_no_state_and_is_dropped() {
    for world in World::both() {
        for (what, source) in forged(&world) {
            for draft in first_packets(&world, source) {
                for hook in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
                    println!("{what}, by {hook:?}");
                    let mut gateway = gateway(&world).by(hook);
                    let before = gateway.books();
                    gateway
                        .wan(&draft.packet())
                        .dropped(DropReason::MartianSource);
                    assert_eq!(gateway.books(), before);
                    assert_eq!(gateway.drops(DropReason::MartianSource), 1);
                }
            }
        }
    }
}

#[test]
fn a_gateway_that_is_told_to_trust_sources_takes_them_all() {
    for world in World::both() {
        for (what, source) in forged(&world) {
            for draft in first_packets(&world, source) {
                println!("{what}");
                let mut gateway = gateway(&world);
                let config = gateway.model.maps.config.as_mut().unwrap();
                config.flags = Config::TRUSTS_SOURCES;
                let _ = gateway.wan(&draft.packet()).departure();
            }
        }
    }
}

/// The other way round: what the WAN's route leads to does not come from the LAN.
#[test]
fn a_client_of_the_wan_does_not_dial_from_the_lan() {
    for world in World::both() {
        let mut gateway = gateway(&world);
        for draft in first_packets(&world, world.client) {
            let frame = ethernet(LAN_MAC, UPSTREAM_MAC, &draft.packet());
            gateway.frame(LAN, frame).dropped(DropReason::MartianSource);
        }
        assert_eq!(gateway.flows(), 0);
        for draft in first_packets(&world, world.second_target) {
            let _ = gateway.lan(&draft.packet()).departure();
        }
        assert_eq!(gateway.flows(), 2);
    }
}

/// Which of several interfaces of the right side it is does not matter, nor where the interface has no side.
#[test]
fn any_interface_of_the_side_is_good_enough() {
    for world in World::both() {
        for source in [world.tunnel_client, world.arm_client, world.far_target] {
            for draft in first_packets(&world, source) {
                let frame = ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet());
                let _ = gateway(&world).frame(WAN, frame).departure();
            }
        }
        for draft in first_packets(&world, world.client) {
            let _ = gateway(&world)
                .tunnel(WAN_TUNNEL, &draft.packet())
                .departure();
        }
    }
}

#[test]
fn the_only_arm_has_both_sides_but_not_the_gateways_own_address() {
    for world in World::both() {
        let datagram =
            |source| Draft::udp(at(source, 40_000), at(world.arm_listen, 81)).payload(*b"hello");
        for source in [
            world.arm_client,
            world.arm_neighbour,
            world.client,
            world.target,
        ] {
            let mut gateway = gateway(&world);
            let _ = gateway.arm(&datagram(source).packet()).departure();
        }
        for source in [world.lan_address, world.listen] {
            let mut gateway = gateway(&world);
            gateway
                .arm(&datagram(source).packet())
                .dropped(DropReason::MartianSource);
        }
    }
}

#[test]
fn a_flow_that_is_known_is_not_asked_about_again() {
    for world in World::both() {
        let mut gateway = gateway(&world);
        let [_, datagram] = first_packets(&world, world.client);
        let _ = gateway.wan(&datagram.packet()).departure();
        // The way back is the LAN's from now on, and the entry is looked at anew.
        let lan = Route::Unresolved { ifindex: LAN };
        let maps = &mut gateway.model.maps;
        maps.set_route(world.client, world.bits(), lan);
        gateway.bump_generation();
        let _ = gateway.wan(&datagram.packet()).departure();
        assert_eq!(gateway.events(Event::FlowCreated), 1);
    }
}

#[test]
fn a_forged_source_takes_nothing_of_a_rules_limits() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, PORT, at(world.target, 8080)).limited(Limits {
            flows: 1,
            rate: Rate {
                flows: 1,
                seconds: 3_600,
                burst: 1,
            },
            ..Limits::NONE
        });
        let mut gateway = Gateway::new(&[rule]);
        let [_, forged] = first_packets(&world, world.second_target);
        gateway
            .wan(&forged.packet())
            .dropped(DropReason::MartianSource);
        let [_, datagram] = first_packets(&world, world.client);
        let _ = gateway.wan(&datagram.packet()).departure();
    }
}
