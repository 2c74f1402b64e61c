//! `CHECKSUM_COMPLETE`: the sum that the network card hands in must fit the packet after translation too. A kernel that has
//! the flag for it compares at the end of a test run.

use std::io::ErrorKind;

use anyhow::{Error, Result};
use portfwd_common::model::{
    frame::{Draft, ethernet},
    world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at},
};

use crate::agreement::agree;
use crate::kernel::{Entry, Kernel};
use crate::surroundings::Surroundings;
use crate::test_run::{Segments, Sums};

/// Whether the kernel knows the flag.
fn is_supported() -> Result<bool> {
    let world = World::v4();
    let packet = Draft::udp(at(world.client, 1), at(world.listen, 2)).packet();
    let frame = ethernet(WAN_MAC, UPSTREAM_MAC, &packet);
    let run = Kernel::new(1)?.run(Entry::Tc, WAN, &frame, Segments::default(), Sums::Whole);
    match run {
        Ok(_) => Ok(true),
        Err(error) if is_invalid_input(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_invalid_input(error: &Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::InvalidInput)
}

#[test]
fn the_sum_over_the_whole_packet_fits_after_translation() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        if !is_supported()? {
            println!("skipped: this kernel has no BPF_F_TEST_SKB_CHECKSUM_COMPLETE (6.16)");
            return Ok(());
        }
        agree(20_250_102, 8_000, Sums::Whole)?;
        Ok(())
    })?
}
