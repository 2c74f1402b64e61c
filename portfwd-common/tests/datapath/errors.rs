//! ICMP and ICMPv6 errors about forwarded flows.

use std::net::IpAddr;

use etherparse::Ipv4Header;
use portfwd_common::{
    abi::Protocol,
    datapath::{Event, Hook, PassReason, Verdict, Way},
    model::{
        frame::{Draft, QUOTED_TRANSPORT, Transport, after_hop, error},
        rules::Forward,
    },
};

use crate::gateway::{Gateway, Outcome, hex};
use portfwd_common::model::world::{World, at};

/// A conversation that errors are about.
#[derive(Clone, Debug)]
struct Talk {
    world: World,
    /// What the client sends, before translation.
    sent: Draft,
    /// The same as it reaches the target.
    delivered: Draft,
    /// What the target answers, before translation.
    answered: Draft,
    /// The same as it reaches the client.
    received: Draft,
}

/// Which way an error travels.
#[derive(Clone, Copy, Debug)]
enum About {
    /// To the client, about what it sent.
    Sent,
    /// To the target, about what it answered.
    Answered,
}

impl Talk {
    fn new(world: World, transport: Transport) -> Self {
        let (listen, target) = match transport {
            Transport::Tcp(_) | Transport::Udp | Transport::UdpWithoutSum => (80, 8080),
            Transport::Echo => (0, 0),
        };
        let (client, listen, target) = (
            at(world.client, 40_000),
            at(world.listen, listen),
            at(world.target, target),
        );
        let sent = Draft {
            transport,
            payload: (0..200).collect(),
            ..Draft::udp(client, listen)
        };
        Self {
            delivered: sent.between(client, target).hop(),
            answered: sent.between(target, client),
            received: sent.between(listen, client).hop(),
            sent,
            world,
        }
    }

    fn all() -> Vec<Self> {
        let transports = [
            Transport::Tcp(0x18),
            Transport::Udp,
            Transport::UdpWithoutSum,
            Transport::Echo,
        ];
        World::both()
            .into_iter()
            .flat_map(|world| transports.map(|transport| Self::new(world, transport)))
            .collect()
    }

    /// With IPv4 options in every packet.
    fn with_options(&self, bytes: usize) -> Self {
        let set = |draft: &Draft| Draft {
            ip_options: vec![1; bytes],
            ..draft.clone()
        };
        Self {
            world: self.world,
            sent: set(&self.sent),
            delivered: set(&self.delivered),
            answered: set(&self.answered),
            received: set(&self.received),
        }
    }

    fn protocol(&self) -> Protocol {
        match self.sent.transport {
            Transport::Tcp(_) => Protocol::Tcp,
            Transport::Udp | Transport::UdpWithoutSum => Protocol::Udp,
            Transport::Echo => Protocol::Echo,
        }
    }

    /// A gateway that carries the conversation.
    fn gateway(&self) -> Gateway {
        let (listen, target) = (self.sent.destination, self.delivered.destination);
        let rule = Forward::new(self.protocol(), listen.port(), target);
        let mut gateway = Gateway::new(&[rule]);
        let _ = gateway.wan(&self.sent.packet()).departure();
        let _ = gateway.lan(&self.answered.packet()).departure();
        gateway
    }

    /// What a router quotes of the packet, and what the quotation must become: the packet as its sender sent it, but for its
    /// hops.
    fn quotations(&self, about: About) -> (Draft, Draft) {
        let (quoted, sender) = match about {
            About::Sent => (&self.delivered, &self.sent),
            About::Answered => (&self.received, &self.answered),
        };
        let restored = Draft {
            hop_limit: quoted.hop_limit,
            ..sender.clone()
        };
        (quoted.clone(), restored)
    }

    fn send(&self, gateway: &mut Gateway, about: About, packet: &[u8]) -> Outcome {
        match about {
            About::Sent => gateway.lan(packet),
            About::Answered => gateway.wan(packet),
        }
    }

    /// An error of a router as it arrives, and the same as it must leave.
    fn errors(
        &self,
        about: About,
        kind: u8,
        code: u8,
        rest: [u8; 4],
        quoted: &[u8],
        restored: &[u8],
    ) -> (Vec<u8>, Vec<u8>) {
        let world = self.world;
        match about {
            About::Sent => (
                error(world.lan_router, world.client, kind, code, rest, quoted),
                // The listen address stands for the whole other side.
                after_hop(error(
                    world.listen,
                    world.client,
                    kind,
                    code,
                    rest,
                    restored,
                )),
            ),
            About::Answered => (
                error(world.wan_router, world.listen, kind, code, rest, quoted),
                after_hop(error(
                    world.wan_router,
                    world.target,
                    kind,
                    code,
                    rest,
                    restored,
                )),
            ),
        }
    }

    #[track_caller]
    fn carried(&self, gateway: &mut Gateway, about: About, arriving: &[u8], leaving: &[u8]) {
        let outcome = self.send(gateway, about, arriving);
        match about {
            About::Sent => outcome.reached_wan(leaving),
            About::Answered => outcome.reached_lan(leaving),
        }
    }

    fn unreachable(&self) -> u8 {
        unreachable(self.world.client)
    }

    /// Length of a packet's headers below the transport.
    fn ip_len(&self) -> usize {
        match self.world.client {
            IpAddr::V4(_) => 20 + self.sent.ip_options.len(),
            IpAddr::V6(_) => 40,
        }
    }
}

fn unreachable(address: IpAddr) -> u8 {
    if address.is_ipv4() { 3 } else { 1 }
}

const BOTH_WAYS: [About; 2] = [About::Sent, About::Answered];

#[test]
fn every_type_and_code_is_carried_with_what_it_says() {
    for talk in Talk::all() {
        let kinds: &[u8] = if talk.world.client.is_ipv4() {
            &[3, 11, 12]
        } else {
            &[1, 2, 3, 4]
        };
        for about in BOTH_WAYS {
            let (quoted, restored) = talk.quotations(about);
            for kind in kinds {
                for code in 0..16 {
                    let mut gateway = talk.gateway();
                    let rest = [0, 17, 0x05, 0x14];
                    let (arriving, leaving) = talk.errors(
                        about,
                        *kind,
                        code,
                        rest,
                        &quoted.packet(),
                        &restored.packet(),
                    );
                    talk.carried(&mut gateway, about, &arriving, &leaving);
                    assert_eq!(gateway.events(Event::IcmpTranslated), 1);
                }
            }
        }
    }
}

#[test]
fn a_quotation_of_any_length_is_restored_as_far_as_it_goes() {
    for talk in Talk::all() {
        for about in BOTH_WAYS {
            let (quoted, restored) = talk.quotations(about);
            let (quoted, restored) = (quoted.packet(), restored.packet());
            let mut gateway = talk.gateway();
            for len in 0..=quoted.len() {
                let mut restored = restored[..len].to_vec();
                // Half of a TCP header sum says nothing to anybody, and stays as it is.
                if talk.protocol() == Protocol::Tcp && len == talk.ip_len() + 17 {
                    restored[len - 1] = quoted[len - 1];
                }
                let (arriving, leaving) = talk.errors(
                    about,
                    talk.unreachable(),
                    1,
                    [0; 4],
                    &quoted[..len],
                    &restored,
                );
                let books = gateway.books();
                if len < talk.ip_len() + QUOTED_TRANSPORT {
                    talk.send(&mut gateway, about, &arriving)
                        .passed(PassReason::Malformed);
                } else {
                    talk.carried(&mut gateway, about, &arriving, &leaving);
                }
                // An error changes nothing in the table, and counts for no port.
                assert_eq!(gateway.books(), books);
            }
        }
    }
}

#[test]
fn options_of_the_quoted_packet_are_stepped_over() {
    for transport in [Transport::Tcp(0x10), Transport::Udp] {
        for words in 0..=10 {
            let talk = Talk::new(World::v4(), transport).with_options(words * 4);
            for about in BOTH_WAYS {
                let (quoted, restored) = talk.quotations(about);
                for len in [talk.ip_len() + 8, talk.ip_len() + 28, quoted.packet().len()] {
                    let (arriving, leaving) = talk.errors(
                        about,
                        11,
                        0,
                        [0; 4],
                        &quoted.packet()[..len],
                        &restored.packet()[..len],
                    );
                    talk.carried(&mut talk.gateway(), about, &arriving, &leaving);
                }
            }
        }
    }
}

/// The packet with IPv4 options.
fn with_outer_options(packet: &[u8], bytes: usize) -> Vec<u8> {
    let (mut header, payload) = Ipv4Header::from_slice(packet).unwrap();
    header.options = vec![1; bytes].as_slice().try_into().unwrap();
    header.total_len += bytes as u16;
    header.header_checksum = header.calc_header_checksum();
    [&header.to_bytes()[..], payload].concat()
}

#[test]
fn options_of_the_error_itself_are_stepped_over() {
    for transport in [Transport::Tcp(0x10), Transport::Udp] {
        let talk = Talk::new(World::v4(), transport);
        for words in 1..=10 {
            for about in BOTH_WAYS {
                let (quoted, restored) = talk.quotations(about);
                let (arriving, leaving) = talk.errors(
                    about,
                    3,
                    4,
                    [0, 0, 5, 0],
                    &quoted.packet(),
                    &restored.packet(),
                );
                let (arriving, leaving) = (
                    with_outer_options(&arriving, words * 4),
                    with_outer_options(&leaving, words * 4),
                );
                talk.carried(&mut talk.gateway(), about, &arriving, &leaving);
            }
        }
    }
}

/// RFC 4884: the quotation is padded to 128 bytes, then come extensions.
#[test]
fn extensions_behind_the_quotation_stay_as_they_are() {
    const EXTENSION: [u8; 12] = [0x20, 0, 0x5a, 0x5a, 0, 8, 1, 1, 0xde, 0xad, 0xbe, 0xef];
    for talk in Talk::all() {
        for about in BOTH_WAYS {
            let (quoted, restored) = talk.quotations(about);
            let extended = |draft: Draft| {
                let mut bytes = draft.payload("short").packet();
                bytes.resize(128, 0);
                bytes.extend(EXTENSION);
                bytes
            };
            let (quoted, restored) = (extended(quoted), extended(restored));
            let length = if talk.world.client.is_ipv4() {
                [0, 32, 0, 0]
            } else {
                [16, 0, 0, 0]
            };
            let kind = if talk.world.client.is_ipv4() { 11 } else { 3 };
            let (arriving, leaving) = talk.errors(about, kind, 0, length, &quoted, &restored);
            talk.carried(&mut talk.gateway(), about, &arriving, &leaving);
        }
    }
}

/// A first fragment with eight bytes of TCP is legal (RFC 791); what follows it in the error is padding, not a header sum.
#[test]
fn padding_behind_a_short_quoted_fragment_is_no_header_sum() {
    let talk = Talk::new(World::v4(), Transport::Tcp(0x10));
    for about in BOTH_WAYS {
        let (quoted, restored) = talk.quotations(about);
        let fragment = |draft: &Draft| {
            let packet = draft.packet();
            let (mut header, rest) = Ipv4Header::from_slice(&packet).unwrap();
            header.total_len = 28;
            header.more_fragments = true;
            header.dont_fragment = false;
            header.header_checksum = header.calc_header_checksum();
            let mut bytes = [&header.to_bytes()[..], &rest[..8]].concat();
            bytes.resize(128, 0);
            bytes
        };
        let (quoted, restored) = (fragment(&quoted), fragment(&restored));
        let (arriving, leaving) = talk.errors(about, 11, 0, [0, 32, 0, 0], &quoted, &restored);
        talk.carried(&mut talk.gateway(), about, &arriving, &leaving);
    }
}

#[test]
fn a_quoted_first_fragment_is_restored_and_a_later_one_is_nobodys() {
    let talk = Talk::new(World::v4(), Transport::Udp);
    for about in BOTH_WAYS {
        let (quoted, restored) = talk.quotations(about);
        let fragment = |draft: &Draft, flags: [u8; 2]| {
            let mut packet = draft.packet();
            packet[6..8].copy_from_slice(&flags);
            let header = Ipv4Header::from_slice(&packet).unwrap().0;
            packet[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
            packet
        };
        for (flags, is_first) in [([0x20, 0], true), ([0x20, 1], false), ([0, 25], false)] {
            let (quoted, restored) = (fragment(&quoted, flags), fragment(&restored, flags));
            let (arriving, leaving) = talk.errors(about, 11, 1, [0; 4], &quoted, &restored);
            let mut gateway = talk.gateway();
            if is_first {
                talk.carried(&mut gateway, about, &arriving, &leaving);
            } else {
                talk.send(&mut gateway, about, &arriving)
                    .passed(PassReason::NoQuotedFlow);
            }
        }
    }
}

#[test]
fn errors_about_nothing_we_carry_pass() {
    for talk in Talk::all() {
        let world = talk.world;
        let kind = talk.unreachable();
        for about in BOTH_WAYS {
            let (quoted, _) = talk.quotations(about);
            let (to, router) = match about {
                About::Sent => (world.client, world.lan_router),
                About::Answered => (world.listen, world.wan_router),
            };
            let unknown = quoted.between(at(quoted.source.ip(), 9), at(quoted.destination.ip(), 9));
            let nested = error(to, router, kind, 0, [0; 4], &quoted.packet());
            let quoting = |bytes: &[u8]| error(router, to, kind, 0, [0; 4], bytes);
            let mut other_version = quoted.packet();
            other_version[0] ^= 0x20;
            let rows: [(&str, Vec<u8>, PassReason); 5] = [
                (
                    "about a flow that is not there",
                    quoting(&unknown.packet()),
                    PassReason::NoQuotedFlow,
                ),
                ("about an error", quoting(&nested), PassReason::NoQuotedFlow),
                (
                    "about a packet of another version",
                    quoting(&other_version),
                    PassReason::Malformed,
                ),
                (
                    "to somebody else than the sender of what it quotes",
                    error(
                        router,
                        world.second_client,
                        kind,
                        0,
                        [0; 4],
                        &quoted.packet(),
                    ),
                    PassReason::NoQuotedFlow,
                ),
                ("that quotes nothing", quoting(&[]), PassReason::Malformed),
            ];
            for (what, packet, reason) in rows {
                println!("{what}");
                let mut gateway = talk.gateway();
                let books = gateway.books();
                talk.send(&mut gateway, about, &packet).passed(reason);
                assert_eq!(gateway.books(), books);
            }
        }
    }
}

#[test]
fn a_quoted_ipv6_fragment_is_nobodys() {
    let talk = Talk::new(World::v6(), Transport::Udp);
    for about in BOTH_WAYS {
        let (quoted, _) = talk.quotations(about);
        let whole = quoted.packet();
        let mut fragment = [&whole[..40], &[17, 0, 0, 1, 1, 2, 3, 4], &whole[40..]].concat();
        fragment[6] = 44;
        let (arriving, _) = talk.errors(about, 3, 1, [0; 4], &fragment, &fragment);
        talk.send(&mut talk.gateway(), about, &arriving)
            .passed(PassReason::NoQuotedFlow);
    }
}

#[test]
fn errors_take_the_ways_that_packets_take() {
    for talk in Talk::all() {
        for (hook, last_hop_to_client, last_hop_to_target) in [
            (Hook::Xdp, Verdict::Pass(PassReason::SlowPath), None),
            (
                Hook::Tc,
                Verdict::Pass(PassReason::HopLimit),
                Some(Way::Stack),
            ),
        ] {
            for about in BOTH_WAYS {
                let (quoted, restored) = talk.quotations(about);
                let (mut arriving, _) = talk.errors(
                    about,
                    talk.unreachable(),
                    1,
                    [0; 4],
                    &quoted.packet(),
                    &restored.packet(),
                );
                set_hop_limit(&mut arriving, 1);
                let mut gateway = talk.gateway().by(hook);
                let outcome = talk.send(&mut gateway, about, &arriving);
                match about {
                    About::Sent => assert_eq!(outcome.verdict, last_hop_to_client),
                    About::Answered => match last_hop_to_target {
                        Some(way) => assert_eq!(outcome.departure().way, way),
                        None => outcome.passed(PassReason::SlowPath),
                    },
                }
            }
        }
    }
}

fn set_hop_limit(packet: &mut [u8], hop_limit: u8) {
    if packet[0] >> 4 == 4 {
        packet[8] = hop_limit;
        packet[10..12].fill(0);
        let header = Ipv4Header::from_slice(packet).unwrap().0;
        packet[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    } else {
        packet[7] = hop_limit;
    }
}

/// The kernel answers a translated packet that it cannot forward; the client must see its own packet quoted.
#[test]
fn errors_of_the_gateway_itself_are_translated_where_they_leave() {
    for talk in Talk::all() {
        let world = talk.world;
        let kind = if world.client.is_ipv4() { 11 } else { 3 };
        for own in [world.listen, world.second_listen, world.lan_address] {
            let mut gateway = talk.gateway();
            let (quoted, restored) = talk.quotations(About::Sent);
            let sent = error(own, world.client, kind, 0, [0; 4], &quoted.packet());
            let expected = error(
                world.listen,
                world.client,
                kind,
                0,
                [0; 4],
                &restored.packet(),
            );
            let outcome = gateway.sends(&sent);
            assert_eq!(outcome.departure().way, Way::Stack);
            assert_eq!(hex(&outcome.after[14..]), hex(&expected));
            assert_eq!(outcome.after[..14], outcome.before[..14]);
        }
    }
}

#[test]
fn what_else_the_gateway_itself_sends_is_left_alone_and_not_counted() {
    for talk in Talk::all() {
        let world = talk.world;
        let mut gateway = talk.gateway();
        let (books, reasons) = (gateway.books(), gateway.model.maps.reasons());
        let own = Draft::udp(at(world.listen, 9_999), at(world.client, 53)).packet();
        gateway.sends(&own).passed(PassReason::NoFlow);
        let kind = talk.unreachable();
        let unrelated = error(world.listen, world.client, kind, 3, [0; 4], &own);
        gateway.sends(&unrelated).passed(PassReason::NoQuotedFlow);
        assert_eq!(
            (gateway.books(), gateway.model.maps.reasons()),
            (books, reasons)
        );
    }
}
