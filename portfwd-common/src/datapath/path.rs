//! How a translated packet leaves: from what is known of its route to a way out, or to a reason why not.

use super::{
    classify::Arrival,
    tables::{Route, Tables},
    verdict::{Departure, DropReason, Hook, PassReason, Verdict, Way},
};
use crate::{
    abi::{FlowDir, LinkLayer, config::interface_slot},
    net::{Address, PacketBuf, headers::MacWords},
};

/// What is known of the way to the next hop. A structure for the same reason as [`Departure`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// How much is known.
    pub knowledge: Knowledge,
    /// Kernel index of the egress interface, if it is not attached.
    pub ifindex: u32,
    /// Slot of the egress interface, if it is.
    pub egress: u16,
    /// Largest IP packet, bytes; [`UNKNOWN_MTU`] if the kernel does not say.
    pub mtu: u16,
    /// MAC address of the next hop; of no meaning on an interface without link header.
    pub next_hop: MacWords,
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

/// Size and hop limit of a packet: what may keep it from leaving.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Largest IP packet on the wire, bytes.
    pub wire_len: u32,
    /// Whether a router must not fragment it.
    pub dont_fragment: bool,
    /// TTL or hop limit it came with.
    pub hop_limit: u8,
}

/// [`Path::mtu`] of an interface that is not attached and whose next hop is not resolved: there is nothing to compare with.
pub const UNKNOWN_MTU: u16 = 0;

#[inline(always)]
const fn clamp(mtu: u32) -> u16 {
    if mtu > 0xffff { 0xffff } else { mtu as u16 }
}

impl Path {
    /// The stack must decide.
    pub const STACK: Self = Self {
        knowledge: Knowledge::Nothing,
        ifindex: 0,
        egress: 0,
        mtu: 0,
        next_hop: [0; 3],
    };

    /// Everything is known.
    #[inline(always)]
    pub const fn ready(egress: u16, next_hop: MacWords, mtu: u16) -> Self {
        Self {
            knowledge: Knowledge::Ready,
            ifindex: 0,
            egress,
            mtu,
            next_hop,
        }
    }

    /// Only the interface is known, and its MTU if it is attached.
    #[inline(always)]
    const fn interface(ifindex: u32, mtu: u16) -> Self {
        Self {
            knowledge: Knowledge::Interface,
            ifindex,
            egress: 0,
            mtu,
            next_hop: [0; 3],
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
                    Self::ready(interface_slot(ifindex), next_hop, clamp(mtu))
                }
                _ => Self::interface(ifindex, clamp(mtu)),
            },
            Route::Unresolved { ifindex } => match tables.interface(interface_slot(ifindex)) {
                // Without link header there is no next hop to resolve.
                Some(egress) if egress.ifindex == ifindex && egress.link() == LinkLayer::Raw => {
                    Self::ready(interface_slot(ifindex), [0; 3], clamp(egress.mtu))
                }
                Some(egress) if egress.ifindex == ifindex => {
                    Self::interface(ifindex, clamp(egress.mtu))
                }
                _ => Self::interface(ifindex, UNKNOWN_MTU),
            },
            Route::Stack => Self::STACK,
        }
    }

    /// The way out of a packet. A packet that cannot simply leave is the kernel's: an original one goes up translated, so that
    /// the kernel forwards it or sends the error (whose quotation [`Hook::TcOut`] translates back); a reply stays as it came,
    /// because its translated source is an address of the gateway, which the kernel takes for spoofed.
    #[inline(always)]
    pub fn departure<T: Tables>(
        &self,
        load: &Load,
        direction: FlowDir,
        arrival: &Arrival,
        tables: &T,
    ) -> Result<Departure, Verdict> {
        let stack = |refusal: Verdict| match (arrival.hook, direction) {
            (Hook::Xdp, _) => Err(Verdict::Pass(PassReason::SlowPath)),
            (Hook::Tc | Hook::TcSlow, FlowDir::Reply) => Err(refusal),
            (Hook::Tc | Hook::TcSlow, FlowDir::Original) | (Hook::TcOut, _) => Ok(Departure::STACK),
        };
        // The gateway's own packet is on its way already.
        if arrival.hook == Hook::TcOut {
            return Ok(Departure::STACK);
        }
        if load.hop_limit <= 1 {
            return stack(Verdict::Pass(PassReason::HopLimit));
        }
        if self.mtu != UNKNOWN_MTU && load.wire_len > u32::from(self.mtu) {
            return stack(if load.dont_fragment {
                Verdict::Pass(PassReason::PacketTooBig)
            } else {
                Verdict::Drop(DropReason::FragmentationNeeded)
            });
        }
        match self.knowledge {
            Knowledge::Ready => {
                let Some(egress) = tables.interface(self.egress) else {
                    return stack(Verdict::Pass(PassReason::NoRoute));
                };
                if arrival.hook == Hook::Xdp && !egress.takes_xdp() {
                    return Err(Verdict::Pass(PassReason::SlowPath));
                }
                let way = match (arrival.link, egress.link()) {
                    (LinkLayer::Ethernet, LinkLayer::Ethernet) => Way::Frame,
                    (LinkLayer::Ethernet | LinkLayer::Raw, LinkLayer::Raw) => Way::Raw,
                    (LinkLayer::Raw, LinkLayer::Ethernet) => Way::NewHeader,
                };
                Ok(Departure {
                    way,
                    ifindex: egress.ifindex,
                    slot: self.egress,
                    next_hop: self.next_hop,
                    source: egress.mac,
                })
            }
            Knowledge::Interface if arrival.hook == Hook::Xdp => {
                Err(Verdict::Pass(PassReason::SlowPath))
            }
            Knowledge::Interface => Ok(Departure {
                way: Way::Resolve,
                ifindex: self.ifindex,
                ..Departure::STACK
            }),
            Knowledge::Nothing => stack(Verdict::Pass(PassReason::NoRoute)),
        }
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
        Way::Raw | Way::NewHeader | Way::Resolve | Way::Stack => Some(()),
    }
}

impl Load {
    /// Of a classified packet whose transport header is `headers` bytes long.
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
        }
    }
}
