//! IPv6: headers between the IP header and the transport, and addresses, all of whose bits count.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portfwd_common::{
    abi::Protocol,
    datapath::{Hook, PassReason},
    model::{
        effort::cases,
        frame::Draft,
        rules::Forward,
        world::{World, at},
    },
};
use proptest::prelude::*;

use crate::gateway::Gateway;

const IPV6_LEN: usize = 40;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const NOTHING: u8 = 59;
const DESTINATION: u8 = 60;

/// Headers and bytes behind the first eight of each that are stepped over at most.
const MOST: usize = 5;
const LONGEST: u8 = 31;

fn gateway(world: &World) -> Gateway {
    Gateway::new(
        &[Protocol::Tcp, Protocol::Udp].map(|p| Forward::new(p, 80, at(world.target, 8080))),
    )
}

fn sent(world: &World, tcp: bool) -> Draft {
    let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
    if tcp {
        Draft::tcp(client, listen, 0x18).payload(*b"segment")
    } else {
        Draft::udp(client, listen)
    }
}

/// An extension header: its number, how many units of eight bytes follow the first, and byte 3, of a routing header the segments
/// that are left.
#[derive(Clone, Copy, Debug)]
struct Extension {
    number: u8,
    units: u8,
    third: u8,
}

impl Extension {
    /// Its bytes; `next` is what follows it.
    fn bytes(self, next: u8) -> Vec<u8> {
        match self.number {
            // Atomic: neither an offset nor more to come.
            FRAGMENT => vec![next, 0, 0, 0, 1, 2, 3, 4],
            // Counted in units of four bytes less two (RFC 4302 section 2.2).
            AUTHENTICATION => {
                let mut bytes = vec![0xa5; 8 + usize::from(self.units) * 8];
                bytes[..4].copy_from_slice(&[next, self.units * 2, 0, 0]);
                bytes
            }
            _ => {
                let mut bytes = vec![0; 8 + usize::from(self.units) * 8];
                bytes[..4].copy_from_slice(&[next, self.units, 0, self.third]);
                bytes
            }
        }
    }
}

/// A packet with extension headers behind its IP header.
fn with_extensions(packet: &[u8], extensions: &[Extension]) -> Vec<u8> {
    let (head, transport) = packet.split_at(IPV6_LEN);
    let mut head = head.to_vec();
    let numbers = extensions.iter().map(|extension| extension.number);
    let mut numbers = numbers.chain([head[6]]);
    head[6] = numbers.next().unwrap();
    let chain: Vec<u8> = extensions
        .iter()
        .zip(numbers)
        .flat_map(|(extension, next)| extension.bytes(next))
        .collect();
    let length = (chain.len() + transport.len()) as u16;
    head[4..6].copy_from_slice(&length.to_be_bytes());
    [head, chain, transport.to_vec()].concat()
}

/// What stands in the way of translation, by a plain walk.
fn obstacle(extensions: &[Extension]) -> Option<PassReason> {
    let mut is_piece = false;
    for (place, extension) in extensions.iter().enumerate() {
        // What is authenticated must not be translated: it would not be authentic. It is a protocol like any other.
        if extension.number == AUTHENTICATION {
            return Some(PassReason::Protocol);
        }
        let is_twice = is_piece && extension.number == FRAGMENT;
        is_piece |= extension.number == FRAGMENT;
        let goes_on = extension.number == ROUTING && extension.third != 0;
        let is_long = extension.number != FRAGMENT && extension.units > LONGEST;
        if place >= MOST || is_twice || goes_on || is_long {
            return Some(PassReason::Malformed);
        }
    }
    None
}

fn any_extension() -> impl Strategy<Value = Extension> {
    let number = prop::sample::select(vec![
        HOP_BY_HOP,
        DESTINATION,
        DESTINATION,
        ROUTING,
        FRAGMENT,
        AUTHENTICATION,
    ]);
    let units = prop_oneof![9 => 0..4_u8, 1 => 30..34_u8];
    let third = prop_oneof![3 => Just(0_u8), 1 => any::<u8>()];
    (number, units, third).prop_map(|(number, units, third)| Extension {
        number,
        units,
        third,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(10_000)))]
    /// RFC 8200 section 4: the transport is found behind up to five headers, which stay as they are; whatever is longer, names
    /// further destinations or makes no sense passes bit for bit.
    #[test]
    fn any_chain_of_headers_leads_to_the_transport_or_passes(
        extensions in prop::collection::vec(any_extension(), 0..9), tcp in any::<bool>(), hook in prop::sample::select(vec![Hook::Xdp, Hook::Tc]),
    ) {
        let world = World::v6();
        let mut gateway = gateway(&world).by(hook);
        let sent = sent(&world, tcp);
        let delivered = sent.between(sent.source, at(world.target, 8080)).hop();
        let outcome = gateway.wan(&with_extensions(&sent.packet(), &extensions));
        match obstacle(&extensions) {
            None => outcome.reached_lan(&with_extensions(&delivered.packet(), &extensions)),
            Some(reason) => {
                outcome.passed(reason);
                prop_assert_eq!(gateway.flows(), 0);
            }
        }
    }
}

/// RFC 5095: routing header 0 is for the kernel, which answers it with an error. Every type, and any number of segments left.
#[test]
fn a_routing_header_that_leads_on_is_never_followed() {
    let world = World::v6();
    for tcp in [true, false] {
        for kind in 0..=u8::MAX {
            for left in [1, 2, 255] {
                let header = Extension {
                    number: ROUTING,
                    units: 2,
                    third: left,
                };
                let mut packet = with_extensions(&sent(&world, tcp).packet(), &[header]);
                packet[IPV6_LEN + 2] = kind;
                let mut gateway = gateway(&world);
                gateway.wan(&packet).passed(PassReason::Malformed);
                assert_eq!(gateway.flows(), 0);
            }
        }
    }
}

/// RFC 2675: with a length of zero the packet is not empty, but longer than the header can say.
#[test]
fn a_packet_of_unsaid_length_passes() {
    let world = World::v6();
    for tcp in [true, false] {
        let jumbo = Extension {
            number: HOP_BY_HOP,
            units: 0,
            third: 0,
        };
        for extensions in [&[][..], &[jumbo]] {
            let mut packet = with_extensions(&sent(&world, tcp).packet(), extensions);
            packet[4..6].fill(0);
            if !extensions.is_empty() {
                packet[IPV6_LEN + 2..IPV6_LEN + 8].copy_from_slice(&[0xc2, 4, 0, 1, 0, 0]);
            }
            let mut gateway = gateway(&world);
            gateway.wan(&packet).passed(PassReason::Malformed);
            assert_eq!(gateway.flows(), 0);
        }
    }
}

/// What follows a header that says that nothing follows is not read, whatever it looks like.
#[test]
fn nothing_is_read_behind_no_next_header() {
    let world = World::v6();
    for tcp in [true, false] {
        let options = Extension {
            number: DESTINATION,
            units: 0,
            third: 0,
        };
        for extensions in [&[][..], &[options]] {
            let mut packet = with_extensions(&sent(&world, tcp).packet(), extensions);
            let name = if extensions.is_empty() { 6 } else { IPV6_LEN };
            packet[name] = NOTHING;
            gateway(&world).wan(&packet).passed(PassReason::Protocol);
        }
    }
}

/// A translator for other families beside us keeps its packets (RFC 6146; 64:ff9b::/96 is the well-known prefix).
#[test]
fn addresses_of_a_translator_beside_us_pass() {
    let world = World::v6();
    let embedded: IpAddr = Ipv4Addr::new(192, 0, 2, 33).to_ipv6_mapped().into();
    let well_known: IpAddr = "64:ff9b::192.0.2.33".parse().unwrap();
    for address in [well_known, embedded] {
        for tcp in [true, false] {
            let sent = sent(&world, tcp);
            let to = sent.between(sent.source, at(address, 80)).packet();
            gateway(&world).wan(&to).passed(PassReason::NoRule);
            gateway(&world).lan(&to).passed(PassReason::NoFlow);
        }
    }
}

/// The address with one of its bits turned.
fn turned(address: IpAddr, bit: u32) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ 1 << bit).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() ^ 1 << bit).into(),
    }
}

#[test]
fn every_bit_of_every_address_counts() {
    for world in World::both() {
        for bit in 0..world.bits() {
            let mut gateway = gateway(&world);
            let sent = Draft::udp(at(world.client, 40_000), at(world.listen, 80));
            let _ = gateway.wan(&sent.packet()).departure();
            let answer = sent.between(at(world.target, 8080), sent.source);
            // The other WAN address differs in two bits.
            let elsewhere = at(turned(world.listen, bit), 80);
            gateway
                .wan(&sent.between(sent.source, elsewhere).packet())
                .passed(PassReason::NoRule);
            let neighbour = at(turned(world.target, bit), 8080);
            gateway
                .lan(&answer.between(neighbour, sent.source).packet())
                .passed(PassReason::NoFlow);
            assert_eq!(gateway.flows(), 1, "bit {bit}");
            // Another client: what leaves is of no flow, or of one of its own, but never of this.
            let other = at(turned(world.client, bit), 40_000);
            let books = gateway.books();
            let _ = gateway.wan(&sent.between(other, sent.destination).packet());
            let after = gateway.books();
            assert!(
                books.v4.iter().all(|flow| after.v4.contains(flow)),
                "bit {bit}"
            );
            assert!(
                books.v6.iter().all(|flow| after.v6.contains(flow)),
                "bit {bit}"
            );
        }
    }
}
