//! Every length that an IPv4 and a TCP header can claim, in packets and frames of several lengths: translated rightly, or left alone.

use portfwd_common::{
    abi::Protocol,
    datapath::{Hook, Verdict},
    model::{
        frame::Draft,
        rules::Forward,
        world::{World, at},
    },
};

use crate::conversation::{ACK, Backend, Client, SYN, Sender};
use crate::gateway::{Gateway, Outcome, hex};

/// Bytes of the headers without options.
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const TCP_LEN: usize = 20;
/// How far the packet goes behind its IP header without options: from a bare TCP header to more than both headers can claim.
const LENGTHS: [usize; 8] = [20, 24, 40, 44, 60, 80, 100, 140];
/// What a frame may have behind its packet.
const PADDINGS: [usize; 2] = [0, 24];
const NO_OPERATION: u8 = 1;

/// What the headers of a packet claim in words of four bytes, and how long it is by its IP header, behind the first 20 or 40 bytes.
#[derive(Clone, Copy, Debug)]
struct Claim {
    ip_words: usize,
    tcp_words: usize,
    length: usize,
}

impl Claim {
    /// All of them. An IPv6 header has one length.
    fn all(world: &World) -> impl Iterator<Item = Self> {
        let ip_words = if world.is_v4() { 0..=15 } else { 5..=5 };
        ip_words.flat_map(|ip_words| {
            (0..=15).flat_map(move |tcp_words| {
                LENGTHS.map(|length| Self {
                    ip_words,
                    tcp_words,
                    length,
                })
            })
        })
    }

    /// Bytes of IPv4 options.
    fn ip_options(self) -> usize {
        (self.ip_words * 4).saturating_sub(IPV4_LEN)
    }

    /// Whether both headers have all that they must, and the packet has both.
    fn is_true(self) -> bool {
        self.ip_words * 4 >= IPV4_LEN
            && self.tcp_words * 4 >= TCP_LEN
            && self.ip_options() + self.tcp_words * 4 <= self.length
    }

    /// The packet that claims this: its TCP header is where its IP header says, as far as there is one.
    fn packet(self, draft: &Draft) -> Vec<u8> {
        let ip_options = vec![NO_OPERATION; self.ip_options()];
        if self.is_true() {
            return Draft {
                tcp_options: vec![NO_OPERATION; self.tcp_words * 4 - TCP_LEN],
                payload: vec![7; self.length - ip_options.len() - self.tcp_words * 4],
                ip_options,
                ..draft.clone()
            }
            .packet();
        }
        let is_v4 = draft.source.is_ipv4();
        let fixed = if is_v4 { IPV4_LEN } else { IPV6_LEN };
        let offset = fixed + ip_options.len() + 12;
        let mut packet = Draft {
            ip_options,
            payload: vec![7; self.length],
            ..draft.clone()
        }
        .packet();
        packet[offset] = (self.tcp_words as u8) << 4;
        packet.truncate(fixed + self.length);
        let (place, length) = if is_v4 {
            packet[0] = 0x40 | self.ip_words as u8;
            (2, packet.len())
        } else {
            (4, self.length)
        };
        packet[place..place + 2].copy_from_slice(&(length as u16).to_be_bytes());
        packet
    }
}

/// A gateway that has a rule, and maybe a flow of it.
fn gateway(world: &World, hook: Hook, first: Option<&Draft>) -> Gateway {
    let rule = Forward::new(Protocol::Tcp, 80, at(world.target, 8080));
    let mut gateway = Gateway::new(&[rule]).by(hook);
    if let Some(first) = first {
        let _ = gateway.wan(&first.packet()).departure();
        let answer = first.between(at(world.target, 8080), first.source);
        let _ = gateway.lan(&answer.packet()).departure();
    }
    gateway
}

/// Sends a packet that claims this, in a frame with some padding. Whether it was translated; if so, then rightly.
fn send(gateway: &mut Gateway, sender: Sender, sent: &Draft, left: &Draft, claim: Claim) -> usize {
    let mut translated = 0;
    for padding in PADDINGS {
        let padding = vec![0x5a; padding];
        let frame = |draft| [&claim.packet(draft)[..], &padding].concat();
        let books = gateway.books();
        let outcome = match sender {
            Client => gateway.wan(&frame(sent)),
            Backend => gateway.lan(&frame(sent)),
        };
        match outcome.verdict {
            Verdict::Forward(_) => {
                assert!(claim.is_true(), "{claim:?} of {sender:?}");
                let left = frame(&left.clone().hop());
                match sender {
                    Client => outcome.reached_lan(&left),
                    Backend => outcome.reached_wan(&left),
                }
                translated += 1;
            }
            Verdict::Pass(_) | Verdict::Drop(_) => {
                is_left_alone(&outcome, claim);
                let after = gateway.books();
                assert_eq!((after.v4, after.v6), (books.v4, books.v6), "{claim:?}");
            }
            Verdict::Refuse(reason) => panic!("{claim:?} is refused: {}", reason.name()),
        }
    }
    translated
}

#[track_caller]
fn is_left_alone(outcome: &Outcome, claim: Claim) {
    assert_eq!(hex(&outcome.after), hex(&outcome.before), "{claim:?}");
}

/// How many packets that are what they claim must come through.
fn expected(world: &World) -> usize {
    Claim::all(world).filter(|claim| claim.is_true()).count() * PADDINGS.len()
}

#[test]
fn segments_of_a_connection_with_any_header_lengths() {
    for world in World::both() {
        let (client, listen) = (at(world.client, 40_000), at(world.listen, 80));
        let target = at(world.target, 8080);
        for hook in [Hook::Xdp, Hook::Tc] {
            for sender in [Client, Backend] {
                let first = Draft::tcp(client, listen, ACK);
                let mut gateway = gateway(&world, hook, Some(&first));
                let (sent, left) = match sender {
                    Client => (first.clone(), first.between(client, target)),
                    Backend => (first.between(target, client), first.between(listen, client)),
                };
                let translated: usize = Claim::all(&world)
                    .map(|claim| send(&mut gateway, sender, &sent, &left, claim))
                    .sum();
                assert_eq!(translated, expected(&world), "{sender:?} by {hook:?}");
                assert_eq!(gateway.flows(), 1);
            }
        }
    }
}

#[test]
fn first_segments_with_any_header_lengths() {
    for world in World::both() {
        let syn = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), SYN);
        let left = syn.between(syn.source, at(world.target, 8080));
        for hook in [Hook::Xdp, Hook::Tc] {
            let translated: usize = Claim::all(&world)
                .map(|claim| {
                    let mut gateway = gateway(&world, hook, None);
                    let translated = send(&mut gateway, Client, &syn, &left, claim);
                    assert_eq!(gateway.flows(), usize::from(translated > 0), "{claim:?}");
                    translated
                })
                .sum();
            assert_eq!(translated, expected(&world), "by {hook:?}");
        }
    }
}
