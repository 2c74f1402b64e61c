//! Wire order as a type. Constructors take host order, the field holds wire order and is private: a mix-up does not compile.

use bytemuck::{Pod, Zeroable};

/// A 16-bit integer in wire (big-endian) order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Be16(u16);

impl Be16 {
    /// From a value in host order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// The value in host order.
    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The two bytes as they lie in memory, read as a native integer: the word that a checksum adds up.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        self.0
    }

    /// From two bytes of memory read as a native integer.
    #[inline(always)]
    pub const fn from_word(word: u16) -> Self {
        Self(word)
    }
}

/// The first four bytes of TCP and UDP: source and destination port, one load and one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Ports(u32);

impl Ports {
    /// From ports in host order.
    #[inline(always)]
    pub const fn new(src: u16, dst: u16) -> Self {
        let (s, d) = (src.to_be_bytes(), dst.to_be_bytes());
        Self(u32::from_ne_bytes([s[0], s[1], d[0], d[1]]))
    }

    /// From the two 16-bit words as they lie in the packet.
    #[inline(always)]
    pub const fn from_words(words: [u16; 2]) -> Self {
        let (s, d) = (words[0].to_ne_bytes(), words[1].to_ne_bytes());
        Self(u32::from_ne_bytes([s[0], s[1], d[0], d[1]]))
    }

    /// The two 16-bit words as they lie in the packet.
    #[inline(always)]
    pub const fn words(self) -> [u16; 2] {
        let b = self.0.to_ne_bytes();
        [
            u16::from_ne_bytes([b[0], b[1]]),
            u16::from_ne_bytes([b[2], b[3]]),
        ]
    }

    /// Source port, host order.
    #[inline(always)]
    pub const fn src(self) -> u16 {
        u16::from_be(self.words()[0])
    }

    /// Destination port, host order.
    #[inline(always)]
    pub const fn dst(self) -> u16 {
        u16::from_be(self.words()[1])
    }

    /// Source and destination exchanged.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        let [s, d] = self.words();
        Self::from_words([d, s])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_lie_in_memory_as_on_the_wire() {
        let ports = Ports::new(0x1234, 0xabcd);
        assert_eq!(bytemuck::bytes_of(&ports), &[0x12, 0x34, 0xab, 0xcd]);
        assert_eq!((ports.src(), ports.dst()), (0x1234, 0xabcd));
        assert_eq!(ports.reversed(), Ports::new(0xabcd, 0x1234));
    }
}
