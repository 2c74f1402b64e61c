//! What a target of rules says without being asked: a packet from a target endpoint that belongs to no flow.
//!
//! A mapping holds in both directions (RFC 4787 REQ-1, RFC 6886 section 3.9): what a target endpoint sends out by a WAN interface
//! leaves with the listen endpoint as its source, be it the first packet of all, one that comes after a reset or after the flow
//! has expired, or an ICMP error about one of those. Where no rule alone says what the listen endpoint is, the packet is dropped:
//! it must not leave with an address of the LAN (RFC 1918 section 3). So is what is late, because no rule leads to its target any
//! more ([`late`]). What a target sends to anywhere else, or from any other of its endpoints, is the kernel's.

use super::{
    Moment, Scene,
    binding::egress,
    known::remember,
    late, nat,
    opening::{begin, pressed},
    path::Path,
    rest,
    tables::{Flows, Table, Tables},
    verdict::{DropReason, Event, Verdict},
    workspace::{Kind, Workspace},
};
use crate::{
    abi::{EndpointKey, FlowDir, FlowKey, Interface, Peer, Protocol, Rule, Traffic},
    net::Address,
};

/// Whether a packet of no flow comes from a target of rules and is about to leave by a WAN interface. Leaves what its rule makes
/// of it and the translated key in the workspace; an error is the verdict.
#[inline(always)]
pub fn decide<A, T>(work: &mut Workspace<A>, scene: &Scene<'_, T>) -> Result<(), Verdict>
where
    A: Address,
    T: Tables,
{
    let (protocol, tables) = (work.subject.protocol, scene.tables);
    let source = EndpointKey::new(work.key.src, protocol, work.key.ports.src());
    let own_affair = Verdict::Pass(work.subject.kind.not_ours());
    let target = tables.target(&source);
    if target.is_none() && !work.track.is_late {
        return Err(rest::unasked(work, scene));
    }
    // Flows of a rule that hides its clients answer to the gateway, never past it.
    let slot = target.filter(|slot| !tables.rule(*slot).is_some_and(Rule::hides_clients));
    if slot.is_none() && !work.track.is_late {
        return Err(own_affair);
    }
    let Some(egress) = leaves_by_wan(&work.key, scene) else {
        return Err(own_affair);
    };
    let private_source = Verdict::Drop(DropReason::PrivateSource);
    let Some(slot) = slot else {
        return Err(private_source);
    };
    if work.subject.kind == Kind::Malformed {
        return Err(private_source);
    }
    work.mapping = nat::to_client(slot, &work.key, &mut work.to, egress.address(), tables)
        .ok_or(private_source)?;
    // Whom the rule's list keeps out hears nothing from it either.
    if !nat::admits(work.mapping.sources, work.key.dst, tables) {
        return Err(Verdict::Drop(DropReason::SourceRefused));
    }
    work.light = work.mapping.light;
    work.direction = FlowDir::Reply;
    work.peer = Peer::Client;
    Ok(())
}

/// The WAN interface by which the kernel would send a packet as it came; `None` if it would not, or the interface is not attached.
#[inline(always)]
pub(super) fn leaves_by_wan<'a, A: Address, T: Tables>(
    key: &FlowKey<A>,
    scene: &Scene<'a, T>,
) -> Option<&'a Interface> {
    let tables = scene.tables;
    let path = Path::of(tables.route(key, scene.arrival.ifindex), tables);
    egress(&path, tables).filter(|egress| egress.role().is_wan())
}

/// Translates a packet that [`decide`] has found a rule for. A datagram begins a flow, so that its answers come back whatever
/// becomes of the rule's other conditions; TCP waits for the client's segment, which begins one. Leaves the rewrite in the
/// workspace, and a packet that is no error counted.
#[inline(always)]
pub fn speak<A, F, T>(work: &mut Workspace<A>, flows: &mut F, moment: &Moment<'_, T>)
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    work.entry.rewrite = work.key.rewrite_to(&work.to);
    let event = match (work.subject.kind, work.subject.protocol) {
        (Kind::Segment, Protocol::Udp) => enter(work, flows, moment),
        // What answers to nobody begins nothing.
        (Kind::Segment, Protocol::Tcp | Protocol::Echo) => Event::Stateless,
        // An error is not counted for the rule, and the other has been refused.
        (Kind::Error | Kind::Malformed, _) => return,
    };
    moment.tables.note(event);
    // Not the workspace's direction: of a byte in memory the verifier knows only that it is less than 256, and LLVM makes an
    // offset of it ("R0 max value is outside of the allowed memory range", kernel 6.18, LLVM 22).
    moment
        .tables
        .count(work.mapping.counter, FlowDir::Reply, work.subject.traffic);
}

/// Enters the flow of a datagram that its target sent first. As ever the reply half goes first: it is the arbiter.
#[inline(always)]
fn enter<A, F, T>(work: &mut Workspace<A>, flows: &mut F, moment: &Moment<'_, T>) -> Event
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    late::give_way(&work.track, &work.key, flows);
    work.partner.reverse_of(&work.to);
    begin(&mut work.entry, FlowDir::Reply, &work.mapping, moment);
    work.entry.traffic = work.subject.traffic;
    let way = work.way();
    remember(&mut work.entry, way, work.bank, moment.config, moment.now);
    if let Err(error) = flows.insert(Table::Opening, &work.key, &work.entry) {
        pressed(error, moment);
        return Event::Stateless;
    }
    begin(&mut work.entry, FlowDir::Original, &work.mapping, moment);
    work.entry.traffic = Traffic {
        packets: 0,
        bytes: 0,
    };
    work.entry.rewrite.undo(&work.key);
    let original = flows.insert(Table::Opening, &work.partner, &work.entry);
    // Back to what the packet at hand needs.
    work.entry.rewrite.undo(&work.partner);
    match original {
        Ok(()) => Event::FlowCreated,
        Err(error) => {
            flows.remove(Table::Opening, &work.key);
            pressed(error, moment);
            Event::Stateless
        }
    }
}
