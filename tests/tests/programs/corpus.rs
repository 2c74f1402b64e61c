//! Frames picked by hand: one of every kind of each field that the datapath looks at, and all of them cut short anywhere.

use portfwd_common::model::{
    frame::{Draft, Transport, after_hop, error, ethernet},
    world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
};

/// A frame, and the interface it comes in by.
pub type Arriving = (u32, Vec<u8>);

fn wan(packet: &[u8]) -> Arriving {
    (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet))
}

fn lan(packet: &[u8]) -> Arriving {
    (LAN, ethernet(LAN_MAC, BACKEND_MAC, packet))
}

/// A conversation of every transport with [`crate::traffic::rule_sets`], and errors about it both ways.
fn conversations(world: &World) -> Vec<Arriving> {
    let client = at(world.client, 40_000);
    let mut frames = Vec::new();
    for (transport, port, target) in [
        (Transport::Tcp(0x02), 80, at(world.target, 8080)),
        (Transport::Udp, 53, at(world.target, 1053)),
        (
            Transport::UdpWithoutSum,
            1001,
            at(world.second_target, 1001),
        ),
    ] {
        let listen = at(world.listen, port);
        let sent = Draft {
            transport,
            ..Draft::udp(client, listen).payload([0x5a; 30])
        };
        let answered = sent.between(target, client);
        let delivered = sent.between(client, target).packet();
        let received = sent.between(listen, client).packet();
        let kind = if world.is_v4() { 3 } else { 1 };
        frames.extend([wan(&sent.packet()), lan(&answered.packet())]);
        frames.extend([wan(&sent.packet()), lan(&answered.packet())]);
        frames.push(lan(&error(
            world.lan_router,
            world.client,
            kind,
            1,
            [0; 4],
            &after_hop(delivered),
        )));
        frames.push(wan(&error(
            world.wan_router,
            world.listen,
            kind,
            1,
            [0; 4],
            &after_hop(received),
        )));
    }
    frames
}

/// Conversations, and every frame of them cut after every byte that leaves a link header.
pub fn truncated(world: &World) -> Vec<Arriving> {
    let whole = conversations(world);
    let mut frames = whole.clone();
    for (ifindex, frame) in whole {
        frames.extend((14..=frame.len()).map(|len| (ifindex, frame[..len].to_vec())));
    }
    frames
}

/// A frame with every value in one of its bytes, for every byte of the headers: protocols, versions, header lengths, flags,
/// types, codes and all else.
pub fn every_header_byte(world: &World) -> Vec<Arriving> {
    let mut frames = Vec::new();
    let conversations = conversations(world);
    for (ifindex, frame) in &conversations {
        frames.push((*ifindex, frame.clone()));
    }
    // Errors quote headers; their own come first.
    for (ifindex, frame) in conversations {
        for at in 12..frame.len().min(14 + 40 + 24) {
            for value in interesting(frame[at]) {
                let mut changed = frame.clone();
                changed[at] = value;
                frames.push((ifindex, changed));
            }
        }
    }
    frames
}

/// Values that take every branch of a byte: its own, those near it, each single bit, and the ends.
fn interesting(byte: u8) -> impl Iterator<Item = u8> {
    let bits = (0..8).map(move |bit| byte ^ (1 << bit));
    bits.chain([
        0,
        1,
        0x7f,
        0x80,
        0xff,
        byte.wrapping_add(1),
        byte.wrapping_sub(1),
    ])
}

/// TCP segments with every set of flags, to a connection that is not there and, the second time, to whatever came of it.
pub fn every_flag(world: &World) -> Vec<Arriving> {
    let mut frames = Vec::new();
    for flags in 0..=u8::MAX {
        let client = at(world.client, 1_000 + u16::from(flags));
        let sent = Draft::tcp(client, at(world.listen, 80), flags);
        let answered = Draft::tcp(at(world.target, 8080), client, flags);
        frames.extend([
            wan(&sent.packet()),
            wan(&sent.packet()),
            lan(&answered.packet()),
        ]);
    }
    frames
}

/// SYNs and their answers with a segment size at every offset, to a rule that has it lowered and to one that does not.
pub fn every_segment_size(world: &World) -> Vec<Arriving> {
    let mut frames = Vec::new();
    for before in 0..=36_u16 {
        for (number, size) in (0_u16..).zip([0, 0x05a0, 0x05a1, 0x05b4, 0x05b5, 0xff00, 0xffff]) {
            let mut options = vec![1; usize::from(before)];
            options.extend([2, 4]);
            options.extend(u16::to_be_bytes(size));
            options.resize(options.len().next_multiple_of(4), 0);
            for (listen, target) in [(80, 8080), (82, 82)] {
                let client = at(world.client, 3_000 + 37 * number + before);
                let sent = Draft {
                    tcp_options: options.clone(),
                    ..Draft::tcp(client, at(world.listen, listen), 0x02)
                };
                let answered = Draft {
                    transport: Transport::Tcp(0x12),
                    ..sent.between(at(world.target, target), client)
                };
                frames.extend([wan(&sent.packet()), lan(&answered.packet())]);
            }
        }
    }
    frames
}

/// IPv4 headers of every length, with padding behind the packet of every small size.
pub fn every_header_length(world: &World) -> Vec<Arriving> {
    let mut frames = Vec::new();
    for words in 0..=10 {
        for padding in [0, 1, 6, 18] {
            for transport in [Transport::Tcp(0x02), Transport::Udp] {
                let client = at(world.client, 2_000 + words);
                let port = if transport == Transport::Udp { 53 } else { 80 };
                let options = if world.is_v4() {
                    usize::from(words) * 4
                } else {
                    0
                };
                let draft = Draft {
                    transport,
                    ip_options: vec![1; options],
                    tcp_options: vec![1; usize::from(words) * 4],
                    ..Draft::udp(client, at(world.listen, port))
                };
                let padding = vec![0xee; padding];
                frames.push(wan(&[draft.packet(), padding].concat()));
            }
        }
    }
    frames
}
