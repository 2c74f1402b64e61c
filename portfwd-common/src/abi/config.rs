//! What user space tells the datapath: timeouts, generation, interfaces.

use bytemuck::{Pod, Zeroable};

use super::{Bank, Epoch, Instant, Ticks};
use crate::net::{
    Address, Ipv4, Ipv6,
    headers::{ETHERNET_LEN, MacWords},
};

/// The only element of CONFIG. User space is its only writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// Its generation is raised by every change of route, neighbour, link or address and by every removal of a rule: a flow entry of
    /// another generation looks at rule and route again with its next packet.
    pub epoch: Epoch,
    /// Kernel ticks in a second (CONFIG_HZ).
    pub ticks_per_second: u32,
    /// A flow entry that was validated longer ago looks again by itself, unless the daemon vouches for it: routes stay right without
    /// the daemon.
    pub validity: Ticks,
    /// The same while the daemon vouches that it hears of every change: longer than `validity`, shorter than every timeout, and less
    /// than 2^15 ticks; 0 for never.
    pub leased_validity: Ticks,
    /// Until when the daemon vouches, see [`Config::is_leased`].
    pub lease_end: Instant,
    /// UDP, from the last packet of either direction (RFC 4787 REQ-5: at least 2 min, 5 min recommended).
    pub udp: Ticks,
    /// TCP before both sides have acknowledged (RFC 5382 REQ-5, RFC 7857 section 2.1: at most 4 min).
    pub tcp_opening: Ticks,
    /// TCP established or half-closed (RFC 5382 REQ-5: at least 2 h 4 min).
    pub tcp_established: Ticks,
    /// TCP after both FINs or a RST (RFC 7857 section 2.2: 4 min).
    pub tcp_closing: Ticks,
    /// A secret of this start: ports that stand for clients are not to be guessed (RFC 6056).
    pub seed: [u32; 2],
    /// [`Config::KEEPS_MSS`] and the other bits.
    pub flags: u32,
    /// How often a packet of a rule with light tracking goes to its flow's entry: [`super::Pace::period_bits`].
    pub turn_bits: u32,
    /// Likewise: [`super::Pace::per_tick`].
    pub turns_per_tick: u32,
}

/// The only element of PRESSURE. The datapath is its only writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Pressure {
    /// When a flow last found the table full; replies without entry are translated by the rule for as long as UDP lives.
    pub full_at: Instant,
    /// 1 once the table has been full, 0 before.
    pub was_full: u32,
}

impl Config {
    /// The maximum segment size that a SYN says stays as it is, whatever the rule.
    pub const KEEPS_MSS: u32 = 1;
    /// Whether a client can be where its packet came from is not asked.
    pub const TRUSTS_SOURCES: u32 = 2;
    /// There are rules that take what is nobody else's: RESTS is asked, and what leaves by the WAN is remembered.
    pub const HAS_RESTS: u32 = 4;
    /// There are rules with light tracking: PORTS is asked before the flow's entry is.
    pub const HAS_LIGHTS: u32 = 8;

    /// What flow entries are to be of.
    #[inline(always)]
    pub const fn generation(&self) -> u16 {
        self.epoch.generation()
    }

    /// The bank of the rule tables that packets look at.
    #[inline(always)]
    pub const fn bank(&self) -> Bank {
        self.epoch.bank()
    }

    /// Whether the daemon vouches that the generation tells every change up to now. It does so for a few seconds at a time, so one
    /// that has died or hangs soon ceases to. (2^32 ticks after its end, 49 days at 1,000 a second, a lease that nobody has renewed
    /// seems to run again, for as long as `leased_validity`.)
    #[inline(always)]
    pub const fn is_leased(&self, now: Instant) -> bool {
        self.lease_end.since(now).0.wrapping_sub(1) < self.leased_validity.0
    }

    /// Whether no SYN's maximum segment size is lowered.
    #[inline(always)]
    pub const fn keeps_mss(&self) -> bool {
        self.flags & Self::KEEPS_MSS != 0
    }

    /// Whether there are rules that take what is nobody else's.
    #[inline(always)]
    pub const fn has_rests(&self) -> bool {
        self.flags & Self::HAS_RESTS != 0
    }

    /// Whether there are rules with light tracking.
    #[inline(always)]
    pub const fn has_lights(&self) -> bool {
        self.flags & Self::HAS_LIGHTS != 0
    }

    /// Whether sources are taken as they come.
    #[inline(always)]
    pub const fn trusts_sources(&self) -> bool {
        self.flags & Self::TRUSTS_SOURCES != 0
    }
}

/// What lies before the IP header on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// An Ethernet header.
    Ethernet,
    /// Nothing (tun, WireGuard).
    Raw,
}

impl LinkLayer {
    /// Length of what precedes the IP header, bytes.
    #[inline(always)]
    pub const fn header_len(self) -> usize {
        match self {
            Self::Ethernet => ETHERNET_LEN,
            Self::Raw => 0,
        }
    }
}

/// Value of ADDRESSES.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct OwnAddress {
    /// 1 if rules without listen address listen on it: it is one of a WAN interface.
    pub is_wan: u32,
    /// Kernel index of the interface that has it.
    pub ifindex: u32,
}

/// Which side of the gateway an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Clients come in here: rules listen on its addresses.
    Wan,
    /// Backends are behind it.
    Lan,
    /// Both: a gateway with one arm.
    Both,
}

impl Role {
    /// Whether clients come in there.
    #[inline(always)]
    pub const fn is_wan(self) -> bool {
        matches!(self, Self::Wan | Self::Both)
    }

    /// Whether backends are behind it.
    #[inline(always)]
    pub const fn is_lan(self) -> bool {
        matches!(self, Self::Lan | Self::Both)
    }

    /// Whether the interfaces of two roles have a side in common.
    #[inline(always)]
    pub const fn meets(self, other: Self) -> bool {
        self.is_wan() && other.is_wan() || self.is_lan() && other.is_lan()
    }
}

/// An element of INTERFACES: an attached interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Interface {
    /// Kernel index; 0 marks an empty slot.
    pub ifindex: u32,
    /// Largest IP packet it sends, bytes.
    pub mtu: u32,
    /// Own MAC address.
    pub mac: MacWords,
    /// [`Interface::ROLE_WAN`] and the other bits.
    pub flags: u16,
    /// First address, the source of stateless replies; unspecified if it has none.
    pub ipv4: Ipv4,
    /// First global address, likewise.
    pub ipv6: Ipv6,
    /// Bits of the prefix of the network that `ipv4` is in.
    pub ipv4_prefix: u8,
    /// The same for `ipv6`.
    pub ipv6_prefix: u8,
    /// Fills the structure.
    pub padding: u16,
}

/// Elements of INTERFACES and EGRESS.
pub const INTERFACE_SLOTS: u32 = 4_096;

/// The slot of an interface. Two attached interfaces never share one: the loader refuses the second.
#[inline(always)]
pub const fn interface_slot(ifindex: u32) -> u16 {
    (ifindex % INTERFACE_SLOTS) as u16
}

/// Frames that XDP may redirect to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transmission {
    /// None.
    Nothing,
    /// Those that lie in one buffer.
    Whole,
    /// All.
    Scattered,
}

impl Transmission {
    /// Its bits in [`Interface::flags`].
    pub const fn flags(self) -> u16 {
        match self {
            Self::Nothing => 0,
            Self::Whole => Interface::XDP_TRANSMIT,
            Self::Scattered => Interface::XDP_TRANSMIT | Interface::XDP_SCATTER,
        }
    }
}

impl Interface {
    /// WAN; LAN if not set.
    pub const ROLE_WAN: u16 = 1;
    /// LAN too, if WAN.
    pub const ROLE_BOTH: u16 = 8;
    /// No Ethernet header.
    pub const RAW: u16 = 2;
    /// Takes frames that XDP redirects to it (`ndo_xdp_xmit`).
    pub const XDP_TRANSMIT: u16 = 4;
    /// And such as lie in several buffers (`NETDEV_XDP_ACT_NDO_XMIT_SG`).
    pub const XDP_SCATTER: u16 = 16;

    /// Which side it is.
    #[inline(always)]
    pub const fn role(&self) -> Role {
        if self.flags & Self::ROLE_WAN == 0 {
            Role::Lan
        } else if self.flags & Self::ROLE_BOTH == 0 {
            Role::Wan
        } else {
            Role::Both
        }
    }

    /// What precedes the IP header.
    #[inline(always)]
    pub const fn link(&self) -> LinkLayer {
        if self.flags & Self::RAW != 0 {
            LinkLayer::Raw
        } else {
            LinkLayer::Ethernet
        }
    }

    /// What XDP may redirect to it.
    pub const fn transmission(&self) -> Transmission {
        if self.flags & Self::XDP_TRANSMIT == 0 {
            Transmission::Nothing
        } else if self.flags & Self::XDP_SCATTER == 0 {
            Transmission::Whole
        } else {
            Transmission::Scattered
        }
    }

    /// Whether an address is in the network of its first address: no router is between the two.
    #[inline(always)]
    pub fn is_near<A: Address>(&self, address: A) -> bool {
        self.address::<A>()
            .is_some_and(|own| own.begins_like(address, self.prefix::<A>()))
    }

    /// Bits of the prefix of the network that its first address of a family is in.
    #[inline(always)]
    pub fn prefix<A: Address>(&self) -> u32 {
        u32::from(match A::FAMILY {
            crate::net::Family::V4 => self.ipv4_prefix,
            crate::net::Family::V6 => self.ipv6_prefix,
        })
    }

    /// Its first address of a family, `None` if it has none.
    #[inline(always)]
    pub fn address<A: Address>(&self) -> Option<A> {
        let address = match A::FAMILY {
            crate::net::Family::V4 => A::narrow(self.ipv4.widen()),
            crate::net::Family::V6 => A::narrow(self.ipv6),
        };
        (address != A::default()).then_some(address)
    }
}

const _: () = assert!(size_of::<Config>() == 56);
const _: () = assert!(size_of::<Interface>() == 40);
