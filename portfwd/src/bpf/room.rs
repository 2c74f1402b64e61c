//! How large the tables are, and what memory that takes.

use std::fmt;

use anyhow::Result;
use portfwd_common::{
    abi::{Binding, BindingKey, FlowEntry, FlowKey, PortCounters, names},
    net::{Ipv4, Ipv6},
};

use super::{counters::Layout, half_open};

/// Sizes that are settled.
pub(super) struct Room {
    max_flows: u32,
    max_half_open: u32,
    /// Elements of the tables for those.
    beginning: u32,
    counters: Layout,
}

impl Room {
    /// Room for connections and for flows that begin, of each family, and for counted ports.
    pub(super) fn of(max_flows: u32, max_half_open: u32, max_ports: u32) -> Result<Self> {
        Ok(Self {
            max_flows,
            max_half_open,
            beginning: half_open::elements(max_half_open)?,
            counters: Layout::of_ports(max_ports)?,
        })
    }

    /// Where the counters are.
    pub(super) const fn counters(&self) -> &Layout {
        &self.counters
    }

    /// Elements of a map whose size is chosen; `None` for any other.
    pub(super) fn elements(&self, map: &str) -> Option<u32> {
        match map {
            names::FLOWS_V4 | names::FLOWS_V6 => Some(2 * self.max_flows),
            names::BINDINGS => Some(self.max_flows),
            names::OPENING_V4 | names::OPENING_V6 => Some(self.beginning),
            names::COUNTERS => Some(self.counters.elements()),
            _ => None,
        }
    }

    /// Bytes that the tables take, as `docs/operations.md` has it.
    fn bytes(&self) -> u64 {
        /// All tables whose size is not chosen, but for what tries take as it comes.
        const FIXED: u64 = 37 << 20;
        let flows = 2 * self.max_flows;
        hash_table::<FlowKey<Ipv4>, FlowEntry<Ipv4>>(flows)
            + hash_table::<FlowKey<Ipv6>, FlowEntry<Ipv6>>(flows)
            + hash_table::<FlowKey<Ipv4>, FlowEntry<Ipv4>>(self.beginning)
            + hash_table::<FlowKey<Ipv6>, FlowEntry<Ipv6>>(self.beginning)
            + hash_table::<BindingKey, Binding>(self.max_flows)
            + u64::from(self.counters.elements()) * size_of::<PortCounters>() as u64
            + FIXED
    }
}

/// Bytes of a hash table that is made with all its elements (`htab_map_mem_usage`).
fn hash_table<K, V>(entries: u32) -> u64 {
    /// `struct htab_elem`, before the key.
    const HEADER: usize = 48;
    /// `struct bucket`.
    const BUCKET: u64 = 16;
    let element = HEADER + size_of::<K>().next_multiple_of(8) + size_of::<V>().next_multiple_of(8);
    u64::from(entries) * element as u64 + u64::from(entries).next_power_of_two() * BUCKET
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} MiB: {} connections, {} that begin, {} ports",
            self.bytes() >> 20,
            self.max_flows,
            self.max_half_open,
            self.counters.ports()
        )
    }
}
