//! Whatever the hot path does not finish: stale entries, first packets, errors.
//!
//! Every step is a function of its own in the kernel object: their frames share the 512 bytes of stack, because they do not
//! call each other. What is too large for that is in a [`Workspace`], and a step that needs the packet's headers again reads
//! them again.

use super::{
    Arrival, Moment, Scene, Views, apply, binding,
    classify::{self, Packet, Unfolded},
    fragments::Piece,
    icmp,
    known::{Judged, Standing, Track, judge, validate},
    limits::{self, Claim},
    mss::{self, Clamp},
    nat::{Hiding, Mapping},
    next_hop, opening,
    path::{Knowledge, Load, Path},
    pool::Search,
    proof, speaking,
    tables::{Flows, Tables},
    tcp::{Numbers, Options, TcpFlags},
    transport,
    verdict::{Departure, DropReason, Hook, PassReason, Verdict},
};
use crate::{
    abi::{BindingKey, FlowDir, FlowEntry, FlowKey, Instant, Peer, Protocol, Role, Traffic},
    net::{
        Address, PacketBuf,
        headers::{Fragment, ICMP_LEN},
    },
};

/// Memory that the slow path works in, and what its steps leave for each other. All zeroes, as the kernel hands it out, is a
/// valid value.
#[derive(Clone, Copy, Debug, Default)]
pub struct Workspace<A: Address> {
    /// When the packet came.
    pub now: Instant,
    /// Key of the packet, or of the packet that would answer what an error quotes.
    pub key: FlowKey<A>,
    /// The key after translation.
    pub to: FlowKey<A>,
    /// That, reversed: the key of the other direction.
    pub partner: FlowKey<A>,
    /// Key of a flow that is in the way of a new one.
    pub rival: FlowKey<A>,
    /// The entry of a new flow; only its rewrite counts if there is to be no entry, or if there is one already.
    pub entry: FlowEntry<A>,
    /// What its headers lead to.
    pub unfolded: Unfolded,
    /// What the packet is.
    pub subject: Subject,
    /// The packet's direction in its flow.
    pub direction: FlowDir,
    /// The numbers of a TCP segment; of an error, only the sequence number of the segment it quotes.
    pub numbers: Numbers,
    /// The options of a SYN.
    pub options: Options,
    /// What becomes of the segment size that is among them.
    pub clamp: Clamp,
    /// What its flow is, if there is one.
    pub track: Track,
    /// Whom the target takes for the client.
    pub peer: Peer,
    /// Key of the port that stands for the client.
    pub binding: BindingKey,
    /// The search for it.
    pub search: Search,
    /// What is known of the way out.
    pub path: Path,
    /// What the rule makes of a first packet.
    pub mapping: Mapping,
    /// What it has taken of the rule's limits.
    pub claim: Claim,
    /// The way out.
    pub departure: Departure,
    /// Its number in NEXT_HOPS; all ones if it has none.
    pub number: u32,
    /// The fragment at hand.
    pub piece: Piece,
    /// What the last step decided, in parts: an enum with fields would be stored with parts that were never written.
    action: Action,
    pass: PassReason,
    drop: DropReason,
}

/// [`Workspace::number`] of a way out that has none.
const NO_NUMBER: u32 = u32::MAX;

/// Which kind of verdict a workspace has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Action {
    #[default]
    Pass,
    Drop,
    Forward,
}

/// What kind of packet a subject is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// TCP or UDP.
    #[default]
    Segment,
    /// An ICMP error that quotes one.
    Error,
    /// TCP or UDP from the LAN with a header that makes no sense but for its ports: the kernel would route it.
    Malformed,
}

impl Kind {
    /// Why such a packet, with numbers that its receiver would not look at, is refused.
    #[inline(always)]
    const fn forged(self) -> DropReason {
        match self {
            Self::Segment | Self::Malformed => DropReason::RstOutOfWindow,
            Self::Error => DropReason::ErrorOutOfWindow,
        }
    }

    /// Why such a packet from the LAN is left to the kernel if no rule is about it.
    #[inline(always)]
    pub(super) const fn not_ours(self) -> PassReason {
        match self {
            Self::Segment => PassReason::NoFlow,
            Self::Error => PassReason::NoQuotedFlow,
            Self::Malformed => PassReason::Malformed,
        }
    }
}

/// Where a packet came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Side {
    /// In by a WAN interface.
    #[default]
    Wan,
    /// In by a LAN interface.
    Lan,
    /// In by an interface that is both.
    Both,
    /// The gateway itself.
    Out,
}

/// All that deciding on a packet needs, besides its key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Subject {
    /// Segment or error.
    pub kind: Kind,
    /// Where it came from.
    pub side: Side,
    /// Transport protocol; of an error, that of the packet it quotes.
    pub protocol: Protocol,

    /// TCP flags.
    pub flags: TcpFlags,
    /// What may keep it from leaving.
    pub load: Load,
    /// What it counts as.
    pub traffic: Traffic,
    /// Length of the transport header, bytes.
    pub header_len: u32,
}

/// A packet as its hook gives it out, as often as it is asked for.
pub trait Input {
    /// The packet's memory.
    type Packet: PacketBuf;
    /// From the link header on.
    fn frame(&self) -> Self::Packet;
    /// What the hook knows besides.
    fn arrival(&self) -> Arrival;
    /// Brings the options of a SYN within reach, for which the hot path has no use. What was given out before is no longer good.
    fn reach_options(&self) {}
}

/// All that the steps of the slow path start from.
#[derive(Clone, Copy, Debug)]
pub struct Job<I, T> {
    /// The packet.
    pub input: I,
    /// Rules, interfaces, routes, counters.
    pub tables: T,
    /// Now.
    pub now: Instant,
}

/// Where every step finds its job, its workspace and the flows for itself: in the kernel, the context of the hook.
///
/// It is a step's only argument, so that the verifier can take each step for a function by itself and look at it once, instead of
/// once for every way that leads to it: `btf_prepare_func_args` knows a context by its type, and nothing of the caller's.
pub trait Context<A: Address> {
    /// How the packet is given out.
    type Input: Input;
    /// What the datapath looks up.
    type Tables: Tables;
    /// The flow tables.
    type Flows: Flows<A>;

    /// Runs `step`; without a workspace, which only a broken map could cause, it is `absent`.
    fn with<R>(
        &mut self,
        absent: R,
        step: impl FnOnce(&Job<Self::Input, Self::Tables>, &mut Workspace<A>, &mut Self::Flows) -> R,
    ) -> R;

    /// The same step, in a way that the compiler cannot see through. A function whose result it knows would lose it, and with it
    /// the register that the verifier looks for ("At subprogram exit the register R0 is not a scalar value", kernel 6.18, LLVM 22).
    fn returned(step: Step) -> Step;
}

/// Decides on a packet from the start.
#[inline(always)]
pub fn slow<A: Address, C: Context<A>>(ctx: &mut C) -> Verdict {
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

/// Whether a step leaves anything to do. What a step is called for goes through the workspace: a function without a scalar
/// result may leave a stack address in the result register ("cannot return stack pointer to the caller", kernel 6.18, LLVM 22).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// The next one.
    Next,
    /// Nothing: the workspace has the verdict.
    Done,
}

impl Step {
    /// What two steps leave to do, of which the second runs whatever the first has come to.
    #[inline(always)]
    fn and(self, second: Self) -> Self {
        match (self, second) {
            (Self::Next, Self::Next) => Self::Next,
            (Self::Done, _) | (_, Self::Done) => Self::Done,
        }
    }
}

/// Runs the body of a step.
#[inline(always)]
pub(super) fn step<A: Address, C: Context<A>>(
    ctx: &mut C,
    body: impl FnOnce(&Job<C::Input, C::Tables>, &mut Workspace<A>, &mut C::Flows) -> Step,
) -> Step {
    C::returned(ctx.with(Step::Done, body))
}

#[inline(always)]
fn steps<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    if unfold_step(ctx) == Step::Done || classify_step(ctx) == Step::Done {
        return Step::Done;
    }
    steps_from_key(ctx)
}

/// What follows once key and subject are in the workspace.
#[inline(always)]
pub(super) fn steps_from_key<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
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
        Kind::Malformed => Standing::Gone,
    };
    let standing = match standing {
        Standing::Gone => {
            let is_lost = kind != Kind::Malformed && ask(ctx, |work| work.track.is_lost);
            if is_lost && lose_step(ctx) == Step::Done {
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
    if begun == Step::Done || depart_step(ctx) == Step::Done || number_step(ctx) == Step::Done {
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
            if (is_due && admit_step(ctx) == Step::Done) || track_step(ctx) == Step::Done {
                return Step::Done;
            }
            let turns = ask(ctx, |work| limits::turns(work, work.now));
            if turns && turn_step(ctx) == Step::Done {
                return Step::Done;
            }
            finish(ctx, is_syn)
        }
        (Step::Next, Standing::Gone, _) => finish(ctx, is_syn),
    }
}

/// What a client's first packet takes: of the rule's limits, of the ports that stand for clients, and an entry for each direction.
#[inline(always)]
fn enter<A: Address, C: Context<A>>(ctx: &mut C) -> Step {
    let (limited, hides) = ask(ctx, |work| {
        (work.mapping.limited, work.mapping.hiding != Hiding::None)
    });
    let entered = if limited && limit(ctx) == Step::Done
        || hides && hide_step(ctx) == Step::Done
        || open_step(ctx) == Step::Done
    {
        Step::Done
    } else {
        Step::Next
    };
    if limited && ask(ctx, |work| work.claim.is_any()) {
        return entered.and(disclaim_step(ctx));
    }
    entered
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
    let is_without_rule = ask(ctx, |work| {
        work.action == Action::Pass && work.pass == PassReason::NoRule
    });
    match side {
        Side::Lan | Side::Both if is_without_rule => decide_speaking_step(ctx),
        Side::Wan | Side::Lan | Side::Both | Side::Out => Step::Done,
    }
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

impl<A: Address> Workspace<A> {
    /// The number of the way out, for the flow's entry.
    #[inline(always)]
    pub const fn way(&self) -> Option<u16> {
        if self.number == NO_NUMBER {
            None
        } else {
            Some(self.number as u16)
        }
    }

    /// Keeps a step's verdict, if it came to one.
    #[inline(always)]
    pub(super) fn settle(&mut self, result: Result<(), Verdict>) -> Step {
        match result {
            Ok(()) => Step::Next,
            Err(verdict) => {
                match verdict {
                    Verdict::Pass(reason) => {
                        self.action = Action::Pass;
                        self.pass = reason;
                    }
                    Verdict::Drop(reason) => {
                        self.action = Action::Drop;
                        self.drop = reason;
                    }
                    Verdict::Forward(departure) => {
                        self.action = Action::Forward;
                        self.departure = departure;
                    }
                }
                Step::Done
            }
        }
    }

    /// What the last step came to.
    #[inline(always)]
    pub(super) const fn verdict(&self) -> Verdict {
        match self.action {
            Action::Pass => Verdict::Pass(self.pass),
            Action::Drop => Verdict::Drop(self.drop),
            Action::Forward => Verdict::Forward(self.departure),
        }
    }
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
        let result = on_scene(job, Err, |views, _| {
            work.unfolded = classify::unfolded::<A, _>(views.network).map_err(Verdict::Pass)?;
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
    if packet.header.protocol == A::ICMP {
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
        let load = Load::of(&packet, ICMP_LEN as u32, scene.arrival);
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
        };
        return Ok(());
    }
    let protocol = Protocol::from_number(packet.header.protocol).ok_or(PassReason::Protocol)?;
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
        load: classified.load(scene.arrival),
        traffic: classified.traffic(scene.arrival),
        header_len: classified.segment.header_len,
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
