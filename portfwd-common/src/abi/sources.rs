//! Who may use a rule: lists of source prefixes, all in one trie.

use bytemuck::{Pod, Zeroable};

use crate::net::{Address, Be16, Ipv6};

/// Key of SOURCES, behind the prefix length (in bits, over all of these bytes in this order). A list belongs to one rule and
/// has addresses of that rule's family only; its answer for an address that none of its prefixes names is under
/// [`SourceKey::LIST_BITS`] alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct SourceKey {
    /// Number of the list, high and low half, wire order.
    list: [Be16; 2],
    /// Address in the first bytes ([`Address::widen`]).
    pub address: Ipv6,
}

/// Value of SOURCES.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Admission {
    /// May begin flows, and keep them.
    Allowed,
    /// May not.
    Denied,
}

impl SourceKey {
    /// Bits of a whole key: the longest prefix.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
    /// Bits that name the list: the shortest prefix.
    pub const LIST_BITS: u32 = u32::BITS;

    /// The key of an address in a list.
    #[inline(always)]
    pub fn new<A: Address>(list: u32, address: A) -> Self {
        Self {
            list: [Be16::new((list >> 16) as u16), Be16::new(list as u16)],
            address: address.widen(),
        }
    }

    /// Number of the list.
    pub const fn list(&self) -> u32 {
        (self.list[0].host() as u32) << 16 | self.list[1].host() as u32
    }
}

impl Admission {
    /// The element of SOURCES. An answer that is not there denies: a list is not half in force while it is written.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        match self {
            Self::Denied => 0,
            Self::Allowed => 1,
        }
    }

    /// From the element of SOURCES.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        if word == 0 {
            Self::Denied
        } else {
            Self::Allowed
        }
    }
}

const _: () = assert!(size_of::<SourceKey>() == 20);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Ipv4;

    #[test]
    fn a_key_begins_with_its_list_and_goes_on_with_the_address_as_on_the_wire() {
        let key = SourceKey::new(
            0x0102_0304,
            Ipv4::from(core::net::Ipv4Addr::new(10, 9, 8, 7)),
        );
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(&[1, 2, 3, 4, 10, 9, 8, 7]);
        assert_eq!(bytemuck::bytes_of(&key), bytes);
        assert_eq!(key.list(), 0x0102_0304);
    }
}
