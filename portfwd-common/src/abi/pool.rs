//! Ports of the gateway that stand for clients: what is taken, and by whom.
//!
//! A pool is all ports of one address in one protocol. A binding says which port of a pool stands for a client endpoint: every
//! flow of that endpoint leaves by it (RFC 4787 REQ-1), and nobody else's does (REQ-3). The datapath takes ports and makes
//! bindings; only the sweep gives them back, when no flow uses them any more.

use bytemuck::{Pod, Zeroable};

use super::{Instant, Protocol};
use crate::net::{Address, Ipv6};

/// Key of POOLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct PoolKey {
    /// Address in the first bytes ([`Address::widen`]).
    pub address: Ipv6,
    /// [`Protocol::class`] of family and protocol.
    pub class: u32,
}

/// Words of [`Pool::taken`]: 64 ports each, even ports in the first half, odd ones in the second.
pub const POOL_WORDS: usize = 1_024;
/// Words of [`Pool::full`]: 64 words of [`Pool::taken`] each.
pub const FULL_WORDS: usize = POOL_WORDS / 64;

/// Value of POOLS: a bit for every port, 1 if it must not be given out. Bits change one by one while packets pass, so nothing
/// ever writes a pool as a whole once it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Pool {
    /// By [`port_word`] and [`port_bit`].
    pub taken: [u64; POOL_WORDS],
    /// A bit for every word of `taken`, set if the word has no port left.
    pub full: [u64; FULL_WORDS],
}

/// The ports of a pool that a rule may use, `first` to `last`, inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct PoolRange {
    /// The first port; never 0.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

/// Key of BINDINGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct BindingKey {
    /// The client's address, in the first bytes ([`Address::widen`]).
    pub client: Ipv6,
    /// The address that stands for it, likewise.
    pub source: Ipv6,
    /// The client's port, host order.
    pub port: u16,
    /// [`Protocol::class`] of family and protocol.
    pub class: u16,
    /// The ports that the rule may use: two rules with different ranges bind a client to a port each.
    pub range: PoolRange,
}

/// Value of BINDINGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Binding {
    /// When a flow last began with it.
    pub used: Instant,
    /// The port that stands for the client's, host order.
    pub port: u16,
    /// Fills the structure.
    pub padding: u16,
}

/// The only element of POOL_TASK: bits of one word of one pool that user space wants changed. The program that does it changes
/// them among packets that take ports, which a write from user space could not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PoolTask {
    /// The pool.
    pub pool: PoolKey,
    /// Element of [`Pool::taken`].
    pub word: u32,
    /// Ports to take.
    pub take: u64,
    /// Ports to give back.
    pub give: u64,
}

impl PoolKey {
    /// The pool of an address and protocol.
    #[inline(always)]
    pub fn new<A: Address>(address: A, protocol: Protocol) -> Self {
        Self {
            address: address.widen(),
            class: u32::from(protocol.class(A::FAMILY)),
        }
    }
}

impl PoolRange {
    /// Every port.
    pub const ALL: Self = Self {
        first: 1,
        last: u16::MAX,
    };

    /// Whether a port is among them.
    #[inline(always)]
    pub const fn has(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl Default for PoolRange {
    fn default() -> Self {
        Self::ALL
    }
}

impl BindingKey {
    /// The pool that the binding's port is of.
    pub const fn pool(&self) -> PoolKey {
        PoolKey {
            address: self.source,
            class: self.class as u32,
        }
    }
}

impl Pool {
    /// Nothing is taken but port 0, which nobody can be.
    pub const FREE: Self = {
        let mut taken = [0; POOL_WORDS];
        taken[0] = 1;
        Self {
            taken,
            full: [0; FULL_WORDS],
        }
    };

    /// Takes a port, while the pool is not in the kernel yet.
    pub const fn take(&mut self, port: u16) {
        let word = port_word(port);
        self.taken[word] |= port_bit(port);
        if self.taken[word] == u64::MAX {
            self.full[word / 64] |= 1 << (word % 64);
        }
    }

    /// Whether a port must not be given out.
    pub const fn is_taken(&self, port: u16) -> bool {
        self.taken[port_word(port)] & port_bit(port) != 0
    }
}

/// The word of [`Pool::taken`] that has a port.
#[inline(always)]
pub const fn port_word(port: u16) -> usize {
    ((port as usize & 1) << 9) | (port as usize >> 7)
}

/// A port's bit in its word.
#[inline(always)]
pub const fn port_bit(port: u16) -> u64 {
    1 << ((port >> 1) & 63)
}

/// Inverse of [`port_word`] and [`port_bit`]: the port of a word's bit.
#[inline(always)]
pub const fn port_of(word: usize, bit: u32) -> u16 {
    ((word & 511) << 7) as u16 | (bit << 1) as u16 | (word >> 9) as u16
}

const _: () = assert!(size_of::<PoolKey>() == 20);
const _: () = assert!(size_of::<Pool>() == 8 * (POOL_WORDS + FULL_WORDS));
const _: () = assert!(size_of::<BindingKey>() == 40);
const _: () = assert!(size_of::<Binding>() == 8);
const _: () = assert!(size_of::<PoolTask>() == 40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_has_a_bit_of_its_own() {
        let mut pool = Pool::FREE;
        assert!(pool.is_taken(0));
        for port in 1..=u16::MAX {
            let (word, bit) = (port_word(port), port_bit(port));
            assert_eq!(port_of(word, bit.trailing_zeros()), port);
            assert!(!pool.is_taken(port));
            pool.take(port);
            assert!(pool.is_taken(port));
        }
        assert_eq!(pool.taken, [u64::MAX; POOL_WORDS]);
        assert_eq!(pool.full, [u64::MAX; FULL_WORDS]);
    }
}
