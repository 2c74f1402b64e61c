//! Frames that end too early pass bit for bit.

use portfwd_common::{
    abi::{LinkLayer, Protocol},
    datapath::{Arrival, Hook, PassReason},
    model::{
        frame::{Draft, after_hop, error, ethernet},
        rules::Forward,
        world::{LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::gateway::Gateway;

fn gateway(world: &World) -> Gateway {
    Gateway::new(&[
        Forward::new(Protocol::Tcp, 80, at(world.target, 8080)),
        Forward::new(Protocol::Udp, 80, at(world.target, 8080)),
    ])
}

fn syn(world: &World) -> Draft {
    Draft::tcp(at(world.client, 40_000), at(world.listen, 80), 0x02)
}

fn datagram(world: &World) -> Draft {
    Draft::udp(at(world.client, 40_000), at(world.listen, 80))
}

fn from_upstream(packet: &[u8]) -> Vec<u8> {
    ethernet(WAN_MAC, UPSTREAM_MAC, packet)
}

/// Every kind of frame that the datapath would carry, cut after every byte.
#[test]
fn frames_cut_short_anywhere() {
    for world in World::both() {
        let (tcp, udp) = (syn(&world), datagram(&world));
        let kind = if world.client.is_ipv4() { 3 } else { 1 };
        let received = udp.between(udp.destination, udp.source).packet();
        let arrived = udp
            .between(udp.source, at(world.target, 8080))
            .hop()
            .packet();
        let mut corpus = vec![
            (WAN, from_upstream(&tcp.clone().payload("data").packet())),
            (WAN, from_upstream(&udp.packet())),
            (
                WAN,
                from_upstream(&error(
                    world.wan_router,
                    world.listen,
                    kind,
                    1,
                    [0; 4],
                    &after_hop(received),
                )),
            ),
            (
                LAN,
                ethernet(
                    LAN_MAC,
                    UPSTREAM_MAC,
                    &error(world.lan_router, world.client, kind, 1, [0; 4], &arrived),
                ),
            ),
            (
                LAN,
                ethernet(
                    LAN_MAC,
                    UPSTREAM_MAC,
                    &udp.between(at(world.target, 8080), udp.source).packet(),
                ),
            ),
        ];
        if world.client.is_ipv4() {
            let with_options = Draft {
                ip_options: vec![1; 40],
                ..udp.clone()
            };
            corpus.push((WAN, from_upstream(&with_options.packet())));
        }
        for (ifindex, frame) in corpus {
            for hook in [Hook::Xdp, Hook::Tc] {
                for link in [LinkLayer::Ethernet, LinkLayer::Raw] {
                    truncate_everywhere(
                        &world,
                        Arrival {
                            hook,
                            link,
                            ..gateway(&world).arrival(ifindex)
                        },
                        &frame,
                    );
                }
            }
        }
    }
}

fn truncate_everywhere(world: &World, arrival: Arrival, frame: &[u8]) {
    let whole = match arrival.link {
        LinkLayer::Ethernet => frame,
        LinkLayer::Raw => &frame[14..],
    };
    let mut gateway = gateway(world);
    let _ = gateway.wan(&syn(world).packet()).departure();
    let _ = gateway.wan(&datagram(world).packet()).departure();
    gateway.hook = arrival.hook;
    let books = gateway.books();
    for len in 0..whole.len() {
        let outcome = gateway.arrive(&arrival, whole[..len].to_vec());
        outcome.passed(PassReason::Malformed);
        assert_eq!(gateway.books(), books, "cut after {len} bytes");
    }
    // The whole one is no Malformed, or cutting it proves nothing.
    let _ = gateway.arrive(&arrival, whole.to_vec()).departure();
}
