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

/// An element of COUNTERS: one listen port of one rule and protocol, on one CPU. [`element`] says where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortCounters {
    /// Original direction.
    pub to_target: Traffic,
    /// Reply direction.
    pub to_client: Traffic,
}

/// Where COUNTERS has a port on a CPU, if it has `ports` of them: every CPU has a block of its own, so that no two write to one
/// cache line (but for the last port of a block and the first of the next, if the number of ports is odd).
#[inline(always)]
#[must_use]
pub const fn element(port: u32, cpu: u32, ports: u32) -> u32 {
    cpu.wrapping_mul(ports).wrapping_add(port)
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
    /// Adds what another CPU has counted.
    #[inline(always)]
    pub const fn add(&mut self, more: &Self) {
        self.to_target.add(more.to_target);
        self.to_client.add(more.to_client);
    }

    /// The counters of a direction.
    #[inline(always)]
    pub const fn direction(&mut self, direction: FlowDir) -> &mut Traffic {
        match direction {
            FlowDir::Original => &mut self.to_target,
            FlowDir::Reply => &mut self.to_client,
        }
    }
}
