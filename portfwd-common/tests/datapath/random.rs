//! Packets nobody thought of.

use std::net::SocketAddr;

use portfwd_common::model::effort::cases;
use portfwd_common::{
    abi::{Config, LinkLayer, Protocol},
    datapath::{Hook, Verdict, Way},
    model::{
        frame::{Draft, Transport, error, ethernet},
        rules::Forward,
    },
};
use proptest::prelude::*;

use crate::{
    gateway::{Gateway, Outcome, hex},
    mss::{clamped, largest, size_in},
};
use portfwd_common::model::world::{
    BACKEND_MAC, LAN, LAN_MAC, MTU, UPSTREAM_MAC, WAN, WAN_MAC, World, at,
};

/// Rules for both protocols: a port, a range, and a whole set of ports of one address.
fn forwards(world: &World) -> Vec<Forward> {
    [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .flat_map(|protocol| {
            [
                Forward::new(protocol, 80, at(world.target, 8080)),
                Forward::new(protocol, 1000, at(world.target, 2000)).to(1019),
                Forward::new(protocol, 65_500, at(world.second_target, 65_500))
                    .to(65_535)
                    .on(world.second_listen),
            ]
        })
        .collect()
}

/// A gateway with these rules, and some for everything else if it is to have any.
fn gateway(world: &World, has_rests: bool) -> Gateway {
    let mut forwards = forwards(world);
    if has_rests {
        forwards.extend(Protocol::ALL.map(|protocol| Forward::rest(protocol, world.target)));
    }
    let mut gateway = Gateway::new(&forwards);
    if has_rests {
        let config = gateway.model.maps.config.as_mut().unwrap();
        config.flags |= Config::HAS_RESTS;
    }
    gateway
}

/// Where a rule sends a listen endpoint.
fn target_of(world: &World, listen: SocketAddr) -> SocketAddr {
    if listen.ip() == world.second_listen {
        at(world.second_target, listen.port())
    } else if listen.port() == 80 {
        at(world.target, 8080)
    } else {
        at(world.target, listen.port() + 1000)
    }
}

fn any_transport() -> impl Strategy<Value = Transport> {
    let legal = prop::sample::select(vec![0x02_u8, 0x12, 0x10, 0x11, 0x18, 0xc2, 0xf0]);
    prop_oneof![
        legal.prop_map(Transport::Tcp),
        Just(Transport::Udp),
        Just(Transport::UdpWithoutSum)
    ]
}

prop_compose! {
    fn any_draft()(
        v6 in any::<bool>(),
        second in any::<bool>(),
        listen in 0..3_u8,
        port in any::<u16>(),
        client_port in any::<u16>(),
        transport in any_transport(),
        hop_limit in 2..=255_u8,
        dont_fragment in any::<bool>(),
        ip_words in 0..=10_usize,
        tcp_words in 0..=10_usize,
        // None of them a source route, with which a packet is none of ours.
        options in prop::collection::vec(any::<u8>().prop_map(|byte| if matches!(byte, 131 | 137) { 0 } else { byte }), 80),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) -> (World, Draft) {
        let world = World::both()[usize::from(v6)];
        let client = if second { world.second_client } else { world.client };
        let listen = match listen {
            0 => at(world.listen, 80),
            1 => at(world.listen, 1000 + port % 20),
            _ => at(world.second_listen, 65_500 + port % 36),
        };
        let draft = Draft {
            source: at(client, client_port),
            destination: listen,
            transport,
            hop_limit,
            dont_fragment,
            ip_options: if v6 { Vec::new() } else { options[..ip_words * 4].to_vec() },
            tcp_options: options[40..40 + tcp_words * 4].to_vec(),
            payload,
            ..Draft::udp(listen, listen)
        };
        (world, draft)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(10_000)))]
    #[test]
    fn any_packet_there_and_back_is_itself_but_for_hops_and_macs((world, sent) in any_draft(), xdp in any::<bool>()) {
        let target = target_of(&world, sent.destination);
        let mut gateway = Gateway::new(&forwards(&world));
        gateway.hook = if xdp { Hook::Xdp } else { Hook::Tc };
        let received = clamped(sent.clone().hop(), largest(&world, MTU));
        for _ in 0..2 {
            gateway.wan(&sent.packet()).reached_lan(&received.between(sent.source, target).packet());
            // The backend sends the very same back, as an echo service does.
            let echoed = sent.between(target, sent.source);
            gateway.lan(&echoed.packet()).reached_wan(&received.between(sent.destination, sent.source).packet());
        }
        prop_assert_eq!(gateway.flows(), 1);
    }
}

/// The bytes of a frame that translation may change: MAC addresses, hop limit, addresses, ports and header sums, those of a
/// quoted packet included.
fn may_change(frame: &[u8]) -> Vec<bool> {
    let mut mask = vec![false; frame.len()];
    mask[..12].fill(true);
    let (network, icmp) = (14, if frame[14] >> 4 == 4 { 1 } else { 58 });
    let (transport, protocol) = allow_network(&mut mask, frame, network);
    if protocol == icmp {
        mask[transport + 2..transport + 4].fill(true);
        let (transport, protocol) = allow_network(&mut mask, frame, transport + 8);
        allow_transport(&mut mask, transport, protocol);
    } else {
        allow_transport(&mut mask, transport, protocol);
        if protocol == 6 {
            allow_segment_size(&mut mask, &frame[transport..], transport);
        }
    }
    mask
}

fn allow_network(mask: &mut [bool], frame: &[u8], at: usize) -> (usize, u8) {
    if frame[at] >> 4 == 4 {
        mask[at + 8] = true;
        mask[at + 10..at + 20].fill(true);
        (at + usize::from(frame[at] & 15) * 4, frame[at + 9])
    } else {
        mask[at + 7] = true;
        mask[at + 8..at + 40].fill(true);
        (at + 40, frame[at + 6])
    }
}

fn allow_transport(mask: &mut [bool], at: usize, protocol: u8) {
    mask[at..at + 4].fill(true);
    let sum = at + if protocol == 6 { 16 } else { 6 };
    let end = mask.len();
    mask[sum.min(end)..(sum + 2).min(end)].fill(true);
}

/// The segment size of a SYN.
fn allow_segment_size(mask: &mut [bool], segment: &[u8], at: usize) {
    let [.., length, flags] = segment[..14.min(segment.len())] else {
        return;
    };
    let end = (usize::from(length >> 4) * 4).min(segment.len());
    if segment.len() >= 20
        && flags & 0x02 != 0
        && let Some(size) = segment.get(20..end).and_then(size_in)
    {
        mask[at + 20 + size..at + 22 + size].fill(true);
    }
}

/// Whatever came of it, nothing was changed that may not be.
fn is_decent(outcome: &Outcome) {
    match outcome.verdict {
        Verdict::Pass(_) | Verdict::Drop(_) => {
            assert_eq!(hex(&outcome.after), hex(&outcome.before));
        }
        // An IP and an ICMP header, of IPv6 at most, in front of what is quoted.
        Verdict::Refuse(_) => assert!(outcome.after.len() <= outcome.before.len() + 40 + 8),
        // Nothing is translated yet; what comes in again is looked at then.
        Verdict::Forward(departure)
            if matches!(departure.way, Way::Hold | Way::Again | Way::Cut) => {}
        Verdict::Forward(_) => {
            assert_eq!(outcome.after.len(), outcome.before.len());
            let mask = may_change(&outcome.before);
            for (at, may) in mask.into_iter().enumerate() {
                assert!(
                    may || outcome.after[at] == outcome.before[at],
                    "byte {at} of {:?}",
                    hex(&outcome.before)
                );
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Mutation {
    Flip { at: prop::sample::Index, bit: u8 },
    Set { at: prop::sample::Index, byte: u8 },
    Cut { at: prop::sample::Index },
    Pad { bytes: u8 },
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), 0..8_u8).prop_map(|(at, bit)| Mutation::Flip { at, bit }),
        4 => (index(), prop::sample::select(vec![0_u8, 1, 0x40, 0x45, 0x46, 0x60, 0x7f, 0x80, 0xff])).prop_map(|(at, byte)| Mutation::Set { at, byte }),
        1 => index().prop_map(|at| Mutation::Cut { at }),
        1 => (1..64_u8).prop_map(|bytes| Mutation::Pad { bytes }),
    ]
}

/// Headers are where it hurts.
const HEADERS: usize = 130;

fn mutate(frame: &mut Vec<u8>, mutation: Mutation) {
    let reach = frame.len().min(HEADERS);
    if reach == 0 {
        return;
    }
    match mutation {
        Mutation::Flip { at, bit } => frame[at.index(reach)] ^= 1 << bit,
        Mutation::Set { at, byte } => frame[at.index(reach)] = byte,
        Mutation::Cut { at } => frame.truncate(at.index(frame.len())),
        Mutation::Pad { bytes } => frame.resize(frame.len() + usize::from(bytes), bytes),
    }
}

/// Every kind of frame about a conversation.
fn frames(world: &World, sent: &Draft) -> [(u32, Vec<u8>); 4] {
    let target = target_of(world, sent.destination);
    let delivered = sent.between(sent.source, target);
    let answered = sent.between(target, sent.source);
    let received = sent.between(sent.destination, sent.source);
    let kind = if world.client.is_ipv4() { 3 } else { 1 };
    let wan = |packet: &[u8]| (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet));
    let lan = |packet: &[u8]| (LAN, ethernet(LAN_MAC, BACKEND_MAC, packet));
    [
        wan(&sent.packet()),
        lan(&answered.packet()),
        lan(&error(
            world.lan_router,
            sent.source.ip(),
            kind,
            1,
            [0; 4],
            &delivered.packet(),
        )),
        wan(&error(
            world.wan_router,
            sent.destination.ip(),
            kind,
            1,
            [0; 4],
            &received.packet(),
        )),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(20_000)))]
    #[test]
    fn damaged_frames_are_left_alone_or_translated_decently(
        (world, sent) in any_draft(), mutations in prop::collection::vec(any_mutation(), 1..4), which in 0..4_usize,
        hook in prop::sample::select(vec![Hook::Xdp, Hook::Tc, Hook::TcSlow, Hook::TcOut]), raw in any::<bool>(),
        has_rests in any::<bool>(),
    ) {
        let mut gateway = gateway(&world, has_rests);
        let [first, ..] = frames(&world, &sent);
        let _ = gateway.frame(first.0, first.1).departure();
        let (ifindex, mut frame) = frames(&world, &sent)[which].clone();
        for mutation in mutations {
            mutate(&mut frame, mutation);
        }
        gateway.hook = hook;
        let arrival = gateway.arrival(ifindex);
        if raw && frame.len() > 14 {
            let packet = frame.split_off(14);
            let arrival = portfwd_common::datapath::Arrival { link: LinkLayer::Raw, ..arrival };
            let outcome = gateway.arrive(&arrival, packet);
            if let Verdict::Pass(_) | Verdict::Drop(_) = outcome.verdict {
                prop_assert_eq!(outcome.after, outcome.before);
            }
        } else {
            is_decent(&gateway.arrive(&arrival, frame));
        }
        let _ = gateway.flows();
    }

    #[test]
    fn noise_is_left_alone_or_translated_decently(
        v6 in any::<bool>(), bytes in prop::collection::vec(any::<u8>(), 0..200), hook in prop::sample::select(vec![Hook::Xdp, Hook::Tc]),
        has_rests in any::<bool>(),
    ) {
        let world = World::both()[usize::from(v6)];
        let mut gateway = gateway(&world, has_rests).by(hook);
        // As it is, and behind headers that lead further in.
        let mut packet = Draft::udp(at(world.client, 1), at(world.listen, 80)).packet();
        let ip_len = if v6 { 40 } else { 20 };
        for keep in [0, 2, ip_len, ip_len + 4] {
            packet.truncate(keep.min(packet.len()));
            is_decent(&gateway.frame(WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &[&packet[..], &bytes].concat())));
            packet = Draft::udp(at(world.client, 1), at(world.listen, 80)).packet();
        }
        is_decent(&gateway.frame(WAN, bytes));
    }
}
