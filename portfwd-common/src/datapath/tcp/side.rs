//! What one side of a connection has shown.

use super::segment::{Numbers, UNKNOWN_SCALE};
use crate::{abi::FlowEntry, net::Address};

/// One side, as the half of the flow remembers it that its own segments pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// [`Side::SYN`] and the other bits.
    pub seen: u8,
    /// Scale of its windows, [`UNKNOWN_SCALE`] if its SYN was not seen.
    pub scale: u8,
    /// The window that came with the highest acknowledgement, as on the wire.
    pub window: u16,
    /// The sequence number behind all that it has sent, SYN and FIN counted.
    pub sent: u32,
    /// The highest acknowledgement that it has sent. Before it has settled, the sequence number of its SYN: an acknowledgement of
    /// that lies above this and not above `sent`.
    pub acked: u32,
}

/// What a receiver makes of a sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Exactly the next one.
    Next,
    /// Within the window.
    Inside,
    /// Outside: the receiver does not look at it.
    Outside,
    /// Nobody can tell.
    Unknown,
}

/// Acknowledgements may be so far ahead of the last window: segments pass each other, and a window may shrink.
const SLACK: u32 = 0x1_0000;
/// So much data may have been lost before it came by here.
const GAP: u32 = 1 << 20;
/// The largest window there is (RFC 7323 section 2.3), with an unknown scale.
const LARGEST: u32 = 1 << 30;

impl Side {
    /// It has ended its data.
    pub const FIN: u8 = 0x01;
    /// It has asked for the connection, or answered.
    pub const SYN: u8 = 0x02;
    /// It has given up, and not sent anything since.
    pub const RST: u8 = 0x04;
    /// It has acknowledged the other side's SYN; of a connection picked up in its middle: it has spoken.
    pub const ACK: u8 = 0x10;
    /// It has sent a segment after its SYN that fits the connection: its numbers are those of data, and follow it.
    pub const SETTLED: u8 = 0x20;
    /// It has opened a connection in the place of one that both sides knew.
    pub const REOPENED: u8 = 0x40;

    /// What an entry says.
    #[inline(always)]
    pub const fn of<A: Address>(entry: &FlowEntry<A>) -> Self {
        Self {
            seen: entry.tcp_seen,
            scale: entry.marks >> SCALE_SHIFT,
            window: entry.window,
            sent: entry.sent,
            acked: entry.acked,
        }
    }

    /// Writes it to an entry.
    #[inline(always)]
    pub const fn store<A: Address>(&self, entry: &mut FlowEntry<A>) {
        entry.tcp_seen = self.seen;
        entry.marks = (entry.marks & ((1 << SCALE_SHIFT) - 1)) | self.scale << SCALE_SHIFT;
        entry.window = self.window;
        entry.sent = self.sent;
        entry.acked = self.acked;
    }

    /// After a SYN, with what else it shows.
    #[inline(always)]
    pub const fn opened(syn: &Numbers, more: u8) -> Self {
        // The window of a SYN is not scaled (RFC 7323 section 2.2). Rounded up: it may only be too large.
        let window = if syn.scale > 14 {
            syn.window
        } else {
            ((syn.window as u32 + (1 << syn.scale) - 1) >> syn.scale) as u16
        };
        Self {
            seen: Self::SYN | more,
            scale: syn.scale,
            window,
            sent: syn.end().wrapping_add(1),
            acked: syn.sequence,
        }
    }

    /// After a segment in the middle of a connection.
    #[inline(always)]
    pub const fn picked_up(segment: &Numbers) -> Self {
        Self {
            seen: Self::ACK | Self::SETTLED,
            scale: UNKNOWN_SCALE,
            window: segment.window,
            sent: segment.end(),
            acked: segment.acknowledgement,
        }
    }

    /// Whether any of `bits` was shown.
    #[inline(always)]
    pub const fn has(&self, bits: u8) -> bool {
        self.seen & bits != 0
    }

    /// Whether its numbers are those of data.
    #[inline(always)]
    pub const fn is_settled(&self) -> bool {
        self.has(Self::SETTLED)
    }

    /// Whether an acknowledgement is one of its SYN, and of no more than it has sent.
    #[inline(always)]
    pub const fn is_answered_by(&self, acknowledgement: u32) -> bool {
        let distance = acknowledgement.wrapping_sub(self.acked);
        self.has(Self::SYN)
            && !self.is_settled()
            && distance != 0
            && distance <= self.sent.wrapping_sub(self.acked)
    }

    /// Its first segment after the SYNs.
    #[inline(always)]
    pub const fn settle(&mut self, segment: &Numbers) {
        self.reach(segment);
        self.acked = segment.acknowledgement;
        self.window = segment.window;
        self.seen = (self.seen & !Self::RST) | Self::ACK | Self::SETTLED;
    }

    /// Settles by what the other side shows: it has answered a SYN, and the other side begins there.
    #[inline(always)]
    pub const fn settle_at(&mut self, acked: u32) {
        if self.has(Self::ACK) && !self.is_settled() {
            self.acked = acked;
            self.seen |= Self::SETTLED;
        }
    }

    /// Follows data and acknowledgements. Only what fits what it has shown before moves its numbers on: who does not see the
    /// connection must guess a number within a window.
    #[inline(always)]
    pub const fn follow(&mut self, segment: &Numbers) {
        self.reach(segment);
        if self.may_acknowledge(segment.acknowledgement) {
            self.acked = segment.acknowledgement;
            self.window = segment.window;
        }
    }

    /// Whether its numbers are up to date once it has followed a segment. One that others have overtaken says nothing new.
    #[inline(always)]
    pub const fn is_joined_by(&self, segment: &Numbers) -> bool {
        let (data, acknowledged) = (
            segment.end().wrapping_sub(self.sent),
            segment.acknowledgement.wrapping_sub(self.acked),
        );
        (!is_ahead(data) || self.may_reach(segment.sequence))
            && (!is_ahead(acknowledged) || self.may_acknowledge(segment.acknowledgement))
    }

    /// Whether an acknowledgement is believed by itself.
    #[inline(always)]
    const fn may_acknowledge(&self, acknowledgement: u32) -> bool {
        acknowledgement.wrapping_sub(self.acked) <= self.limit()
    }

    /// Whether new data that begins there is believed by itself.
    #[inline(always)]
    const fn may_reach(&self, sequence: u32) -> bool {
        let gap = sequence.wrapping_sub(self.sent);
        !is_ahead(gap) || gap <= GAP
    }

    /// Moves on to the end of a segment's data, if that joins what was sent before, but for a gap.
    #[inline(always)]
    pub const fn reach(&mut self, segment: &Numbers) {
        let ahead = segment.end().wrapping_sub(self.sent);
        if is_ahead(ahead) && self.may_reach(segment.sequence) {
            self.sent = segment.end();
        }
    }

    /// Believes what the other side shows where that goes beyond what fits by itself: segments may have gone another way for a
    /// time. For the slow path, which gets what does not join.
    #[inline(always)]
    pub const fn catch_up(&mut self, other: &Self, segment: &Numbers) {
        if !other.is_settled() {
            return;
        }
        if is_ahead(other.acked.wrapping_sub(self.sent)) {
            self.sent = other.acked;
        }
        let (advance, most) = (
            segment.acknowledgement.wrapping_sub(self.acked),
            other.sent.wrapping_sub(self.acked),
        );
        if is_ahead(most) && advance <= most {
            self.acked = segment.acknowledgement;
            self.window = segment.window;
        }
    }

    /// What it makes of a sequence number of the other side.
    #[inline(always)]
    pub const fn place(&self, sequence: u32) -> Place {
        if !self.is_settled() {
            return Place::Unknown;
        }
        let distance = sequence.wrapping_sub(self.acked);
        if distance == 0 {
            Place::Next
        } else if self.scale == UNKNOWN_SCALE {
            Place::Unknown
        } else if distance <= (self.window as u32) << self.scale {
            Place::Inside
        } else {
            Place::Outside
        }
    }

    /// Whether the other side may have a segment on its way that begins there, and that this side has not acknowledged. A
    /// keep-alive begins one before.
    #[inline(always)]
    pub const fn awaits(&self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.acked.wrapping_sub(1)) <= self.limit() + 1
    }

    /// Whether a segment that begins there can be one of its own SYN.
    #[inline(always)]
    pub const fn opens_at(&self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.acked) < self.sent.wrapping_sub(self.acked)
    }

    /// How far its next acknowledgement can be ahead: the other side can have sent no more than its window allows.
    #[inline(always)]
    const fn limit(&self) -> u32 {
        if self.scale == UNKNOWN_SCALE {
            LARGEST
        } else {
            ((self.window as u32) << self.scale) + SLACK
        }
    }
}

/// Where [`FlowEntry::marks`] has the scale.
const SCALE_SHIFT: u8 = 4;

/// Whether a distance between two numbers leads forward.
#[inline(always)]
const fn is_ahead(distance: u32) -> bool {
    distance as i32 > 0
}
