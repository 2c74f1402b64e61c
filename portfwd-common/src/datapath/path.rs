//! How a translated packet leaves: from what is known of its route to a way out, or to a reason why not.

use super::{
    classify::Arrival,
    tables::{Route, Tables},
    verdict::{Departure, DropReason, Hook, PassReason, Verdict, Way},
};
use crate::{
    abi::{FlowDir, Interface, LinkLayer, NextHop, Peer, config::interface_slot, next_hop::Hold},
    net::{Address, PacketBuf, headers::MacWords},
};

/// What is known of the way to the next hop. A structure for the same reason as [`Departure`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// How much is known.
    pub knowledge: Knowledge,
    /// Kernel index of the egress interface, if it is not attached.
    pub ifindex: u32,
    /// Largest IP packet, bytes; [`UNKNOWN_MTU`] if the kernel does not say.
    pub mtu: u16,
    /// The way, if all of it is known.
    pub hop: NextHop,
}

/// How much is known of a [`Path`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Knowledge {
    /// Everything; the interface is attached.
    #[default]
    Ready,
    /// The interface; the kernel must find the next hop.
    Interface,
    /// The stack must decide.
    Nothing,
}

/// What keeps a packet from simply leaving. Not yet a verdict: a verdict's parts would be stored unwritten for the hooks that make
/// nothing of them ("R3 !read_ok", kernel 6.18, LLVM 22).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// TTL or hop limit 1.
    HopLimit,
    /// Too big, and must not be fragmented.
    TooBig,
    /// Too big, and may be fragmented.
    MustBeFragmented,
    /// Nobody knows a way.
    NoRoute,
}

/// Size and hop limit of a packet: what may keep it from leaving.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Largest IP packet on the wire, bytes.
    pub wire_len: u32,
    /// Whether a router must not fragment it.
    pub dont_fragment: bool,
    /// TTL or hop limit it came with.
    pub hop_limit: u8,
    /// Whether XDP has it in several buffers.
    pub is_scattered: bool,
}

/// [`Path::mtu`] of an interface that is not attached and whose next hop is not resolved: there is nothing to compare with.
pub const UNKNOWN_MTU: u16 = 0;

#[inline(always)]
const fn clamp(mtu: u32) -> u16 {
    if mtu > 0xffff { 0xffff } else { mtu as u16 }
}

/// No way.
const NOWHERE: NextHop = NextHop {
    hold: Hold::NEVER,
    ifindex: 0,
    slot: 0,
    mtu: UNKNOWN_MTU,
    mac: [0; 3],
    source: [0; 3],
    flags: 0,
    padding: 0,
};

impl Path {
    /// The stack must decide.
    pub const STACK: Self = Self {
        knowledge: Knowledge::Nothing,
        ifindex: 0,
        mtu: UNKNOWN_MTU,
        hop: NOWHERE,
    };

    /// Everything is known: by an attached interface, to a MAC address.
    #[inline(always)]
    const fn ready(egress: &Interface, mac: MacWords, mtu: u16) -> Self {
        Self {
            knowledge: Knowledge::Ready,
            ifindex: 0,
            mtu,
            hop: NextHop {
                hold: Hold::NEVER,
                ifindex: egress.ifindex,
                slot: interface_slot(egress.ifindex),
                mtu,
                mac,
                source: egress.mac,
                flags: egress.flags & NextHop::FLAGS,
                padding: 0,
            },
        }
    }

    /// Only the interface is known, and its MTU if it is attached.
    #[inline(always)]
    const fn interface(ifindex: u32, mtu: u16) -> Self {
        Self {
            knowledge: Knowledge::Interface,
            ifindex,
            mtu,
            hop: NOWHERE,
        }
    }

    /// From the kernel's answer.
    #[inline(always)]
    pub fn of<T: Tables>(route: Route, tables: &T) -> Self {
        match route {
            Route::Via {
                ifindex,
                next_hop,
                mtu,
            } => match tables.interface(interface_slot(ifindex)) {
                Some(egress) if egress.ifindex == ifindex => {
                    Self::ready(egress, next_hop, clamp(mtu))
                }
                _ => Self::interface(ifindex, clamp(mtu)),
            },
            Route::Unresolved { ifindex } => match tables.interface(interface_slot(ifindex)) {
                // Without link header there is no next hop to resolve.
                Some(egress) if egress.ifindex == ifindex && egress.link() == LinkLayer::Raw => {
                    Self::ready(egress, [0; 3], clamp(egress.mtu))
                }
                Some(egress) if egress.ifindex == ifindex => {
                    Self::interface(ifindex, clamp(egress.mtu))
                }
                _ => Self::interface(ifindex, UNKNOWN_MTU),
            },
            Route::Refused | Route::Stack => Self::STACK,
        }
    }

    /// Kernel index of the egress interface, if it is known.
    #[inline(always)]
    pub const fn egress(&self) -> Option<u32> {
        match self.knowledge {
            Knowledge::Ready => Some(self.hop.ifindex),
            Knowledge::Interface => Some(self.ifindex),
            Knowledge::Nothing => None,
        }
    }

    /// The way out of a packet. A packet that cannot simply leave is the kernel's: an original one goes up translated, so that
    /// the kernel forwards it or sends the error (whose quotation [`Hook::TcOut`] translates back); a reply stays as it came,
    /// because its translated source is an address of the gateway, which the kernel takes for spoofed. Where the gateway stands
    /// for the client both are so: the kernel would take the one for spoofed and the other for its own. They are dropped, and their
    /// sender is told by portfwd itself (`refusal`).
    #[inline(always)]
    pub fn departure(
        &self,
        load: &Load,
        half: (FlowDir, Peer),
        arrival: &Arrival,
    ) -> Result<Departure, Verdict> {
        match self.knowledge {
            Knowledge::Ready => match departure_by(&self.hop, load, arrival) {
                Some(departure) => Ok(departure),
                None => match load.obstacle(self.mtu) {
                    Some(obstacle) => stack(obstacle, self.mtu, half, arrival),
                    None => Err(Verdict::Pass(PassReason::SlowPath)),
                },
            },
            Knowledge::Interface => {
                if let Some(obstacle) = load.obstacle(self.mtu) {
                    return stack(obstacle, self.mtu, half, arrival);
                }
                match arrival.hook {
                    Hook::Xdp => Err(Verdict::Pass(PassReason::SlowPath)),
                    Hook::Tc | Hook::TcSlow => Ok(Departure {
                        way: Way::Resolve,
                        ifindex: self.ifindex,
                        ..Departure::STACK
                    }),
                    Hook::TcOut => Ok(Departure::STACK),
                }
            }
            Knowledge::Nothing => {
                let obstacle = load.obstacle(self.mtu).unwrap_or(Obstacle::NoRoute);
                stack(obstacle, self.mtu, half, arrival)
            }
        }
    }
}

/// The way out of a packet by a way that is known; `None` if it cannot simply leave, which is for [`Path::departure`].
#[inline(always)]
fn departure_by(hop: &NextHop, load: &Load, arrival: &Arrival) -> Option<Departure> {
    load.may_leave_by(hop, arrival)
        .then(|| departure(hop, arrival))
}

/// The way out of a packet that [may leave](Load::may_leave_by) by a way that is known.
#[inline(always)]
pub fn departure(hop: &NextHop, arrival: &Arrival) -> Departure {
    // The gateway's own packet is on its way already.
    if arrival.hook == Hook::TcOut {
        return Departure::STACK;
    }
    let way = match (arrival.link, hop.link()) {
        (LinkLayer::Ethernet, LinkLayer::Ethernet) => Way::Frame,
        (LinkLayer::Ethernet | LinkLayer::Raw, LinkLayer::Raw) => Way::Raw,
        (LinkLayer::Raw, LinkLayer::Ethernet) => Way::NewHeader,
    };
    Departure {
        way,
        ifindex: hop.ifindex,
        slot: hop.slot,
        next_hop: hop.mac,
        source: hop.source,
        mtu: hop.mtu,
    }
}

/// What becomes of a packet with something in its way.
#[inline(always)]
const fn stack(
    obstacle: Obstacle,
    mtu: u16,
    (direction, peer): (FlowDir, Peer),
    arrival: &Arrival,
) -> Result<Departure, Verdict> {
    match (arrival.hook, peer, direction) {
        (Hook::TcOut, _, _) => Ok(Departure::STACK),
        (Hook::Xdp, _, _) => Err(Verdict::Pass(PassReason::SlowPath)),
        // A super-packet cannot be cut here.
        (Hook::Tc | Hook::TcSlow, _, _)
            if matches!(obstacle, Obstacle::MustBeFragmented) && arrival.segment_size == 0 =>
        {
            Err(Verdict::Forward(Departure::cut(mtu)))
        }
        (Hook::Tc | Hook::TcSlow, Peer::Gateway, _) => Err(Verdict::Drop(DropReason::NoWayOut)),
        (Hook::Tc | Hook::TcSlow, Peer::Client, FlowDir::Reply) => Err(match obstacle {
            Obstacle::HopLimit => Verdict::Pass(PassReason::HopLimit),
            Obstacle::TooBig => Verdict::Pass(PassReason::PacketTooBig),
            Obstacle::MustBeFragmented => Verdict::Drop(DropReason::FragmentationNeeded),
            Obstacle::NoRoute => Verdict::Pass(PassReason::NoRoute),
        }),
        (Hook::Tc | Hook::TcSlow, Peer::Client, FlowDir::Original) => Ok(Departure::STACK),
    }
}

/// Writes the link header, if the packet leaves in the frame it came in.
#[inline(always)]
#[must_use]
pub fn write_link<P: PacketBuf>(frame: P, departure: &Departure) -> Option<()> {
    match departure.way {
        Way::Frame => {
            let ([a, b, c], [d, e, f]) = (departure.next_hop, departure.source);
            frame.write(0, [a, b, c, d, e, f])
        }
        Way::Raw
        | Way::NewHeader
        | Way::Resolve
        | Way::Stack
        | Way::Hold
        | Way::Again
        | Way::Cut => Some(()),
    }
}

impl Load {
    /// Of a classified packet in one buffer whose transport header is `headers` bytes long.
    #[inline(always)]
    pub fn of<A: Address, P: PacketBuf>(
        packet: &super::classify::Packet<A, P>,
        headers: u32,
        arrival: &Arrival,
    ) -> Self {
        Self {
            wire_len: packet.wire_len(headers, arrival),
            dont_fragment: packet.header.dont_fragment,
            hop_limit: packet.header.hop_limit,
            is_scattered: false,
        }
    }

    /// Whether it can simply leave by a way that is known.
    #[inline(always)]
    pub fn may_leave_by(&self, hop: &NextHop, arrival: &Arrival) -> bool {
        match arrival.hook {
            // The gateway's own packet is on its way already.
            Hook::TcOut => true,
            Hook::Xdp => {
                hop.takes_xdp()
                    && (!self.is_scattered || hop.takes_scattered())
                    && self.obstacle(hop.mtu).is_none()
            }
            Hook::Tc | Hook::TcSlow => self.obstacle(hop.mtu).is_none(),
        }
    }

    /// What keeps it from leaving by a route with this MTU.
    #[inline(always)]
    pub(super) const fn obstacle(&self, mtu: u16) -> Option<Obstacle> {
        if self.hop_limit <= 1 {
            return Some(Obstacle::HopLimit);
        }
        if mtu == UNKNOWN_MTU || self.wire_len <= mtu as u32 {
            return None;
        }
        Some(if self.dont_fragment {
            Obstacle::TooBig
        } else {
            Obstacle::MustBeFragmented
        })
    }
}
