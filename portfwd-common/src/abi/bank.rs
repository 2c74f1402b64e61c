//! Two banks of rule tables, and the word that says which of them packets look at.
//!
//! PORTS, RULES, LISTENS, TARGETS and RESTS hold everything twice, once for each bank. Packets look at one; a change of rules, however
//! many, is written to the other, and then packets go over to it, by one store of one word. So no packet finds a part of a change,
//! and no two packets, to whatever ports, find different parts of it.

use bytemuck::{Pod, Zeroable};

/// One of the two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bank {
    /// The first.
    #[default]
    A,
    /// The second.
    B,
}

/// What packets go by. One word, so that both change at one instant: a generation in its low 16 bits, and in the others how often
/// packets have gone over from one bank to the other. So a word that is the same tells that nothing has changed. (As for the
/// generation, but for 2^16 changes between two looks.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Epoch(u32);

impl Bank {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The one that this is not.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Where an element of this bank is in an array with room for `size` elements of each.
    ///
    /// By arithmetic: the verifier would follow every branch to the end of the program.
    #[inline(always)]
    pub const fn element(self, index: u32, size: u32) -> u32 {
        self as u32 * size + index
    }

    /// The high byte of a class in the keys of this bank.
    #[inline(always)]
    pub(super) const fn class_byte(self) -> u16 {
        (self as u16) << 8
    }
}

impl Epoch {
    /// How often packets have gone over, modulo 2: they began in the first bank.
    const BANK_B: u32 = 1 << 16;

    /// A generation, and a bank that packets have come to directly.
    pub const fn new(generation: u16, bank: Bank) -> Self {
        Self(match bank {
            Bank::A => generation as u32,
            Bank::B => generation as u32 | Self::BANK_B,
        })
    }

    /// The generation.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        self.0 as u16
    }

    /// The bank that packets look at.
    #[inline(always)]
    pub const fn bank(self) -> Bank {
        if self.0 & Self::BANK_B == 0 {
            Bank::A
        } else {
            Bank::B
        }
    }

    /// The next generation of the same bank.
    #[must_use]
    pub const fn next(self) -> Self {
        let turns = self.0 & !(u16::MAX as u32);
        Self(turns | self.generation().wrapping_add(1) as u32)
    }

    /// The same generation of the other bank.
    #[must_use]
    pub const fn switched(self) -> Self {
        Self(self.0.wrapping_add(Self::BANK_B))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_that_wraps_stays_in_its_bank() {
        for bank in Bank::ALL {
            let last = Epoch::new(u16::MAX, bank);
            assert_eq!((last.generation(), last.bank()), (u16::MAX, bank));
            assert_eq!(last.next(), Epoch::new(0, bank));
            let other = last.switched();
            assert_eq!((other.generation(), other.bank()), (u16::MAX, bank.other()));
        }
    }

    #[test]
    fn a_bank_that_packets_come_back_to_is_told_from_what_it_was() {
        let mut epoch = Epoch::default();
        for turns in 1..1_u32 << 16 {
            epoch = epoch.switched();
            assert_eq!(epoch.bank() == Bank::A, turns % 2 == 0);
            assert_eq!(epoch.generation(), 0);
            assert_ne!(epoch, Epoch::default());
        }
        assert_eq!(epoch.switched(), Epoch::default());
    }
}
