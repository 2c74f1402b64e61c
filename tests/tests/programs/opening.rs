//! The table where flows begin is an LRU of the kernel, which makes room before it is full: every CPU takes free elements in
//! batches and keeps them at hand, where no other CPU finds them (`bpf_lru_pop_free`, kernel/bpf/bpf_lru_list.c). There are as many
//! elements more: two CPUs lost 128 entries at the very end without them.

use std::thread;

use anyhow::{Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use portfwd_common::{
    abi::Protocol,
    datapath::Table,
    model::{
        frame::{Draft, ethernet},
        rules::{Forward, Lowered},
        world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::kernel::{Entry, Kernel, MAX_HALF_OPEN};
use crate::surroundings::Surroundings;
use crate::test_run::{Segments, Sums};

/// Where the table is looked at, in percent of what it has room for.
const LOOKS: [u32; 6] = [25, 50, 75, 90, 99, 100];

/// Of so many flows one begins on each CPU but the first, which has the others: batches are used up unevenly.
const SHARES: u32 = 7;

/// Has flows begin, those with the numbers from `first` to `last`, on so many CPUs.
fn begin(kernel: &Kernel, world: &World, first: u32, last: u32, cpus: u32) -> Result<()> {
    thread::scope(|scope| {
        let begin_on = |cpu: u32| -> Result<()> {
            let mut only = CpuSet::new();
            only.set(cpu as usize)?;
            sched_setaffinity(Pid::from_raw(0), &only)?;
            for number in (first..last).filter(|number| share(*number, cpus) == cpu) {
                let client = at(world.client, 1 + number as u16);
                let sent = Draft::udp(client, at(world.listen, 53)).packet();
                let sent = ethernet(WAN_MAC, UPSTREAM_MAC, &sent);
                let segments = Segments::default();
                let run = kernel.run(Entry::Tc, WAN, &sent, segments, Sums::Unknown)?;
                ensure!(run.frame != sent, "flow {number} was not translated");
            }
            Ok(())
        };
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| scope.spawn(move || begin_on(cpu)))
            .collect();
        let mut ends = threads.into_iter();
        ends.try_for_each(|thread| thread.join().expect("no thread panics"))
    })
}

/// The CPU that a flow begins on.
fn share(number: u32, cpus: u32) -> u32 {
    match number % SHARES {
        share if share < cpus => share,
        _ => 0,
    }
}

#[test]
fn no_flow_that_begins_is_lost_up_to_the_last_that_there_is_room_for() -> Result<()> {
    let online = thread::available_parallelism()?.get() as u32;
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            for cpus in [1, online] {
                let mut kernel = Kernel::new(1)?;
                kernel.configure(1)?;
                let rule = Forward::new(Protocol::Udp, 53, at(world.target, 53));
                kernel.set_rules(Lowered::of(&[rule]))?;
                let mut begun = 0;
                for percent in LOOKS {
                    let flows = MAX_HALF_OPEN * percent / 100;
                    begin(&kernel, &world, begun, flows, cpus)?;
                    begun = flows;
                    let there = kernel.flows_v4(Table::Opening)?.len()
                        + kernel.flows_v6(Table::Opening)?.len();
                    let entered = 2 * flows;
                    let lost = entered - there as u32;
                    assert_eq!(
                        lost, 0,
                        "of {entered} entries, by {cpus} CPUs, at {percent} %"
                    );
                }
            }
        }
        Ok(())
    })?
}
