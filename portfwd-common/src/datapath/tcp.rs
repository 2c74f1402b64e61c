//! TCP as the datapath follows it (RFC 9293, RFC 7857 section 2, RFC 5961).
//!
//! What each side has shown is kept in the half of the flow that its own segments pass: control flags, up to where it has sent,
//! up to where it has acknowledged ([`Side`]). The state of the connection follows from both ([`TcpState`]). Once both sides have
//! settled, their data passes by the hot path, which only moves the numbers on; everything that may change the state is judged by
//! the slow path, which has both halves before it ([`judge`]).
//!
//! The datapath is liberal in forwarding: a segment of a known connection is carried whatever its numbers. It is conservative in
//! state: only numbers that somebody who does not see the connection cannot know move it. The one exception in forwarding is a
//! RST that its receiver would not look at (RFC 5961 section 3.2): it is refused.
//!
//! Sequence numbers are modulo 2^32. They are only ever compared by their distance from a number that is known.

mod options;
mod segment;
mod side;
mod state;

pub use options::{Options, SegmentSize};
pub use segment::{Numbers, SegmentKind, TcpFlags, UNKNOWN_SCALE};
pub use side::{Place, Side};
pub use state::{Since, TcpState};

use crate::abi::FlowDir;

/// What becomes of a segment of a known connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Carried; its side has moved on, and the flow has been heard of.
    #[default]
    Follow,
    /// Carried; nothing is remembered of it, and the flow is no younger by it.
    Unmoved,
    /// The connection is over: as the first segment of another.
    Begin,
    /// Carried; both sides are those of a connection that has just been opened in the place of this one.
    Restart,
    /// Refused: its receiver would not look at it.
    Refuse,
}

/// Judges a segment of `sender`, whose direction is `from`. Both sides afterwards are in their places. `receiver` changes by
/// [`Action::Restart`], which must be remembered, and by a third segment, which may be: it saves the backend's next segment from
/// being judged.
#[inline(always)]
pub fn judge(
    sender: &mut Side,
    receiver: &mut Side,
    from: FlowDir,
    state: TcpState,
    kind: SegmentKind,
    segment: &Numbers,
) -> Action {
    match kind {
        SegmentKind::Syn => syn(sender, from, state, segment),
        SegmentKind::SynAck => syn_ack(sender, receiver, from, state, segment),
        SegmentKind::Rst => rst(sender, receiver, from, state, segment),
        SegmentKind::Fin | SegmentKind::Ack => data(sender, receiver, from, state, kind, segment),
        // No receiver makes anything of it; it may be liberal with it, too.
        SegmentKind::Nonsense => Action::Unmoved,
    }
}

/// Makes what is known of both sides fit a segment of a connection whose packets are not all looked at, so that the segment counts: its
/// sender has sent and acknowledged what it says, and it is what the receiver awaits. Only once both are known to have opened it:
/// until then every segment is met, and its numbers are to be right.
#[inline(always)]
pub const fn believe(
    sender: &mut Side,
    receiver: &mut Side,
    state: TcpState,
    kind: SegmentKind,
    segment: &Numbers,
) {
    let is_known = match state {
        TcpState::Established | TcpState::HalfClosed | TcpState::Closing | TcpState::Reset => true,
        TcpState::SynSent
        | TcpState::SynReceived
        | TcpState::PickedUp
        | TcpState::Refused
        | TcpState::Reopened => false,
    };
    let is_of_it = match kind {
        SegmentKind::Ack | SegmentKind::Fin | SegmentKind::Rst => true,
        SegmentKind::Syn | SegmentKind::SynAck | SegmentKind::Nonsense => false,
    };
    if !is_known || !is_of_it {
        return;
    }
    receiver.acked = segment.sequence;
    sender.sent = segment.sequence;
    if !matches!(kind, SegmentKind::Rst) {
        sender.acked = segment.acknowledgement;
    }
}

#[inline(always)]
fn syn(sender: &mut Side, from: FlowDir, state: TcpState, segment: &Numbers) -> Action {
    match (from, state) {
        // Sent again: no answer has come through. A SYN with another number is another attempt, on a port used again.
        (FlowDir::Original, TcpState::SynSent | TcpState::SynReceived) => {
            if sender.acked == segment.sequence {
                Action::Unmoved
            } else {
                Action::Begin
            }
        }
        // The client has left a connection that only it knew, and opens another.
        (FlowDir::Original, TcpState::PickedUp) => Action::Begin,
        // The port is used again after the end (RFC 6056, TIME-WAIT): the rules are asked anew.
        (
            FlowDir::Original,
            TcpState::Closing | TcpState::Reset | TcpState::Refused | TcpState::Reopened,
        ) => Action::Begin,
        // The client has lost the connection, or somebody pretends so. The backend answers with a challenge (RFC 5961 section 4.2)
        // or, if it has lost it too, with a SYN-ACK; that will tell.
        (FlowDir::Original, TcpState::Established | TcpState::HalfClosed) => Action::Unmoved,
        // Simultaneous open: both SYNs are on their way (RFC 9293 section 3.5).
        (FlowDir::Reply, TcpState::SynSent) => {
            *sender = Side::opened(segment, 0);
            Action::Follow
        }
        // The backend opens from the port it served, after the end. Nothing is established before the client opens, too; until
        // then what is late of the old connection is still carried.
        (FlowDir::Reply, TcpState::Closing | TcpState::Reset | TcpState::Refused) => {
            *sender = Side::opened(segment, Side::REOPENED);
            Action::Follow
        }
        // Sent again, or a SYN into a connection that goes on.
        (
            FlowDir::Reply,
            TcpState::SynReceived
            | TcpState::PickedUp
            | TcpState::Established
            | TcpState::HalfClosed
            | TcpState::Reopened,
        ) => Action::Unmoved,
    }
}

#[inline(always)]
fn syn_ack(
    sender: &mut Side,
    receiver: &mut Side,
    from: FlowDir,
    state: TcpState,
    segment: &Numbers,
) -> Action {
    let answers = receiver.is_answered_by(segment.acknowledgement);
    match (from, state) {
        // The answer to the client's SYN. An old one, to another SYN, does not acknowledge this: the client will reset that.
        (FlowDir::Reply, TcpState::SynSent | TcpState::SynReceived) => {
            let is_repeated =
                sender.has(Side::SYN) && sender.has(Side::ACK) && sender.acked == segment.sequence;
            if answers && !is_repeated {
                *sender = Side::opened(segment, Side::ACK);
                Action::Follow
            } else {
                Action::Unmoved
            }
        }
        // The client's answer in a simultaneous open, which repeats the number of its SYN.
        (FlowDir::Original, TcpState::SynReceived) => {
            if answers && sender.acked == segment.sequence {
                sender.seen |= Side::ACK;
                Action::Follow
            } else {
                Action::Unmoved
            }
        }
        // The backend answers a SYN that came into the connection: it knows nothing of it any more. Unless it is its old answer
        // that comes again, because the third segment was lost behind the gateway.
        (FlowDir::Reply, TcpState::Established | TcpState::HalfClosed) => {
            if is_old_answer(sender, segment) {
                Action::Unmoved
            } else {
                *sender = Side::opened(segment, Side::ACK | Side::REOPENED);
                *receiver = reopened_by(segment);
                Action::Restart
            }
        }
        // Answers nothing that was asked.
        (
            FlowDir::Reply,
            TcpState::PickedUp
            | TcpState::Closing
            | TcpState::Reset
            | TcpState::Refused
            | TcpState::Reopened,
        )
        | (
            FlowDir::Original,
            TcpState::SynSent
            | TcpState::PickedUp
            | TcpState::Established
            | TcpState::HalfClosed
            | TcpState::Closing
            | TcpState::Reset
            | TcpState::Refused
            | TcpState::Reopened,
        ) => Action::Unmoved,
    }
}

/// Whether a SYN-ACK begins where its sender began, or shortly before where it is.
#[inline(always)]
pub(super) const fn is_old_answer(sender: &Side, segment: &Numbers) -> bool {
    const FIRST_FLIGHT: u32 = 0x1_0000;
    if sender.is_settled() {
        let begins = segment.sequence.wrapping_add(1);
        sender.sent.wrapping_sub(begins) <= FIRST_FLIGHT
    } else {
        sender.acked == segment.sequence
    }
}

/// A side whose SYN was only seen by the answer to it.
#[inline(always)]
const fn reopened_by(answer: &Numbers) -> Side {
    Side {
        seen: Side::SYN | Side::REOPENED,
        scale: UNKNOWN_SCALE,
        window: u16::MAX,
        sent: answer.acknowledgement,
        acked: answer.acknowledgement.wrapping_sub(1),
    }
}

#[inline(always)]
fn rst(
    sender: &mut Side,
    receiver: &Side,
    from: FlowDir,
    state: TcpState,
    segment: &Numbers,
) -> Action {
    // What the sender would send next: a RST right behind its last data (RFC 9293 section 3.10.4).
    let is_behind_data = sender.has(Side::SYN | Side::SETTLED) && segment.sequence == sender.sent;
    match (from, state) {
        // The port is closed: the RST acknowledges the SYN (RFC 9293 section 3.10.7.3), its sequence number says nothing.
        (FlowDir::Reply, TcpState::SynSent) => {
            give_up(sender, receiver.is_answered_by(segment.acknowledgement))
        }
        // The backend has given up on the handshake.
        (FlowDir::Reply, TcpState::SynReceived | TcpState::Reopened) => give_up(
            sender,
            is_behind_data || receiver.is_answered_by(segment.acknowledgement),
        ),
        // The backend knows no such connection: it answers what it got, at the number it was asked for.
        (FlowDir::Reply, TcpState::PickedUp) => give_up(sender, segment.sequence == receiver.acked),
        // The client has given up; or it resets an old SYN-ACK, at the number that one acknowledged: that is for the backend.
        (
            FlowDir::Original,
            TcpState::SynSent | TcpState::SynReceived | TcpState::PickedUp | TcpState::Reopened,
        ) => give_up(sender, is_behind_data),
        // RFC 5961 section 3.2. Exact: the receiver resets. Inside the window: it answers with a challenge, to which the sender,
        // if it is the sender, answers with an exact one. Outside: it does nothing, so nothing reaches it.
        (_, TcpState::Established | TcpState::HalfClosed | TcpState::Closing | TcpState::Reset) => {
            match receiver.place(segment.sequence) {
                Place::Next => give_up(sender, true),
                Place::Inside | Place::Unknown => give_up(sender, is_behind_data),
                Place::Outside if is_behind_data => give_up(sender, true),
                Place::Outside => Action::Refuse,
            }
        }
        // Sent again.
        (_, TcpState::Refused) => Action::Unmoved,
    }
}

/// A RST is carried; whether it is the one that the receiver waits for decides whether it counts.
#[inline(always)]
const fn give_up(sender: &mut Side, counts: bool) -> Action {
    if counts {
        sender.seen |= Side::RST;
        Action::Follow
    } else {
        Action::Unmoved
    }
}

#[inline(always)]
fn data(
    sender: &mut Side,
    receiver: &mut Side,
    from: FlowDir,
    state: TcpState,
    kind: SegmentKind,
    segment: &Numbers,
) -> Action {
    match (from, state) {
        // Nobody has answered the SYN.
        (_, TcpState::SynSent) => Action::Unmoved,
        // The third segment: it acknowledges the backend's SYN, which only somebody who has seen it can.
        (FlowDir::Original, TcpState::SynReceived | TcpState::Reopened) => {
            if !sender.is_settled() && receiver.is_answered_by(segment.acknowledgement) {
                let begins = sender.acked.wrapping_add(1);
                sender.settle(segment);
                end(sender, receiver, kind, segment);
                receiver.settle_at(begins);
                Action::Follow
            } else {
                Action::Unmoved
            }
        }
        // The last segment of a simultaneous open; or a backend that sends before the third segment, which is not established
        // by that but may be acknowledged.
        (FlowDir::Reply, TcpState::SynReceived | TcpState::Reopened) => {
            if !sender.has(Side::ACK) && receiver.is_answered_by(segment.acknowledgement) {
                sender.settle(segment);
            } else {
                sender.reach(segment);
            }
            Action::Follow
        }
        // Nobody has answered yet.
        (FlowDir::Original, TcpState::PickedUp) => {
            sender.follow(segment);
            Action::Follow
        }
        // The backend knows the connection.
        (FlowDir::Reply, TcpState::PickedUp) => {
            *sender = Side::picked_up(segment);
            end(sender, receiver, kind, segment);
            Action::Follow
        }
        // Data goes on. After a RST it shows that the RST did not count (RFC 7857 section 2.2).
        (_, TcpState::Established | TcpState::HalfClosed | TcpState::Closing | TcpState::Reset) => {
            if sender.is_settled() {
                sender.catch_up(receiver, segment);
                sender.follow(segment);
            } else {
                sender.settle(segment);
            }
            // Or the other side has spoken since.
            if is_expected(receiver, segment) || !matches!(state, TcpState::Reset) {
                sender.seen &= !Side::RST;
            }
            end(sender, receiver, kind, segment);
            Action::Follow
        }
        // There never was a connection.
        (_, TcpState::Refused) => Action::Unmoved,
    }
}

/// A FIN ends its sender's data, if the receiver takes it.
#[inline(always)]
fn end(sender: &mut Side, receiver: &Side, kind: SegmentKind, segment: &Numbers) {
    if kind == SegmentKind::Fin && is_expected(receiver, segment) {
        sender.seen |= Side::FIN;
        if sender.sent == segment.end() {
            sender.sent = sender.sent.wrapping_add(1);
        }
    }
}

/// Whether a segment can be one that the receiver has not acknowledged yet.
#[inline(always)]
const fn is_expected(receiver: &Side, segment: &Numbers) -> bool {
    !receiver.is_settled() || receiver.awaits(segment.sequence) || receiver.awaits(segment.end())
}

/// Whether an ICMP error can be about a segment that begins there (RFC 5927 section 4.1): its sender has sent it, and the receiver
/// has not acknowledged it.
#[inline(always)]
pub const fn is_on_its_way(sender: &Side, receiver: &Side, sequence: u32) -> bool {
    if receiver.is_settled() {
        receiver.awaits(sequence)
    } else if sender.is_settled() {
        // The other side has not spoken.
        true
    } else {
        sender.opens_at(sequence)
    }
}

#[cfg(test)]
mod tests;
