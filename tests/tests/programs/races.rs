//! Several CPUs at once.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;

use anyhow::Result;
use portfwd_common::{
    abi::Protocol,
    model::{
        frame::{Draft, ethernet},
        maps::pool_key,
        rules::{Forward, Lowered, Source},
        world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::kernel::{Entry, Kernel};
use crate::surroundings::Surroundings;
use crate::test_run::{self, Segments, Sums};

const THREADS: usize = 4;
const FLOWS: u16 = 500;

/// Two flows of one hidden client endpoint begin on several CPUs at once: the endpoint gets one port, and what a CPU has taken in
/// vain goes back.
#[test]
fn flows_of_one_client_that_race_share_one_port_and_no_port_is_lost() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut kernel = Kernel::new(2 * u32::from(FLOWS))?;
            kernel.configure(1)?;
            let rules = [(53, world.target), (54, world.second_target)].map(|(port, target)| {
                Forward::new(Protocol::Udp, port, at(target, port)).from(Source::Masquerade)
            });
            kernel.set_rules(Lowered::of(&rules))?;
            let (xdp, tc) = (kernel.program(Entry::Xdp)?, kernel.program(Entry::Tc)?);
            let start = Barrier::new(THREADS);
            thread::scope(|scope| {
                for number in 0..THREADS {
                    let start = &start;
                    let listen = at(world.listen, 53 + (number / 2) as u16);
                    scope.spawn(move || {
                        for port in 1..=FLOWS {
                            let sent = Draft::udp(at(world.client, port), listen);
                            let frame = ethernet(WAN_MAC, UPSTREAM_MAC, &sent.packet());
                            start.wait();
                            let run = if number % 2 == 0 {
                                test_run::xdp(xdp, WAN, &frame)
                            } else {
                                test_run::tc(tc, WAN, &frame, Segments::default(), Sums::Unknown)
                            };
                            // Every one of them left, translated.
                            assert_ne!(run.unwrap().frame, frame);
                        }
                    });
                }
            });
            let bindings = kernel.bindings()?;
            assert_eq!(bindings.len(), usize::from(FLOWS));
            let ports: BTreeSet<_> = bindings.values().map(|binding| binding.port).collect();
            assert_eq!(ports.len(), usize::from(FLOWS));
            let key = pool_key(world.lan_address, Protocol::Udp);
            let pool = kernel.pools()?[&key];
            let taken: u32 = pool.taken.iter().map(|word| word.count_ones()).sum();
            // And port 0, which is nobody's.
            assert_eq!(taken, u32::from(FLOWS) + 1);
            assert!(ports.iter().all(|port| pool.is_taken(*port)));
        }
        Ok(())
    })?
}
