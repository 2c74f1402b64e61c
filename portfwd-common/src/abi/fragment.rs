//! Datagrams in fragments: what the first fragment has found out for those that follow.

use bytemuck::{Pod, Zeroable};

use super::Instant;
use crate::net::{Address, Delta, Family, Ipv6, be::Ports};

/// Key of FRAGMENTS: what the fragments of a datagram have in common (RFC 791 section 3.2, RFC 8200 section 4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct DatagramKey {
    /// Source in the first bytes ([`Address::widen`]).
    pub src: Ipv6,
    /// Destination, likewise.
    pub dst: Ipv6,
    /// Identification, as it lies in memory.
    pub id: u32,
    /// Index of the interface that it came in by.
    pub ifindex: u32,
    /// 4 with the IP protocol number above, or 6: over IPv6 only the first fragment says what the datagram carries.
    pub kind: u32,
}

/// Key of HELD: a fragment that came before the one in front of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct HeldKey {
    /// Its datagram.
    pub datagram: DatagramKey,
    /// Where in the datagram it begins, in units of eight bytes.
    pub offset: u32,
}

/// Value of FRAGMENTS: what becomes of a datagram's fragments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Datagram {
    /// Translated source in the first bytes ([`Address::widen`]).
    pub src: Ipv6,
    /// Translated destination, likewise.
    pub dst: Ipv6,
    /// Translated ports, by which the route is found.
    pub ports: Ports,
    /// Ports as the first fragment had them.
    pub came_with: Ports,
    /// IP protocol number of what it carries.
    pub protocol: u32,
    /// Element of COUNTERS.
    pub counter: u32,
    /// When its last fragment passed.
    pub last_seen: Instant,
    /// Change of the addresses' words.
    pub address_delta: Delta,
    /// Where the fragment begins that passed last, in units of eight bytes.
    pub start: u16,
    /// Where the next one has to begin, likewise. Beyond the end of the last fragment if that has passed.
    pub next: u16,
    /// [`Fate`].
    pub fate: u8,
    /// 0 for the original direction, 1 for the reply.
    pub direction: u8,
}

/// What becomes of a datagram's later fragments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// Translated, one after the other.
    Translate,
    /// Left to the kernel.
    Pass,
    /// Dropped.
    #[default]
    Refuse,
}

/// Bytes of an IP packet that HELD has room for. Larger fragments are not held: a WAN has an MTU of 1,500 bytes or less.
pub const HELD_BYTES: usize = 2_000;

/// Value of HELD.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Held {
    /// When it came.
    pub since: Instant,
    /// Bytes that count.
    pub len: u32,
    /// The fragment, from its IP header on.
    pub bytes: [u8; HELD_BYTES],
}

/// Datagrams whose fragments are followed at a time.
pub const MAX_DATAGRAMS: u32 = 16_384;
/// Fragments that are held at a time.
pub const MAX_HELD: u32 = 2_048;
/// How long a datagram waits for its next fragment, in seconds (RFC 6146 section 4: FRAGMENT_MIN).
pub const FRAGMENT_SECONDS: u32 = 2;

impl DatagramKey {
    /// The key of a fragment.
    #[inline(always)]
    pub fn new<A: Address>(src: A, dst: A, protocol: u8, id: u32, ifindex: u32) -> Self {
        let kind = match A::FAMILY {
            Family::V4 => 4 | u32::from(protocol) << 8,
            Family::V6 => 6,
        };
        Self {
            src: src.widen(),
            dst: dst.widen(),
            id,
            ifindex,
            kind,
        }
    }
}

impl Fate {
    /// The byte in [`Datagram::fate`].
    #[inline(always)]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Translate => 1,
            Self::Pass => 2,
            Self::Refuse => 0,
        }
    }
}

impl Datagram {
    /// What becomes of its later fragments.
    #[inline(always)]
    pub const fn fate(&self) -> Fate {
        match self.fate {
            1 => Fate::Translate,
            2 => Fate::Pass,
            // Nobody writes another value.
            _ => Fate::Refuse,
        }
    }
}

const _: () = assert!(size_of::<DatagramKey>() == 44);
const _: () = assert!(size_of::<HeldKey>() == 48);
const _: () = assert!(size_of::<Datagram>() == 60);
const _: () = assert!(size_of::<Held>() == 8 + HELD_BYTES);
