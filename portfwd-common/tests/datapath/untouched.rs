//! What is not ours passes bit for bit, and leaves no trace but the count of the reason.

use std::net::IpAddr;

use portfwd_common::{
    abi::Protocol,
    datapath::{Hook, PassReason},
    model::{
        frame::{Draft, Mac, error, ethernet},
        rules::Forward,
    },
};

use crate::gateway::Gateway;
use portfwd_common::model::world::{
    ELSEWHERE, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, WAN_TUNNEL, World, at,
};

const SYN: u8 = 0x02;

fn gateway(world: &World) -> Gateway {
    Gateway::new(&[
        Forward::new(Protocol::Tcp, 80, at(world.target, 8080)),
        Forward::new(Protocol::Udp, 80, at(world.target, 8080)),
        Forward::new(Protocol::Tcp, 443, at(world.target, 443)).on(world.second_listen),
    ])
}

fn syn(world: &World) -> Draft {
    Draft::tcp(at(world.client, 40_000), at(world.listen, 80), SYN)
}

fn datagram(world: &World) -> Draft {
    Draft::udp(at(world.client, 40_000), at(world.listen, 80))
}

/// The frame passes for the reason, by every hook, whether the gateway knows its flow or not.
#[track_caller]
fn passes(world: &World, ifindex: u32, frame: &[u8], reason: PassReason, what: &str) {
    for hook in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
        for is_known in [false, true] {
            println!(
                "{what}, by {hook:?}, {}",
                if is_known { "known" } else { "not known" }
            );
            let mut gateway = gateway(world).by(Hook::Tc);
            if is_known {
                let _ = gateway.wan(&syn(world).packet()).departure();
                let _ = gateway.wan(&datagram(world).packet()).departure();
            }
            gateway.hook = hook;
            let (books, reasons) = (gateway.books(), gateway.model.maps.reasons());
            gateway.frame(ifindex, frame.to_vec()).passed(reason);
            assert_eq!(gateway.books(), books);
            let mut counted = reasons;
            if hook != Hook::TcSlow {
                *counted.entry(reason.index()).or_default() += 1;
            }
            assert_eq!(gateway.model.maps.reasons(), counted);
        }
    }
}

fn from_upstream(packet: &[u8]) -> Vec<u8> {
    ethernet(WAN_MAC, UPSTREAM_MAC, packet)
}

/// The packet with bytes of it set.
fn with(mut packet: Vec<u8>, bytes: &[(usize, u8)]) -> Vec<u8> {
    for (at, byte) in bytes {
        packet[*at] = *byte;
    }
    packet
}

fn with_ethertype(mut frame: Vec<u8>, ethertype: [u8; 2]) -> Vec<u8> {
    frame[12..14].copy_from_slice(&ethertype);
    frame
}

#[test]
fn frames_that_are_not_ip_or_not_for_us() {
    use PassReason::{NotForUs, NotIp};
    const OTHER: Mac = [2, 0, 0, 0, 9, 9];
    const GROUP: Mac = [1, 0, 0x5e, 1, 2, 3];
    for world in World::both() {
        let packet = syn(&world).packet();
        let frame = from_upstream(&packet);
        let tagged = [&frame[..12], &[0x81, 0, 0, 20], &frame[12..]].concat();
        let to = |mac| ethernet(mac, UPSTREAM_MAC, &packet);
        for (what, frame, reason) in [
            ("an ARP frame", with_ethertype(frame.clone(), [8, 6]), NotIp),
            (
                "an LLDP frame",
                with_ethertype(frame.clone(), [0x88, 0xcc]),
                NotIp,
            ),
            (
                "a frame of IEEE 802.3 with a length",
                with_ethertype(frame.clone(), [0, 46]),
                NotIp,
            ),
            ("PPPoE", with_ethertype(frame.clone(), [0x88, 0x64]), NotIp),
            ("MPLS", with_ethertype(frame.clone(), [0x88, 0x47]), NotIp),
            ("a VLAN tag", tagged.clone(), NotIp),
            (
                "two VLAN tags",
                [&frame[..12], &[0x88, 0xa8, 0, 5], &tagged[12..]].concat(),
                NotIp,
            ),
            ("a frame to another station", to(OTHER), NotForUs),
            (
                "a frame to our other interface's address",
                to(LAN_MAC),
                NotForUs,
            ),
            ("a frame to a group", to(GROUP), NotForUs),
            ("a broadcast frame", to([0xff; 6]), NotForUs),
        ] {
            passes(&world, WAN, &frame, reason, what);
        }
    }
}

#[test]
fn packets_that_contradict_themselves() {
    use PassReason::Malformed;
    let world = World::v4();
    let (tcp, udp) = (syn(&world).packet(), datagram(&world).packet());
    let rows = [
        (
            "IPv4 in a frame that says IPv6",
            with_ethertype(from_upstream(&tcp), [0x86, 0xdd]),
        ),
        ("version 5", from_upstream(&with(tcp.clone(), &[(0, 0x55)]))),
        (
            "an IPv4 header of 16 bytes",
            from_upstream(&with(tcp.clone(), &[(0, 0x44)])),
        ),
        (
            "an IPv4 header of no bytes",
            from_upstream(&with(tcp.clone(), &[(0, 0x40)])),
        ),
        (
            "a total length below the header's",
            from_upstream(&with(tcp.clone(), &[(3, 19)])),
        ),
        (
            "a total length of zero",
            from_upstream(&with(tcp.clone(), &[(3, 0)])),
        ),
        (
            "a total length beyond the frame",
            from_upstream(&with(tcp.clone(), &[(3, 41)])),
        ),
        (
            "a TCP header of 16 bytes",
            from_upstream(&with(tcp.clone(), &[(32, 0x40)])),
        ),
        (
            "a TCP header beyond the packet",
            from_upstream(&with(tcp.clone(), &[(32, 0x60)])),
        ),
        (
            "a datagram of 7 bytes",
            from_upstream(&with(udp.clone(), &[(25, 7)])),
        ),
        (
            "a datagram beyond the packet",
            from_upstream(&with(udp.clone(), &[(25, 17)])),
        ),
    ];
    for (what, frame) in rows {
        passes(&world, WAN, &frame, Malformed, what);
    }
    let world = World::v6();
    let (tcp, udp) = (syn(&world).packet(), datagram(&world).packet());
    for (what, frame) in [
        (
            "IPv6 in a frame that says IPv4",
            with_ethertype(from_upstream(&tcp), [8, 0]),
        ),
        (
            "version 7",
            with_ethertype(
                from_upstream(&with(tcp.clone(), &[(0, 0x72)])),
                [0x86, 0xdd],
            ),
        ),
        (
            "a payload length beyond the frame",
            from_upstream(&with(tcp.clone(), &[(5, 21)])),
        ),
        (
            "a payload length below TCP's header",
            from_upstream(&with(tcp.clone(), &[(5, 19)])),
        ),
        (
            "a TCP header of 16 bytes",
            from_upstream(&with(tcp.clone(), &[(52, 0x40)])),
        ),
        (
            "a TCP header beyond the packet",
            from_upstream(&with(tcp.clone(), &[(52, 0x60)])),
        ),
        (
            "a datagram of 7 bytes",
            from_upstream(&with(udp.clone(), &[(45, 7)])),
        ),
        (
            "a datagram beyond the packet",
            from_upstream(&with(udp.clone(), &[(45, 17)])),
        ),
    ] {
        passes(&world, WAN, &frame, Malformed, what);
    }
}

#[test]
fn every_other_protocol() {
    for (world, at, icmp) in [(World::v4(), 9, 1), (World::v6(), 6, 58)] {
        for protocol in (0..=u8::MAX).filter(|number| ![6, 17].contains(number)) {
            let reason = match (world.client, protocol) {
                // Extension headers, which what follows is none of.
                (IpAddr::V6(_), 0 | 43 | 60) => PassReason::Malformed,
                // Of the gateway's own datagrams in fragments other tests tell.
                (IpAddr::V6(_), 44) => continue,
                _ => PassReason::Protocol,
            };
            let payload = datagram(&world).payload(vec![0; 64]).packet();
            // Whatever is there in the place of an ICMP type is no error, and no echo.
            let packet = with(payload, &[(at, protocol)]);
            let start = packet.len() - 72;
            let packet = if protocol == icmp {
                with(packet, &[(start, 40)])
            } else {
                packet
            };
            passes(
                &world,
                WAN,
                &from_upstream(&packet),
                reason,
                &format!("protocol {protocol}"),
            );
        }
    }
}

#[test]
fn icmp_that_is_no_error() {
    for (world, errors, echo) in [
        (World::v4(), &[3_u8, 11, 12][..], [8, 0]),
        (World::v6(), &[1, 2, 3, 4], [128, 129]),
    ] {
        let there = datagram(&world);
        let quoted = there.between(at(world.target, 8080), there.source).packet();
        for kind in (0..=u8::MAX).filter(|kind| !errors.contains(kind)) {
            let packet = error(world.wan_router, world.listen, kind, 0, [0; 4], &quoted);
            let reason = if echo.contains(&kind) {
                PassReason::NoRule
            } else {
                PassReason::Protocol
            };
            passes(
                &world,
                WAN,
                &from_upstream(&packet),
                reason,
                &format!("ICMP type {kind}"),
            );
        }
    }
}

#[test]
fn packets_that_no_rule_and_no_flow_is_about() {
    for world in World::both() {
        let stranger = world.second_client;
        for (what, draft) in [
            (
                "a port without rule",
                syn(&world).between(at(stranger, 1), at(world.listen, 81)),
            ),
            (
                "port zero",
                syn(&world).between(at(stranger, 1), at(world.listen, 0)),
            ),
            (
                "the gateway's LAN address",
                syn(&world).between(at(stranger, 1), at(world.lan_address, 80)),
            ),
            (
                "an address that a rule on another does not listen on",
                syn(&world).between(at(stranger, 1), at(world.listen, 443)),
            ),
            (
                "a backend's own address",
                syn(&world).between(at(stranger, 1), at(world.target, 8080)),
            ),
            (
                "a datagram to a port of TCP only",
                datagram(&world).between(at(stranger, 1), at(world.second_listen, 443)),
            ),
        ] {
            passes(
                &world,
                WAN,
                &from_upstream(&draft.packet()),
                PassReason::NoRule,
                what,
            );
        }
        for (what, draft) in [
            (
                "a backend that speaks from a port of its own",
                syn(&world).between(at(world.target, 8081), at(stranger, 9)),
            ),
            (
                "a backend that speaks to a neighbour",
                syn(&world).between(at(world.target, 8080), at(world.narrow_target, 9)),
            ),
            (
                "a LAN client that dials the gateway's own service",
                syn(&world).between(at(world.second_target, 5), at(world.listen, 22)),
            ),
        ] {
            let frame = ethernet(LAN_MAC, UPSTREAM_MAC, &draft.packet());
            passes(&world, LAN, &frame, PassReason::NoFlow, what);
        }
    }
}

#[test]
fn sources_that_no_router_forwards() {
    let (v4, v6) = (World::v4(), World::v6());
    for (world, sources) in [
        (
            v4,
            &[
                "0.0.0.0",
                "0.1.2.3",
                "127.0.0.1",
                "224.0.0.1",
                "239.255.255.250",
                "240.0.0.1",
                "255.255.255.255",
                "10.3.0.1",
            ][..],
        ),
        (
            v6,
            &[
                "::",
                "::1",
                "fe80::1",
                "febf::1",
                "ff02::1",
                "::ffff:10.0.0.1",
                "::10.0.0.1",
                "2001:db8:3::1",
            ],
        ),
    ] {
        for source in sources {
            let source: IpAddr = source.parse().unwrap();
            for draft in [syn(&world), datagram(&world)] {
                let packet = draft.between(at(source, 80), draft.destination).packet();
                passes(
                    &world,
                    WAN,
                    &from_upstream(&packet),
                    PassReason::NotUnicast,
                    &format!("from {source}"),
                );
            }
        }
    }
}

#[test]
fn interfaces_that_are_not_attached_and_gateways_that_are_not_configured() {
    for world in World::both() {
        let frame = from_upstream(&syn(&world).packet());
        passes(
            &world,
            ELSEWHERE,
            &frame,
            PassReason::NotForUs,
            "an interface of no program",
        );
        // 4096 + WAN has the WAN's slot.
        passes(
            &world,
            4096 + WAN,
            &frame,
            PassReason::NotForUs,
            "an interface that shares a slot",
        );
        let mut gateway = gateway(&world);
        gateway.model.maps.config = None;
        gateway.frame(WAN, frame).passed(PassReason::NotForUs);
        assert_eq!(gateway.flows(), 0);
    }
}

#[test]
fn packets_without_link_header_that_are_not_ip() {
    for world in World::both() {
        for first in [0x00, 0x35, 0x55, 0x75, 0xff] {
            let mut gateway = gateway(&world);
            let packet = with(syn(&world).packet(), &[(0, first)]);
            gateway
                .tunnel(WAN_TUNNEL, &packet)
                .passed(PassReason::NotIp);
        }
    }
}

/// The kernel refuses packets with a source route unless it is told otherwise, and portfwd must not take them past it (RFC 7126
/// sections 4.3.5 and 4.4.5).
#[test]
fn packets_that_say_by_what_way_they_go() {
    const LOOSE: [u8; 8] = [131, 7, 4, 198, 51, 100, 9, 0];
    const STRICT: [u8; 8] = [137, 7, 4, 198, 51, 100, 9, 0];
    const NOTHING: [u8; 4] = [1; 4];
    const RECORD: [u8; 8] = [7, 7, 4, 0, 0, 0, 0, 1];
    let world = &World::both()[0];
    for route in [LOOSE, STRICT] {
        for before in [&[][..], &NOTHING, &RECORD, &[1; 32]] {
            for draft in [syn(world), datagram(world)] {
                let draft = Draft {
                    ip_options: [before, &route].concat(),
                    ..draft
                };
                let frame = from_upstream(&draft.packet());
                passes(
                    world,
                    WAN,
                    &frame,
                    PassReason::SourceRoute,
                    "a source route",
                );
            }
        }
    }
    // Behind the end of the options there is none, and none in one that goes on beyond the header.
    for before in [vec![0; 4], vec![7, 100, 4, 1]] {
        let draft = Draft {
            ip_options: [before.as_slice(), &LOOSE].concat(),
            ..datagram(world)
        };
        let _ = gateway(world).wan(&draft.packet()).departure();
    }
}
