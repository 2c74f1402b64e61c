//! What NAT has no business with stays bit for bit.

use portfwd_common::{
    abi::{Protocol, Rule},
    datapath::{Hook, PassReason},
    model::{
        effort::cases,
        frame::{Draft, after_hop, error},
        rules::{Forward, Source},
        world::{World, at},
    },
};
use proptest::prelude::*;

use crate::gateway::Gateway;

fn forwards(world: &World) -> [Forward; 2] {
    [Protocol::Tcp, Protocol::Udp].map(|p| Forward::new(p, 80, at(world.target, 8080)))
}

/// The sum of RFC 1071, written down once more.
fn ones_sum(bytes: &[u8]) -> u32 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (folded & 0xffff) + (folded >> 16)
}

/// Sets a packet's sums anew.
fn resum(packet: &mut [u8]) {
    let is_v4 = packet[0] >> 4 == 4;
    let (transport, addresses, protocol) = if is_v4 {
        (usize::from(packet[0] & 15) * 4, 12..20, packet[9])
    } else {
        (40, 8..40, packet[6])
    };
    if is_v4 {
        packet[10..12].fill(0);
        let sum = !(ones_sum(&packet[..transport]) as u16);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let at = transport + if protocol == 6 { 16 } else { 6 };
    packet[at..at + 2].fill(0);
    let length = (packet.len() - transport) as u32;
    let pseudo = [
        &packet[addresses],
        &length.to_be_bytes(),
        &[0, 0, 0, protocol],
    ]
    .concat();
    let sum = ones_sum(&[&pseudo[..], &packet[transport..]].concat()) as u16;
    let sum = match (!sum, protocol) {
        (0, 17) => 0xffff,
        (sum, _) => sum,
    };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Fields that are no concern of NAT.
#[derive(Clone, Copy, Debug)]
struct Markings {
    class: u8,
    label: u32,
    id: u16,
    reserved: bool,
    tcp_reserved: u8,
    urgent: u16,
}

fn any_markings() -> impl Strategy<Value = Markings> {
    any::<(u8, u32, u16, bool, u8, u16)>().prop_map(
        |(class, label, id, reserved, tcp_reserved, urgent)| Markings {
            class,
            label,
            id,
            reserved,
            tcp_reserved,
            urgent,
        },
    )
}

fn marked(mut packet: Vec<u8>, marks: &Markings) -> Vec<u8> {
    let transport = if packet[0] >> 4 == 4 {
        packet[1] = marks.class;
        packet[4..6].copy_from_slice(&marks.id.to_be_bytes());
        packet[6] |= u8::from(marks.reserved) << 7;
        20
    } else {
        let word = 6 << 28 | u32::from(marks.class) << 20 | marks.label & 0xf_ffff;
        packet[..4].copy_from_slice(&word.to_be_bytes());
        40
    };
    let protocol = if transport == 20 {
        packet[9]
    } else {
        packet[6]
    };
    if protocol == 6 {
        packet[transport + 12] |= marks.tcp_reserved & 15;
        packet[transport + 18..transport + 20].copy_from_slice(&marks.urgent.to_be_bytes());
    }
    resum(&mut packet);
    packet
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(10_000)))]
    /// Traffic class, flow label, identification, reserved bits, urgent pointer: as they came, on the first packet and on those
    /// of a known flow, in both directions.
    #[test]
    fn markings_of_every_kind_stay_as_they_are(
        v6 in any::<bool>(), tcp in any::<bool>(), xdp in any::<bool>(), marks in any_markings(), more in any_markings(),
    ) {
        let world = World::both()[usize::from(v6)];
        let hook = if xdp { Hook::Xdp } else { Hook::Tc };
        let mut gateway = Gateway::new(&forwards(&world)).by(hook);
        let (client, listen, target) = (at(world.client, 40_000), at(world.listen, 80), at(world.target, 8080));
        let sent = if tcp { Draft::tcp(client, listen, 0x18) } else { Draft::udp(client, listen) };
        for marks in [marks, more] {
            let delivered = sent.between(client, target).hop();
            gateway.wan(&marked(sent.packet(), &marks)).reached_lan(&marked(delivered.packet(), &marks));
            let answer = sent.between(target, client);
            let received = sent.between(listen, client).hop();
            gateway.lan(&marked(answer.packet(), &marks)).reached_wan(&marked(received.packet(), &marks));
        }
    }
}

/// Addresses and ports in payloads mean nothing here: there is no application gateway (RFC 4787 REQ-10), so no payload opens a way
/// in (NAT slipstreaming), and none is edited.
#[test]
fn payloads_that_name_endpoints_open_nothing_and_stay_as_they_are() {
    for world in World::both() {
        let (client, listen, target) = (
            at(world.client, 40_000),
            at(world.listen, 80),
            at(world.target, 8080),
        );
        let words =
            |endpoint: std::net::SocketAddr| endpoint.ip().to_string().replace(['.', ':'], ",");
        for payload in [
            format!("PORT {},31,144\r\n", words(target)),
            format!("227 Entering Passive Mode ({},31,144).\r\n", words(target)),
            format!("229 Entering Extended Passive Mode (|||{}|)\r\n", 8080),
            format!("REGISTER sip:{target} SIP/2.0\r\nContact: <sip:a@{target}>\r\n\r\n"),
            format!("c=IN IP4 {}\r\nm=audio 5004 RTP/AVP 0\r\n", target.ip()),
            format!(
                "SETUP rtsp://{target}/a RTSP/1.0\r\nTransport: RTP/AVP;client_port=5004-5005\r\n\r\n"
            ),
            format!("\u{1}DCC CHAT chat 167772170 {}\u{1}\r\n", 5004),
        ] {
            for tcp in [true, false] {
                let mut gateway = Gateway::new(&forwards(&world));
                let sent = if tcp {
                    Draft::tcp(client, listen, 0x18)
                } else {
                    Draft::udp(client, listen)
                }
                .payload(payload.clone());
                gateway
                    .wan(&sent.packet())
                    .reached_lan(&sent.between(client, target).hop().packet());
                gateway
                    .lan(&sent.between(target, client).packet())
                    .reached_wan(&sent.between(listen, client).hop().packet());
                assert_eq!(gateway.flows(), 1, "{payload:?}");
                for port in [5004, 5005, 5060, 8080, 31 * 256 + 144] {
                    let inward = Draft::udp(at(world.second_client, 9), at(world.listen, port));
                    gateway.wan(&inward.packet()).passed(PassReason::NoRule);
                }
            }
        }
    }
}

/// The MTU that a router reports is for the sender to judge, whatever it is; here it is neither changed nor remembered.
#[test]
fn every_reported_mtu_is_handed_on_as_it_is() {
    for world in World::both() {
        let mut gateway = Gateway::new(&forwards(&world));
        let (client, listen, target) = (
            at(world.client, 40_000),
            at(world.listen, 80),
            at(world.target, 8080),
        );
        let sent = Draft::udp(client, listen).payload(vec![7; 1_400]);
        let _ = gateway.wan(&sent.packet()).departure();
        let answer = sent.between(target, client);
        let _ = gateway.lan(&answer.packet()).departure();
        let (books, hops) = (gateway.books(), gateway.model.maps.next_hops());
        let (kind, code) = if world.is_v4() { (3, 4) } else { (2, 0) };
        let delivered = sent.between(client, target).hop().packet();
        let quoted = sent.clone().hop().packet();
        for mtu in (0..=u16::MAX)
            .step_by(97)
            .chain([68, 296, 552, 1_280, 1_500, u16::MAX])
        {
            let [high, low] = mtu.to_be_bytes();
            let rest = if world.is_v4() {
                [0, 0, high, low]
            } else {
                [low, high, high, low]
            };
            let arriving = error(world.lan_router, world.client, kind, code, rest, &delivered);
            let leaving = after_hop(error(world.listen, world.client, kind, code, rest, &quoted));
            gateway.lan(&arriving).reached_wan(&leaving);
        }
        assert_eq!(gateway.books(), books);
        assert_eq!(gateway.model.maps.next_hops(), hops);
        // Packets as large as before still leave.
        let _ = gateway.wan(&sent.packet()).departure();
    }
}

/// What has been translated is nobody's that meets the programs again, by either interface: on a bridge and its port, in generic
/// XDP and TC, or sent back round a corner.
#[test]
fn a_packet_that_comes_by_twice_is_translated_once() {
    for world in World::both() {
        for source in [Source::Client, Source::Masquerade] {
            for first in [Hook::Xdp, Hook::Tc] {
                let mut gateway = Gateway::new(&forwards(&world).map(|f| f.from(source))).by(first);
                let sent = Draft::udp(at(world.client, 40_000), at(world.listen, 80));
                let outcome = gateway.wan(&sent.packet());
                let _ = outcome.departure();
                let translated = outcome.after[14..].to_vec();
                let books = gateway.books();
                for second in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
                    gateway.hook = second;
                    gateway.wan(&translated).passed(PassReason::NoRule);
                    gateway.lan(&translated).passed(PassReason::NoFlow);
                }
                assert_eq!(gateway.books(), books);
            }
        }
    }
}

/// A first segment that is sent again after its rule was pointed elsewhere goes where the first one went, if the rule's flows are
/// spared; a new connection goes to the new target.
#[test]
fn a_syn_that_comes_again_keeps_the_target_it_had() {
    for world in World::both() {
        let (old, new) = (at(world.target, 8080), at(world.second_target, 8080));
        let rule = |target| Forward::new(Protocol::Tcp, 80, target);
        let mut gateway = Gateway::new(&[rule(old)]);
        let syn = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), 0x02);
        let before = *gateway.model.maps.rules.rules.get(&1).unwrap();
        gateway
            .wan(&syn.packet())
            .reached_lan(&syn.between(syn.source, old).hop().packet());
        // As the daemon leaves it: the old slot is closed, the port leads to another.
        gateway.set_rules(&[Forward::new(Protocol::Tcp, 81, old), rule(new)]);
        let closed = Rule {
            flags: before.flags | Rule::CLOSED,
            ..before
        };
        gateway.model.maps.rules.rules.insert(1, closed);
        for seconds in [1, 2, 4, 8] {
            gateway.wait(seconds);
            gateway
                .wan(&syn.packet())
                .reached_lan(&syn.between(syn.source, old).hop().packet());
        }
        let another = syn.between(at(world.client, 40_001), syn.destination);
        gateway
            .wan(&another.packet())
            .reached_lan(&another.between(another.source, new).hop().packet());
        // Once the embryo is dead, the old 5-tuple is new, too.
        gateway.wait(241);
        gateway
            .wan(&syn.packet())
            .reached_lan(&syn.between(syn.source, new).hop().packet());
    }
}
