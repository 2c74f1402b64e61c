//! Cutting an IPv4 packet that is too big for its way out into fragments (RFC 791 section 3.2).
//!
//! The fragments are as their sender could have made them: of the packet as it came, before translation. They come in again, one
//! after the other, and are translated as any others. A packet that is a fragment itself is cut like a whole one.

use crate::net::{
    Be16, PacketBuf, Sum,
    headers::{IPV4_LEN, MORE_FRAGMENTS, OFFSET_MASK},
};

/// Bytes behind the IP header of the largest packet that is cut.
pub const CUT_BYTES: usize = 9_216;
/// Fragments that a packet is cut into at most: one that fits into [`CUT_BYTES`], for an MTU of 576 bytes.
pub const MAX_PIECES: u32 = 17;
/// Bytes that a fragment carries at most: less than the largest that the kernel program can prove to lie in its memory.
const MAX_STEP: u32 = 8_184;

/// How a packet is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Bytes behind the IP header.
    pub payload: u32,
    /// Bytes that every fragment but the last carries.
    step: u32,
    total_length: u16,
    field: u16,
    header_sum: u16,
}

/// A fragment: a slice of what the packet carries, and what its header says of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Where it begins, in bytes of what the packet carries.
    pub at: u32,
    /// How many bytes.
    pub len: u32,
    total_length: u16,
    field: u16,
    header_sum: u16,
}

impl Cut {
    /// Of the packet at `network`, into fragments of at most `mtu` bytes. `None` if it cannot be cut: it has options, of which some
    /// would have to go, or is too large, or the fragments would be too many.
    #[inline(always)]
    pub fn of<P: PacketBuf>(network: P, mtu: u16) -> Option<Self> {
        let [version, total_length, _, field, _, header_sum]: [u16; 6] = network.read(0)?;
        let payload =
            u32::from(Be16::from_word(total_length).host()).checked_sub(IPV4_LEN as u32)?;
        let step = (u32::from(mtu).checked_sub(IPV4_LEN as u32)? & !7).min(MAX_STEP);
        let has_options = version.to_ne_bytes()[0] != 0x45;
        if has_options || payload as usize > CUT_BYTES || step == 0 || payload > step * MAX_PIECES {
            return None;
        }
        Some(Self {
            payload,
            step,
            total_length,
            field,
            header_sum,
        })
    }

    /// A fragment by its number, from 0; `None` behind the last.
    #[inline(always)]
    pub fn slice(&self, number: u32) -> Option<Slice> {
        let at = number.wrapping_mul(self.step);
        if at >= self.payload {
            return None;
        }
        let rest = self.payload - at;
        let len = rest.min(self.step);
        let field = Be16::from_word(self.field).host();
        let more = if rest > self.step {
            MORE_FRAGMENTS
        } else {
            field & MORE_FRAGMENTS
        };
        let offset = (field & OFFSET_MASK).wrapping_add((at / 8) as u16) & OFFSET_MASK;
        let field = Be16::new(field & !(OFFSET_MASK | MORE_FRAGMENTS) | more | offset).word();
        let total_length = Be16::new((IPV4_LEN as u32 + len) as u16).word();
        let header_sum = Sum::ZERO
            .replace(self.total_length, total_length)
            .replace(self.field, field)
            .delta()
            .apply(self.header_sum);
        Some(Slice {
            at,
            len,
            total_length,
            field,
            header_sum,
        })
    }
}

impl Slice {
    /// Writes what the header says of it. `None` if the header is not there.
    #[inline(always)]
    #[must_use]
    pub fn write_header<P: PacketBuf>(&self, network: P) -> Option<()> {
        network.write(2, self.total_length)?;
        network.write(6, self.field)?;
        network.write(10, self.header_sum)
    }
}
