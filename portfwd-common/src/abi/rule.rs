//! Rules as the datapath looks them up.
//!
//! A packet to a port first reads one word of PORTS. It names the rule that covers the port, and says whether rules with
//! listen addresses must be asked first (LISTENS). So a range costs what a port costs, and the usual gateway, whose rules
//! share no port, never searches.
//!
//! Precedence: a listen with an address before one without; among equals, the exact port before the range. What no such rule
//! listens on is looked up in RESTS: rules that take everything else.

use bytemuck::{Pod, Zeroable};
use network_types::ip::IpProto;

use super::{Bank, Limits, MAX_RULES, PoolRange};
use crate::net::{Address, Family, Ipv6};

/// A protocol that is forwarded: by port, or, without any, by the identifier that asks and answers have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// ICMP or ICMPv6 echo (RFC 792, RFC 4443 section 4). The identifier has the place of the client's port. That of the other side
    /// is always [`ECHO_PORT`].
    Echo,
}

/// The port that echo is asked at and answered from: no other protocol has it.
pub const ECHO_PORT: u16 = 0;

/// An element of RULES: one protocol of one rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Rule {
    /// Listen address in the first bytes ([`Address::widen`]); unspecified stands for every own address of the WAN interfaces.
    pub listen: Ipv6,
    /// Target address, likewise.
    pub target: Ipv6,
    /// First listen port.
    pub first: u16,
    /// Last listen port, inclusive.
    pub last: u16,
    /// Target port of the first listen port; the others follow one by one.
    pub target_first: u16,
    /// [`Rule::ACTIVE`] and the other bits.
    pub flags: u16,
    /// Element of COUNTERS of the first listen port; the others follow one by one.
    pub counter_base: u32,
    /// The rule's number for the operator.
    pub id: u32,
    /// [`Protocol::number`].
    pub protocol: u32,
    /// With [`Rule::SNAT`]: the address that stands for clients.
    pub source: Ipv6,
    /// Ports that may stand for clients, where any do.
    pub source_ports: PoolRange,
    /// List in SOURCES that says who may use it; 0 for everybody.
    pub sources: u32,
    /// How many flows it takes.
    pub limits: Limits,
}

/// An element of PORTS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct PortSlot(pub u32);

/// Classes whose ports are counted from 0 to 65,535. The others have [`ECHO_PORT`] alone.
const PORT_CLASSES: u16 = 4;

/// Combinations of family and protocol.
pub const CLASSES: u16 = PORT_CLASSES + 2;

/// Elements of a bank of PORTS: two families, two protocols, all ports; and one for the echo of each family.
pub const PORT_SLOTS: u32 = ((PORT_CLASSES as u32) << 16) + (CLASSES - PORT_CLASSES) as u32;

/// Key of LISTENS and TARGETS, behind the prefix length (in bits, over all of these bytes in this order). An exact port has
/// all [`EndpointKey::BITS`]; an aligned block of 2^n ports has n fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct EndpointKey {
    /// Address in the first bytes ([`Address::widen`]).
    pub address: Ipv6,
    /// [`Protocol::class`] of family and protocol, wire order; with the bank in its high byte in the tables
    /// ([`EndpointKey::in_bank`]), and without it everywhere else.
    pub class: crate::net::Be16,
    /// Port, wire order.
    pub port: crate::net::Be16,
}

/// Key of ADDRESSES.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct AddressKey {
    /// Address in the first bytes ([`Address::widen`]).
    pub address: Ipv6,
    /// 4 or 6: an IPv4 address and the IPv6 address that starts with its bytes are not the same.
    pub family: u32,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Echo];

    /// IP protocol number; of echo that of ICMP, over either family.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => IpProto::Tcp as u8,
            Self::Udp => IpProto::Udp as u8,
            Self::Echo => IpProto::Icmp as u8,
        }
    }

    /// The protocol with a [number](Self::number).
    pub const fn from_number(number: u8) -> Option<Self> {
        if number == Self::Echo.number() {
            Some(Self::Echo)
        } else {
            Self::with_ports(number)
        }
    }

    /// From the number in an IP header; `None` for what has no ports.
    #[inline(always)]
    pub const fn with_ports(number: u8) -> Option<Self> {
        if number == Self::Tcp.number() {
            Some(Self::Tcp)
        } else if number == Self::Udp.number() {
            Some(Self::Udp)
        } else {
            None
        }
    }

    /// 0 to 5 for the six combinations of family and protocol.
    #[inline(always)]
    pub const fn class(self, family: Family) -> u16 {
        let (first, second) = match self {
            Self::Tcp => (0, 2),
            Self::Udp => (1, 3),
            Self::Echo => (PORT_CLASSES, PORT_CLASSES + 1),
        };
        match family {
            Family::V4 => first,
            Family::V6 => second,
        }
    }
}

/// Ports that a [class](Protocol::class) has.
pub const fn ports_of_class(class: u16) -> u32 {
    if class < PORT_CLASSES { 1 << 16 } else { 1 }
}

/// The element of a bank of PORTS for a port of a [class](Protocol::class). Echo has one element, whatever the port: [`Rule::covers`] tells.
#[inline(always)]
pub const fn port_index(class: u16, port: u16) -> u32 {
    if class < PORT_CLASSES {
        (class as u32) << 16 | port as u32
    } else {
        ((PORT_CLASSES as u32) << 16) + (class - PORT_CLASSES) as u32
    }
}

impl Bank {
    /// The element of PORTS for a [`port_index`].
    #[inline(always)]
    pub const fn port(self, index: u32) -> u32 {
        self.element(index, PORT_SLOTS)
    }

    /// The element of RULES for a slot; `None` if there is no such slot.
    #[inline(always)]
    pub const fn rule(self, slot: u16) -> Option<u32> {
        if (slot as u32) < MAX_RULES {
            Some(self.element(slot as u32, MAX_RULES))
        } else {
            None
        }
    }
}

impl PortSlot {
    /// No rule covers the port.
    pub const EMPTY: Self = Self(0);
    /// Rules with several listen scopes cover the port: LISTENS is asked before the rule named here.
    const SCOPED: u32 = 1 << 31;

    /// The rule slot alone covers the port, whatever its listen address.
    #[inline(always)]
    pub const fn only(rule: u16) -> Self {
        Self(rule as u32)
    }

    /// LISTENS goes first; then the rule without address, slot 0 if there is none.
    #[inline(always)]
    pub const fn scoped(any: u16) -> Self {
        Self(any as u32 | Self::SCOPED)
    }

    /// The rule slot; 0 is none.
    #[inline(always)]
    pub const fn rule(self) -> u16 {
        self.0 as u16
    }

    /// Whether LISTENS goes first.
    #[inline(always)]
    pub const fn is_scoped(self) -> bool {
        self.0 & Self::SCOPED != 0
    }
}

impl EndpointKey {
    /// Bits of a whole key: the longest prefix.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;

    /// The key of one endpoint.
    #[inline(always)]
    pub fn new<A: Address>(address: A, protocol: Protocol, port: u16) -> Self {
        Self {
            address: address.widen(),
            class: crate::net::Be16::new(protocol.class(A::FAMILY)),
            port: crate::net::Be16::new(port),
        }
    }

    /// The key in a bank.
    #[inline(always)]
    pub const fn in_bank(self, bank: Bank) -> Self {
        Self {
            class: crate::net::Be16::new(self.class.host() | bank.class_byte()),
            ..self
        }
    }

    /// The bank that a key is in, and the key without it.
    pub const fn of_bank(self) -> (Bank, Self) {
        const BANK: u16 = Bank::B.class_byte();
        let class = self.class.host();
        let bank = if class & BANK == 0 { Bank::A } else { Bank::B };
        let class = crate::net::Be16::new(class & !BANK);
        (bank, Self { class, ..self })
    }
}

impl AddressKey {
    /// The key of an address.
    #[inline(always)]
    pub fn new<A: Address>(address: A) -> Self {
        Self {
            address: address.widen(),
            family: family_number(A::FAMILY),
        }
    }
}

#[inline(always)]
const fn family_number(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}

impl Rule {
    /// Flows of the slot go on.
    pub const ACTIVE: u16 = 1;
    /// Addresses are IPv6.
    pub const V6: u16 = 2;
    /// Listens on every own address of the WAN interfaces.
    pub const ANY_ADDRESS: u16 = 4;
    /// The listen endpoint follows from the target endpoint alone, so a flow of this rule can do without entries.
    pub const STATELESS: u16 = 8;
    /// Takes no new flow. With [`Rule::ACTIVE`] those that it has go on, without it there are none: the slot waits for its rule
    /// to open again. The datapath need not look: neither PORTS nor LISTENS leads to such a slot.
    pub const CLOSED: u16 = 0x8000;
    /// The egress interface's own address stands for clients.
    pub const MASQUERADE: u16 = 16;
    /// [`Rule::source`] stands for clients.
    pub const SNAT: u16 = 32;
    /// The maximum segment size that a SYN says stays as it is.
    pub const KEEPS_MSS: u16 = 64;
    /// Takes what is nobody else's: RESTS leads to it, neither PORTS nor LISTENS does, and all its ports are counted as one.
    pub const REST: u16 = 128;
    /// Its flows' entries are records, which most packets do not look at: what they say of a connection may be old.
    pub const LIGHT: u16 = 256;
    /// With [`Rule::LIGHT`]: flows of other rules go on at its ports or from its target, so its packets look at their entries.
    pub const SHADED: u16 = 512;

    /// Its protocol.
    pub const fn protocol(&self) -> Protocol {
        match Protocol::from_number(self.protocol as u8) {
            Some(protocol) => protocol,
            // Nobody writes another number.
            None => Protocol::Tcp,
        }
    }

    /// Whether flows of the slot go on.
    #[inline(always)]
    pub const fn is_active(&self) -> bool {
        self.flags & Self::ACTIVE != 0
    }

    /// Whether new flows may begin.
    #[inline(always)]
    pub const fn takes_flows(&self) -> bool {
        self.flags & (Self::ACTIVE | Self::CLOSED) == Self::ACTIVE
    }

    /// Whether anybody has the slot.
    #[inline(always)]
    pub const fn is_used(&self) -> bool {
        self.flags != 0
    }

    /// Whether it listens on every own address of the WAN interfaces.
    #[inline(always)]
    pub const fn is_any_address(&self) -> bool {
        self.flags & Self::ANY_ADDRESS != 0
    }

    /// Whether flows of this rule can be translated without entries.
    #[inline(always)]
    pub const fn is_stateless(&self) -> bool {
        self.flags & Self::STATELESS != 0
    }

    /// Whether its packets can do without entries: none that has limits lets a packet pass that belongs to no flow.
    #[inline(always)]
    pub const fn carries_without_entries(&self) -> bool {
        self.is_stateless() && !self.limits.bind()
    }

    /// Whether entries of its flows are records.
    #[inline(always)]
    pub const fn is_light(&self) -> bool {
        self.flags & Self::LIGHT != 0
    }

    /// Whether its packets need not look at their flow's entry now.
    #[inline(always)]
    pub const fn carries_by_itself(&self) -> bool {
        const NEEDED: u16 = Rule::ACTIVE | Rule::STATELESS | Rule::LIGHT;
        self.flags & (NEEDED | Self::SHADED | Self::CLOSED) == NEEDED
    }

    /// Whether the egress interface's own address stands for clients.
    #[inline(always)]
    pub const fn is_masquerade(&self) -> bool {
        self.flags & Self::MASQUERADE != 0
    }

    /// Whether [`Rule::source`] stands for clients.
    #[inline(always)]
    pub const fn is_snat(&self) -> bool {
        self.flags & Self::SNAT != 0
    }

    /// Whether the maximum segment size that a SYN says stays as it is.
    #[inline(always)]
    pub const fn keeps_mss(&self) -> bool {
        self.flags & Self::KEEPS_MSS != 0
    }

    /// Whether it takes what is nobody else's.
    #[inline(always)]
    pub const fn is_rest(&self) -> bool {
        self.flags & Self::REST != 0
    }

    /// Whether something stands for its clients, wherever they are.
    #[inline(always)]
    pub const fn hides_clients(&self) -> bool {
        self.is_masquerade() || self.is_snat()
    }

    /// Whether it listens on a port.
    #[inline(always)]
    pub const fn covers(&self, port: u16) -> bool {
        self.is_active() && self.first <= port && port <= self.last
    }

    /// The target port of a listen port it covers.
    #[inline(always)]
    pub const fn target_port(&self, listen: u16) -> u16 {
        self.target_first
            .wrapping_add(listen.wrapping_sub(self.first))
    }

    /// The listen port of a target port, `None` if it is not one of its targets.
    #[inline(always)]
    pub const fn listen_port(&self, target: u16) -> Option<u16> {
        let listen = self
            .first
            .wrapping_add(target.wrapping_sub(self.target_first));
        if target >= self.target_first
            && self.covers(listen)
            && listen.wrapping_sub(self.first) == target.wrapping_sub(self.target_first)
        {
            Some(listen)
        } else {
            None
        }
    }

    /// The element of COUNTERS of a listen port it covers.
    #[inline(always)]
    pub const fn counter(&self, listen: u16) -> u32 {
        if self.is_rest() {
            return self.counter_base;
        }
        self.counter_base
            .wrapping_add(listen.wrapping_sub(self.first) as u32)
    }

    /// Elements of COUNTERS that it has.
    pub const fn counters(&self) -> u32 {
        if self.is_rest() {
            1
        } else {
            self.last.saturating_sub(self.first) as u32 + 1
        }
    }
}

const _: () = assert!(size_of::<Rule>() == 112);
const _: () = assert!(size_of::<EndpointKey>() == 20);
const _: () = assert!(size_of::<AddressKey>() == 20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_of_every_range_edge_maps_there_and_back() {
        for (first, last, target_first) in [
            (1, 65535, 1),
            (1000, 2000, 64535),
            (80, 80, 8080),
            (65535, 65535, 1),
            (1, 1, 65535),
        ] {
            let rule = Rule {
                first,
                last,
                target_first,
                flags: Rule::ACTIVE,
                counter_base: 7,
                ..Rule::default()
            };
            for port in 0..=u16::MAX {
                assert_eq!(rule.covers(port), (first..=last).contains(&port));
                if rule.covers(port) {
                    let target = rule.target_port(port);
                    assert_eq!(
                        u32::from(target),
                        u32::from(target_first) + u32::from(port - first)
                    );
                    assert_eq!(rule.listen_port(target), Some(port));
                    assert_eq!(rule.counter(port), 7 + u32::from(port - first));
                }
            }
            let targets = (0..=u16::MAX)
                .filter(|t| rule.listen_port(*t).is_some())
                .count();
            assert_eq!(targets, usize::from(last - first) + 1);
        }
    }
}
