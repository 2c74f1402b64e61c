//! Flows that prove themselves: TCP whose handshake is complete, or whose two ends are both met in its middle, and datagrams of
//! which more than one has passed. They move from the table in which the eldest makes room to the one in which nobody does.
//!
//! Half-open connections, scans and floods never get there: they can only drive out each other. The other half goes first, as
//! ever. For a moment a flow is in both tables; lookups ask the connection table first.

use super::{
    Moment,
    nat::Mapping,
    opening::{begin, pressed},
    tables::{Flows, InsertError, Table, Tables},
    tcp::{Action, TcpState},
    verdict::{DropReason, Event, Verdict},
    workspace::{Kind, Workspace},
};
use crate::{
    abi::{FlowDir, FlowEntry, Instant, Protocol},
    net::Address,
};

/// Whether the flow of the packet at hand, which has been judged, moves now.
#[inline(always)]
pub fn is_due<A: Address>(work: &Workspace<A>, now: Instant) -> bool {
    if work.track.table == Table::Flows || work.subject.kind != Kind::Segment {
        return false;
    }
    match work.subject.protocol {
        // The first datagram has made the entry; this is another.
        Protocol::Udp | Protocol::Echo => true,
        Protocol::Tcp if work.track.action == Action::Follow => state_after(work, now).is_proven(),
        Protocol::Tcp => false,
    }
}

/// Where the connection of the packet at hand, which has been judged, is after it.
#[inline(always)]
pub(super) fn state_after<A: Address>(work: &Workspace<A>, now: Instant) -> TcpState {
    let (sender, receiver) = (
        (&work.track.sender, now),
        (&work.track.receiver, work.track.receiver_seen),
    );
    match work.direction {
        FlowDir::Original => TcpState::of(sender, receiver),
        FlowDir::Reply => TcpState::of(receiver, sender),
    }
}

/// Moves the flow of the packet at hand. Without room, one whose rule determines the translation alone stays where it is, where
/// losing it does no harm; any other is not let in, and the packet is dropped.
#[inline(always)]
pub fn admit<A, F, T>(
    work: &mut Workspace<A>,
    flows: &mut F,
    moment: &Moment<'_, T>,
) -> Result<(), Verdict>
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    let stateless = moment
        .tables
        .rule(work.track.rule)
        .is_some_and(crate::abi::Rule::carries_without_entries);
    work.mapping = Mapping {
        rule: work.track.rule,
        counter: work.track.counter,
        stateless,
        // Flows whose client is hidden do not begin there; and the source was judged before.
        ..Mapping::default()
    };
    let (own, other) = match work.direction {
        FlowDir::Original => (FlowDir::Original, FlowDir::Reply),
        FlowDir::Reply => (FlowDir::Reply, FlowDir::Original),
    };
    // Worked out anew: an entry of the other table may have become another flow's since it was looked at.
    work.entry.rewrite = work.key.rewrite_to(&work.to);
    let Some(there) = flows.flow(Table::Opening, &work.partner) else {
        return Ok(());
    };
    let before = Before::of(there);
    begin(&mut work.entry, other, &work.mapping, moment);
    before.store(&mut work.entry, work.track.created);
    work.track.receiver.store(&mut work.entry);
    work.entry.rewrite.undo(&work.key);
    let inserted = flows.insert(Table::Flows, &work.partner, &work.entry);
    work.entry.rewrite.undo(&work.partner);
    if let Err(error) = inserted {
        return refused(error, stateless, moment);
    }
    let Some(there) = flows.flow(Table::Opening, &work.key) else {
        flows.remove(Table::Flows, &work.partner);
        return Ok(());
    };
    let before = Before::of(there);
    begin(&mut work.entry, own, &work.mapping, moment);
    before.store(&mut work.entry, work.track.created);
    work.track.sender.store(&mut work.entry);
    if let Err(error) = flows.insert(Table::Flows, &work.key, &work.entry) {
        flows.remove(Table::Flows, &work.partner);
        return refused(error, stateless, moment);
    }
    flows.remove(Table::Opening, &work.partner);
    flows.remove(Table::Opening, &work.key);
    work.track.table = Table::Flows;
    moment.tables.note(Event::FlowProven);
    Ok(())
}

/// What a half keeps when it moves, besides what TCP has shown.
struct Before {
    traffic: crate::abi::Traffic,
    last_seen: Instant,
    marks: u8,
}

impl Before {
    #[inline(always)]
    fn of<A: Address>(entry: &FlowEntry<A>) -> Self {
        Self {
            traffic: entry.traffic,
            last_seen: entry.last_seen,
            marks: entry.marks & FlowEntry::<A>::FLAGS,
        }
    }

    #[inline(always)]
    fn store<A: Address>(&self, entry: &mut FlowEntry<A>, created: Instant) {
        entry.traffic = self.traffic;
        entry.last_seen = self.last_seen;
        entry.created = created;
        entry.marks |= self.marks;
    }
}

/// A flow that is not let in.
#[inline(always)]
fn refused<T: Tables>(
    error: InsertError,
    stateless: bool,
    moment: &Moment<'_, T>,
) -> Result<(), Verdict> {
    pressed(error, moment);
    match error {
        // Another CPU moves it.
        InsertError::Exists => Ok(()),
        InsertError::Full if stateless => Ok(()),
        InsertError::Full => Err(Verdict::Drop(DropReason::TableFull)),
    }
}
