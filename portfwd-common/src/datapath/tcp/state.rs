//! The states of a connection, and how long a silent one is kept.

use super::Side;
use crate::abi::{Config, Instant, Ticks};

/// Where a TCP connection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TcpState {
    /// The client has sent a SYN.
    #[default]
    SynSent,
    /// The backend has answered it, or has sent a SYN of its own at the same time (RFC 5382 REQ-2).
    SynReceived,
    /// The client was met in the middle of a connection that has no entry, and the backend has not spoken.
    PickedUp,
    /// Both sides have acknowledged each other's SYN, or were both met in the middle.
    Established,
    /// One side has sent its FIN; counts as established (RFC 7857 section 2.3).
    HalfClosed,
    /// Both sides have sent their FIN.
    Closing,
    /// One side has sent the RST that the other expects, and nobody has sent anything since.
    Reset,
    /// That, before anything was established.
    Refused,
    /// A side has opened anew in the place of a connection that both knew, and the other has not taken part yet.
    Reopened,
}

/// From when a timeout counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// The flow's first packet: more of the same does not keep it.
    Created,
    /// The last packet that counts.
    LastSeen,
}

/// A refused connection is kept for this many seconds: what refuses it may be lost and come again.
const REFUSED: u32 = 10;

impl TcpState {
    /// Every state.
    pub const ALL: [Self; 9] = [
        Self::SynSent,
        Self::SynReceived,
        Self::PickedUp,
        Self::Established,
        Self::HalfClosed,
        Self::Closing,
        Self::Reset,
        Self::Refused,
        Self::Reopened,
    ];

    /// The state, from what each side has shown and when it last did.
    #[inline(always)]
    pub const fn of(original: (&Side, Instant), reply: (&Side, Instant)) -> Self {
        let ((original, original_seen), (reply, reply_seen)) = (original, reply);
        let both_acked = original.has(Side::ACK) && reply.has(Side::ACK);
        // What the other side sends after a RST shows that it has not taken it (RFC 7857 section 2.2).
        let original_gave_up = original.has(Side::RST) && !is_later(reply_seen, original_seen);
        let reply_gave_up = reply.has(Side::RST) && !is_later(original_seen, reply_seen);
        if original_gave_up || reply_gave_up {
            // Refused if there was nothing to reset.
            if both_acked {
                Self::Reset
            } else {
                Self::Refused
            }
        } else if !both_acked && (original.has(Side::REOPENED) || reply.has(Side::REOPENED)) {
            // SYN or SYN-ACK on a connection that was known: not established before the other side answers it.
            Self::Reopened
        } else if original.has(Side::FIN) && reply.has(Side::FIN) {
            // Both are done; the last ACK may be lost and the FIN come again.
            Self::Closing
        } else if both_acked && (original.has(Side::FIN) || reply.has(Side::FIN)) {
            // One side is done, the other may send for hours.
            Self::HalfClosed
        } else if both_acked {
            // The third segment was seen, or a flow was picked up in its middle and both sides speak.
            Self::Established
        } else if !original.has(Side::SYN) {
            // Somebody sends into a connection that only they know of.
            Self::PickedUp
        } else if reply.has(Side::SYN) {
            // SYN and SYN-ACK, no third segment: a scan or a spoofed SYN gets no further.
            Self::SynReceived
        } else {
            // Only the client has spoken.
            Self::SynSent
        }
    }

    /// How long a connection in this state is kept.
    #[inline(always)]
    pub const fn timeout(self, config: &Config) -> Ticks {
        match self {
            Self::SynSent | Self::SynReceived => config.tcp_opening,
            Self::Established | Self::HalfClosed => config.tcp_established,
            Self::PickedUp | Self::Closing | Self::Reset | Self::Reopened => config.tcp_closing,
            Self::Refused => Ticks(REFUSED.saturating_mul(config.ticks_per_second)),
        }
    }

    /// From when that counts. A SYN that comes again and again, or data that nobody answers, keeps nothing.
    #[inline(always)]
    pub const fn since(self) -> Since {
        match self {
            Self::SynSent | Self::SynReceived | Self::PickedUp => Since::Created,
            Self::Established
            | Self::HalfClosed
            | Self::Closing
            | Self::Reset
            | Self::Refused
            | Self::Reopened => Since::LastSeen,
        }
    }

    /// Whether a SYN from the client now begins a new connection on the same 5-tuple.
    #[inline(always)]
    pub const fn is_over(self) -> bool {
        match self {
            Self::Closing | Self::Reset | Self::Refused | Self::Reopened => true,
            Self::SynSent
            | Self::SynReceived
            | Self::PickedUp
            | Self::Established
            | Self::HalfClosed => false,
        }
    }

    /// Whether it counts where flows are limited: its ends still have it open, or may.
    #[inline(always)]
    pub const fn is_open(self) -> bool {
        match self {
            Self::SynSent
            | Self::SynReceived
            | Self::PickedUp
            | Self::Established
            | Self::HalfClosed
            | Self::Reopened => true,
            Self::Closing | Self::Reset | Self::Refused => false,
        }
    }

    /// Whether both sides have shown that they know of the connection: it is worth a place that nobody can take from it.
    #[inline(always)]
    pub const fn is_proven(self) -> bool {
        match self {
            Self::Established | Self::HalfClosed | Self::Closing | Self::Reset => true,
            Self::SynSent | Self::SynReceived | Self::PickedUp | Self::Refused | Self::Reopened => {
                false
            }
        }
    }

    /// Name for listings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SynSent => "syn-sent",
            Self::SynReceived => "syn-received",
            Self::PickedUp => "picked-up",
            Self::Established => "established",
            Self::HalfClosed => "half-closed",
            Self::Closing => "closing",
            Self::Reset => "reset",
            Self::Refused => "refused",
            Self::Reopened => "reopened",
        }
    }
}

#[inline(always)]
const fn is_later(one: Instant, other: Instant) -> bool {
    one.ticks() != other.ticks() && one.later(other).ticks() == one.ticks()
}
