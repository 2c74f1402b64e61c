//! The connection table: one entry per direction of a flow.
//!
//! An element of a kernel hash map is a header of 48 bytes, the key and the value. The entry is laid out so that an element is
//! a whole number of 64-byte cache lines, and that of IPv4 has all the hot path touches in its second line.

use bytemuck::{Pod, Zeroable};

use super::{Instant, Stamp, Traffic};
use crate::net::{Address, Delta, Ipv4, Ipv6, be::Ports};

/// A 5-tuple as the packet carries it: key of FLOWS_V4 and FLOWS_V6.
///
/// A transport protocol in a word of its own leaves no padding; three bytes of it would cost a call to memset per packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// Both ports.
    pub ports: Ports,
    /// IP protocol number.
    pub protocol: u32,
}

/// What translation puts in place of a 5-tuple, with what that changes in checksums: computed once per flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Rewrite<A> {
    /// New source.
    pub src: A,
    /// New destination.
    pub dst: A,
    /// New ports.
    pub ports: Ports,
    /// Change of the addresses' words.
    pub address_delta: Delta,
    /// Change of the ports' words.
    pub port_delta: Delta,
}

/// Direction of a packet in its flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FlowDir {
    /// From the client, who sent the first packet.
    #[default]
    Original,
    /// From the backend.
    Reply,
}

/// Whom the target takes for the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Peer {
    /// The client itself.
    #[default]
    Client,
    /// The gateway: an address of its own and a port of a pool stand for the client. Such a flow cannot do without its entry,
    /// and the kernel must not see its packets: their addresses are its own.
    Gateway,
}

/// One direction of a flow: all that its next packet needs. Only packets of this direction write to it, so two directions on
/// two CPUs never write to one cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowEntry<A: Address> {
    /// What passed in this direction.
    pub traffic: Traffic,
    /// What becomes of the packet.
    pub rewrite: Rewrite<A>,
    /// When this direction's last packet passed.
    pub last_seen: Instant,
    /// When the flow began. Both halves carry the same; a partner with another one belongs to another life.
    pub created: Instant,
    /// Element of COUNTERS.
    pub counter: u32,
    /// TCP: the sequence number after the last byte that this side has sent, see [`crate::datapath::tcp`].
    pub sent: u32,
    /// TCP: the highest acknowledgement that this side has sent.
    pub acked: u32,
    /// TCP: the window that came with it, as on the wire but in host order.
    pub window: u16,
    /// When rule, partner, lifetime and route were last looked at.
    pub validated: Stamp,
    /// [`super::Config::generation`] of the validation, low 16 bits.
    pub generation: u16,
    /// Slot of the rule.
    pub rule: u16,
    /// Element of NEXT_HOPS: the way out that validation found.
    pub next_hop: u16,
    /// What this side has shown of TCP, see [`crate::datapath::tcp`].
    pub tcp_seen: u8,
    /// [`Self::REPLY`]; bit 1: the [`Peer`]; bit 2 is for what else holds of a flow as a whole; [`Self::LATE`]; the upper four are
    /// the scale of `window`.
    pub marks: u8,
    /// Fills the element up to whole cache lines.
    pub padding: A::Padding,
}

impl<A: Address> FlowKey<A> {
    /// The key of a packet that answers this one.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            ports: self.ports.reversed(),
            protocol: self.protocol,
        }
    }

    /// Becomes the reverse of another key, field by field: no copy on the stack.
    #[inline(always)]
    pub const fn reverse_of(&mut self, other: &Self) {
        self.src = other.dst;
        self.dst = other.src;
        self.ports = other.ports.reversed();
        self.protocol = other.protocol;
    }

    /// Becomes the key of a packet that answers a translated one, field by field.
    #[inline(always)]
    pub const fn reverse_of_rewrite(&mut self, rewrite: &Rewrite<A>, protocol: u32) {
        self.src = rewrite.dst;
        self.dst = rewrite.src;
        self.ports = rewrite.ports.reversed();
        self.protocol = protocol;
    }

    /// The key after translation.
    #[inline(always)]
    pub const fn rewritten(&self, rewrite: &Rewrite<A>) -> Self {
        Self {
            src: rewrite.src,
            dst: rewrite.dst,
            ports: rewrite.ports,
            protocol: self.protocol,
        }
    }

    /// The rewrite that turns this key into `to`.
    #[inline(always)]
    pub fn rewrite_to(&self, to: &Self) -> Rewrite<A> {
        let [old_src, old_dst] = self.ports.words();
        let [new_src, new_dst] = to.ports.words();
        Rewrite {
            src: to.src,
            dst: to.dst,
            ports: to.ports,
            address_delta: crate::net::headers::address_delta(
                [self.src, self.dst],
                [to.src, to.dst],
            ),
            port_delta: crate::net::Sum::ZERO
                .replace(old_src, new_src)
                .replace(old_dst, new_dst)
                .delta(),
        }
    }
}

impl<A: Address> Rewrite<A> {
    /// Becomes the rewrite of the packets that answer those this one was for, whose key was `key`.
    #[inline(always)]
    pub const fn undo(&mut self, key: &FlowKey<A>) {
        self.src = key.dst;
        self.dst = key.src;
        self.ports = key.ports.reversed();
        self.address_delta = self.address_delta.negated();
        self.port_delta = self.port_delta.negated();
    }
}

impl FlowDir {
    /// Its bit in [`FlowEntry::marks`].
    #[inline(always)]
    pub const fn mark(self) -> u8 {
        match self {
            Self::Original => 0,
            Self::Reply => REPLY,
        }
    }
}

/// [`FlowEntry::marks`]: the reply direction; the original if not set.
const REPLY: u8 = 1;
/// [`FlowEntry::marks`]: the gateway stands for the client; the client shows itself if not set.
const GATEWAY_PEER: u8 = 2;

impl Peer {
    /// Its bit in [`FlowEntry::marks`].
    #[inline(always)]
    pub const fn mark(self) -> u8 {
        match self {
            Self::Client => 0,
            Self::Gateway => GATEWAY_PEER,
        }
    }
}

impl<A: Address> FlowEntry<A> {
    /// In [`Self::marks`]: the reply direction; the original if not set.
    pub const REPLY: u8 = REPLY;
    /// In [`Self::marks`]: what holds of the flow as a whole.
    pub const FLAGS: u8 = 0x06;
    /// In [`Self::marks`]: the reply half of a flow that has ended with its rule, alone, see [`crate::datapath::late`]: for how
    /// long is in `last_seen` and `counter`.
    pub const LATE: u8 = 0x08;

    /// Its direction.
    #[inline(always)]
    pub const fn dir(&self) -> FlowDir {
        if self.marks & REPLY == 0 {
            FlowDir::Original
        } else {
            FlowDir::Reply
        }
    }

    /// Whether it is all that is left of a flow that has ended with its rule.
    #[inline(always)]
    pub const fn is_late(&self) -> bool {
        self.marks & Self::LATE != 0
    }

    /// Whom its target takes for the client.
    #[inline(always)]
    pub const fn peer(&self) -> Peer {
        if self.marks & GATEWAY_PEER == 0 {
            Peer::Client
        } else {
            Peer::Gateway
        }
    }

    /// The key of the other direction's entry, given this one's: the translated tuple, reversed.
    #[inline(always)]
    pub const fn partner(&self, key: &FlowKey<A>) -> FlowKey<A> {
        key.rewritten(&self.rewrite).reversed()
    }
}

/// Bytes of an element of a kernel hash map before its key.
const ELEMENT_HEADER: usize = 48;
const CACHE_LINE: usize = 64;

const fn element<A: Address>() -> usize {
    ELEMENT_HEADER + size_of::<FlowKey<A>>() + size_of::<FlowEntry<A>>()
}

const _: () = assert!(size_of::<FlowKey<Ipv4>>() == 16);
const _: () = assert!(size_of::<FlowKey<Ipv6>>() == 40);
const _: () = assert!(element::<Ipv4>() == 2 * CACHE_LINE);
const _: () = assert!(element::<Ipv6>() == 3 * CACHE_LINE);

#[expect(
    unsafe_code,
    reason = "the derive cannot see that a generic layout has no padding; the sizes are asserted above and below"
)]
mod pod {
    use super::*;

    const fn fields<A: Address>() -> usize {
        2 * 8 + size_of::<Rewrite<A>>() + 5 * 4 + 5 * 2 + 2 + size_of::<A::Padding>()
    }
    const _: () = assert!(
        size_of::<Rewrite<Ipv4>>() == 2 * 4 + 8 && size_of::<Rewrite<Ipv6>>() == 2 * 16 + 8
    );
    const _: () = assert!(
        size_of::<FlowEntry<Ipv4>>() == fields::<Ipv4>()
            && size_of::<FlowEntry<Ipv6>>() == fields::<Ipv6>()
    );

    // SAFETY: repr(C) of Pod fields; the assertions show that the sizes of the fields add up to that of the type, so there is
    // no padding, for both types that implement the sealed trait `Address`.
    unsafe impl<A: Address> Zeroable for FlowKey<A> {}
    // SAFETY: as above.
    unsafe impl<A: Address> Pod for FlowKey<A> {}
    // SAFETY: as above.
    unsafe impl<A: Address> Zeroable for Rewrite<A> {}
    // SAFETY: as above.
    unsafe impl<A: Address> Pod for Rewrite<A> {}
    // SAFETY: as above.
    unsafe impl<A: Address> Zeroable for FlowEntry<A> {}
    // SAFETY: as above.
    unsafe impl<A: Address> Pod for FlowEntry<A> {}
}
