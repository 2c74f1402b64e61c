//! The kernel's programs and the model agree, frame by frame and in all their tables.

use std::{env, net::UdpSocket};

use anyhow::Result;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use portfwd_common::{
    abi::{Protocol, Rule},
    datapath::{DropReason, Event, PassReason, Verdict},
    model::{
        frame::{Draft, ethernet},
        rules::{Forward, Lowered},
        world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::corpus::{self, Arriving};
use crate::kernel::Entry;
use crate::surroundings::Surroundings;
use crate::test_run::Sums;
use crate::traffic::{Step, Traffic, rule_sets};
use crate::twins::{Crossing, Twins};

/// Room for so few flows of each family that it runs out now and then.
const MAX_FLOWS: u32 = 80;
/// Steps after which all tables are compared.
const INTERVAL: u32 = 16;

/// Where random traffic starts from, unless this variable says otherwise: to try others, and to see a failure again.
const SEED: &str = "PORTFWD_TEST_SEED";

fn seed(default: u64) -> u64 {
    let seed = env::var(SEED).map_or(default, |text| text.parse().unwrap());
    println!("{SEED}={seed}");
    seed
}

/// Lets random traffic pass both, and returns them.
pub fn agree(default_seed: u64, steps: u32, sums: Sums) -> Result<Twins> {
    agree_as(
        default_seed,
        steps,
        Twins::new(MAX_FLOWS, sums)?,
        &rule_sets(),
    )
}

fn agree_as(default_seed: u64, steps: u32, mut twins: Twins, sets: &[Lowered; 2]) -> Result<Twins> {
    let seed = seed(default_seed);
    twins.set_rules(&sets[0])?;
    let mut traffic = Traffic::new(seed);
    // A service of the gateway, where a rule for everything else listens.
    let mut services = Vec::new();
    for world in World::both() {
        let own = at(world.second_listen, 7);
        services.push(UdpSocket::bind(own)?);
        twins.know_socket(Protocol::Udp, own, None);
    }
    for step in 0..steps {
        match traffic.step() {
            Step::Cross(crossing) => {
                let _ = twins.cross(&crossing)?;
            }
            Step::Generation => twins.bump_generation()?,
            Step::Trust => twins.turn_trust()?,
            Step::Age(seconds) => twins.age(seconds)?,
            Step::Rules(number) => twins.set_rules(&sets[number])?,
        }
        if step.is_multiple_of(INTERVAL) {
            twins.compare_books()?;
            twins.renew_lease()?;
        }
    }
    twins.compare_books()?;
    Ok(twins)
}

/// Entries are looked at again with every packet, or used as they are because the daemon vouches for them: which of the two,
/// their stamps tell.
#[test]
fn random_traffic_fares_the_same_where_only_the_daemons_word_spares_a_look() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        let twins = Twins::new(MAX_FLOWS, Sums::Unknown)?.vouched_for()?;
        agree_as(20_261_127, 10_000, twins, &rule_sets()).map(|_| ())
    })?
}

/// Has a test stay on one CPU: each has its own ways to clients, and the model has one.
fn stay_on_one_cpu() -> Result<()> {
    let mut only = CpuSet::new();
    only.set(0)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &only)?)
}

/// The same rules with light tracking, where they can have it.
fn lightly(mut rules: Lowered) -> Lowered {
    let rests: Vec<Rule> = rules
        .rules
        .values()
        .filter(|rule| rule.is_rest())
        .copied()
        .collect();
    for rule in rules.rules.values_mut() {
        let shades = |rest: &Rule| (rest.target, rest.protocol) == (rule.target, rule.protocol);
        if rule.carries_without_entries() && rule.protocol() != Protocol::Echo {
            rule.flags |= Rule::LIGHT;
            if rests.iter().any(shades) {
                rule.flags |= Rule::SHADED;
            }
        }
    }
    rules
}

#[test]
fn random_traffic_fares_the_same_with_light_tracking() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        stay_on_one_cpu()?;
        let twins = Twins::new(MAX_FLOWS, Sums::Unknown)?.without_turns()?;
        let sets = rule_sets().map(lightly);
        let mut rules = sets.iter().flat_map(|set| set.rules.values());
        assert!(rules.any(Rule::carries_by_itself));
        agree_as(20_261_128, 30_000, twins, &sets).map(|_| ())
    })?
}

/// What light tracking is for: packets of a flow that has been met leave its entries alone, by each program.
#[test]
fn packets_with_light_tracking_are_not_told_to_their_entries() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        stay_on_one_cpu()?;
        for world in World::both() {
            for entry in [Entry::Xdp, Entry::Tc, Entry::TcSlow] {
                let mut twins = Twins::new(MAX_FLOWS, Sums::Unknown)?.without_turns()?;
                let forward = Forward::new(Protocol::Udp, 53, at(world.target, 1053));
                twins.set_rules(&Lowered::of(&[forward.on(world.listen).light()]))?;
                let client = at(world.client, 5_353);
                let sent = Draft::udp(client, at(world.listen, 53)).packet();
                let back = Draft::udp(at(world.target, 1053), client).packet();
                let there = Crossing::new(entry, WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &sent));
                let back = Crossing::new(entry, LAN, ethernet(LAN_MAC, BACKEND_MAC, &back));
                for _ in 0..20 {
                    for crossing in [&there, &back] {
                        let verdict = twins.cross(crossing)?;
                        assert!(matches!(verdict, Verdict::Forward(_)), "{verdict:?}");
                    }
                }
                // The first of either direction is met; twenty are counted.
                twins.compare_books()?;
                let [met, counted] = twins.met_and_counted()?;
                assert!(met <= 4 && counted == 40, "{met} met of {counted}");
            }
        }
        Ok(())
    })?
}

#[test]
fn random_traffic_fares_the_same_in_the_kernel_and_in_the_model() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        let twins = agree(20_250_101, 40_000, Sums::Unknown)?;
        // Traffic that does not reach what it is there for proves nothing.
        let reasons = PassReason::ALL
            .iter()
            // What answers the gateway itself: a test of its own has it.
            .filter(|reason| !matches!(reason, PassReason::Answer))
            .map(|reason| (reason.index(), reason.name()))
            .chain(
                Event::ALL
                    .iter()
                    // Nothing is logged here, so nothing of it is lost.
                    .filter(|event| !matches!(event, Event::LogLost))
                    .map(|event| (event.index(), event.name())),
            )
            .chain(
                DropReason::ALL
                    .iter()
                    // The first two cannot happen without another CPU or a helper that fails. When a rate refuses is told by the
                    // clock, which the two may read a tick apart: rows have it.
                    .filter(|reason| {
                        !matches!(
                            reason,
                            DropReason::Vanished
                                | DropReason::RewriteFailed
                                | DropReason::SourceRate
                                | DropReason::RuleRate
                        )
                    })
                    .map(|reason| (reason.index(), reason.name())),
            );
        for (index, name) in reasons {
            println!("{name}: {}", twins.counted(index));
            assert_ne!(twins.counted(index), 0, "no frame met {name}");
        }
        Ok(())
    })?
}

/// Lets frames pass both, by XDP and by TC.
fn agree_on(frames: &[Arriving]) -> Result<()> {
    for entry in [Entry::Xdp, Entry::Tc] {
        let mut twins = Twins::new(1_024, Sums::Unknown)?;
        twins.set_rules(&rule_sets()[0])?;
        for (ifindex, frame) in frames {
            let crossing = Crossing::new(entry, *ifindex, frame.clone());
            if crossing.is_taken() {
                let _ = twins.cross(&crossing)?;
            }
        }
        twins.compare_books()?;
    }
    Ok(())
}

#[test]
fn frames_picked_by_hand_fare_the_same_in_the_kernel_and_in_the_model() -> Result<()> {
    type Corpus = fn(&World) -> Vec<Arriving>;
    let corpora: [(&str, Corpus); 5] = [
        ("cut short anywhere", corpus::truncated),
        ("any byte of a header", corpus::every_header_byte),
        ("any TCP flags", corpus::every_flag),
        ("headers of any length", corpus::every_header_length),
        ("segment sizes anywhere", corpus::every_segment_size),
    ];
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            for (name, corpus) in corpora {
                let frames = corpus(&world);
                println!("{name}: {} frames", frames.len());
                agree_on(&frames)?;
            }
        }
        Ok(())
    })?
}
