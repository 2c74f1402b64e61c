//! Lists of options, which IPv4 and TCP headers have in one form (RFC 791 section 3.1, RFC 9293 section 3.1): an end, a filler of
//! one byte, and options with a length.
//!
//! They count as a receiver counts them (`tcp_parse_options` of Linux, `tcp_dooptions` of the BSDs): nothing from the first on
//! that has no length or does not end within the header.

use super::tables::{Repeat, Repeated, Repeats};
use crate::net::PacketBuf;

/// An option with a length.
#[derive(Clone, Copy, Debug)]
pub struct Listed<P> {
    /// What it is.
    pub kind: u8,
    /// Its length with kind and length, at least 2 bytes.
    pub length: u32,
    /// Where it begins in the header, bytes.
    pub at: u32,
    /// From it on.
    pub view: P,
}

/// How far a walk has come, in memory of the caller's: the verifier would look at every option once for every number of options
/// before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Offset in the header of the option at hand, bytes.
    at: u32,
    /// Where the header ends, bytes.
    end: u32,
}

/// Length of a header of either kind without options, and of the longest, bytes.
const FIRST: u32 = 20;
const MAX_HEADER: u32 = 60;

const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;

/// A walk over options.
struct Walk<'a, P, V> {
    header: P,
    cursor: &'a mut Cursor,
    visit: V,
}

/// Visits the options of the header at `header`, which is so many bytes long. A visit returns `None` if nothing is left to do.
#[inline(always)]
pub fn walk<P: PacketBuf>(
    header: P,
    header_len: u32,
    cursor: &mut Cursor,
    repeat: &impl Repeats,
    visit: impl FnMut(Listed<P>) -> Option<()>,
) {
    *cursor = Cursor {
        at: FIRST,
        end: header_len.min(MAX_HEADER),
    };
    let mut walk = Walk {
        header,
        cursor,
        visit,
    };
    // An option is at least a byte long.
    repeat.repeat(MAX_HEADER - FIRST, &mut walk);
}

impl<P: PacketBuf, V: FnMut(Listed<P>) -> Option<()>> Repeated for Walk<'_, P, V> {
    /// Looks at one option.
    #[inline(always)]
    fn step(&mut self) -> Repeat {
        self.look().map_or(Repeat::Enough, |()| Repeat::GoOn)
    }
}

impl<P: PacketBuf, V: FnMut(Listed<P>) -> Option<()>> Walk<'_, P, V> {
    /// `None` if there is no other behind it.
    #[inline(always)]
    fn look(&mut self) -> Option<()> {
        let Cursor { at, end } = *self.cursor;
        // The constant is for the verifier, which knows nothing of what is in memory.
        if at >= end || at >= MAX_HEADER {
            return None;
        }
        let view = self.header.after(at as usize);
        let length = match view.read::<u8>(0)? {
            END_OF_OPTIONS => return None,
            NO_OPERATION => 1,
            kind => {
                let length = u32::from(view.read::<u8>(1)?);
                if length < 2 || at + length > end {
                    return None;
                }
                (self.visit)(Listed {
                    kind,
                    length,
                    at,
                    view,
                })?;
                length
            }
        };
        self.cursor.at = at + length;
        Some(())
    }
}
