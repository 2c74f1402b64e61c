//! The options of a SYN, as far as they matter here: window scale and maximum segment size.
//!
//! They count as a receiver counts them (`tcp_parse_options` of Linux, `tcp_dooptions` of the BSDs): of one that is there twice
//! the last, and nothing from the first on that has no length or does not end within the header. An option with a length that is
//! not its own is none.

use crate::{
    datapath::tables::{Repeat, Repeated, Repeats},
    net::{PacketBuf, headers::TcpHeader},
};

/// What a SYN says in its options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Window scale; 0 if it offers none.
    pub scale: u8,
    /// Largest segment that its sender takes.
    pub segment_size: SegmentSize,
    /// Offset in the TCP header of the option at hand, bytes.
    at: u32,
    /// Where the header ends, bytes.
    end: u32,
}

/// A maximum segment size (RFC 9293 section 3.7.1) and where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentSize {
    /// Offset of its two bytes in the TCP header, bytes; 0 if there is none.
    pub at: u8,
    /// Bytes of data.
    pub value: u16,
}

/// A walk over options. Where it is, it keeps in [`Options`].
#[derive(Debug)]
struct Walk<'a, P> {
    transport: P,
    options: &'a mut Options,
}

/// The largest window scale (RFC 7323 section 2.3: larger ones count as this).
const MAX_SCALE: u8 = 14;
const FIRST: u32 = size_of::<TcpHeader>() as u32;
/// Length of the longest TCP header, bytes.
const MAX_HEADER: u32 = 60;

const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
const MAX_SEGMENT_SIZE: u8 = 2;
const WINDOW_SCALE: u8 = 3;

impl Options {
    /// Reads those of the header at `transport`, which is so many bytes long. What is written to is memory of the caller's.
    #[inline(always)]
    pub fn read<P: PacketBuf>(&mut self, transport: P, header_len: u32, repeat: &impl Repeats) {
        *self = Self {
            at: FIRST,
            end: header_len.min(MAX_HEADER),
            ..Self::default()
        };
        let mut walk = Walk {
            transport,
            options: self,
        };
        // An option is at least a byte long.
        repeat.repeat(MAX_HEADER - FIRST, &mut walk);
    }
}

impl<P: PacketBuf> Repeated for Walk<'_, P> {
    /// Looks at one option.
    #[inline(always)]
    fn step(&mut self) -> Repeat {
        self.look().map_or(Repeat::Enough, |()| Repeat::GoOn)
    }
}

impl<P: PacketBuf> Walk<'_, P> {
    /// `None` if there is no other behind it.
    #[inline(always)]
    fn look(&mut self) -> Option<()> {
        let options = &mut *self.options;
        let (at, end) = (options.at, options.end);
        // The constant is for the verifier, which knows nothing of what is in memory.
        if at >= end || at >= MAX_HEADER {
            return None;
        }
        let option = self.transport.after(at as usize);
        let length = match option.read::<u8>(0)? {
            END_OF_OPTIONS => return None,
            NO_OPERATION => 1,
            kind => {
                let length = u32::from(option.read::<u8>(1)?);
                if length < 2 || at + length > end {
                    return None;
                }
                match (kind, length) {
                    (MAX_SEGMENT_SIZE, 4) => {
                        options.segment_size = SegmentSize {
                            at: (at + 2) as u8,
                            value: u16::from_be_bytes(option.read(2)?),
                        };
                    }
                    (WINDOW_SCALE, 3) => options.scale = option.read::<u8>(2)?.min(MAX_SCALE),
                    (_, _) => {}
                }
                length
            }
        };
        options.at = at + length;
        Some(())
    }
}
