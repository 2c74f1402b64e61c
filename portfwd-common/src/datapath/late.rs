//! What the targets of flows that have ended with their rule still send.
//!
//! A rule that goes, or leads elsewhere, ends its flows, but their targets do not hear of it. What they still send would leave by a
//! WAN interface with an address of the LAN as its source (RFC 1918 section 3), because no rule says any more what it is to be. So
//! the reply half of such a flow stays, marked as late, for as long as the flow would have lived in silence, and what it is about
//! is dropped where it is about to leave by a WAN interface. Only this 5-tuple: what the target sends to others is its own affair,
//! and so is a connection that it accepts anew. A half that is late is of no flow: whoever begins one on its key takes its place.

use super::{
    conntrack::Term,
    known::Track,
    tables::Flows,
    tcp::{SegmentKind, Side, is_old_answer},
    workspace::Workspace,
};
use crate::{
    abi::{FlowDir, FlowEntry, FlowKey, Instant, Peer, Protocol},
    net::Address,
};

/// Marks the reply half of a flow that has ended, which lives for `term` yet: as long as the flow would have.
#[inline(always)]
pub const fn mark<A: Address>(entry: &mut FlowEntry<A>, term: Term) {
    entry.marks |= FlowEntry::<A>::LATE;
    // Neither counts any more what it did.
    entry.last_seen = term.since;
    entry.counter = term.length.0;
}

/// How long a half that is marked stays.
#[inline(always)]
pub const fn term<A: Address>(entry: &FlowEntry<A>) -> Term {
    Term {
        since: entry.last_seen,
        length: crate::abi::Ticks(entry.counter),
    }
}

/// Ends a flow whose rule does not hold any more, of whose halves one is the packet's, where validation has found it. What answers
/// to the gateway itself does not leave, and needs no half. A flow that another CPU has begun in its place meanwhile is left alone.
#[inline(always)]
pub(super) fn end<A: Address, F: Flows<A>>(work: &mut Workspace<A>, peer: Peer, flows: &mut F) {
    let Track {
        table,
        created,
        term,
        ..
    } = work.track;
    let (original, reply) = match work.direction {
        FlowDir::Original => (&work.key, &work.partner),
        FlowDir::Reply => (&work.partner, &work.key),
    };
    let is_it = |entry: &mut FlowEntry<A>| entry.created == created;
    if flows.flow(table, original).is_some_and(is_it) {
        flows.remove(table, original);
    }
    match (peer, flows.flow(table, reply)) {
        (Peer::Client, Some(entry)) if entry.created == created => mark(entry, term),
        (Peer::Gateway, Some(entry)) if entry.created == created => flows.remove(table, reply),
        (Peer::Client | Peer::Gateway, _) => {}
    }
    work.track.is_late = match peer {
        Peer::Client => work.direction == FlowDir::Reply,
        Peer::Gateway => false,
    };
}

/// Looks at the half of the packet's key, which is marked as late. Leaves in the workspace whether the packet is. The half goes if
/// its time is over, or if the target has accepted another connection from the same endpoint.
#[inline(always)]
pub(super) fn meet<A: Address, F: Flows<A>>(work: &mut Workspace<A>, flows: &mut F, now: Instant) {
    let Some(entry) = flows.flow(work.track.table, &work.key) else {
        return;
    };
    work.track.is_late = !term(entry).is_over(now) && !opens_anew(entry, work);
    if !work.track.is_late {
        flows.remove(work.track.table, &work.key);
    }
}

/// Whether a SYN-ACK is not the one that the flow had, sent again. One of a flow that has had none may be its first.
#[inline(always)]
fn opens_anew<A: Address>(entry: &FlowEntry<A>, work: &Workspace<A>) -> bool {
    let side = Side::of(entry);
    match work.subject.protocol {
        Protocol::Tcp => {
            matches!(work.subject.flags.kind(), SegmentKind::SynAck)
                && entry.traffic.packets != 0
                && !is_old_answer(&side, &work.numbers)
        }
        Protocol::Udp | Protocol::Echo => false,
    }
}

/// Makes room for a flow that begins on the key of a half that is late.
#[inline(always)]
pub(super) fn give_way<A: Address, F: Flows<A>>(track: &Track, key: &FlowKey<A>, flows: &mut F) {
    if track.is_late {
        flows.remove(track.table, key);
    }
}
