//! Random traffic around the gateway: conversations, errors about them, damage, and things that change meanwhile.

use std::collections::VecDeque;
use std::net::SocketAddr;

use fastrand::Rng;
use portfwd_common::{
    abi::{Admission, Limits, LinkLayer, PoolRange, Protocol, Rate},
    model::{
        frame::{Draft, Transport, error, ethernet, fragments},
        rules::{Forward, Lowered, Source},
        world::{
            ARM, ARM_MAC, BACKEND_MAC, LAN, LAN_MAC, TUNNEL, UPSTREAM_MAC, WAN, WAN_MAC,
            WAN_TUNNEL, World, at,
        },
    },
};

use crate::kernel::Entry;
use crate::test_run::{SHORTEST, Segments};
use crate::twins::Crossing;

/// What happens next.
pub enum Step {
    /// A frame comes by.
    Cross(Crossing),
    /// Routes may have changed.
    Generation,
    /// Sources are trusted from now on, or no longer.
    Trust,
    /// Time passes, in seconds. No sum of these is one of the timeouts.
    Age(u32),
    /// Other rules, by number in [`rule_sets`].
    Rules(usize),
}

/// A rate that nobody reaches: what is refused must not depend on when a test runs.
const FAST: Rate = Rate {
    flows: Rate::MOST,
    seconds: 1,
    burst: Rate::MOST,
};

/// So many flows, and of each network of sources.
const fn most(flows: u32, source_flows: u32, source_bits: u32) -> Limits {
    Limits {
        flows,
        source_flows,
        source_bits,
        ..Limits::NONE
    }
}

/// Rules that reach every kind of backend.
fn forwards() -> [Vec<Forward>; 2] {
    let mut sets = [Vec::new(), Vec::new()];
    for world in World::both() {
        let udp = |port, target| Forward::new(Protocol::Udp, port, target);
        let tcp = |port, target| Forward::new(Protocol::Tcp, port, target);
        let echo = |target| Forward::new(Protocol::Echo, 0, at(target, 0));
        let steady = [
            tcp(80, at(world.target, 8080)),
            tcp(80, at(world.second_target, 80)).on(world.second_listen),
            tcp(1000, at(world.second_target, 2000))
                .to(1007)
                .limited(most(3, 1, world.bits())),
            udp(1000, at(world.second_target, 1000)).to(1007),
            udp(1003, at(world.target, 3)).limited(Limits {
                rate: FAST,
                source_rate: FAST,
                ..most(0, 1, 8)
            }),
            udp(441, at(world.silent_target, 1)),
            udp(442, at(world.narrow_target, 2)),
            udp(443, at(world.tunnel_target, 3)),
            udp(444, at(world.far_target, 4)),
            udp(445, at(world.lost_target, 5)),
            udp(446, at(world.slow_target, 6)),
            tcp(447, at(world.target, 7))
                .from(Source::Masquerade)
                .limited(most(1, 0, 0)),
            udp(447, at(world.target, 7)).from(Source::Masquerade),
            udp(448, at(world.far_target, 8)).from(Source::Masquerade),
            udp(449, at(world.second_target, 9)).from(Source::Snat(
                world.lan_address,
                PoolRange {
                    first: 3_000,
                    last: 3_006,
                },
            )),
            udp(450, at(world.arm_target, 10)),
            tcp(450, at(world.arm_target, 10)),
            echo(world.second_target)
                .on(world.second_listen)
                .from(Source::Masquerade),
        ];
        let passing = [
            udp(53, at(world.target, 1053)),
            tcp(81, at(world.target, 8080)),
            tcp(82, at(world.target, 82)).keeping_mss(),
            tcp(90, at(world.target, 90)).to(99).on(world.listen),
            echo(world.target),
        ];
        sets[0].extend(steady);
        sets[0].extend(passing);
        // Last: other rules go before it.
        sets[0].extend(
            Protocol::ALL.map(|protocol| {
                Forward::rest(protocol, world.second_target).on(world.second_listen)
            }),
        );
        sets[1].extend(steady);
        sets[1].push(udp(53, at(world.second_target, 1053)));
    }
    sets
}

/// Sets of rules that reach every kind of backend. The second one keeps a client out that the first one lets in.
pub fn rule_sets() -> [Lowered; 2] {
    let [open, mut guarded] = forwards().map(|forwards| (Lowered::of(&forwards), forwards.len()));
    // The first rule of either family.
    for (world, slot) in World::both().iter().zip([1, guarded.1 as u16 / 2 + 1]) {
        let network = (
            World::network(world.client),
            world.network_bits(),
            Admission::Allowed,
        );
        let kept_out = (world.second_client, world.bits(), Admission::Denied);
        guarded.0 = guarded
            .0
            .admitting(slot, Admission::Denied, &[network, kept_out]);
    }
    [open.0, guarded.0]
}

/// Listen ports of interest, the last two without a rule.
const PORTS: [(Protocol, u16); 30] = [
    (Protocol::Tcp, 80),
    (Protocol::Tcp, 80),
    (Protocol::Tcp, 80),
    (Protocol::Tcp, 81),
    (Protocol::Tcp, 90),
    (Protocol::Tcp, 99),
    (Protocol::Tcp, 1000),
    (Protocol::Tcp, 1007),
    (Protocol::Udp, 53),
    (Protocol::Udp, 53),
    (Protocol::Udp, 1000),
    (Protocol::Udp, 1003),
    (Protocol::Udp, 441),
    (Protocol::Udp, 442),
    (Protocol::Udp, 443),
    (Protocol::Udp, 444),
    (Protocol::Udp, 445),
    (Protocol::Udp, 446),
    (Protocol::Tcp, 447),
    (Protocol::Udp, 447),
    (Protocol::Udp, 448),
    (Protocol::Udp, 449),
    (Protocol::Udp, 449),
    (Protocol::Udp, 450),
    (Protocol::Tcp, 450),
    (Protocol::Echo, 0),
    (Protocol::Echo, 0),
    (Protocol::Echo, 0),
    (Protocol::Udp, 7),
    (Protocol::Tcp, 1008),
];
/// TCP flags: what connections are made of, more often than the rest.
const FLAGS: [u8; 14] = [
    0x02, 0x02, 0x02, 0x12, 0x12, 0x10, 0x10, 0x10, 0x18, 0x11, 0x11, 0x04, 0x14, 0x00,
];
/// Source ports of clients: few, so that they meet again.
const CLIENT_PORTS: u16 = 3;
/// Headers are where damage hurts.
const HEADERS: usize = 130;

/// A source of steps, the same for the same seed.
pub struct Traffic {
    random: Rng,
    /// Conversations that may be known by now: what the client sends.
    talks: Vec<Talk>,
    /// Fragments that are on their way.
    fragments: Vec<Crossing>,
    /// What comes before anything else.
    pending: VecDeque<Crossing>,
}

#[derive(Clone)]
struct Talk {
    world: World,
    sent: Draft,
    target: SocketAddr,
    /// Whom the target takes for the client, unless its port was taken.
    seen: SocketAddr,
}

/// Where a client is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Wan,
    Tunnel,
    Lan,
    Arm,
}

impl Traffic {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            random: Rng::with_seed(seed),
            talks: Vec::new(),
            fragments: Vec::new(),
            pending: VecDeque::new(),
        }
    }

    /// What happens next.
    pub fn step(&mut self) -> Step {
        if let Some(crossing) = self.pending.pop_front() {
            return Step::Cross(crossing);
        }
        match self.random.u8(..100) {
            0..=1 => Step::Generation,
            2 => Step::Trust,
            3..=4 => Step::Age(self.choose(&[37, 130, 330, 7_500])),
            5 => Step::Rules(self.random.usize(..2)),
            6..=9 => {
                self.connect();
                self.step()
            }
            _ => Step::Cross(self.crossing()),
        }
    }

    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.random.usize(..from.len())]
    }

    fn crossing(&mut self) -> Crossing {
        let mut crossing = match self.random.u8(..13) {
            0..=4 => self.client_packet(),
            5..=7 => self.backend_packet(),
            8..=9 => self.router_error(),
            _ => self.fragment(),
        };
        if self.random.u8(..5) == 0 {
            for _ in 0..self.random.u8(1..4) {
                self.damage(&mut crossing.frame);
            }
            let len = crossing.frame.len().max(SHORTEST);
            crossing.frame.resize(len, 0);
            if !crossing.is_taken() {
                crossing.entry = Entry::Xdp;
                crossing.segments = Segments::default();
            }
        }
        crossing
    }

    /// A fragment of a datagram whose others come by in between, in any order, now and then twice or not at all. The second time
    /// it may say another port, if it is the first of its datagram: two datagrams of one identification, at whatever pace the
    /// machine goes.
    fn fragment(&mut self) -> Crossing {
        if self.fragments.len() < 4 {
            let crossing = if self.random.bool() {
                self.client_packet()
            } else {
                self.backend_packet()
            };
            self.cut(&crossing);
        }
        let place = self.random.usize(..self.fragments.len());
        if self.random.u8(..10) == 0 {
            let again = self.fragments[place].clone();
            return if place.is_multiple_of(2) {
                from_another_port(again)
            } else {
                again
            };
        }
        self.fragments.swap_remove(place)
    }

    /// Cuts a datagram into fragments, which go where it would have gone.
    fn cut(&mut self, whole: &Crossing) {
        let entry = match whole.entry {
            Entry::Xdp => Entry::Tc,
            Entry::Tc | Entry::TcRaw | Entry::TcSlow | Entry::TcOut => whole.entry,
        };
        let link = match entry.link() {
            LinkLayer::Ethernet => SHORTEST,
            LinkLayer::Raw => 0,
        };
        let (head, packet) = whole.frame.split_at(link);
        let is_large = self.random.u8(..20) == 0;
        let packet = if is_large {
            lengthened(packet, 5_000)
        } else {
            packet.to_vec()
        };
        let size = if is_large {
            2_400
        } else {
            8 * self.random.usize(1..20)
        };
        // Few, so that they meet again.
        let id = self.random.u32(..8);
        for piece in fragments(&packet, id, size, 0).into_iter().take(24) {
            let frame = [head, &piece].concat();
            self.fragments
                .push(Crossing::new(entry, whole.ifindex, frame));
        }
    }

    fn client_packet(&mut self) -> Crossing {
        let world = self.choose(&World::both());
        let (client, place) = match self.random.u8(..50) {
            // An address of the gateway itself: no router forwards from there.
            0 => (world.second_listen, Place::Wan),
            1..=3 => (world.lost_target, Place::Wan),
            4..=9 => (world.tunnel_client, Place::Tunnel),
            10..=20 => (world.second_client, Place::Wan),
            21..=25 => (world.second_target, Place::Lan),
            26..=27 => (world.target, Place::Lan),
            28..=30 => (world.arm_client, Place::Arm),
            31..=33 => (world.arm_neighbour, Place::Arm),
            _ => (world.client, Place::Wan),
        };
        let client_port = self.random.u16(1..=CLIENT_PORTS);
        let listen = match self.random.u8(..20) {
            0 => world.lan_address,
            1..=6 => world.second_listen,
            _ if place == Place::Arm => world.arm_listen,
            _ => world.listen,
        };
        let (protocol, port) = self.choose(&PORTS);
        let transport = match (protocol, self.random.u8(..3)) {
            (Protocol::Tcp, _) => Transport::Tcp(self.choose(&FLAGS)),
            (Protocol::Udp, 0) => Transport::UdpWithoutSum,
            (Protocol::Udp, _) => Transport::Udp,
            (Protocol::Echo, _) => Transport::Echo,
        };
        let sent = self.draft(at(client, client_port), at(listen, port), transport);
        let target = self.target_of(&world, &sent);
        let seen = self.seen(&world, &sent, target, place);
        let talk = Talk {
            world,
            sent: sent.clone(),
            target,
            seen,
        };
        if self.talks.len() < 64 {
            self.talks.push(talk);
        } else {
            let place = self.random.usize(..64);
            self.talks[place] = talk;
        }
        match place {
            Place::Wan => self.by_wan(&sent),
            Place::Tunnel => Crossing::new(Entry::TcRaw, WAN_TUNNEL, sent.packet()),
            Place::Lan => self.by_lan(&sent.packet(), sent.headers_len()),
            Place::Arm => self.by_arm(&sent.packet(), sent.headers_len()),
        }
    }

    /// Whom the target takes for the client, as far as that can be told from here.
    fn seen(
        &mut self,
        world: &World,
        sent: &Draft,
        target: SocketAddr,
        place: Place,
    ) -> SocketAddr {
        let (client, listen) = (sent.source, sent.destination);
        let port = client.port();
        match listen.port() {
            447 => at(world.lan_address, port),
            449 => at(world.lan_address, self.random.u16(3_000..=3_006)),
            0 if listen.ip() == world.second_listen => at(world.lan_address, port),
            _ if place == Place::Lan => at(listen.ip(), port),
            _ if client.ip() == world.arm_neighbour && target.ip() == world.arm_target => {
                at(listen.ip(), port)
            }
            _ => client,
        }
    }

    /// Where the rules send it, for what comes back; anywhere if there is none.
    fn target_of(&mut self, world: &World, sent: &Draft) -> SocketAddr {
        let protocol = match sent.transport {
            Transport::Tcp(_) => Protocol::Tcp,
            Transport::Udp | Transport::UdpWithoutSum => Protocol::Udp,
            Transport::Echo => Protocol::Echo,
        };
        let port = sent.destination.port();
        let sets = forwards();
        let set = &sets[self.random.usize(..2)];
        // One for everything else after all others.
        let (rests, certain): (Vec<&Forward>, Vec<&Forward>) =
            set.iter().partition(|rule| rule.is_rest);
        let found = certain.iter().rev().chain(&rests).find(|rule| {
            rule.protocol == protocol
                && rule.target.is_ipv4() == world.is_v4()
                && (rule.first..=rule.last).contains(&port)
                && rule
                    .listen
                    .is_none_or(|listen| listen == sent.destination.ip())
        });
        found.map_or(at(world.target, 9), |rule| {
            at(rule.target, rule.target_first + (port - rule.first))
        })
    }

    fn draft(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        transport: Transport,
    ) -> Draft {
        let size = match self.random.u8(..20) {
            0 => self.random.usize(1_200..1_600),
            _ => self.random.usize(..64),
        };
        let options = |random: &mut Rng| match random.u8(..8) {
            0 => (0..4 * random.usize(..=10))
                .map(|_| random.u8(..))
                .collect(),
            _ => Vec::new(),
        };
        Draft {
            source,
            destination,
            transport,
            sequence: self.number(),
            acknowledgement: self.number(),
            window: self.choose(&[0, 1, 300, u16::MAX]),
            accurate_ecn: self.random.bool(),
            hop_limit: match self.random.u8(..16) {
                0 => self.random.u8(..3),
                _ => self.random.u8(32..=255),
            },
            dont_fragment: self.random.bool(),
            ip_options: if source.is_ipv4() {
                options(&mut self.random)
            } else {
                Vec::new()
            },
            tcp_options: options(&mut self.random),
            payload: (0..size).map(|_| self.random.u8(..)).collect(),
        }
    }

    /// A connection of two sides that count, with a forged segment at its end.
    fn connect(&mut self) {
        let world = self.choose(&World::both());
        let (client, listen) = (
            at(world.client, self.random.u16(1..=CLIENT_PORTS)),
            at(world.listen, 80),
        );
        let target = at(world.target, 8080);
        let (mut next, forged) = (
            [self.random.u32(..), self.random.u32(..)],
            self.random.u32(..),
        );
        let segments = [
            (0, 0x02),
            (1, 0x12),
            (0, 0x10),
            (1, 0x18),
            (0, 0x18),
            (1, 0x04),
            (0, 0x04),
            (0, 0x11),
        ];
        for (own, flags) in segments {
            let (source, destination) = [(client, listen), (target, client)][own];
            let is_syn = flags & 0x02 != 0;
            let sequence = if flags == 0x04 { forged } else { next[own] };
            let draft = Draft {
                window: self.choose(&[0, 300, u16::MAX]),
                tcp_options: if is_syn {
                    self.syn_options()
                } else {
                    Vec::new()
                },
                ..Draft::tcp(source, destination, flags).numbers(sequence, next[1 - own])
            }
            .payload(vec![
                own as u8;
                if flags & 0x08 != 0 {
                    self.random.usize(..500)
                } else {
                    0
                }
            ]);
            if flags != 0x04 {
                next[own] = sequence.wrapping_add(draft.payload.len() as u32 + u32::from(is_syn));
            }
            let crossing = match own {
                0 => self.by_wan(&draft),
                _ => self.by_lan(&draft.packet(), draft.headers_len()),
            };
            self.pending.push_back(crossing);
        }
    }

    /// Segment size and window scale, at an even or an odd offset.
    fn syn_options(&mut self) -> Vec<u8> {
        let [high, low] = self.random.u16(1_400..1_500).to_be_bytes();
        let mut options = vec![2, 4, high, low, 3, 3, self.random.u8(..16)];
        options.insert(self.choose(&[0, 4, 7]), 1);
        options
    }

    /// A TCP number near those of all other segments, so that some fit each other; now and then any.
    fn number(&mut self) -> u32 {
        match self.random.u8(..8) {
            0 => self.random.u32(..),
            _ => 0xffff_fffa_u32.wrapping_add(self.random.u32(..10)),
        }
    }

    fn backend_packet(&mut self) -> Crossing {
        let Some(Talk {
            world,
            sent,
            target,
            seen,
        }) = self.talk()
        else {
            return self.client_packet();
        };
        let transport = match sent.transport {
            Transport::Tcp(_) => Transport::Tcp(self.choose(&FLAGS)),
            Transport::Udp | Transport::UdpWithoutSum | Transport::Echo => sent.transport,
        };
        let answer = self.draft(target, seen, transport);
        if target.ip() == world.arm_target {
            self.by_arm(&answer.packet(), answer.headers_len())
        } else if target.ip() == world.tunnel_target {
            Crossing::new(Entry::TcRaw, TUNNEL, answer.packet())
        } else {
            self.by_lan(&answer.packet(), answer.headers_len())
        }
    }

    fn router_error(&mut self) -> Crossing {
        let Some(Talk {
            world,
            sent,
            target,
            seen,
        }) = self.talk()
        else {
            return self.client_packet();
        };
        let (code, rest) = (self.random.u8(..6), [0, 0, 5, self.random.u8(..)]);
        let kind = if world.is_v4() {
            self.choose(&[3, 3, 11, 12, 8, 5])
        } else {
            self.choose(&[1, 2, 3, 4, 128, 135])
        };
        let cut = |random: &mut Rng, packet: Vec<u8>| {
            let len = random.usize(..=packet.len());
            packet[..if random.bool() { packet.len() } else { len }].to_vec()
        };
        let delivered = cut(&mut self.random, sent.between(seen, target).hop().packet());
        let client = sent.source.ip();
        match self.random.u8(..3) {
            0 => {
                let packet = error(world.lan_router, seen.ip(), kind, code, rest, &delivered);
                self.by_lan(&packet, packet.len())
            }
            1 => {
                // The gateway's own kernel sends it.
                let packet = error(world.listen, client, kind, code, rest, &delivered);
                Crossing::new(Entry::TcOut, WAN, ethernet(UPSTREAM_MAC, WAN_MAC, &packet))
            }
            _ => {
                let received = cut(
                    &mut self.random,
                    sent.between(sent.destination, sent.source).hop().packet(),
                );
                let packet = error(
                    world.wan_router,
                    sent.destination.ip(),
                    kind,
                    code,
                    rest,
                    &received,
                );
                let entry = self.entry();
                Crossing::new(entry, WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &packet))
            }
        }
    }

    fn talk(&mut self) -> Option<Talk> {
        if self.talks.is_empty() {
            return None;
        }
        let place = self.random.usize(..self.talks.len());
        Some(self.talks[place].clone())
    }

    fn by_wan(&mut self, draft: &Draft) -> Crossing {
        let crossing = Crossing::new(
            self.entry(),
            WAN,
            ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet()),
        );
        self.segmented(crossing, draft.headers_len())
    }

    fn by_lan(&mut self, packet: &[u8], headers: usize) -> Crossing {
        let crossing = Crossing::new(self.entry(), LAN, ethernet(LAN_MAC, BACKEND_MAC, packet));
        self.segmented(crossing, headers)
    }

    fn by_arm(&mut self, packet: &[u8], headers: usize) -> Crossing {
        let crossing = Crossing::new(self.entry(), ARM, ethernet(ARM_MAC, BACKEND_MAC, packet));
        self.segmented(crossing, headers)
    }

    fn entry(&mut self) -> Entry {
        self.choose(&[Entry::Xdp, Entry::Xdp, Entry::Tc, Entry::Tc, Entry::TcSlow])
    }

    /// Now and then a frame stands for several packets.
    fn segmented(&mut self, crossing: Crossing, headers: usize) -> Crossing {
        let payload = crossing.frame.len() - SHORTEST - headers;
        if crossing.entry == Entry::Xdp || payload < 64 || self.random.bool() {
            return crossing;
        }
        let size = self.random.usize(16..payload);
        Crossing {
            segments: Segments {
                count: payload.div_ceil(size) as u32,
                size: size as u32,
            },
            ..crossing
        }
    }

    fn damage(&mut self, frame: &mut Vec<u8>) {
        let at = self.random.usize(..frame.len().clamp(1, HEADERS));
        match self.random.u8(..10) {
            0..=3 => frame[at] ^= 1 << self.random.u8(..8),
            4..=7 => frame[at] = self.choose(&[0, 1, 0x40, 0x45, 0x46, 0x60, 0x7f, 0x80, 0xff]),
            8 => frame.truncate(self.random.usize(SHORTEST..=frame.len().max(SHORTEST))),
            _ => frame.resize(frame.len() + self.random.usize(1..64), self.random.u8(..)),
        }
    }
}

/// An IP packet with so many bytes behind it that count.
fn lengthened(packet: &[u8], bytes: usize) -> Vec<u8> {
    [packet, &vec![0x5a; bytes]].concat()
}

/// A fragment as if its datagram came from the port next to its own, or had the next code; what is not the first of one says something else.
fn from_another_port(mut fragment: Crossing) -> Crossing {
    const IPV6_AND_FRAGMENT: usize = 40 + 8;
    let network = match fragment.entry.link() {
        LinkLayer::Ethernet => SHORTEST,
        LinkLayer::Raw => 0,
    };
    let headers = match fragment.frame.get(network) {
        Some(first) if first >> 4 == 4 => usize::from(first & 15) * 4,
        Some(_) | None => IPV6_AND_FRAGMENT,
    };
    if let Some(port) = fragment.frame.get_mut(network + headers + 1) {
        *port ^= 1;
    }
    fragment
}
