//! How many connections the kernel tracks: a setting of the machine, for all namespaces.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

const MOST: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
const BUCKETS: &str = "/sys/module/nf_conntrack/parameters/hashsize";

/// The kernel tracks as many connections as were asked for, until this is dropped. One at a time.
///
/// A table that is full makes room by ending connections that only one side has spoken on (`early_drop`), so that each of their
/// packets begins one again. What is compared with portfwd, which has the room that it needs, is to have it as well.
#[derive(Debug)]
pub struct Room([(&'static str, u64); 2]);

impl Room {
    /// Room for so many connections at least, in as many buckets, which is the kernel's own proportion.
    ///
    /// # Errors
    /// If the kernel tracks no connections, or does not let its numbers be changed from here.
    pub fn for_connections(count: u64) -> Result<Self> {
        if !Path::new(MOST).exists() {
            // Whether it can be loaded shows below.
            let _ = Command::new("modprobe").arg("nf_conntrack").status();
        }
        let room = Self([(BUCKETS, read(BUCKETS)?), (MOST, read(MOST)?)]);
        for (path, there) in room.0 {
            write(path, there.max(count))?;
        }
        Ok(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for (path, number) in self.0 {
            if let Err(error) = write(path, number) {
                eprintln!("{error:#}");
            }
        }
    }
}

fn read(path: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let number = text.trim().parse();
    number.with_context(|| format!("{path} is no number"))
}

fn write(path: &str, number: u64) -> Result<()> {
    fs::write(path, number.to_string()).with_context(|| format!("write {number} to {path}"))
}
