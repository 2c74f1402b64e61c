//! The only code that writes to a packet.

use super::{
    Views,
    classify::{Packet, pseudo_header, sum_kind, write_ports},
    mss::Clamp,
    path::write_link,
    tcp::TcpFlags,
    verdict::{Departure, DropReason, Verdict},
    workspace::Workspace,
};
use crate::{
    abi::{Protocol, Rewrite},
    net::{Address, PacketBuf, packet::SumChange},
};

/// Carries a rewrite out. Everything was decided and in bounds before; should an access or the kernel still refuse, the packet
/// is half written and must not live.
#[inline(always)]
pub fn apply<A: Address, P: PacketBuf>(
    packet: &Packet<A, P>,
    protocol: Protocol,
    rewrite: &Rewrite<A>,
    clamp: Clamp,
    departure: &Departure,
) -> Verdict {
    match try_apply(packet, protocol, rewrite, clamp, departure) {
        Some(()) => Verdict::Forward(*departure),
        None => Verdict::Drop(DropReason::RewriteFailed),
    }
}

/// Carries the rewrite of a new flow, or of none, out.
#[inline(always)]
pub fn apply_new<A: Address, P: PacketBuf>(views: &Views<P>, work: &Workspace<A>) -> Verdict {
    // Of any other packet nothing was said: the workspace has that of an earlier one.
    let clamp = if work.subject.flags.any(TcpFlags::SYN) {
        work.clamp
    } else {
        Clamp::NONE
    };
    match Packet::<A, P>::unfolded(views, &work.unfolded) {
        Ok(packet) => apply(
            &packet,
            work.subject.protocol,
            &work.entry.rewrite,
            clamp,
            &work.departure,
        ),
        Err(reason) => Verdict::Pass(reason),
    }
}

#[inline(always)]
fn try_apply<A: Address, P: PacketBuf>(
    packet: &Packet<A, P>,
    protocol: Protocol,
    rewrite: &Rewrite<A>,
    clamp: Clamp,
    departure: &Departure,
) -> Option<()> {
    write_link(packet.frame, departure)?;
    let whole = A::rewrite(
        packet.network,
        rewrite.src,
        rewrite.dst,
        rewrite.address_delta,
        departure.hop(),
    )?;
    write_ports(packet.transport, protocol, rewrite.ports)?;
    let mut body = rewrite.port_delta;
    if !clamp.is_none() {
        // Bytes: the option may be at any offset.
        let value = packet.transport.after(usize::from(clamp.said.at));
        value.write(0, clamp.lowered.to_be_bytes())?;
        body = body.and(clamp.delta());
    }
    // Last: the sum may need the kernel, after which the packet's memory may have moved.
    packet.transport.update_sum(SumChange {
        kind: sum_kind(protocol),
        pseudo: pseudo_header(A::FAMILY, protocol, rewrite.address_delta),
        body,
        packet: whole,
    })
}
