//! The options of a SYN, as far as they matter here: window scale and maximum segment size. Of one that is there twice the last
//! counts, as it does for a receiver; an option with a length that is not its own is none.

use crate::{
    datapath::{
        options::{self, Cursor},
        tables::Repeats,
    },
    net::PacketBuf,
};

/// What a SYN says in its options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Window scale; 0 if it offers none.
    pub scale: u8,
    /// Largest segment that its sender takes.
    pub segment_size: SegmentSize,
    /// How far they have been read.
    cursor: Cursor,
}

/// A maximum segment size (RFC 9293 section 3.7.1) and where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentSize {
    /// Offset of its two bytes in the TCP header, bytes; 0 if there is none.
    pub at: u8,
    /// Bytes of data.
    pub value: u16,
}

/// The largest window scale (RFC 7323 section 2.3: larger ones count as this).
const MAX_SCALE: u8 = 14;

const MAX_SEGMENT_SIZE: u8 = 2;
const WINDOW_SCALE: u8 = 3;

impl Options {
    /// Reads those of the header at `transport`, which is so many bytes long. What is written to is memory of the caller's.
    #[inline(always)]
    pub fn read<P: PacketBuf>(&mut self, transport: P, header_len: u32, repeat: &impl Repeats) {
        *self = Self::default();
        let Self {
            scale,
            segment_size,
            cursor,
        } = self;
        options::walk(transport, header_len, cursor, repeat, |option| {
            match (option.kind, option.length) {
                (MAX_SEGMENT_SIZE, 4) => {
                    *segment_size = SegmentSize {
                        at: (option.at + 2) as u8,
                        value: u16::from_be_bytes(option.view.read(2)?),
                    };
                }
                (WINDOW_SCALE, 3) => *scale = option.view.read::<u8>(2)?.min(MAX_SCALE),
                (_, _) => {}
            }
            Some(())
        });
    }
}
