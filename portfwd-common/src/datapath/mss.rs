//! MSS clamping: neither side of a connection is told of segments that do not fit through the gateway.
//!
//! A SYN or SYN-ACK says how large the segments are to be that come back. What it says is lowered, never raised, to what the
//! smaller one of two MTUs leaves: that of the route by which the packet leaves, and that of the interface by which it came, where
//! the answer leaves. Only the fixed headers are taken off, whatever options are to come (RFC 6691). A SYN that says nothing stays
//! as it is: its receiver takes it for 536 or 1,220 bytes (RFC 9293 section 3.7.1).

use super::{
    Scene, path::UNKNOWN_MTU, tables::Tables, tcp::SegmentSize, verdict::Event,
    workspace::Workspace,
};
use crate::{
    abi::Rule,
    net::{Address, Be16, Delta, Sum, headers::TcpHeader},
};

/// A maximum segment size in the place of another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clamp {
    /// What is there, and where.
    pub said: SegmentSize,
    /// What is to be there, bytes of data.
    pub lowered: u16,
}

impl Clamp {
    /// Everything stays.
    pub const NONE: Self = Self {
        said: SegmentSize { at: 0, value: 0 },
        lowered: 0,
    };

    /// Whether anything changes.
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.said.at == 0
    }

    /// What that changes in the header's sum. At an odd offset the bytes of the value are in two words of the sum, in each at the
    /// other place: as if they were swapped (RFC 1071 section 2 (B)).
    #[inline(always)]
    pub const fn delta(&self) -> Delta {
        let (mut old, mut new) = (
            Be16::new(self.said.value).word(),
            Be16::new(self.lowered).word(),
        );
        if self.said.at & 1 != 0 {
            (old, new) = (old.swap_bytes(), new.swap_bytes());
        }
        Sum::ZERO.replace(old, new).delta()
    }
}

/// Says in the workspace what becomes of the maximum segment size in a SYN that has a way out, and counts it.
#[inline(always)]
pub fn clamp<A: Address, T: Tables>(work: &mut Workspace<A>, scene: &Scene<'_, T>) {
    work.clamp = Clamp::NONE;
    let said = work.options.segment_size;
    let Some(largest) = largest::<A>(work.path.mtu, scene.ingress.mtu) else {
        return;
    };
    if said.at == 0 || u32::from(said.value) <= largest || !is_wanted(work.mapping.rule, scene) {
        return;
    }
    work.clamp = Clamp {
        said,
        lowered: largest as u16,
    };
    scene.tables.note(Event::MssClamped);
}

/// The largest segment that two MTUs let through; `None` if neither is known, or they have no room for one.
#[inline(always)]
fn largest<A: Address>(egress: u16, ingress: u32) -> Option<u32> {
    let headers = (A::HEADER_LEN + size_of::<TcpHeader>()) as u32;
    let mtu = match (u32::from(egress), ingress) {
        (egress, 0) => egress,
        (UNKNOWN, ingress) => ingress,
        (egress, ingress) => egress.min(ingress),
    };
    (mtu > headers).then(|| mtu - headers)
}

const UNKNOWN: u32 = UNKNOWN_MTU as u32;

/// Whether neither the operator of the gateway nor the rule wants it left.
#[inline(always)]
fn is_wanted<T: Tables>(slot: u16, scene: &Scene<'_, T>) -> bool {
    !scene.config.keeps_mss() && !scene.tables.rule(slot).is_some_and(Rule::keeps_mss)
}
