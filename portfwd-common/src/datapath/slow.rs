//! Whatever the hot path does not finish: stale entries, first packets, errors.
//!
//! Every step is a function of its own in the kernel object: their frames share the 512 bytes of stack, because they do not
//! call each other. What is too large for that is in a [`Workspace`], and a step that needs the packet's headers again reads
//! them again.

use core::convert::identity;

use super::{
    Moment, Scene, Views, apply, binding,
    classify::{self, Echo, Packet},
    fragments, icmp,
    known::{Judged, Standing, judge, validate},
    light, limits, mss,
    nat::Hiding,
    next_hop, opening,
    path::{Knowledge, Load, Path},
    proof, refusal, rest, reverse_path, speaking,
    tables::{Fragments, Tables},
    tcp::{Numbers, TcpFlags},
    transport,
    verdict::{Hook, PassReason, Verdict},
    workspace::{Beginning, Context, Input, Job, Kind, NO_NUMBER, Side, Step, Subject, Workspace},
};
use crate::{
    abi::{Config, FlowDir, Protocol, Role, Traffic},
    net::{
        Address, PacketBuf,
        headers::{Fragment, ICMP_LEN},
    },
};

/// Decides on a packet, from the start or from where the program for fragments has left off.
#[inline(always)]
pub fn slow<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Verdict {
    // The last step that runs has left its verdict in the workspace.
    let _ = C::returned(steps(ctx));
    verdict(ctx)
}

/// What the last step came to.
#[inline(always)]
pub(super) fn verdict<A: Address, C: Context<A>>(ctx: &mut C) -> Verdict {
    ctx.with(Verdict::Pass(PassReason::NotForUs), |_, work, _| {
        work.verdict()
    })
}

/// Runs the body of a step.
#[inline(always)]
pub(super) fn step<A: Address, C: Context<A>>(
    ctx: &mut C,
    body: impl FnOnce(&Job<C::Input, C::Tables>, &mut Workspace<A>, &mut C::Flows) -> Step,
) -> Step {
    C::returned(ctx.with(Step::Done, body))
}

/// The same steps for both beginnings, so that the verifier looks at each once for both.
#[inline(always)]
fn steps<A: Address, C: Context<A, Flows: Fragments>>(ctx: &mut C) -> Step {
    if beginning(ctx) == Beginning::Packet
        && (unfold_step(ctx) == Step::Done || classify_step(ctx) == Step::Done)
    {
        return Step::Done;
    }
    let step = C::returned(steps_from_key(ctx));
    match beginning(ctx) {
        Beginning::Packet => step,
        // Whatever it comes to, the rest of the datagram goes the same way.
        Beginning::FirstFragment => fragments::remember_step(ctx),
    }
}

/// Where the slow path begins.
#[inline(always)]
fn beginning<A: Address, C: Context<A>>(ctx: &mut C) -> Beginning {
    ctx.with(Beginning::Packet, |job, _, _| job.input.beginning())
}

/// What follows once key and subject are in the workspace.
#[inline(always)]
fn steps_from_key<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    let (kind, side, is_syn) = ask(ctx, |work| {
        let Subject {
            kind, side, flags, ..
        } = work.subject;
        (kind, side, flags.any(TcpFlags::SYN))
    });
    if is_syn && options_step(ctx) == Step::Done {
        return Step::Done;
    }
    let standing = match kind {
        Kind::Segment | Kind::Error => validate_step(ctx),
        // It is of no flow, but it may be late.
        Kind::Malformed => {
            let _ = validate_step(ctx);
            Standing::Gone
        }
    };
    let standing = match standing {
        Standing::Gone => {
            if ask(ctx, |work| work.track.is_lost) && lose_step(ctx) == Step::Done {
                return Step::Done;
            }
            Standing::Gone
        }
        Standing::Alive => match judge_step(ctx) {
            Judged::GoesOn => Standing::Alive,
            Judged::Over => Standing::Gone,
            Judged::Forged => return settle(ctx, Verdict::Drop(kind.forged())),
        },
    };
    let begun = match (standing, side, kind) {
        (Standing::Alive, _, _) => Step::Next,
        (Standing::Gone, Side::Wan | Side::Lan | Side::Both, Kind::Segment) => begin(ctx, side),
        (Standing::Gone, Side::Lan | Side::Both, _) => decide_speaking_step(ctx),
        (Standing::Gone, Side::Wan | Side::Out, kind) => {
            settle(ctx, Verdict::Pass(kind.not_ours()))
        }
    };
    if begun == Step::Done {
        return Step::Done;
    }
    if depart_step(ctx) == Step::Done {
        return tell(ctx);
    }
    if number_step(ctx) == Step::Done {
        return Step::Done;
    }
    let entered = match standing {
        Standing::Alive => Step::Next,
        Standing::Gone => match ask(ctx, |work| work.direction) {
            FlowDir::Original => enter(ctx),
            // The gateway's own packet without flow has passed above.
            FlowDir::Reply => speak_step(ctx),
        },
    };
    match (entered, standing, kind) {
        (Step::Done, _, _) => Step::Done,
        (Step::Next, _, Kind::Error) => error_step(ctx),
        (Step::Next, Standing::Alive, _) => {
            let is_due = ask(ctx, |work| proof::is_due(work, work.now));
            if is_due && admit_step(ctx) == Step::Done {
                return tell(ctx);
            }
            if track_step(ctx) == Step::Done {
                return Step::Done;
            }
            let turns = ask(ctx, |work| limits::turns(work, work.now));
            if turns && turn_step(ctx) == Step::Done {
                return Step::Done;
            }
            leave(ctx, is_syn)
        }
        (Step::Next, Standing::Gone, _) => leave(ctx, is_syn),
    }
}

/// Sends a packet on its way, and has others leave as it does if its rule has light tracking.
#[inline(always)]
fn leave<A: Address, C: Context<A>>(ctx: &mut C, is_syn: bool) -> Step {
    if ask(ctx, |work| work.light) != 0 && keep_step(ctx) == Step::Done {
        return Step::Done;
    }
    finish(ctx, is_syn)
}

/// What a client's first packet takes: of the rule's limits, of the ports that stand for clients, and an entry for each direction.
#[inline(always)]
fn enter<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    if reverse_path_step(ctx) == Step::Done {
        return Step::Done;
    }
    let (limited, hides) = ask(ctx, |work| {
        (work.mapping.limited, work.mapping.hiding != Hiding::None)
    });
    let entered = if limited && limit(ctx) == Step::Done
        || hides && hide_step(ctx) == Step::Done
        || open_step(ctx) == Step::Done
    {
        tell(ctx)
    } else {
        Step::Next
    };
    if limited && ask(ctx, |work| work.claim.is_any()) {
        return entered.and(disclaim_step(ctx));
    }
    entered
}

/// Sees to it that the sender hears of a drop that it is to be told of.
#[inline(always)]
fn tell<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    if ask(ctx, |work| refusal::is_due(work)) {
        return tell_step(ctx);
    }
    Step::Done
}

/// Writes the packet, once everything about it is decided.
#[inline(always)]
fn finish<A: Address, C: Context<A>>(ctx: &mut C, is_syn: bool) -> Step {
    if is_syn && clamp_step(ctx) == Step::Done {
        return Step::Done;
    }
    apply_step(ctx)
}

/// Asks the limits of a rule, its source's before its own: one source cannot use up what there is for all.
#[inline(always)]
fn limit<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    if limit_source_step(ctx) == Step::Done || limit_rule_step(ctx) == Step::Done {
        return Step::Done;
    }
    Step::Next
}

/// A packet that begins a flow. On the LAN side there are two kinds of them: a client dials an address that a rule listens on, or
/// a target speaks without being asked.
#[inline(always)]
fn begin<A: Address, C: Context<A>>(ctx: &mut C, side: Side) -> Step {
    if decide_step(ctx) == Step::Next {
        return Step::Next;
    }
    let mut is_without_rule = is_without_rule(ctx);
    if is_without_rule && has_rests(ctx) {
        // A step is verified once, however often it is called.
        if rest_step(ctx) == Step::Next && decide_step(ctx) == Step::Next {
            return Step::Next;
        }
        is_without_rule = self::is_without_rule(ctx);
    }
    match side {
        Side::Lan | Side::Both if is_without_rule => decide_speaking_step(ctx),
        Side::Wan | Side::Lan | Side::Both | Side::Out => Step::Done,
    }
}

/// Whether the last step has found no rule.
#[inline(always)]
fn is_without_rule<A: Address, C: Context<A>>(ctx: &mut C) -> bool {
    ask(ctx, |work| {
        matches!(work.verdict(), Verdict::Pass(PassReason::NoRule))
    })
}

/// Whether there are rules that take what is nobody else's.
#[inline(always)]
fn has_rests<A: Address, C: Context<A>>(ctx: &mut C) -> bool {
    ctx.with(false, |job, _, _| {
        job.tables.config().is_some_and(Config::has_rests)
    })
}

/// Something that is in the workspace.
#[inline(always)]
pub(super) fn ask<A: Address, C: Context<A>, R: Default>(
    ctx: &mut C,
    question: impl FnOnce(&Workspace<A>) -> R,
) -> R {
    ctx.with(R::default(), |_, work, _| question(work))
}

/// Ends the packet's way with a verdict.
#[inline(always)]
fn settle<A: Address, C: Context<A>>(ctx: &mut C, verdict: Verdict) -> Step {
    ctx.with(Step::Done, |_, work, _| work.settle(Err(verdict)))
}

/// Runs a step with the scene set, as the hot path sets it for itself.
#[inline(always)]
pub(super) fn on_scene<I, T, R>(
    job: &Job<I, T>,
    refused: impl FnOnce(Verdict) -> R,
    step: impl FnOnce(&Views<I::Packet>, &Scene<'_, T>) -> R,
) -> R
where
    I: Input,
    T: Tables,
{
    let arrival = job.input.arrival();
    let Some(scene) = Scene::of(&arrival, &job.tables, job.now) else {
        return refused(Verdict::Pass(PassReason::NotForUs));
    };
    let frame = job.input.frame();
    match scene.link(frame) {
        Ok(_) => step(&Views::of(frame, arrival.link), &scene),
        Err(reason) => refused(Verdict::Pass(reason)),
    }
}

/// Runs a step that is about flows alone.
#[inline(always)]
fn at_moment<I, T, R>(
    job: &Job<I, T>,
    refused: impl FnOnce(Verdict) -> R,
    step: impl FnOnce(&Moment<'_, T>) -> R,
) -> R
where
    T: Tables,
{
    match job.tables.config() {
        Some(config) => step(&Moment {
            config,
            tables: &job.tables,
            now: job.now,
        }),
        None => refused(Verdict::Pass(PassReason::NotForUs)),
    }
}

/// Runs a step that is about the packet alone.
#[inline(always)]
fn on_views<I: Input, T, R>(job: &Job<I, T>, step: impl FnOnce(&Views<I::Packet>) -> R) -> R {
    step(&Views::of(job.input.frame(), job.input.arrival().link))
}

#[inline(never)]
fn unfold_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let len = job.input.frame_len();
        let result = on_scene(job, Err, |views, scene| {
            let available = len.saturating_sub(scene.arrival.link.header_len() as u32);
            work.unfolded =
                classify::unfolded::<A, _>(views.network, available).map_err(Verdict::Pass)?;
            if work.unfolded.has_options::<A>() {
                work.unfolded
                    .read_options(views.network, &job.tables)
                    .map_err(Verdict::Pass)?;
            }
            Ok(())
        });
        work.settle(result)
    })
}

#[inline(never)]
fn classify_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |views, scene| {
            whole(views, work, scene).map_err(Verdict::Pass)
        });
        work.settle(result)
    })
}

/// Reads the options of a SYN, at the place that classification has found: to read the headers again would have LLVM mix the
/// packet's pointer into a result ("R1 invalid mem access 'scalar'", kernel 6.18, LLVM 22).
#[inline(never)]
fn options_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        job.input.reach_options();
        let views = Views::of(job.input.frame(), job.input.arrival().link);
        let transport = work.unfolded.transport(&views);
        work.options
            .read(transport, work.subject.header_len, &job.tables);
        work.numbers.scale = work.options.scale;
        Step::Next
    })
}

/// Without the packet: where its segment size is, and what it says, is in the workspace.
#[inline(never)]
fn clamp_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| {
            mss::clamp(work, scene);
            Ok(())
        });
        work.settle(result)
    })
}

#[inline(never)]
fn validate_step<A: Address, C: Context<A>>(ctx: &mut C) -> Standing {
    ctx.with(Standing::Gone, |job, work, flows| {
        at_moment(
            job,
            |_| Standing::Gone,
            |moment| validate(work, flows, moment),
        )
    })
}

/// Without scene, for the same reason.
#[inline(never)]
fn judge_step<A: Address, C: Context<A>>(ctx: &mut C) -> Judged {
    ctx.with(Judged::GoesOn, |_, work, flows| judge(work, flows))
}

#[inline(never)]
fn admit_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, flows| {
        let result = at_moment(job, Err, |moment| proof::admit(work, flows, moment));
        work.settle(result)
    })
}

#[inline(never)]
fn track_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, flows| {
        let result = at_moment(job, Err, |moment| transport::track(work, flows, moment));
        work.settle(result)
    })
}

#[inline(never)]
fn error_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let verdict = on_views(job, |views| icmp::carry(views, work, &job.tables));
        work.settle(Err(verdict))
    })
}

#[inline(never)]
fn decide_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| opening::decide(work, scene));
        work.settle(result)
    })
}

/// Asks the rules that take what is nobody else's.
#[inline(never)]
fn rest_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| rest::decide(work, scene));
        work.settle(result)
    })
}

#[inline(never)]
fn limit_source_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = at_moment(job, Err, |moment| limits::claim_of_source(work, moment));
        work.settle(result)
    })
}

#[inline(never)]
fn limit_rule_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = at_moment(job, Err, |moment| limits::claim_of_rule(work, moment));
        work.settle(result)
    })
}

#[inline(never)]
fn tell_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let verdict = on_scene(job, identity, |views, scene| {
            refusal::tell(work, views, scene)
        });
        work.settle(Err(verdict))
    })
}

/// Gives back what was taken for a flow that does not begin. Leaves the verdict as it is.
#[inline(never)]
fn disclaim_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        limits::disclaim(work, &job.tables);
        Step::Next
    })
}

/// Counts the flow that validation has ended.
#[inline(never)]
fn lose_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        limits::lose(work, &job.tables);
        Step::Next
    })
}

/// Counts a connection that its packet has ended, or has taken up again.
#[inline(never)]
fn turn_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        limits::turn(work, &job.tables, job.now);
        Step::Next
    })
}

/// Finds an endpoint of the gateway that stands for the client.
#[inline(never)]
fn hide_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| binding::hide(work, scene));
        work.settle(result)
    })
}

#[inline(never)]
fn open_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, flows| {
        let result = at_moment(job, Err, |moment| opening::open(work, flows, moment));
        work.settle(result)
    })
}

#[inline(never)]
fn decide_speaking_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| speaking::decide(work, scene));
        work.settle(result)
    })
}

#[inline(never)]
fn speak_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, flows| {
        let result = at_moment(job, Err, |moment| {
            speaking::speak(work, flows, moment);
            Ok(())
        });
        work.settle(result)
    })
}

/// Finds the way out of a packet that is or will be translated.
#[inline(never)]
pub(super) fn depart_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| {
            let Scene {
                arrival, tables, ..
            } = *scene;
            work.path = match arrival.hook {
                // The gateway's own packet is on its way already.
                Hook::TcOut => Path::STACK,
                Hook::Xdp | Hook::Tc | Hook::TcSlow => {
                    Path::of(tables.route(&work.to, arrival.ifindex), tables)
                }
            };
            let half = (work.direction, work.peer);
            work.departure = work.path.departure(&work.subject.load, half, arrival)?;
            Ok(())
        });
        work.settle(result)
    })
}

/// Asks whether the client can be where its packet came from.
#[inline(never)]
fn reverse_path_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| {
            if scene.config.trusts_sources() {
                return Ok(());
            }
            reverse_path::check(work, scene)
        });
        work.settle(result)
    })
}

/// Numbers the way out, for the entry of the flow.
#[inline(never)]
fn number_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = at_moment(job, Err, |moment| {
            work.number = match (work.path.knowledge, work.subject.kind) {
                (Knowledge::Ready, Kind::Segment) => {
                    next_hop::number(&work.path.hop, moment.config, moment.now, moment.tables)
                        .map_or(NO_NUMBER, u32::from)
                }
                // Nothing is remembered of an error's way.
                (Knowledge::Ready | Knowledge::Interface | Knowledge::Nothing, _) => NO_NUMBER,
            };
            Ok(())
        });
        work.settle(result)
    })
}

/// Keeps the way out for other packets of the rule, or to the client.
#[inline(never)]
fn keep_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let result = on_scene(job, Err, |_, scene| {
            light::keep(work, scene);
            Ok(())
        });
        work.settle(result)
    })
}

#[inline(never)]
fn apply_step<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    step(ctx, |job, work, _| {
        let verdict = on_views(job, |views| apply::apply_new(views, work));
        work.settle(Err(verdict))
    })
}

/// Says what the packet is, in the workspace; not a fragment, which has its own program.
#[inline(always)]
fn whole<A, P, T>(
    views: &Views<P>,
    work: &mut Workspace<A>,
    scene: &Scene<'_, T>,
) -> Result<(), PassReason>
where
    A: Address,
    P: PacketBuf,
{
    match (work.unfolded.fragment, scene.arrival.hook) {
        (Fragment::Whole, _) => subject(views, work, scene),
        // XDP has no way to hold one, or to send one again.
        (Fragment::First | Fragment::Later, Hook::Xdp) => Err(PassReason::SlowPath),
        (Fragment::First | Fragment::Later, Hook::Tc | Hook::TcSlow | Hook::TcOut) => {
            Err(PassReason::Fragment)
        }
    }
}

/// Which side of the gateway a packet came from.
#[inline(always)]
pub(super) const fn side<T>(scene: &Scene<'_, T>) -> Side {
    match (scene.arrival.hook, scene.ingress.role()) {
        (Hook::TcOut, _) => Side::Out,
        (Hook::Xdp | Hook::Tc | Hook::TcSlow, Role::Wan) => Side::Wan,
        (Hook::Xdp | Hook::Tc | Hook::TcSlow, Role::Lan) => Side::Lan,
        (Hook::Xdp | Hook::Tc | Hook::TcSlow, Role::Both) => Side::Both,
    }
}

/// Says what a packet whose headers have been followed is, in the workspace.
#[inline(always)]
pub(super) fn subject<A, P, T>(
    views: &Views<P>,
    work: &mut Workspace<A>,
    scene: &Scene<'_, T>,
) -> Result<(), PassReason>
where
    A: Address,
    P: PacketBuf,
{
    let packet = Packet::unfolded(views, &work.unfolded)?;
    let side = side(scene);
    let echo = packet.echo();
    if packet.header.protocol == A::ICMP && echo.is_none() {
        let quoted = packet.quoted()?;
        // An error goes to the source of what it quotes; anything else is forged or not ours to understand.
        if packet.header.dst != quoted.key.dst {
            return Err(PassReason::NoQuotedFlow);
        }
        work.key = quoted.key;
        work.numbers = Numbers {
            sequence: quoted.sequence,
            ..Numbers::default()
        };
        let load = Load {
            is_scattered: work.unfolded.is_scattered,
            ..Load::of(&packet, ICMP_LEN as u32, scene.arrival)
        };
        let (flags, traffic) = (
            TcpFlags(0),
            Traffic {
                packets: 0,
                bytes: 0,
            },
        );
        work.subject = Subject {
            kind: Kind::Error,
            side,
            protocol: quoted.protocol,
            flags,
            load,
            traffic,
            header_len: 0,
            is_answer: false,
            rest: 0,
        };
        return Ok(());
    }
    let protocol = match echo {
        Some(_) => Protocol::Echo,
        None => Protocol::with_ports(packet.header.protocol).ok_or(PassReason::Protocol)?,
    };
    let segment = match (packet.segment(protocol), side) {
        (Ok(segment), _) => segment,
        (Err(reason), Side::Lan | Side::Both) => {
            return malformed(&packet, protocol, side, work).ok_or(reason);
        }
        (Err(reason), Side::Wan | Side::Out) => return Err(reason),
    };
    let classified = packet.with(segment);
    work.key = classified.key;
    if protocol == Protocol::Tcp {
        work.numbers = classified.numbers().ok_or(PassReason::Malformed)?;
    }
    work.subject = Subject {
        kind: Kind::Segment,
        side,
        protocol,
        flags: classified.segment.flags,
        load: Load {
            is_scattered: work.unfolded.is_scattered,
            ..classified.load(scene.arrival)
        },
        traffic: classified.traffic(scene.arrival),
        header_len: classified.segment.header_len,
        is_answer: echo == Some(Echo::Reply),
        rest: 0,
    };
    Ok(())
}

/// A packet from the LAN of whose transport header only the ports make sense.
#[inline(always)]
fn malformed<A: Address, P: PacketBuf>(
    packet: &Packet<A, P>,
    protocol: Protocol,
    side: Side,
    work: &mut Workspace<A>,
) -> Option<()> {
    work.key = packet.key(protocol, packet.ports()?);
    work.subject = Subject {
        kind: Kind::Malformed,
        side,
        protocol,
        ..Subject::default()
    };
    Some(())
}
