//! One's-complement arithmetic of the Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! A *sum* is a running one's-complement sum of 16-bit words; a *header sum* is its complement as a header stores it. Words
//! are added as they lie in memory: one's-complement addition commutes with a swap of bytes (RFC 1071 section 2 (B)), so no
//! conversion is needed on either endianness.
//!
//! The update is equation 3 of RFC 1624, `HC' = ~(~HC + ~m + m')`, never equation 2: that one turns a header sum of 0x0000
//! into 0xffff. A [`Delta`] is `~m + m'` of all changed words, constant for the life of a flow.
//!
//! Zero: in UDP a header sum of 0x0000 means "none was computed" (RFC 768). Over IPv4 such a datagram stays so; a computed
//! 0x0000 is sent as 0xffff. TCP and ICMP know no such substitution.

use bytemuck::{Pod, Zeroable};

/// A one's-complement sum that has not been folded. Room for 65,537 words before it could overflow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u32);

/// What a change of words adds to a one's-complement sum; folded, and 0x0000 rather than 0xffff if nothing changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Delta(u16);

/// Folds the carries of a 32-bit sum until none is left: the second fold takes the carry that the first can make.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let once = (sum >> 16) + (sum & 0xffff);
    ((once >> 16) + (once & 0xffff)) as u16
}

impl Sum {
    /// Nothing added yet.
    pub const ZERO: Self = Self(0);

    /// Adds words that came into being.
    #[inline(always)]
    pub const fn plus(self, words: u32) -> Self {
        Self(self.0.wrapping_add(words))
    }

    /// Adds what another has added up.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        self.plus(other.0)
    }

    /// One word took the place of another.
    #[inline(always)]
    pub const fn replace(self, old: u16, new: u16) -> Self {
        Self(self.0.wrapping_add(!old as u32).wrapping_add(new as u32))
    }

    /// A sum of words (at most 0xffff × 8) took the place of another.
    #[inline(always)]
    pub const fn replace_sum(self, old: u32, new: u32) -> Self {
        self.replace(fold(old), fold(new))
    }

    /// The folded delta.
    #[inline(always)]
    pub const fn delta(self) -> Delta {
        match fold(self.0) {
            0xffff => Delta(0),
            folded => Delta(folded),
        }
    }

    /// A header sum that this comes into, by RFC 1624 equation 3.
    #[inline(always)]
    pub const fn apply(self, header_sum: u16) -> u16 {
        self.plus(!header_sum as u32).header_sum()
    }

    /// The same of UDP: none stays none, a computed zero is sent as all ones (RFC 768).
    #[inline(always)]
    pub const fn apply_udp(self, header_sum: u16) -> u16 {
        if header_sum == 0 {
            return 0;
        }
        match self.apply(header_sum) {
            0 => 0xffff,
            sum => sum,
        }
    }

    /// The complement, as a header stores it.
    #[inline(always)]
    pub const fn header_sum(self) -> u16 {
        !fold(self.0)
    }
}

impl Delta {
    /// No change.
    pub const ZERO: Self = Self(0);

    /// As the beginning of a sum.
    #[inline(always)]
    pub const fn sum(self) -> Sum {
        Sum(self.0 as u32)
    }

    /// Both changes.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Sum(self.0 as u32 + other.0 as u32).delta()
    }

    /// The change back.
    #[inline(always)]
    pub const fn negated(self) -> Self {
        match self.0 {
            0 => Self(0),
            delta => Self(!delta),
        }
    }

    /// The delta as a 32-bit word, as the kernel's checksum helpers take it.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0 as u32
    }

    /// The updated header sum, by RFC 1624 equation 3.
    #[inline(always)]
    pub const fn apply(self, header_sum: u16) -> u16 {
        Sum(self.0 as u32).apply(header_sum)
    }

    /// The updated header sum of UDP: none stays none, a computed zero is sent as all ones (RFC 768).
    #[inline(always)]
    pub const fn apply_udp(self, header_sum: u16) -> u16 {
        Sum(self.0 as u32).apply_udp(header_sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(words: &[u16]) -> u16 {
        let mut sum: u64 = words.iter().map(|w| u64::from(*w)).sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        !(sum as u16)
    }

    #[test]
    fn the_worked_example_of_rfc_1624_section_4_gives_zero_not_all_ones() {
        assert_eq!(
            Sum::ZERO.replace(0x5555, 0x3285).delta().apply(0xdd2f),
            0x0000
        );
    }

    /// A single fold leaves a carry in about one header of 33,000; all sums that two folds must handle are few enough to try.
    #[test]
    fn fold_leaves_no_carry() {
        for sum in (0..=0xffff_u32).flat_map(|high| {
            [
                high << 16,
                high << 16 | 1,
                high << 16 | 0xffff,
                high << 16 | (0xffff - high),
            ]
        }) {
            assert_eq!(u32::from(fold(sum)) % 0xffff, sum % 0xffff, "{sum:#x}");
        }
    }

    #[test]
    fn every_change_of_one_word_equals_recomputation_at_every_header_sum() {
        // One word exhaustively against a set of partners that reaches every old header sum class.
        for other in [0_u16, 1, 0x7fff, 0x8000, 0xfffe, 0xffff, 0x1234] {
            for new in 0..=0xffff_u16 {
                for old in [1_u16, 0x00ff, 0xffff] {
                    let before = full(&[other, old]);
                    let after = full(&[other, new]);
                    let updated = Sum::ZERO.replace(old, new).delta().apply(before);
                    // All-zero data has the one sum that no real header has; both zeros are right there.
                    if other != 0 || new != 0 {
                        assert_eq!(updated, after, "{other:#x} {old:#x} {new:#x}");
                    }
                }
            }
        }
    }

    #[test]
    fn udp_keeps_no_checksum_and_never_computes_none() {
        for delta in 0..=0xffff_u32 {
            let delta = Sum::ZERO.plus(delta).delta();
            assert_eq!(delta.apply_udp(0), 0);
            for sum in [1, 0x7fff, 0xfffe, 0xffff] {
                assert_ne!(delta.apply_udp(sum), 0);
            }
        }
    }

    /// Three random words of a random header of 20 bytes change, one of them to an edge value.
    #[test]
    fn incremental_equals_full_recomputation_over_a_million_random_headers() {
        const EDGES: [u16; 5] = [0, 1, 0x8000, 0xfffe, 0xffff];
        let mut random = fastrand::Rng::with_seed(1624);
        for _ in 0..crate::model::effort::cases(1_000_000) {
            let mut words: [u16; 10] = std::array::from_fn(|_| random.u16(..));
            words[9] = 0x4500; // a header is never all zero
            let (header, before) = (words, full(&words));
            let mut sum = Sum::ZERO;
            for new in [EDGES[random.usize(..5)], random.u16(..), random.u16(..)] {
                let at = random.usize(..9);
                sum = sum.replace(words[at], new);
                words[at] = new;
            }
            let updated = sum.delta().apply(before);
            assert_eq!(updated, full(&words), "{header:04x?} to {words:04x?}");
        }
    }
}
