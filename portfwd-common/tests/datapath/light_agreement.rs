//! With light tracking packets fare as with full tracking, and are counted alike, whatever happens.

use std::net::{IpAddr, SocketAddr};

use portfwd_common::{
    abi::{PortCounters, Protocol, Ticks},
    datapath::{Hook, PassReason, Verdict},
    model::{
        effort::cases,
        frame::{Draft, Transport, ethernet},
        rules::Forward,
        world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};
use proptest::prelude::*;

use crate::{
    conversation::{ACK, FIN, RST, SYN, SYN_ACK},
    gateway::{Gateway, Outcome, SECOND},
    light::{PERIOD, via},
};

/// One end of a TCP connection or of an exchange of datagrams.
#[derive(Clone, Copy, Debug)]
struct Talk {
    protocol: Protocol,
    client: SocketAddr,
    listen: SocketAddr,
    target: SocketAddr,
    /// The next sequence numbers, the client's first.
    next: [u32; 2],
    is_open: bool,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    /// Packets of one talk, from the client or to it.
    Say {
        talk: usize,
        from_client: bool,
        length: usize,
        hop_limit: u8,
        dont_fragment: bool,
    },
    /// The handshake of a connection, or its end.
    Turn {
        talk: usize,
        end: u8,
    },
    Wait(u32),
    /// The daemon has heard of a change.
    Change,
    /// The next hop of a target has another MAC address, and the daemon has heard of it.
    Reroute(u8),
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (
            0..TALKS,
            any::<bool>(),
            prop::sample::select(vec![0_usize, 1, 64, 1_272, 1_400, 1_460, 1_700]),
            prop::sample::select(vec![1_u8, 2, 64]),
            any::<bool>(),
        ).prop_map(|(talk, from_client, length, hop_limit, dont_fragment)| Act::Say {
            talk, from_client, length, hop_limit, dont_fragment,
        }),
        2 => (0..TALKS, 0..4_u8).prop_map(|(talk, end)| Act::Turn { talk, end }),
        4 => (0..3 * SECOND).prop_map(Act::Wait),
        1 => prop::sample::select(vec![PERIOD, 20 * SECOND, 301 * SECOND]).prop_map(Act::Wait),
        1 => Just(Act::Change),
        1 => any::<u8>().prop_map(Act::Reroute),
    ]
}

const TALKS: usize = 6;

/// The same gateway twice: with full tracking and with light.
struct Twins {
    world: World,
    gateways: [Gateway; 2],
    target: IpAddr,
    talks: [Talk; TALKS],
}

impl Twins {
    fn new(world: &World, target: IpAddr) -> Self {
        let rules = [Protocol::Udp, Protocol::Tcp].map(|protocol| {
            Forward::new(protocol, 53, at(target, 1053))
                .to(60)
                .on(world.listen)
        });
        let talk = |number: usize| {
            let port = 53 + number as u16 % 3;
            let client = [world.client, world.second_client][number % 2];
            Talk {
                protocol: [Protocol::Udp, Protocol::Tcp][number / 2 % 2],
                client: at(client, 40_000 + number as u16),
                listen: at(world.listen, port),
                target: at(target, 1_000 + port),
                next: [number as u32, 0xffff_fff0],
                is_open: false,
            }
        };
        Self {
            world: *world,
            gateways: [
                Gateway::with_room(&rules, 100),
                Gateway::with_room(&rules.map(Forward::light), 100),
            ],
            target,
            talks: std::array::from_fn(talk),
        }
    }

    fn act(&mut self, act: Act, hook: Hook) {
        match act {
            Act::Say {
                talk,
                from_client,
                length,
                hop_limit,
                dont_fragment,
            } => {
                let draft = Draft {
                    hop_limit,
                    dont_fragment,
                    payload: vec![7; length],
                    ..self.draft(talk, from_client, ACK)
                };
                // What has not been opened by a handshake is picked up in its middle.
                self.send(talk, from_client, &draft, hook);
            }
            Act::Turn { talk, end } if self.talks[talk].protocol == Protocol::Tcp => {
                let segments: &[(bool, u8)] = match end {
                    0 => &[(true, FIN), (false, FIN), (true, ACK)],
                    1 => &[(false, FIN)],
                    2 if self.talks[talk].is_open => &[(true, RST)],
                    2 => &[],
                    _ => &[(true, SYN), (false, SYN_ACK), (true, ACK)],
                };
                self.talks[talk].is_open = end == 3;
                for (from_client, flags) in segments {
                    let draft = self.draft(talk, *from_client, *flags);
                    self.send(talk, *from_client, &draft, hook);
                }
            }
            Act::Turn { .. } => {}
            Act::Wait(ticks) => {
                for gateway in &mut self.gateways {
                    gateway.model.advance(Ticks(ticks));
                }
            }
            Act::Change => self.gateways.iter_mut().for_each(Gateway::bump_generation),
            Act::Reroute(number) => {
                let (target, bits) = (self.target, self.world.bits());
                let next_hop = [2, 0, u16::from(number)];
                for gateway in &mut self.gateways {
                    if target == self.world.target {
                        gateway
                            .model
                            .maps
                            .set_route(target, bits, via(LAN, next_hop));
                        gateway.bump_generation();
                    }
                }
            }
        }
    }

    fn draft(&self, talk: usize, from_client: bool, flags: u8) -> Draft {
        let Talk {
            protocol,
            client,
            listen,
            target,
            next: [own, other],
            ..
        } = self.talks[talk];
        let (source, destination, sequence, acknowledgement) = if from_client {
            (client, listen, own, other)
        } else {
            (target, client, other, own)
        };
        match protocol {
            Protocol::Udp | Protocol::Echo => Draft::udp(source, destination),
            Protocol::Tcp => {
                Draft::tcp(source, destination, flags).numbers(sequence, acknowledgement)
            }
        }
    }

    fn send(&mut self, talk: usize, from_client: bool, draft: &Draft, hook: Hook) {
        let frame = if from_client {
            ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet())
        } else {
            ethernet(LAN_MAC, BACKEND_MAC, &draft.packet())
        };
        let ifindex = if from_client { WAN } else { LAN };
        let [full, light] = self.gateways.each_mut().map(|gateway| {
            gateway.hook = hook;
            let outcome = gateway.frame(ifindex, frame.clone());
            let outcome = behind_xdp(gateway, ifindex, outcome);
            gateway.model.backlog.clear();
            outcome
        });
        assert_eq!(light, full, "{draft:?}");
        let taken = draft.payload.len() as u32 + u32::from(takes_number(draft));
        let own = usize::from(!from_client);
        self.talks[talk].next[own] = self.talks[talk].next[own].wrapping_add(taken);
    }

    fn counters(&self) -> [Vec<(u32, PortCounters)>; 2] {
        [0, 1].map(|of| self.gateways[of].books().counters)
    }
}

/// What XDP leaves is for TC.
fn behind_xdp(gateway: &mut Gateway, ifindex: u32, outcome: Outcome) -> Outcome {
    if gateway.hook != Hook::Xdp || outcome.verdict != Verdict::Pass(PassReason::SlowPath) {
        return outcome;
    }
    gateway.hook = Hook::TcSlow;
    gateway.frame(ifindex, outcome.after)
}

fn takes_number(draft: &Draft) -> bool {
    match draft.transport {
        Transport::Tcp(flags) => flags & 0x03 != 0,
        Transport::Udp | Transport::UdpWithoutSum | Transport::Echo => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(1_500)))]
    #[test]
    fn packets_fare_as_with_full_tracking_and_are_counted_alike(
        v6 in any::<bool>(), to in 0..5_usize, hook in prop::sample::select(vec![Hook::Xdp, Hook::Tc]),
        acts in prop::collection::vec(any_act(), 1..80),
    ) {
        let world = World::both()[usize::from(v6)];
        let target = [world.target, world.slow_target, world.narrow_target, world.silent_target, world.far_target][to];
        let mut twins = Twins::new(&world, target);
        for act in acts {
            twins.act(act, hook);
        }
        let [full, light] = twins.counters();
        prop_assert_eq!(light, full);
    }
}
