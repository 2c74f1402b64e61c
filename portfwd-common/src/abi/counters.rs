//! Counters, exact to the packet: every CPU adds to elements of its own, readers sum over the CPUs.

use bytemuck::{Pod, Zeroable};

use super::FlowDir;

/// Packets and bytes. A super-packet of the kernel counts as the segments it stands for on the wire; bytes are those of the
/// IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Traffic {
    /// IP packets.
    pub packets: u64,
    /// Bytes, from the IP header on.
    pub bytes: u64,
}

/// An element of COUNTERS: one listen port of one rule and protocol, on one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortCounters {
    /// Original direction.
    pub to_target: Traffic,
    /// Reply direction.
    pub to_client: Traffic,
}

impl Traffic {
    /// Adds a packet.
    #[inline(always)]
    pub const fn add(&mut self, more: Self) {
        self.packets = self.packets.wrapping_add(more.packets);
        self.bytes = self.bytes.wrapping_add(more.bytes);
    }
}

impl PortCounters {
    /// The counters of a direction.
    #[inline(always)]
    pub const fn direction(&mut self, direction: FlowDir) -> &mut Traffic {
        match direction {
            FlowDir::Original => &mut self.to_target,
            FlowDir::Reply => &mut self.to_client,
        }
    }
}
