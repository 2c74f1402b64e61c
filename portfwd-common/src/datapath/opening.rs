//! The first packet of a flow: two entries, or none if there is no room.
//!
//! The reply half is inserted first and with NOEXIST: it is the arbiter. Two CPUs that see one flow begin race for it, and two
//! flows that would be told apart only by what translation throws away clash on it.

use super::{
    Moment, Scene,
    conntrack::Half,
    known::{Life, Opening, life, remember, stale},
    late,
    limits::Claim,
    nat::{self, Mapping},
    tables::{Flows, InsertError, Table, Tables},
    tcp::{Numbers, SegmentKind, Side, TcpFlags},
    verdict::{DropReason, Event, PassReason, Verdict},
    workspace::{Subject, Workspace},
};
use crate::{
    abi::{FlowDir, FlowEntry, Protocol, Stamp, Traffic},
    net::Address,
};

/// What came of an attempt to enter a flow.
enum Entered {
    /// Both halves are there.
    Yes,
    /// Nothing to enter, or another CPU is entering the same flow: the rule says what the entry would.
    No,
    /// The reply's 5-tuple belongs to another live flow.
    Clash,
    /// No room.
    Full,
}

/// Whether a packet may begin a flow. Leaves what its rule makes of it and the translated key in the workspace; an error is the
/// verdict.
#[inline(always)]
pub fn decide<A, T>(work: &mut Workspace<A>, scene: &Scene<'_, T>) -> Result<(), Verdict>
where
    A: Address,
    T: Tables,
{
    let Subject {
        protocol,
        side,
        is_answer,
        rest,
        ..
    } = work.subject;
    if is_answer {
        return Err(Verdict::Pass(PassReason::NoRule));
    }
    let slot = match rest {
        0 => nat::listening(&work.key, protocol, scene.tables),
        rest => rest,
    };
    let Some(mapping) = nat::to_target(slot, &work.key, &mut work.to, side, scene) else {
        return Err(Verdict::Pass(PassReason::NoRule));
    };
    if !work.key.src.is_unicast() || work.key.src == work.key.dst {
        return Err(Verdict::Pass(PassReason::NotUnicast));
    }
    if protocol == Protocol::Tcp && !work.subject.flags.is_legal() {
        return Err(Verdict::Drop(DropReason::BadTcpFlags));
    }
    if !nat::admits(mapping.sources, work.key.src, scene.tables) {
        return Err(Verdict::Drop(DropReason::SourceRefused));
    }
    work.mapping = mapping;
    work.light = mapping.light;
    work.direction = FlowDir::Original;
    work.peer = mapping.hiding.peer();
    Ok(())
}

/// Begins a flow that a rule has decided on and that has a way out. Leaves the rewrite in the workspace, and the packet counted; an
/// error is the verdict.
#[inline(always)]
pub fn open<A, F, T>(
    work: &mut Workspace<A>,
    flows: &mut F,
    moment: &Moment<'_, T>,
) -> Result<(), Verdict>
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    work.partner.reverse_of(&work.to);
    work.entry.rewrite = work.key.rewrite_to(&work.to);
    // A RST begins nothing.
    let entered = if work.subject.flags.any(TcpFlags::RST) {
        Entered::No
    } else {
        enter(work, flows, moment)
    };
    let event = match entered {
        Entered::Yes => {
            // Its places are taken for good.
            work.claim = Claim::default();
            Event::FlowCreated
        }
        Entered::No => Event::Stateless,
        Entered::Clash => return Err(Verdict::Drop(DropReason::TupleClash)),
        Entered::Full => {
            moment.tables.under_pressure(moment.now);
            if !work.mapping.stateless {
                return Err(Verdict::Drop(DropReason::TableFull));
            }
            Event::Stateless
        }
    };
    moment.tables.note(event);
    moment.tables.count(
        work.mapping.counter,
        FlowDir::Original,
        work.subject.traffic,
    );
    Ok(())
}

#[inline(always)]
fn enter<A, F, T>(work: &mut Workspace<A>, flows: &mut F, moment: &Moment<'_, T>) -> Entered
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    late::give_way(&work.track, &work.key, flows);
    begin(&mut work.entry, FlowDir::Reply, &work.mapping, moment);
    work.entry.rewrite.undo(&work.key);
    let reply = insert_reply(work, flows, moment);
    // Back to what the packet at hand needs, whether it gets an entry or not.
    work.entry.rewrite.undo(&work.partner);
    match reply {
        Entered::Yes => {}
        Entered::No | Entered::Clash | Entered::Full => return reply,
    }
    begin(&mut work.entry, FlowDir::Original, &work.mapping, moment);
    work.entry.traffic = work.subject.traffic;
    first_side(work.subject.flags, &work.numbers).store(&mut work.entry);
    let way = work.way();
    remember(&mut work.entry, way, work.bank, moment.config, moment.now);
    let table = Table::first(work.mapping.hiding);
    match flows.insert(table, &work.key, &work.entry) {
        Ok(()) => Entered::Yes,
        Err(error) => {
            flows.remove(table, &work.partner);
            match error {
                InsertError::Exists => Entered::No,
                InsertError::Full => Entered::Full,
            }
        }
    }
}

/// Inserts the reply half, unless another flow has its key. The other table is looked at after that: a flow that moves there is in
/// both for a moment.
#[inline(always)]
fn insert_reply<A, F, T>(work: &mut Workspace<A>, flows: &mut F, moment: &Moment<'_, T>) -> Entered
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    let table = Table::first(work.mapping.hiding);
    match flows.insert(table, &work.partner, &work.entry) {
        Ok(()) => {}
        Err(InsertError::Full) => return Entered::Full,
        Err(InsertError::Exists) => match clear_way(table, work, flows, moment) {
            Way::Clear => match flows.insert(table, &work.partner, &work.entry) {
                Ok(()) => {}
                Err(InsertError::Exists) => return Entered::No,
                Err(InsertError::Full) => return Entered::Full,
            },
            Way::SameFlow => return Entered::No,
            Way::OtherFlow => return Entered::Clash,
        },
    }
    let entered = match clear_way(table.other(), work, flows, moment) {
        Way::Clear => return Entered::Yes,
        Way::SameFlow => Entered::No,
        Way::OtherFlow => Entered::Clash,
    };
    flows.remove(table, &work.partner);
    entered
}

/// What the first segment of a flow shows of its sender; nothing of UDP.
#[inline(always)]
fn first_side(flags: TcpFlags, segment: &Numbers) -> Side {
    match flags.kind() {
        SegmentKind::Syn => Side::opened(segment, 0),
        // The connection is known to its ends, not here. Whether that is so, the backend's answer will show.
        SegmentKind::SynAck | SegmentKind::Fin | SegmentKind::Ack => Side::picked_up(segment),
        // Enters nothing.
        SegmentKind::Rst | SegmentKind::Nonsense => Side::default(),
    }
}

/// A flow that cannot be entered because there is no room puts the table under pressure.
#[inline(always)]
pub(super) fn pressed<T: Tables>(error: InsertError, moment: &Moment<'_, T>) {
    match error {
        InsertError::Full => moment.tables.under_pressure(moment.now),
        InsertError::Exists => {}
    }
}

/// Every field but the rewrite, for a flow that begins now. The generation marks an entry without route as stale.
#[inline(always)]
pub(super) fn begin<A: Address, T>(
    entry: &mut FlowEntry<A>,
    direction: FlowDir,
    mapping: &Mapping,
    moment: &Moment<'_, T>,
) {
    entry.traffic = Traffic {
        packets: 0,
        bytes: 0,
    };
    entry.last_seen = moment.now;
    entry.created = moment.now;
    entry.counter = mapping.counter;
    entry.sent = 0;
    entry.acked = 0;
    entry.window = 0;
    entry.validated = Stamp::of(moment.now);
    entry.generation = stale(moment.config);
    entry.rule = mapping.rule;
    entry.next_hop = 0;
    entry.tcp_seen = 0;
    entry.marks = direction.mark() | mapping.hiding.peer().mark();
}

/// Who has the reply's key.
enum Way {
    /// Nobody any more: what was there was dead and is gone.
    Clear,
    /// The flow that is about to be entered.
    SameFlow,
    /// Another live flow.
    OtherFlow,
}

/// Looks at the entry that is in the way of a new reply half.
#[inline(always)]
fn clear_way<A, F, T>(
    table: Table,
    work: &mut Workspace<A>,
    flows: &mut F,
    moment: &Moment<'_, T>,
) -> Way
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    let Some(there) = flows.flow(table, &work.partner) else {
        return Way::Clear;
    };
    if there.is_late() {
        flows.remove(table, &work.partner);
        return Way::Clear;
    }
    let half = Half::from(&*there);
    work.rival
        .reverse_of_rewrite(&there.rewrite, work.partner.protocol);
    let life = life(
        half,
        table,
        &work.rival,
        work.subject.protocol,
        Opening::of(work.subject.flags),
        flows,
        moment,
    );
    let same = work.rival == work.key;
    match life {
        Life::Alive if same => Way::SameFlow,
        Life::Alive => Way::OtherFlow,
        Life::Over => {
            flows.remove(table, &work.partner);
            flows.remove(table, &work.rival);
            Way::Clear
        }
        // The other half is missing: another CPU is about to insert it, or somebody died between the two.
        Life::Halved if same && moment.now.since_any_cpu(half.created) < moment.config.validity => {
            Way::SameFlow
        }
        Life::Halved => {
            flows.remove(table, &work.partner);
            Way::Clear
        }
    }
}
