//! What the steps of the slow path work on: a workspace that lasts from step to step, and how each step finds it.

use super::{
    Arrival,
    classify::Unfolded,
    fragments::Piece,
    known::Track,
    limits::Claim,
    mss::Clamp,
    nat::Mapping,
    path::{Load, Path},
    pool::Search,
    refusal::Notice,
    tables::{Flows, Tables},
    tcp::{Numbers, Options, TcpFlags},
    verdict::{Departure, DropReason, PassReason, Verdict},
};
use crate::{
    abi::{Bank, BindingKey, FlowDir, FlowEntry, FlowKey, Instant, Peer, Protocol, Traffic},
    net::{Address, PacketBuf},
};

/// Memory that the slow path works in, and what its steps leave for each other. All zeroes, as the kernel hands it out, is a
/// valid value.
#[derive(Clone, Copy, Debug, Default)]
pub struct Workspace<A: Address> {
    /// When the packet came.
    pub now: Instant,
    /// The bank of the rule tables that packets looked at then: one packet sees one.
    pub bank: Bank,
    /// A number of this packet's, by which a program behind a tail call knows that the workspace is the one it was left in: while
    /// programs are replaced, one of another object may come between, which has a workspace of its own.
    pub ticket: u32,
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
    /// The rule with light tracking that it is of and that carries by itself, by slot; 0 if there is none.
    pub light: u16,
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
    /// What the sender of the packet is told.
    pub notice: Notice,
    /// What the last step decided, in parts: an enum with fields would be stored with parts that were never written.
    action: Action,
    pass: PassReason,
    drop: DropReason,
}

/// [`Workspace::number`] of a way out that has none.
pub(super) const NO_NUMBER: u32 = u32::MAX;

/// Which kind of verdict a workspace has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Action {
    #[default]
    Pass,
    Drop,
    Refuse,
    Forward,
}

/// What kind of packet a subject is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// TCP, UDP or echo.
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
    pub(super) const fn forged(self) -> DropReason {
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
    /// Whether it is an answer by what it says itself, as echo is, and belongs to a flow or to nobody.
    pub is_answer: bool,
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
    /// The rule for everything else that takes it, by slot; 0 if it has not come to that.
    pub rest: u16,
}

/// Where the slow path begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Beginning {
    /// With a packet of which nothing is known.
    #[default]
    Packet,
    /// With the first fragment of a datagram: the program for fragments has followed its headers, and what they lead to is in the
    /// workspace.
    FirstFragment,
}

/// A packet as its hook gives it out, as often as it is asked for.
pub trait Input {
    /// The packet's memory.
    type Packet: PacketBuf;
    /// From the link header on.
    fn frame(&self) -> Self::Packet;
    /// What the hook knows besides.
    fn arrival(&self) -> Arrival;
    /// Bytes of the frame, also those that its memory does not show: XDP sees the first buffer of several.
    fn frame_len(&self) -> u32;
    /// What has been found out before the slow path begins.
    fn beginning(&self) -> Beginning {
        Beginning::Packet
    }
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
    pub(super) fn and(self, second: Self) -> Self {
        match (self, second) {
            (Self::Next, Self::Next) => Self::Next,
            (Self::Done, _) | (_, Self::Done) => Self::Done,
        }
    }
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
                    Verdict::Refuse(reason) => {
                        self.action = Action::Refuse;
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
            Action::Refuse => Verdict::Refuse(self.drop),
            Action::Forward => Verdict::Forward(self.departure),
        }
    }
}
