//! TCP as the datapath follows it: which flags each side has shown. The state of a connection follows from the flags of both
//! halves of its flow; no sequence number is looked at.

use crate::abi::Config;
use crate::abi::Ticks;

/// The flags byte of a TCP header (byte 13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// First segment of a direction.
    pub const SYN: u8 = 0x02;
    /// Connection refused or aborted.
    pub const RST: u8 = 0x04;
    /// Acknowledgement field is valid.
    pub const ACK: u8 = 0x10;

    /// Whether any of `flags` is set.
    #[inline(always)]
    pub const fn any(self, flags: u8) -> bool {
        self.0 & flags != 0
    }

    /// What is remembered of a segment (see [`crate::abi::FlowEntry::tcp_seen`]): its SYN, FIN and RST, and its ACK unless it
    /// is a SYN-ACK, so that ACK means "this side has acknowledged the other's SYN".
    #[inline(always)]
    pub const fn seen(self) -> u8 {
        let mut seen = self.0 & (Self::FIN | Self::SYN | Self::RST);
        if !self.any(Self::SYN) {
            seen |= self.0 & Self::ACK;
        }
        seen
    }

    /// Whether a stack could have sent this combination. PSH, URG, ECE and CWR say nothing here.
    #[inline(always)]
    pub const fn is_legal(self) -> bool {
        match self.0 & (Self::FIN | Self::SYN | Self::RST | Self::ACK) {
            // An opening SYN, and its answer.
            Self::SYN | 0x12 => true,
            // Refusal with and without acknowledgement (RFC 9293 section 3.10.7.1 sends both).
            Self::RST | 0x14 => true,
            // Data, acknowledgement, end of data.
            Self::ACK | 0x11 => true,
            // Data without ACK, FIN without ACK, SYN or RST with FIN: nobody.
            _ => false,
        }
    }
}

/// Where a TCP connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// The client has sent a SYN.
    SynSent,
    /// The backend has answered it.
    SynReceived,
    /// Both sides have acknowledged; one side may have sent its FIN (half-closed counts as established, RFC 7857 section 2.3).
    Established,
    /// One side has sent its FIN.
    HalfClosed,
    /// Both sides have sent their FIN.
    Closing,
    /// One side has sent a RST.
    Reset,
}

impl TcpState {
    /// The state, from what was seen of either direction.
    #[inline(always)]
    pub const fn of(original: u8, reply: u8) -> Self {
        let (original, reply) = (TcpFlags(original), TcpFlags(reply));
        if original.any(TcpFlags::RST) || reply.any(TcpFlags::RST) {
            // A side gave up; the other may not know yet.
            Self::Reset
        } else if original.any(TcpFlags::FIN) && reply.any(TcpFlags::FIN) {
            // Both are done; the last ACK may be lost and the FIN come again.
            Self::Closing
        } else if original.any(TcpFlags::FIN) || reply.any(TcpFlags::FIN) {
            // One side is done, the other may send for hours.
            Self::HalfClosed
        } else if original.any(TcpFlags::ACK) && reply.0 != 0 {
            // The third segment was seen, or a flow was picked up in its middle and both sides speak.
            Self::Established
        } else if reply.any(TcpFlags::SYN) {
            // SYN and SYN-ACK, no third segment: a scan or a spoofed SYN gets no further.
            Self::SynReceived
        } else {
            // Only the client has spoken.
            Self::SynSent
        }
    }

    /// How long a silent connection in this state is kept.
    #[inline(always)]
    pub const fn timeout(self, config: &Config) -> Ticks {
        match self {
            Self::SynSent | Self::SynReceived => config.tcp_opening,
            Self::Established | Self::HalfClosed => config.tcp_established,
            Self::Closing | Self::Reset => config.tcp_closing,
        }
    }

    /// Whether a SYN from the client now begins a new connection on the same 5-tuple.
    #[inline(always)]
    pub const fn is_over(self) -> bool {
        match self {
            Self::Closing | Self::Reset => true,
            Self::SynSent | Self::SynReceived | Self::Established | Self::HalfClosed => false,
        }
    }

    /// Name for listings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SynSent => "syn-sent",
            Self::SynReceived => "syn-received",
            Self::Established => "established",
            Self::HalfClosed => "half-closed",
            Self::Closing => "closing",
            Self::Reset => "reset",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legal_flag_sets_are_those_a_stack_sends() {
        for byte in 0..=u8::MAX {
            let flags = TcpFlags(byte);
            let (fin, syn, rst, ack) = (
                flags.any(TcpFlags::FIN),
                flags.any(TcpFlags::SYN),
                flags.any(TcpFlags::RST),
                flags.any(TcpFlags::ACK),
            );
            // A SYN or a RST alone with or without ACK; data or FIN only with it.
            let legal = matches!(
                (syn, rst, fin, ack),
                (true, false, false, _) | (false, true, false, _) | (false, false, _, true)
            );
            assert_eq!(flags.is_legal(), legal, "{byte:#010b}");
        }
    }

    #[test]
    fn a_connection_goes_through_its_states() {
        let seen = |flags: &[u8]| flags.iter().fold(0, |all, f| all | TcpFlags(*f).seen());
        let (syn, syn_ack, ack, fin, rst) = (0x02, 0x12, 0x10, 0x11, 0x04);
        for (name, original, reply) in [
            ("syn-sent", seen(&[syn]), 0),
            ("syn-sent", seen(&[syn, syn]), 0),
            ("syn-received", seen(&[syn]), seen(&[syn_ack])),
            ("established", seen(&[syn, ack]), seen(&[syn_ack])),
            ("established", seen(&[syn, ack]), seen(&[syn_ack, ack])),
            ("established", seen(&[ack]), seen(&[ack])),
            ("half-closed", seen(&[syn, ack, fin]), seen(&[syn_ack, ack])),
            ("half-closed", seen(&[syn, ack]), seen(&[syn_ack, ack, fin])),
            (
                "closing",
                seen(&[syn, ack, fin]),
                seen(&[syn_ack, ack, fin]),
            ),
            ("reset", seen(&[syn]), seen(&[rst])),
            ("reset", seen(&[syn, ack, rst]), seen(&[syn_ack, ack])),
        ] {
            assert_eq!(TcpState::of(original, reply).name(), name);
        }
    }
}
