//! What the targets of flows that have ended with their rule still send.
//!
//! A rule that goes, or leads elsewhere, ends its flows, but their targets do not hear of it. What they still send would leave by a
//! WAN interface with an address of the LAN as its source (RFC 1918 section 3), because no rule says any more what it is to be. So
//! the reply half of such a flow stays, marked as late, for as long as the flow would have lived in silence, and what it is about
//! is dropped where it is about to leave by a WAN interface. Only this 5-tuple: what the target sends to others is its own affair,
//! and so is a connection that it accepts anew. A half that is late is of no flow: whoever begins one on its key takes its place.

use super::{
    conntrack::ECHO_SECONDS,
    known::Track,
    tables::{Flows, Table},
    workspace::Workspace,
};
use crate::{
    abi::{Config, FlowDir, FlowEntry, FlowKey, Instant, Peer, Protocol, Ticks},
    net::Address,
};

/// Whether a half that is marked as late still is.
#[inline(always)]
pub fn is_due<A: Address>(
    entry: &FlowEntry<A>,
    protocol: Protocol,
    config: &Config,
    now: Instant,
) -> bool {
    now.since_any_cpu(entry.last_seen) <= lifetime(entry, protocol, config)
}

/// How long a half is late, from the last packet that the flow had of its target.
#[inline(always)]
fn lifetime<A: Address>(entry: &FlowEntry<A>, protocol: Protocol, config: &Config) -> Ticks {
    match protocol {
        Protocol::Tcp if entry.traffic.packets == 0 => config.tcp_opening,
        Protocol::Tcp => config.tcp_established,
        Protocol::Udp => config.udp,
        Protocol::Echo => Ticks(config.ticks_per_second.wrapping_mul(ECHO_SECONDS)),
    }
}

/// Ends a flow whose rule does not hold any more, of whose halves one is the packet's. What answers to the gateway itself does not
/// leave, and needs no half.
#[inline(always)]
pub(super) fn end<A: Address, F: Flows<A>>(
    work: &mut Workspace<A>,
    table: Table,
    peer: Peer,
    flows: &mut F,
) {
    let (original, reply) = match work.direction {
        FlowDir::Original => (&work.key, &work.partner),
        FlowDir::Reply => (&work.partner, &work.key),
    };
    flows.remove(table, original);
    match peer {
        Peer::Client => {
            if let Some(entry) = flows.flow(table, reply) {
                entry.marks |= FlowEntry::<A>::LATE;
            }
            work.track.is_late = work.direction == FlowDir::Reply;
        }
        Peer::Gateway => flows.remove(table, reply),
    }
}

/// Looks at the half of the packet's key, which is marked as late. Leaves in the workspace whether the packet is. The half goes if
/// its time is over, or if the target has accepted another connection from the same endpoint.
#[inline(always)]
pub(super) fn meet<A: Address, F: Flows<A>>(
    work: &mut Workspace<A>,
    table: Table,
    flows: &mut F,
    config: &Config,
    now: Instant,
) {
    let Some(entry) = flows.flow(table, &work.key) else {
        return;
    };
    work.track.is_late =
        is_due(entry, work.subject.protocol, config, now) && !opens_anew(entry, work);
    if !work.track.is_late {
        flows.remove(table, &work.key);
    }
}

/// Whether a SYN-ACK is not the one that the flow had, sent again.
#[inline(always)]
fn opens_anew<A: Address>(entry: &FlowEntry<A>, work: &Workspace<A>) -> bool {
    const BOTH: u8 = super::tcp::TcpFlags::SYN | super::tcp::TcpFlags::ACK;
    work.subject.protocol == Protocol::Tcp
        && work.subject.flags.0 & BOTH == BOTH
        && entry.traffic.packets != 0
        && entry.sent != work.numbers.sequence.wrapping_add(1)
}

/// Makes room for a flow that begins on the key of a half that is late.
#[inline(always)]
pub(super) fn give_way<A: Address, F: Flows<A>>(track: &Track, key: &FlowKey<A>, flows: &mut F) {
    if track.is_late {
        flows.remove(track.table, key);
    }
}
