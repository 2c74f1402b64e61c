//! TCP and UDP packets of known flows: the hot path.

use super::{
    Moment, Scene, Views,
    apply::apply,
    classify::{self, Classified, Packet, Segment},
    known::{is_fresh, is_good, remember},
    mss::Clamp,
    path::departure,
    tables::{Flows, Table, Tables},
    tcp::{Action, Side, TcpFlags},
    verdict::{DropReason, Hook, PassReason, Verdict},
    workspace::Workspace,
};
use crate::{
    abi::{FlowEntry, Protocol},
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
    carry_classified(&classified::<A, P>(views)?, flows, scene)
}

/// A whole TCP or UDP packet.
#[inline(always)]
pub(super) fn classified<A: Address, P: PacketBuf>(views: Views<P>) -> Option<Classified<A, P>> {
    let packet = Packet::of(views, classify::network::<A, P>(views.network)?);
    let segment = packet
        .segment(Protocol::with_ports(packet.header.protocol)?)
        .ok()?;
    Some(packet.with(segment))
}

/// The same, of a packet that is known to be one.
#[inline(always)]
pub(super) fn carry_classified<A, P, F, T>(
    classified: &Classified<A, P>,
    flows: &mut F,
    scene: &Scene<'_, T>,
) -> Option<Verdict>
where
    A: Address,
    P: PacketBuf,
    F: Flows<A>,
    T: Tables,
{
    // A copy: the lookup takes its address, and would drag the rest of the packet's description into memory with it.
    let key = classified.key;
    let entry = flows.flow(Table::Flows, &key)?;
    if !is_good(entry, scene.config, scene.now) || !is_data(&classified.segment, entry, scene) {
        return None;
    }
    let hop = scene.tables.next_hop(entry.next_hop)?;
    // Known without another look: TC will send it.
    if scene.arrival.hook == Hook::Xdp && !hop.takes_xdp() {
        return Some(Verdict::Pass(PassReason::SlowPath));
    }
    if !classified
        .load(scene.arrival)
        .may_leave_by(&hop, scene.arrival)
    {
        return None;
    }
    match classified.segment.protocol {
        Protocol::Udp | Protocol::Echo => {}
        Protocol::Tcp => follow(classified, entry)?,
    }
    let traffic = classified.traffic(scene.arrival);
    entry.traffic.add(traffic);
    entry.last_seen = scene.now;
    scene.tables.count(entry.counter, entry.dir(), traffic);
    Some(apply(
        &classified.packet,
        classified.segment.protocol,
        &entry.rewrite,
        Clamp::NONE,
        &departure(&hop, scene.arrival),
    ))
}

/// Whether a packet changes no state: a datagram, or TCP data of a side that has settled. Everything else is judged.
///
/// Of a connection that was met in its middle, no packet of one side tells whether it goes on for longer than an entry is fresh
/// ([`super::tcp::TcpState::PickedUp`], [`super::tcp::TcpState::Refused`]): the daemon's word does not do for it.
#[inline(always)]
fn is_data<A: Address, T: Tables>(
    segment: &Segment,
    entry: &FlowEntry<A>,
    scene: &Scene<'_, T>,
) -> bool {
    match segment.protocol {
        Protocol::Udp | Protocol::Echo => true,
        Protocol::Tcp => {
            !segment
                .flags
                .any(TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST)
                && entry.tcp_seen & (Side::SETTLED | Side::RST) == Side::SETTLED
                && (entry.tcp_seen & Side::SYN != 0 || is_fresh(entry, scene.config, scene.now))
        }
    }
}

/// Follows the numbers of TCP data. `None` where they do not join what its side has shown: the slow path catches up with the other
/// side ([`Side::catch_up`]).
#[inline(always)]
fn follow<A: Address, P: PacketBuf>(
    classified: &Classified<A, P>,
    entry: &mut FlowEntry<A>,
) -> Option<()> {
    if classified.segment.flags.any(TcpFlags::ACK) {
        let (mut side, numbers) = (Side::of(entry), classified.numbers()?);
        if !side.is_joined_by(&numbers) {
            return None;
        }
        side.follow(&numbers);
        (entry.sent, entry.acked, entry.window) = (side.sent, side.acked, side.window);
    }
    Some(())
}

/// Remembers a packet whose entry has just been found good, and that has a way out. The rewrite is in the workspace.
#[inline(always)]
pub fn track<A, F, T>(
    work: &Workspace<A>,
    flows: &mut F,
    moment: &Moment<'_, T>,
) -> Result<(), Verdict>
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    // Another CPU may have moved the flow since it was looked at. One look at each table: what is found is noted there and then,
    // for between two looks it may move again.
    let table = if let Some(entry) = flows.flow(work.track.table, &work.key) {
        note(entry, work, moment);
        work.track.table
    } else if let Some(entry) = flows.flow(work.track.table.other(), &work.key) {
        note(entry, work, moment);
        work.track.table.other()
    } else {
        // Removed by the daemon a moment ago; the next packet begins anew.
        return Err(Verdict::Drop(DropReason::Vanished));
    };
    // The only time that a packet writes to the other direction's half: both are those of another connection now.
    if work.track.action == Action::Restart
        && let Some(other) = flows.flow(table, &work.partner)
    {
        work.track.receiver.store(other);
    }
    Ok(())
}

/// Notes the packet at hand in its entry, and counts it.
#[inline(always)]
fn note<A, T>(entry: &mut FlowEntry<A>, work: &Workspace<A>, moment: &Moment<'_, T>)
where
    A: Address,
    T: Tables,
{
    entry.traffic.add(work.subject.traffic);
    remember(entry, work.way(), work.bank, moment.config, moment.now);
    match work.track.action {
        Action::Follow | Action::Restart => {
            work.track.sender.store(entry);
            entry.last_seen = moment.now;
        }
        // The latter two do not come here.
        Action::Unmoved | Action::Begin | Action::Refuse => {}
    }
    moment
        .tables
        .count(entry.counter, entry.dir(), work.subject.traffic);
}
