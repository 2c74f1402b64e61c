//! Ranges of ports as the kernel's longest-prefix tries hold them.

use portfwd_common::{
    abi::EndpointKey,
    net::{Be16, Ipv6},
};

/// An aligned block of 2^`bits` ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortBlock {
    /// First port.
    pub port: u16,
    /// Ports, as power of two: 0 to 15.
    pub bits: u32,
}

/// A key of LISTENS or TARGETS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// Bits of the key that count.
    pub length: u32,
    /// The first of the endpoints.
    pub key: EndpointKey,
}

/// What LISTENS or TARGETS is to hold under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub prefix: Prefix,
    /// Slot of the rule; `None` to remove the key.
    pub slot: Option<u16>,
}

impl PortBlock {
    /// Cuts a range into the fewest aligned blocks (at most 30).
    pub fn cover(first: u16, last: u16) -> Vec<Self> {
        let mut blocks = Vec::new();
        let (mut port, end) = (u32::from(first), u32::from(last) + 1);
        while port < end {
            let bits = port.trailing_zeros().min((end - port).ilog2());
            blocks.push(Self {
                port: port as u16,
                bits,
            });
            port += 1 << bits;
        }
        blocks
    }

    /// The block as key; `class` is that of family and protocol.
    pub fn prefix(self, address: Ipv6, class: u16) -> Prefix {
        let key = EndpointKey {
            address,
            class: Be16::new(class),
            port: Be16::new(self.port),
        };
        Prefix {
            length: EndpointKey::BITS - self.bits,
            key,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_is_covered_once_by_few_aligned_blocks() {
        for (first, last) in [
            (1, 65535),
            (1, 1),
            (65535, 65535),
            (1, 65534),
            (2, 65534),
            (1000, 1999),
            (1024, 2047),
            (80, 443),
            (32767, 32768),
        ] {
            let blocks = PortBlock::cover(first, last);
            assert!(blocks.len() <= 30, "{first}-{last}: {}", blocks.len());
            let mut next = u32::from(first);
            for block in blocks {
                assert_eq!(u32::from(block.port), next);
                assert_eq!(next % (1 << block.bits), 0);
                next += 1 << block.bits;
            }
            assert_eq!(next, u32::from(last) + 1);
        }
    }
}
