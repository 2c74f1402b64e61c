//! TCP and UDP packets of known flows: the hot path.

use super::{
    Scene, Views,
    apply::apply,
    classify::{self, Classified, Packet, Segment},
    known::{Opening, is_fresh, remember},
    path::departure_by,
    slow::Workspace,
    tables::{Flows, Tables},
    verdict::{Departure, DropReason, Hook, PassReason, Verdict},
};
use crate::{
    abi::{FlowEntry, Protocol, Traffic},
    net::{Address, PacketBuf},
};

/// The hot path: a whole TCP or UDP packet of a flow whose entry is fresh. `None` if it is anything else; then nothing was
/// written, to packet or tables.
#[inline(always)]
pub fn carry_fast<A, P, F, T>(
    views: Views<P>,
    flows: &mut F,
    scene: &Scene<'_, T>,
) -> Option<Verdict>
where
    A: Address,
    P: PacketBuf,
    F: Flows<A>,
    T: Tables,
{
    let packet = Packet::of(views, classify::network::<A, P>(views.network).ok()?);
    let segment = packet
        .segment(Protocol::from_number(packet.header.protocol)?)
        .ok()?;
    let classified = packet.with(segment);
    // A copy: the lookup takes its address, and would drag the rest of the packet's description into memory with it.
    let key = classified.key;
    let entry = flows.flow(&key)?;
    if !is_fresh(entry, scene.config, scene.now)
        || Opening::of(classified.segment.flags) == Opening::Syn
    {
        return None;
    }
    let hop = scene.tables.next_hop(entry.next_hop)?;
    // Known without another look: TC will send it.
    if scene.arrival.hook == Hook::Xdp && !hop.takes_xdp() {
        return Some(Verdict::Pass(PassReason::SlowPath));
    }
    let departure = departure_by(&hop, &classified.load(scene.arrival), scene.arrival)?;
    Some(carry_known(&classified, entry, &departure, scene))
}

/// A packet whose entry has just been found good, and that has a way out.
#[inline(always)]
pub fn carry_validated<A, P, F, T>(
    views: &Views<P>,
    work: &Workspace<A>,
    flows: &mut F,
    scene: &Scene<'_, T>,
) -> Verdict
where
    A: Address,
    P: PacketBuf,
    F: Flows<A>,
    T: Tables,
{
    let packet = match Packet::<A, P>::unfolded(views, &work.unfolded) {
        Ok(packet) => packet,
        Err(reason) => return Verdict::Pass(reason),
    };
    let classified = match packet.segment(work.subject.protocol) {
        Ok(segment) => packet.with(segment),
        Err(reason) => return Verdict::Pass(reason),
    };
    match flows.flow(&work.key) {
        Some(entry) => {
            remember(entry, work.way(), scene.config, scene.now);
            carry_known(&classified, entry, &work.departure, scene)
        }
        // Removed by the daemon a moment ago; the next packet begins anew.
        None => Verdict::Drop(DropReason::Vanished),
    }
}

/// A packet of a live flow: track, then translate.
#[inline(always)]
fn carry_known<A, P, T>(
    classified: &Classified<A, P>,
    entry: &mut FlowEntry<A>,
    departure: &Departure,
    scene: &Scene<'_, T>,
) -> Verdict
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let traffic = classified.traffic(scene.arrival);
    track(entry, &classified.segment, traffic, scene);
    scene.tables.count(entry.counter, entry.dir(), traffic);
    apply(
        &classified.packet,
        classified.segment.protocol,
        &entry.rewrite,
        departure,
    )
}

#[inline(always)]
fn track<A: Address, T>(
    entry: &mut FlowEntry<A>,
    segment: &Segment,
    traffic: Traffic,
    scene: &Scene<'_, T>,
) {
    entry.traffic.add(traffic);
    entry.last_seen = scene.now;
    let seen = entry.tcp_seen | segment.flags.seen();
    if seen != entry.tcp_seen {
        entry.tcp_seen = seen;
    }
}
