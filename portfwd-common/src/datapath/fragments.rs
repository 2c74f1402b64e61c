//! Datagrams in fragments.
//!
//! Only the first fragment of a datagram has ports. It goes the way of a whole packet, and what was found out for it is kept
//! ([`Datagram`]) for those that follow: their addresses are translated, and nothing else of them, for all behind the IP header is
//! payload there.
//!
//! Fragments are carried in the order of their offsets. One that comes before the fragment in front of it is held
//! ([`Way::Hold`]); when that one comes, both come in again, one after the other ([`Way::Again`]), and each is treated as if it had
//! come in order. So one number per datagram, where the next fragment has to begin, tells what overlaps what went before
//! (RFC 1858, RFC 3128, RFC 5722), and nothing of a datagram leaves before it is known whose it is. What is held too long is
//! forgotten.
//!
//! Both tables forget what was not used for longest when they are full. No whole packet ever looks at them.

use core::convert::identity;

use super::{
    Scene, Views,
    classify::Packet,
    known::home,
    path::{Load, write_link},
    slow,
    speaking::leaves_by_wan,
    tables::{Flows, Fragments, Tables},
    verdict::{Departure, DropReason, Event, PassReason, Verdict, Way},
    workspace::{Context, Kind, Side, Step, Workspace},
};
use crate::{
    abi::{
        Config, FlowDir, FlowKey, Instant, Peer, Rewrite, Ticks, Traffic,
        fragment::{Datagram, DatagramKey, FRAGMENT_SECONDS, Fate, HELD_BYTES, HeldKey},
    },
    net::{
        Address, Family, PacketBuf,
        be::Ports,
        headers::{Extent, Fragment, NetworkHeader},
    },
};

/// A fragment, as its headers have it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Piece {
    /// Its datagram.
    pub datagram: DatagramKey,
    /// The fragment that [`Way::Hold`] keeps or [`Way::Again`] takes back.
    pub held: HeldKey,
    /// Length of the IP packet, bytes.
    pub len: u32,
    /// Where it begins in the datagram, in units of eight bytes.
    start: u16,
    /// Where the next one begins, likewise.
    end: u16,
    /// Whether another one follows.
    place: Place,
}

/// Where in its datagram a fragment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// It has the transport header.
    #[default]
    First,
    /// Behind it, and before others.
    Middle,
    /// Behind all others.
    Last,
}

/// Whether a datagram has waited for too long, or a fragment has been held for too long.
#[inline(always)]
pub fn is_forgotten(since: Instant, config: &Config, now: Instant) -> bool {
    now.since_any_cpu(since) > Ticks(config.ticks_per_second.wrapping_mul(FRAGMENT_SECONDS))
}

/// Whether a fragment that begins at `offset` need not be held (any longer), now that this is known of its datagram.
#[inline(always)]
pub fn is_due(datagram: &Datagram, offset: u32) -> bool {
    match datagram.fate() {
        Fate::Translate => u32::from(datagram.next) >= offset,
        Fate::Pass | Fate::Refuse => true,
    }
}

/// Decides on a fragment whose headers the slow path has followed: what they lead to is in the workspace. `None` for the first of a
/// datagram: the slow path goes on with it as with a whole packet ([`Beginning::FirstFragment`](super::Beginning)).
#[inline(always)]
pub fn fragment<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Option<Verdict> {
    match C::returned(steps(ctx)) {
        Step::Next => None,
        // The last step that has run has left its verdict in the workspace.
        Step::Done => Some(slow::verdict(ctx)),
    }
}

#[inline(always)]
fn steps<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Step {
    if look_step(ctx) == Step::Done {
        return Step::Done;
    }
    match slow::ask(ctx, |work| work.piece.place) {
        Place::First => {
            if subject_step(ctx) == Step::Next {
                return Step::Next;
            }
            if slow::ask(ctx, |work| {
                work.verdict() == Verdict::Drop(DropReason::BadFragment)
            }) {
                let _ = C::returned(whose_step(ctx));
            }
            remember_step(ctx)
        }
        Place::Middle | Place::Last => {
            if slow::depart_step(ctx) == Step::Done {
                return Step::Done;
            }
            follow_step(ctx)
        }
    }
}

#[inline(never)]
fn look_step<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Step {
    slow::step(ctx, |job, work, flows| {
        let result = slow::on_scene(job, Err, |views, scene| look(views, work, flows, scene));
        work.settle(result)
    })
}

#[inline(never)]
fn subject_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    slow::step(ctx, |job, work, _| {
        let result = slow::on_scene(job, Err, |views, scene| first(views, work, scene));
        work.settle(result)
    })
}

/// A step of its own: what it asks for would lie on the stack beside all that classification has there.
#[inline(never)]
fn whose_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    slow::step(ctx, |job, work, _| {
        let result = slow::on_scene(job, Err, |views, scene| whose(views, work, scene));
        work.settle(result)
    })
}

/// The packet has been written by now: it is not looked at again.
#[inline(never)]
pub(super) fn remember_step<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Step {
    slow::step(ctx, |job, work, flows| {
        remember(work, flows, job.now);
        Step::Done
    })
}

#[inline(never)]
fn follow_step<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Step {
    slow::step(ctx, |job, work, flows| {
        let verdict = slow::on_scene(job, identity, |views, scene| {
            follow(views, work, flows, scene)
        });
        work.settle(Err(verdict))
    })
}

/// Says what the fragment is, and finds out what is known of its datagram. Without a verdict, a first fragment is a new
/// datagram's, and a later one is in turn: the workspace has its translation.
#[inline(always)]
fn look<A, P, F, T>(
    views: &Views<P>,
    work: &mut Workspace<A>,
    flows: &mut F,
    scene: &Scene<'_, T>,
) -> Result<(), Verdict>
where
    A: Address,
    P: PacketBuf,
    F: Fragments,
    T: Tables,
{
    let packet = Packet::<A, P>::unfolded(views, &work.unfolded).map_err(Verdict::Pass)?;
    let (header, extent) = (packet.header, work.unfolded.extent);
    work.piece = Piece::of(&header, &extent, scene.arrival.ifindex);
    let Piece {
        start, end, place, ..
    } = work.piece;
    let pass = Err(Verdict::Pass(PassReason::Fragment));
    let drop = |reason| Err(Verdict::Drop(reason));
    let is_sound = is_sound(&header, &extent);
    let known = flows
        .datagram(&work.piece.datagram)
        .filter(|known| !is_forgotten(known.last_seen, scene.config, scene.now));
    match known {
        Some(known) => match (known.fate(), place) {
            (Fate::Refuse, _) => return drop(DropReason::FragmentRefused),
            (Fate::Pass, _) => {
                known.last_seen = scene.now;
                return with_successor(&mut work.piece, flows, scene, pass);
            }
            (Fate::Translate, _) if !is_sound => {
                known.fate = Fate::Refuse.byte();
                return drop(DropReason::BadFragment);
            }
            // The identification is in use again, or somebody wants the rest of the datagram to go elsewhere.
            (Fate::Translate, Place::First) if packet.ports() != Some(known.came_with) => {
                scene.tables.note(Event::FragmentClash);
            }
            (Fate::Translate, _) if start < known.next => {
                let is_duplicate = start == known.start && end == known.next;
                if A::FAMILY == Family::V6 && !is_duplicate && place != Place::First {
                    // RFC 5722: the whole datagram.
                    known.fate = Fate::Refuse.byte();
                }
                return drop(DropReason::FragmentOverlap);
            }
            (Fate::Translate, _) if start > known.next => return hold(&work.piece),
            (Fate::Translate, _) => {
                work.key = FlowKey {
                    src: header.src,
                    dst: header.dst,
                    ports: known.came_with,
                    protocol: known.protocol,
                };
                translated(work, known);
            }
        },
        None => match place {
            Place::First if !is_sound => {
                return if is_ours(&header, work, scene) {
                    drop(DropReason::BadFragment)
                } else {
                    pass
                };
            }
            Place::First => {}
            Place::Middle | Place::Last => {
                return if !is_ours(&header, work, scene) {
                    pass
                } else if is_sound {
                    hold(&work.piece)
                } else {
                    drop(DropReason::BadFragment)
                };
            }
        },
    }
    work.subject.load = Load::of(&packet, 0, scene.arrival);
    work.subject.traffic = Traffic {
        packets: 1,
        bytes: u64::from(header.total_len),
    };
    with_successor(&mut work.piece, flows, scene, Ok(()))
}

/// What a later fragment of a known datagram becomes.
#[inline(always)]
fn translated<A: Address>(work: &mut Workspace<A>, known: &Datagram) {
    work.entry.rewrite = Rewrite {
        src: A::narrow(known.src),
        dst: A::narrow(known.dst),
        ports: known.ports,
        address_delta: known.address_delta,
        port_delta: crate::net::Delta::ZERO,
    };
    work.to = work.key.rewritten(&work.entry.rewrite);
    work.mapping.counter = known.counter;
    let shows_client;
    (work.direction, shows_client) = if known.direction == 0 {
        (FlowDir::Original, work.to.src == work.key.src)
    } else {
        (FlowDir::Reply, work.to.dst == work.key.dst)
    };
    work.peer = if shows_client {
        Peer::Client
    } else {
        Peer::Gateway
    };
}

/// The same verdict, unless the fragment behind this one is held: then both come in again, this one first.
#[inline(always)]
fn with_successor<F: Fragments, T>(
    piece: &mut Piece,
    flows: &mut F,
    scene: &Scene<'_, T>,
    otherwise: Result<(), Verdict>,
) -> Result<(), Verdict> {
    piece.held = HeldKey {
        datagram: piece.datagram,
        offset: u32::from(piece.end),
    };
    match flows.held_since(&piece.held) {
        Some(since) if !is_forgotten(since, scene.config, scene.now) => {
            Err(Verdict::Forward(Departure::AGAIN))
        }
        Some(_) | None => otherwise,
    }
}

/// Keeps a fragment until the one in front of it has come.
#[inline(always)]
fn hold(piece: &Piece) -> Result<(), Verdict> {
    if piece.len as usize > HELD_BYTES {
        return Err(Verdict::Drop(DropReason::FragmentTooLarge));
    }
    Err(Verdict::Forward(Departure::HOLD))
}

/// Whether a fragment could be a part of a datagram at all (RFC 791: only the last one's length need not be a multiple of eight; a
/// datagram has no more than 65,535 bytes).
#[inline(always)]
fn is_sound<A>(header: &NetworkHeader<A>, extent: &Extent) -> bool {
    let len = header.total_len.saturating_sub(extent.at as u32);
    let end = u32::from(extent.offset) * 8 + len;
    len != 0 && end <= 0xffff && (!extent.more || len.is_multiple_of(8))
}

/// Whether a datagram may be one that is translated, so that nothing of it may be left to the kernel before its first fragment has
/// come: it is for the gateway itself, or on its way from the LAN out by the WAN.
#[inline(always)]
fn is_ours<A: Address, T: Tables>(
    header: &NetworkHeader<A>,
    work: &mut Workspace<A>,
    scene: &Scene<'_, T>,
) -> bool {
    if scene.tables.is_local(header.dst) {
        return true;
    }
    work.key = FlowKey {
        src: header.src,
        dst: header.dst,
        ports: Ports::new(0, 0),
        protocol: u32::from(header.protocol),
    };
    match slow::side(scene) {
        // Nothing leaves from an address that no router forwards, whatever a route to its destination says.
        Side::Lan | Side::Both => {
            header.src.is_unicast() && leaves_by_wan(&work.key, scene).is_some()
        }
        Side::Wan | Side::Out => false,
    }
}

/// The transport header of a datagram's first fragment. All of it must be there (RFC 1858 section 3, RFC 7112), or the datagram is
/// refused, if it is ours: [`whose`] asks.
#[inline(always)]
fn first<A, P, T>(
    views: &Views<P>,
    work: &mut Workspace<A>,
    scene: &Scene<'_, T>,
) -> Result<(), Verdict>
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let found = slow::subject(views, work, scene);
    match (found, work.subject.kind) {
        (Ok(()), Kind::Segment) => Ok(()),
        // ICMP errors are too short to be cut.
        (Ok(()), Kind::Error | Kind::Malformed) | (Err(PassReason::Malformed), _) => {
            Err(Verdict::Drop(DropReason::BadFragment))
        }
        (Err(_), _) => Err(Verdict::Pass(PassReason::Fragment)),
    }
}

/// Leaves a first fragment that makes no sense to the kernel, unless it is ours.
#[inline(always)]
fn whose<A, P, T>(
    views: &Views<P>,
    work: &mut Workspace<A>,
    scene: &Scene<'_, T>,
) -> Result<(), Verdict>
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let packet = Packet::<A, P>::unfolded(views, &work.unfolded).map_err(Verdict::Pass)?;
    Err(if is_ours(&packet.header, work, scene) {
        Verdict::Drop(DropReason::BadFragment)
    } else {
        Verdict::Pass(PassReason::Fragment)
    })
}

/// Keeps what was decided on the first fragment of a datagram.
#[inline(always)]
fn remember<A: Address, F: Fragments>(work: &Workspace<A>, flows: &mut F, now: Instant) {
    let fate = match work.verdict() {
        // It comes in again, in smaller pieces.
        Verdict::Forward(departure) if departure.way == Way::Cut => return,
        Verdict::Forward(_) => Fate::Translate,
        Verdict::Drop(_) | Verdict::Refuse(_) => Fate::Refuse,
        Verdict::Pass(reason) if reason.is_about_others() => Fate::Pass,
        // The kernel answers the first one.
        Verdict::Pass(_) => Fate::Refuse,
    };
    let rewrite = &work.entry.rewrite;
    flows.remember(
        &work.piece.datagram,
        &Datagram {
            src: rewrite.src.widen(),
            dst: rewrite.dst.widen(),
            ports: rewrite.ports,
            came_with: work.key.ports,
            protocol: work.key.protocol,
            counter: work.mapping.counter,
            last_seen: now,
            address_delta: rewrite.address_delta,
            start: 0,
            next: work.piece.end,
            fate: fate.byte(),
            direction: match work.direction {
                FlowDir::Original => 0,
                FlowDir::Reply => 1,
            },
        },
    );
}

/// Translates a later fragment that is in turn and has a way out.
#[inline(always)]
fn follow<A, P, F, T>(
    views: &Views<P>,
    work: &mut Workspace<A>,
    flows: &mut F,
    scene: &Scene<'_, T>,
) -> Verdict
where
    A: Address,
    P: PacketBuf,
    F: Flows<A> + Fragments,
    T: Tables,
{
    let Some(known) = flows.datagram(&work.piece.datagram) else {
        return Verdict::Drop(DropReason::Vanished);
    };
    if known.next != work.piece.start {
        // Another CPU has had the same fragment a moment ago.
        return Verdict::Drop(DropReason::FragmentOverlap);
    }
    (known.start, known.next) = (work.piece.start, work.piece.end);
    known.last_seen = scene.now;
    let (counter, is_original) = (known.counter, known.direction == 0);
    if work.piece.place == Place::Last {
        // The identification may be used again.
        flows.forget(&work.piece.datagram);
    }
    let table = home(flows, &work.key);
    if let Some(entry) = flows.flow(table, &work.key) {
        entry.traffic.add(work.subject.traffic);
    }
    let direction = if is_original {
        FlowDir::Original
    } else {
        FlowDir::Reply
    };
    scene.tables.count(counter, direction, work.subject.traffic);
    scene.tables.note(Event::FragmentTranslated);
    match write(views, work) {
        Some(()) => Verdict::Forward(work.departure),
        None => Verdict::Drop(DropReason::RewriteFailed),
    }
}

#[inline(always)]
fn write<A: Address, P: PacketBuf>(views: &Views<P>, work: &Workspace<A>) -> Option<()> {
    write_link(views.frame, &work.departure)?;
    let rewrite = &work.entry.rewrite;
    let whole = A::rewrite(
        views.network,
        rewrite.src,
        rewrite.dst,
        rewrite.address_delta,
        work.departure.hop(),
    )?;
    // Last, as with the sum of a transport.
    views.network.update_whole_sum(whole);
    Some(())
}

impl Piece {
    #[inline(always)]
    fn of<A: Address>(header: &NetworkHeader<A>, extent: &Extent, ifindex: u32) -> Self {
        let datagram =
            DatagramKey::new(header.src, header.dst, header.protocol, extent.id, ifindex);
        let len = header.total_len.saturating_sub(extent.at as u32);
        let start = extent.offset;
        Self {
            datagram,
            held: HeldKey {
                datagram,
                offset: u32::from(start),
            },
            len: header.total_len,
            start,
            end: start.saturating_add(len.div_ceil(8) as u16),
            place: match (header.fragment, extent.more) {
                (Fragment::Whole | Fragment::First, _) => Place::First,
                (Fragment::Later, true) => Place::Middle,
                (Fragment::Later, false) => Place::Last,
            },
        }
    }
}
