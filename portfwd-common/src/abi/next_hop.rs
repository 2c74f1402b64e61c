//! Ways out, finished: what a packet needs to leave, kept once for all flows that leave alike.

use bytemuck::{Pod, Zeroable};

use super::{Instant, Interface, LinkLayer, Ticks};
use crate::net::headers::MacWords;

/// An element of NEXT_HOPS. Everything but the first word stays as it is for as long as any flow entry that names the element
/// may be fresh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct NextHop {
    /// Who has it: see [`Hold`]. Changed only by compare-and-exchange.
    pub hold: Hold,
    /// Kernel index of the egress interface; 0 in an element that was never written.
    pub ifindex: u32,
    /// The interface's element of EGRESS, see [`super::config::interface_slot`].
    pub slot: u16,
    /// Largest IP packet of the route, bytes; 0 if the kernel does not say.
    pub mtu: u16,
    /// MAC address of the next hop; of no meaning on an interface without link header.
    pub mac: MacWords,
    /// The interface's own MAC address, likewise.
    pub source: MacWords,
    /// Of the interface's flags [`Self::FLAGS`].
    pub flags: u16,
    /// Zero.
    pub padding: u16,
}

/// Elements of NEXT_HOPS.
pub const NEXT_HOP_SLOTS: u32 = 16_384;

/// The word that says until when an element must stay as it is, and whether somebody writes to it now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Hold(pub u64);

impl Hold {
    /// Nobody has ever used the element.
    pub const NEVER: Self = Self(0);
    /// Somebody is writing to it.
    pub const WRITING: Self = Self(1 << 63);
    const USED: u64 = 1 << 32;

    /// Used at an instant.
    #[inline(always)]
    pub const fn at(now: Instant) -> Self {
        Self(Self::USED | now.ticks() as u64)
    }

    /// Whether it may be overwritten: no entry that refers to it can still be fresh, and nobody writes to it.
    #[inline(always)]
    pub fn is_free(self, now: Instant, rest: Ticks) -> bool {
        self == Self::NEVER
            || (self.0 & Self::USED != 0
                && now.since_any_cpu(Instant::from_ticks(self.0 & 0xffff_ffff)) > rest)
    }
}

impl NextHop {
    /// Flags of an interface that say how a frame leaves by it.
    pub const FLAGS: u16 = Interface::RAW | Interface::XDP_TRANSMIT | Interface::XDP_SCATTER;

    /// Whether a packet leaves the same way by both.
    #[inline(always)]
    pub fn is_same_way(&self, other: &Self) -> bool {
        self.ifindex == other.ifindex
            && self.mtu == other.mtu
            && self.mac == other.mac
            && self.source == other.source
            && self.flags == other.flags
    }

    /// What precedes the IP header there.
    #[inline(always)]
    pub const fn link(&self) -> LinkLayer {
        if self.flags & Interface::RAW != 0 {
            LinkLayer::Raw
        } else {
            LinkLayer::Ethernet
        }
    }

    /// Whether XDP may redirect there.
    #[inline(always)]
    pub const fn takes_xdp(&self) -> bool {
        self.flags & Interface::XDP_TRANSMIT != 0
    }

    /// Whether XDP may redirect frames there that lie in several buffers.
    #[inline(always)]
    pub const fn takes_scattered(&self) -> bool {
        self.flags & Interface::XDP_SCATTER != 0
    }
}

const _: () = assert!(size_of::<NextHop>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_free_before_its_first_use_and_a_rest_after_its_last() {
        let (now, rest) = (Instant::from_ticks(0xffff_fffe), Ticks(4));
        assert!(Hold::NEVER.is_free(now, rest));
        assert!(!Hold::WRITING.is_free(now, rest));
        for (age, is_free) in [(0, false), (4, false), (5, true), (1_000_000, true)] {
            assert_eq!(Hold::at(now).is_free(now.plus(Ticks(age)), rest), is_free);
        }
        // Another CPU's clock may be ahead.
        assert!(!Hold::at(now.plus(Ticks(1))).is_free(now, rest));
    }
}
