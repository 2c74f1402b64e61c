//! The kernel's programs and the model agree, frame by frame and in all their tables.

use std::{env, net::UdpSocket};

use anyhow::Result;
use portfwd_common::{
    abi::Protocol,
    datapath::{DropReason, Event, PassReason},
    model::world::{World, at},
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
    agree_as(default_seed, steps, Twins::new(MAX_FLOWS, sums)?)
}

fn agree_as(default_seed: u64, steps: u32, mut twins: Twins) -> Result<Twins> {
    let seed = seed(default_seed);
    let sets = rule_sets();
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
        agree_as(20_261_127, 10_000, twins).map(|_| ())
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
