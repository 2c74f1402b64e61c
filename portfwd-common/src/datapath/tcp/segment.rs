//! A TCP segment as far as the state machine looks at it.

use crate::net::headers::TcpHeader;

/// The flags byte of a TCP header (byte 13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

/// What a segment is for, by its flags. PSH, URG, ECE and CWR say nothing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// Asks for a connection.
    Syn,
    /// Answers a SYN.
    SynAck,
    /// Refuses or aborts.
    Rst,
    /// Ends the sender's data.
    Fin,
    /// Data or an acknowledgement.
    Ack,
    /// Nothing that a stack sends.
    Nonsense,
}

/// Sequence number, acknowledgement and what goes with them, host order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Of the segment's first byte, or of its SYN.
    pub sequence: u32,
    /// Of the next byte expected; of no meaning without the flag ACK.
    pub acknowledgement: u32,
    /// Bytes of data.
    pub payload: u32,
    /// Window as on the wire.
    pub window: u16,
    /// Window scale that a SYN offers, [`UNKNOWN_SCALE`] if it was not looked for.
    pub scale: u8,
}

/// The window scale of a connection whose SYN nobody saw.
pub const UNKNOWN_SCALE: u8 = 15;

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

    /// What the segment is for.
    #[inline(always)]
    pub const fn kind(self) -> SegmentKind {
        match self.0 & (Self::FIN | Self::SYN | Self::RST | Self::ACK) {
            Self::SYN => SegmentKind::Syn,
            0x12 => SegmentKind::SynAck,
            // Refusal without and with acknowledgement (RFC 9293 section 3.10.7.1 sends both).
            Self::RST | 0x14 => SegmentKind::Rst,
            0x11 => SegmentKind::Fin,
            Self::ACK => SegmentKind::Ack,
            // Data without ACK, FIN without ACK, SYN or RST with FIN or each other.
            _ => SegmentKind::Nonsense,
        }
    }

    /// Whether a stack could have sent this combination.
    #[inline(always)]
    pub const fn is_legal(self) -> bool {
        !matches!(self.kind(), SegmentKind::Nonsense)
    }
}

impl Numbers {
    /// Of a header with so many bytes of data behind it.
    #[inline(always)]
    pub fn of(header: &TcpHeader, payload: u32) -> Self {
        Self {
            sequence: u32::from_be(header.sequence),
            acknowledgement: u32::from_be(header.acknowledgement),
            payload,
            window: u16::from_be(header.window),
            scale: UNKNOWN_SCALE,
        }
    }

    /// The sequence number behind the data; a SYN or FIN takes one more.
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        self.sequence.wrapping_add(self.payload)
    }
}
