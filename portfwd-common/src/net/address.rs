//! The two address families. This module, [`super::headers`] and [`super::compose`] are the only places that know IPv4 from IPv6; the
//! datapath is generic over [`Address`] and instantiated twice.

use core::{
    fmt::Debug,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bytemuck::{Pod, Zeroable};

use super::{compose::Compose, headers::Network};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// An IPv4 address; the word lies in memory as on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Ipv4(u32);

/// An IPv6 address; the words lie in memory as on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Ipv6([u32; 4]);

/// An address as packets and map keys hold it, and what its family makes different.
pub trait Address:
    Copy + Debug + Default + PartialEq + Eq + Hash + Pod + Network + Compose
{
    /// The family.
    const FAMILY: Family;
    /// Fills a flow entry up to whole cache lines (see [`crate::abi::FlowEntry`]).
    type Padding: Pod + Debug + Default + PartialEq + Eq;

    /// The address in the first bytes of a field that holds either family.
    fn widen(self) -> Ipv6;
    /// Inverse of [`Address::widen`].
    fn narrow(wide: Ipv6) -> Self;
    /// One's-complement sum of the 16-bit words as they lie in memory, not folded (at most 8 × 0xffff).
    fn sum(self) -> u32;
    /// Whether another address has the same first `bits` bits.
    fn begins_like(self, other: Self, bits: u32) -> bool;
    /// Whether all bits behind the first `bits` are ones, and there is more than one: all hosts of an IPv4 network. IPv6 has none.
    fn is_all_ones_behind(self, bits: u32) -> bool;
    /// Whether it may be the source or destination of a forwarded packet: not multicast, broadcast, loopback or unspecified.
    fn is_unicast(self) -> bool;
    /// As the standard library's type.
    fn ip(self) -> IpAddr;
}

/// Whether two words, as they lie in memory, have the same first `bits` bits.
#[inline(always)]
const fn word_begins_like(one: u32, other: u32, bits: u32) -> bool {
    let difference = u32::from_be(one ^ other) as u64;
    let bits = if bits > 32 { 32 } else { bits };
    difference >> (32 - bits) == 0
}

/// A word, as it lies in memory, with zeroes behind its first `bits` bits.
#[inline(always)]
const fn word_first_bits(word: u32, bits: u32) -> u32 {
    let bits = if bits > 32 { 32 } else { bits };
    word & (((u32::MAX as u64) << (32 - bits)) as u32).to_be()
}

/// Sum of the two halves of a word.
#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

impl Ipv4 {
    /// From the four bytes of the wire, read as two native words.
    #[inline(always)]
    pub const fn from_words(words: [u16; 2]) -> Self {
        let (a, b) = (words[0].to_ne_bytes(), words[1].to_ne_bytes());
        Self(u32::from_ne_bytes([a[0], a[1], b[0], b[1]]))
    }

    /// The bytes of the wire as two native words.
    #[inline(always)]
    pub const fn words(self) -> [u16; 2] {
        let b = self.0.to_ne_bytes();
        [
            u16::from_ne_bytes([b[0], b[1]]),
            u16::from_ne_bytes([b[2], b[3]]),
        ]
    }

    /// The word as it lies in memory, for kernel structures in wire order.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }
}

impl Ipv6 {
    /// The unspecified address, also the empty value of a field that holds either family.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// The words as they lie in memory, for kernel structures in wire order.
    #[inline(always)]
    pub const fn raw(self) -> [u32; 4] {
        self.0
    }

    /// The address with zeroes behind its first `bits` bits.
    #[inline(always)]
    pub const fn first_bits(self, bits: u32) -> Self {
        let [a, b, c, d] = self.0;
        Self([
            word_first_bits(a, bits),
            word_first_bits(b, bits.saturating_sub(32)),
            word_first_bits(c, bits.saturating_sub(64)),
            word_first_bits(d, bits.saturating_sub(96)),
        ])
    }

    /// From words as they lie in memory.
    #[inline(always)]
    pub const fn from_raw(words: [u32; 4]) -> Self {
        Self(words)
    }
}

impl From<Ipv4Addr> for Ipv4 {
    fn from(address: Ipv4Addr) -> Self {
        Self(u32::from_ne_bytes(address.octets()))
    }
}

impl From<Ipv6Addr> for Ipv6 {
    fn from(address: Ipv6Addr) -> Self {
        Self(bytemuck::cast(address.octets()))
    }
}

/// Either family in one field, see [`Address::widen`].
impl From<IpAddr> for Ipv6 {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Ipv4::from(v4).widen(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl Address for Ipv4 {
    const FAMILY: Family = Family::V4;
    type Padding = [u64; 0];

    #[inline(always)]
    fn widen(self) -> Ipv6 {
        Ipv6([self.0, 0, 0, 0])
    }

    #[inline(always)]
    fn narrow(wide: Ipv6) -> Self {
        Self(wide.0[0])
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        halves(self.0)
    }

    #[inline(always)]
    fn begins_like(self, other: Self, bits: u32) -> bool {
        word_begins_like(self.0, other.0, bits)
    }

    #[inline(always)]
    fn is_all_ones_behind(self, bits: u32) -> bool {
        // Networks of two addresses or one have no broadcast address (RFC 3021).
        const SMALLEST: u32 = 30;
        bits <= SMALLEST && u32::from_be(self.0) | !(u32::MAX >> bits) == u32::MAX
    }

    #[inline(always)]
    fn is_unicast(self) -> bool {
        // RFC 1812 section 5.3.7: 0/8, 127/8, 224/4, 240/4 are not forwarded.
        let first = self.0.to_ne_bytes()[0];
        first != 0 && first != 127 && first < 224
    }

    fn ip(self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from(self.0.to_ne_bytes()))
    }
}

impl Address for Ipv6 {
    const FAMILY: Family = Family::V6;
    type Padding = [u64; 2];

    #[inline(always)]
    fn widen(self) -> Ipv6 {
        self
    }

    #[inline(always)]
    fn narrow(wide: Ipv6) -> Self {
        wide
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        halves(self.0[0]) + halves(self.0[1]) + halves(self.0[2]) + halves(self.0[3])
    }

    #[inline(always)]
    fn begins_like(self, other: Self, bits: u32) -> bool {
        let (one, other) = (self.0, other.0);
        word_begins_like(one[0], other[0], bits)
            && word_begins_like(one[1], other[1], bits.saturating_sub(32))
            && word_begins_like(one[2], other[2], bits.saturating_sub(64))
            && word_begins_like(one[3], other[3], bits.saturating_sub(96))
    }

    #[inline(always)]
    fn is_all_ones_behind(self, _bits: u32) -> bool {
        false
    }

    #[inline(always)]
    fn is_unicast(self) -> bool {
        let head = self.0[0].to_ne_bytes();
        let multicast = head[0] == 0xff;
        // fe80::/10 never crosses a router (RFC 4291 section 2.5.6); ::, ::1 and the v4-mapped and v4-compatible blocks start
        // with 64 zero bits and are not valid on the wire (RFC 6092 REC-3, REC-5).
        let link_local = head[0] == 0xfe && head[1] & 0xc0 == 0x80;
        let embedded = self.0[0] == 0 && self.0[1] == 0;
        !(multicast || link_local || embedded)
    }

    fn ip(self) -> IpAddr {
        let octets: [u8; 16] = bytemuck::cast(self.0);
        IpAddr::V6(Ipv6Addr::from(octets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lie_in_memory_as_on_the_wire() {
        let v4 = Ipv4::from(Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(bytemuck::bytes_of(&v4), &[10, 1, 2, 3]);
        assert_eq!(Ipv4::narrow(v4.widen()), v4);
        assert_eq!(v4.ip(), "10.1.2.3".parse::<IpAddr>().unwrap());
        let v6: Ipv6 = "2001:db8::9".parse::<Ipv6Addr>().unwrap().into();
        assert_eq!(v6.ip(), "2001:db8::9".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn addresses_of_one_network_begin_alike() {
        for (one, other, bits) in [
            ("10.1.2.3", "10.1.2.3", 32),
            ("10.1.2.3", "10.1.2.2", 31),
            ("10.1.2.3", "10.1.2.131", 24),
            ("10.1.2.3", "138.1.2.3", 0),
            ("2001:db8::1", "2001:db8::1", 128),
            ("2001:db8::1", "2001:db8::2:1", 110),
            ("2001:db8::1", "2001:db8:0:1::1", 63),
            ("2001:db8::1", "2001:db9::1", 31),
            ("2001:db8::1", "a001:db8::1", 0),
        ] {
            let alike = |bits| match (one.parse().unwrap(), other.parse().unwrap()) {
                (IpAddr::V4(a), IpAddr::V4(b)) => Ipv4::from(a).begins_like(b.into(), bits),
                (IpAddr::V6(a), IpAddr::V6(b)) => Ipv6::from(a).begins_like(b.into(), bits),
                (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
            };
            for length in 0..=128 {
                assert_eq!(
                    alike(length),
                    length <= bits || one == other,
                    "{one} {other} {length}"
                );
            }
        }
    }

    #[test]
    fn only_unicast_addresses_that_cross_routers_are_unicast() {
        for (text, unicast) in [
            ("0.0.0.1", false),
            ("10.0.0.1", true),
            ("127.0.0.1", false),
            ("223.255.255.255", true),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("::", false),
            ("::1", false),
            ("::ffff:10.0.0.1", false),
            ("fe80::1", false),
            ("fec0::1", true),
            ("ff02::1", false),
            ("2001:db8::1", true),
        ] {
            let got = match text.parse().unwrap() {
                IpAddr::V4(a) => Ipv4::from(a).is_unicast(),
                IpAddr::V6(a) => Ipv6::from(a).is_unicast(),
            };
            assert_eq!(got, unicast, "{text}");
        }
    }
}
