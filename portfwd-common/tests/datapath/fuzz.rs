//! Conversations of frames that nobody thought of, mutated from those that did something new before.
//!
//! The kept ones are in `tests/corpus`. An input is a sequence of steps: a byte that says where
//! and how a frame comes in and how long after the last one, two bytes with its length, and the frame. What a run that lasts
//! minutes (`cargo xtask fuzz`) finds to be new it keeps there.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
};

use portfwd_common::{
    abi::{LinkLayer, Protocol},
    datapath::{Arrival, Hook, Verdict, Way},
    model::{
        corpus::{Corpus, Matter},
        frame::{Draft, error, ethernet, fragments, with_options},
        rules::{Forward, Source},
        world::{
            ARM, BACKEND_MAC, LAN, LAN_MAC, TUNNEL, UPSTREAM_MAC, WAN, WAN_MAC, WAN_TUNNEL, World,
            at,
        },
    },
};

use crate::gateway::{Gateway, hex};

/// Inputs that every day's run tries.
const USUAL: u64 = 20_000;
/// Longest input that is kept, bytes.
const LONGEST: usize = 1_500;

fn gateway() -> Gateway {
    let rules: Vec<_> = World::both()
        .iter()
        .flat_map(|world| {
            [Protocol::Tcp, Protocol::Udp]
                .into_iter()
                .flat_map(|protocol| {
                    let forward = |port, target, target_port| {
                        Forward::new(protocol, port, at(target, target_port))
                    };
                    [
                        forward(80, world.target, 8080),
                        forward(81, world.second_target, 8081).from(Source::Masquerade),
                        forward(82, world.narrow_target, 82),
                        forward(83, world.tunnel_target, 83),
                        forward(84, world.silent_target, 84),
                        forward(1_000, world.target, 2_000).to(1_019),
                    ]
                })
        })
        .collect();
    Gateway::with_room(&rules, 64)
}

/// A frame, how it comes in, and seconds before.
struct Step {
    arrival: Arrival,
    wait: u32,
    frame: Vec<u8>,
}

impl Step {
    /// The steps of an input, as far as it goes.
    fn all(mut input: &[u8]) -> Vec<Self> {
        let mut steps = Vec::new();
        while let [how, high, low, rest @ ..] = input {
            let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
            let (frame, left) = rest.split_at(length);
            steps.push(Self::of(*how, frame));
            input = left;
        }
        steps
    }

    fn of(how: u8, frame: &[u8]) -> Self {
        let (ifindex, link) = match how & 7 {
            0 | 1 => (WAN, LinkLayer::Ethernet),
            2 | 3 => (LAN, LinkLayer::Ethernet),
            4 => (ARM, LinkLayer::Ethernet),
            5 => (TUNNEL, LinkLayer::Raw),
            6 => (WAN_TUNNEL, LinkLayer::Raw),
            _ => (LAN + 1, LinkLayer::Ethernet),
        };
        let hook = match how >> 3 & 3 {
            0 => Hook::Xdp,
            1 => Hook::Tc,
            2 => Hook::TcSlow,
            _ => Hook::TcOut,
        };
        // There is no XDP without link header.
        let hook = match (hook, link) {
            (Hook::Xdp, LinkLayer::Raw) => Hook::Tc,
            (hook, _) => hook,
        };
        Self {
            arrival: Arrival {
                hook,
                link,
                ifindex,
                segment_size: 0,
            },
            wait: match how >> 5 {
                0..=4 => 0,
                5 => 2,
                6 => 200,
                _ => 400,
            },
            frame: frame.to_vec(),
        }
    }
}

/// Runs an input and checks what must hold of every packet. Returns what it did, as far as it shows.
fn run(input: &[u8]) -> BTreeSet<u64> {
    let mut gateway = gateway();
    let mut features = BTreeSet::new();
    for step in Step::all(input) {
        gateway.wait(step.wait);
        let before = gateway.model.maps.reasons();
        let outcome = gateway.arrive(&step.arrival, step.frame);
        let after = gateway.model.maps.reasons();
        check(&outcome.verdict, &outcome.before, &outcome.after);
        // A flow has two entries, or there would be an odd number.
        let _ = gateway.flows();
        features.insert(feature(
            &outcome.verdict,
            step.arrival.hook,
            &before,
            &after,
        ));
        for again in gateway.settle() {
            check(&again.verdict, &again.before, &again.after);
        }
    }
    features
}

#[track_caller]
fn check(verdict: &Verdict, before: &[u8], after: &[u8]) {
    match verdict {
        Verdict::Pass(_) | Verdict::Drop(_) => assert_eq!(hex(after), hex(before), "{verdict:?}"),
        // An IP and an ICMP header, of IPv6 at most, in front of what is quoted.
        Verdict::Refuse(_) => assert!(after.len() <= before.len() + 40 + 8, "{:?}", hex(after)),
        Verdict::Forward(departure) => {
            let (link_before, link_after) = match departure.way {
                Way::Hold | Way::Again | Way::Cut => return,
                Way::Frame | Way::Stack => (0, 0),
                Way::Raw => (before.len() - before.len().min(after.len()), 0),
                // Where there was none: the kernel's helper takes one off.
                Way::NewHeader | Way::Resolve => (0, after.len() - after.len().min(before.len())),
            };
            let (before, after) = (&before[link_before..], &after[link_after..]);
            assert_eq!(after.len(), before.len(), "{departure:?}");
            let changed = before.iter().zip(after).filter(|(b, a)| b != a).count();
            // MAC addresses, hop limit, addresses, ports and sums, twice for what an error quotes.
            let most = 12 + 2 * (1 + 2 + 32 + 4 + 4) + 2;
            assert!(
                changed <= most,
                "{changed} bytes changed of {:?}",
                hex(before)
            );
        }
    }
}

/// What happened to a packet: its verdict and what was counted.
fn feature(
    verdict: &Verdict,
    hook: Hook,
    before: &BTreeMap<u32, u64>,
    after: &BTreeMap<u32, u64>,
) -> u64 {
    let mut hasher = DefaultHasher::new();
    (hook as u8).hash(&mut hasher);
    match verdict {
        Verdict::Pass(reason) => (0, reason.index()).hash(&mut hasher),
        Verdict::Drop(reason) => (1, reason.index()).hash(&mut hasher),
        Verdict::Refuse(reason) => (3, reason.index()).hash(&mut hasher),
        Verdict::Forward(departure) => (2, departure.way as u8).hash(&mut hasher),
    }
    for (reason, count) in after {
        if before.get(reason) != Some(count) {
            reason.hash(&mut hasher);
        }
    }
    hasher.finish()
}

fn step(how: u8, frame: &[u8]) -> Vec<u8> {
    let length = (frame.len() as u16).to_be_bytes();
    [&[how], &length[..], frame].concat()
}

/// Conversations as hosts have them, to begin with.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for world in World::both() {
        let wan = |packet: &[u8]| ethernet(WAN_MAC, UPSTREAM_MAC, packet);
        let lan = |packet: &[u8]| ethernet(LAN_MAC, BACKEND_MAC, packet);
        let (client, listen, target) = (
            at(world.client, 40_000),
            at(world.listen, 80),
            at(world.target, 8080),
        );
        for hook in [0, 8] {
            let tcp: Vec<u8> = [
                (true, 0x02),
                (false, 0x12),
                (true, 0x10),
                (true, 0x18),
                (false, 0x11),
                (true, 0x14),
            ]
            .into_iter()
            .flat_map(|(from_client, flags)| {
                if from_client {
                    step(hook, &wan(&Draft::tcp(client, listen, flags).packet()))
                } else {
                    step(hook | 2, &lan(&Draft::tcp(target, client, flags).packet()))
                }
            })
            .collect();
            seeds.push(tcp);
            let question = Draft::udp(client, listen);
            let answer = Draft::udp(target, client);
            let kind = if world.is_v4() { 3 } else { 1 };
            let delivered = question.between(client, target).hop().packet();
            let refusal = error(world.target, world.client, kind, 3, [0; 4], &delivered);
            seeds.push(
                [
                    step(hook, &wan(&question.packet())),
                    step(hook | 2, &lan(&answer.packet())),
                    step(hook | 2, &lan(&refusal)),
                ]
                .concat(),
            );
            for port in [81, 82, 83, 84, 1_005] {
                let other = question.between(client, at(world.listen, port));
                seeds.push(step(hook, &wan(&other.packet())));
            }
            let large = Draft {
                dont_fragment: false,
                ..question.clone().payload(vec![7; 300])
            };
            let pieces = fragments(&large.packet(), 7, 120, 0);
            seeds.push(
                [2, 0, 1]
                    .iter()
                    .flat_map(|at: &usize| step(hook | 8, &wan(&pieces[*at])))
                    .collect(),
            );
            let hairpin = question.between(at(world.second_target, 5), listen);
            seeds.push(step(hook | 2, &lan(&hairpin.packet())));
            seeds.push(step(
                14,
                &question
                    .between(at(world.tunnel_client, 9), listen)
                    .packet(),
            ));
            if !world.is_v4() {
                seeds.push(step(hook, &wan(&with_options(&question.packet(), 60))));
            }
        }
    }
    seeds
}

#[test]
fn no_conversation_of_any_frames_breaks_what_must_hold() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let matter = Matter {
        seeds: seeds(),
        words: &[],
        usual: USUAL,
    };
    let found = Corpus::new(folder, LONGEST).explore(matter, run);
    println!("{found:?}");
}
