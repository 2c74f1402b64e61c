//! What the datapath has to say: its slow path tells why it drops a packet, if the log wants to know.
//!
//! Whether it does is settled when the programs are loaded: at any other level the calls are dead code to the verifier, which
//! takes them out.

use anyhow::{Context, Result};
use aya::{Ebpf, EbpfLoader};
use aya_log::{EbpfLogger, Level};
use log::{error, log_enabled};
use tokio::io::{Interest, unix::AsyncFd};

/// The module of the kernel object that writes to the log; `RUST_LOG=portfwd::report=debug` turns it on.
const TARGET: &str = "portfwd::report";
/// No message of the datapath is this severe.
pub(super) const OFF: u8 = 0;

/// The level in force, as the object's read-only data has it.
#[must_use]
pub fn level() -> u8 {
    if log_enabled!(target: TARGET, log::Level::Debug) {
        Level::Debug as u8
    } else {
        OFF
    }
}

/// Has the object loaded with a level.
pub fn set_level<'a>(loader: &mut EbpfLoader<'a>, level: &'a u8) {
    loader.override_global(aya_log::LEVEL, level, true);
}

/// Passes on to the log what the programs say, for as long as the runtime lives.
pub fn follow(ebpf: &mut Ebpf, level: u8) -> Result<()> {
    if level == OFF {
        return Ok(());
    }
    let logger = EbpfLogger::init(ebpf).context("cannot read the datapath's messages")?;
    // SAFETY: the logger owns the ring buffer's descriptor and gives out no other for as long as it lives.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?;
    tokio::spawn(async move {
        loop {
            match logger.readable_mut().await {
                Ok(mut ready) => {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
                Err(cause) => {
                    error!("the datapath's messages are no longer read: {cause}");
                    return;
                }
            }
        }
    });
    Ok(())
}
