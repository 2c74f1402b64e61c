//! The only code that writes to a packet.

use super::{
    Views,
    classify::{Packet, sum_kind},
    path::write_link,
    slow::Workspace,
    verdict::{Departure, DropReason, Verdict},
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
    departure: &Departure,
) -> Verdict {
    match try_apply(packet, protocol, rewrite, departure) {
        Some(()) => Verdict::Forward(*departure),
        None => Verdict::Drop(DropReason::RewriteFailed),
    }
}

/// Carries the rewrite of a new flow, or of none, out.
#[inline(always)]
pub fn apply_new<A: Address, P: PacketBuf>(views: &Views<P>, work: &Workspace<A>) -> Verdict {
    match Packet::<A, P>::unfolded(views, &work.unfolded) {
        Ok(packet) => apply(
            &packet,
            work.subject.protocol,
            &work.entry.rewrite,
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
    packet.transport.write(0, rewrite.ports.words())?;
    // Last: the sum may need the kernel, after which the packet's memory may have moved.
    packet.transport.update_sum(SumChange {
        kind: sum_kind(protocol),
        pseudo: rewrite.address_delta,
        body: rewrite.port_delta,
        packet: whole,
    })
}
