//! Every arm of the machine, and its arithmetic beside one that does not wrap.

use super::*;
use crate::abi::Instant;
use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet, VecDeque},
    vec::Vec,
};

const CLIENT_ISN: u32 = 0xffff_fff0;
const BACKEND_ISN: u32 = 0x7fff_fff0;
const SCALE: u8 = 2;

/// A connection that both sides tell the machine about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Connection {
    original: Shown,
    reply: Shown,
    now: u32,
}

/// A side as the machine has it, and when it was last heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shown {
    seen: u8,
    scale: u8,
    window: u16,
    sent: u32,
    acked: u32,
    at: u32,
}

impl Shown {
    fn side(self) -> Side {
        let Self {
            seen,
            scale,
            window,
            sent,
            acked,
            ..
        } = self;
        Side {
            seen,
            scale,
            window,
            sent,
            acked,
        }
    }

    fn of(side: Side, at: u32) -> Self {
        Self {
            seen: side.seen,
            scale: side.scale,
            window: side.window,
            sent: side.sent,
            acked: side.acked,
            at,
        }
    }
}

impl Connection {
    fn state(&self) -> TcpState {
        let at = |shown: Shown| Instant::from_ticks(u64::from(shown.at));
        TcpState::of(
            (&self.original.side(), at(self.original)),
            (&self.reply.side(), at(self.reply)),
        )
    }

    /// Sender and receiver of a segment.
    fn sides(&self, from: FlowDir) -> (Side, Side) {
        let (original, reply) = (self.original.side(), self.reply.side());
        match from {
            FlowDir::Original => (original, reply),
            FlowDir::Reply => (reply, original),
        }
    }

    /// The connection after a segment, and what became of it.
    fn after(&self, from: FlowDir, kind: SegmentKind, segment: &Numbers) -> (Self, Action) {
        let (mut sender, mut receiver) = self.sides(from);
        let untouched = (sender, receiver);
        let action = judge(
            &mut sender,
            &mut receiver,
            from,
            self.state(),
            kind,
            segment,
        );
        let mut next = *self;
        next.now += 1;
        if matches!(action, Action::Unmoved | Action::Begin | Action::Refuse) {
            assert_eq!((sender, receiver), untouched, "{self:?} {from:?} {kind:?}");
            return (next, action);
        }
        let (own, other) = match from {
            FlowDir::Original => (&mut next.original, &mut next.reply),
            FlowDir::Reply => (&mut next.reply, &mut next.original),
        };
        *own = Shown::of(sender, self.now);
        if action == Action::Restart {
            *other = Shown::of(receiver, other.at);
        }
        (next, action)
    }
}

const KINDS: [SegmentKind; 6] = [
    SegmentKind::Syn,
    SegmentKind::SynAck,
    SegmentKind::Rst,
    SegmentKind::Fin,
    SegmentKind::Ack,
    SegmentKind::Nonsense,
];

fn numbers(sequence: u32, acknowledgement: u32) -> Numbers {
    Numbers {
        sequence,
        acknowledgement,
        payload: 0,
        window: 100,
        scale: SCALE,
    }
}

fn begun(side: Side) -> Connection {
    Connection {
        original: Shown::of(side, 0),
        reply: Shown::of(Side::default(), 0),
        now: 1,
    }
}

fn opening() -> Connection {
    begun(Side::opened(&numbers(CLIENT_ISN, 0), 0))
}

/// Numbers that a side may use: those that fit, those beside them, and those far away.
fn candidates() -> Vec<Numbers> {
    let near = |isn: u32| [0_u32, 1, 2, 400, 402].map(|off| isn.wrapping_add(off));
    let far = [7_u32, 0x4000_0000];
    let sequences: Vec<u32> = near(CLIENT_ISN)
        .into_iter()
        .chain(near(BACKEND_ISN))
        .chain(far)
        .collect();
    let acknowledgements = sequences.clone();
    sequences
        .iter()
        .flat_map(|s| acknowledgements.iter().map(|a| numbers(*s, *a)))
        .collect()
}

/// What tells connections apart for the machine, but for their numbers: the state, what each side has shown, and whether the client
/// was heard last, the backend, or both at once.
type Shape = (TcpState, u8, u8, Ordering);

impl Connection {
    fn shape(&self) -> Shape {
        (
            self.state(),
            self.original.seen,
            self.reply.seen,
            self.original.at.cmp(&self.reply.at),
        )
    }

    /// The same long after: how long ago does not matter, only who was last.
    fn later(mut self) -> Self {
        let order = self.original.at.cmp(&self.reply.at);
        (self.original.at, self.reply.at) = match order {
            Ordering::Less => (0, 1),
            Ordering::Equal => (0, 0),
            Ordering::Greater => (1, 0),
        };
        self.now = 2;
        self
    }
}

/// What the machine may do with a segment of a kind, in a state.
type Arm = (SegmentKind, FlowDir, TcpState);

/// Connections of each shape that are gone on from, whatever their numbers.
const OF_EACH_SHAPE: usize = 40;

/// Goes on from both beginnings, by segments of any kind, number and sender, until nothing of a new shape comes up. Tells `see` of
/// every step.
fn explore(mut see: impl FnMut(&Connection, &Connection, Action, Arm, &Numbers)) {
    let segments = candidates();
    let picked_up = Side::picked_up(&numbers(
        CLIENT_ISN.wrapping_add(1),
        BACKEND_ISN.wrapping_add(1),
    ));
    let mut ahead = VecDeque::from([opening().later(), begun(picked_up).later()]);
    let mut known: HashSet<Connection> = ahead.iter().copied().collect();
    let mut shapes = HashMap::<Shape, usize>::new();
    while let Some(connection) = ahead.pop_front() {
        for from in [FlowDir::Original, FlowDir::Reply] {
            for kind in KINDS {
                let arm = (kind, from, connection.state());
                for segment in &segments {
                    let (after, action) = connection.after(from, kind, segment);
                    see(&connection, &after, action, arm, segment);
                    let later = after.later();
                    let met = shapes.entry(later.shape()).or_default();
                    if *met < OF_EACH_SHAPE && known.insert(later) {
                        *met += 1;
                        ahead.push_back(later);
                    }
                }
            }
        }
    }
}

/// The table of [`judge`] written a second time, without the numbers: all that may become of a segment, by whether those fit.
fn outcomes((kind, from, state): Arm) -> &'static [Action] {
    use Action::{Begin, Follow, Refuse, Restart, Unmoved};
    use FlowDir::{Original, Reply};
    use SegmentKind::{Ack, Fin, Nonsense, Rst, Syn, SynAck};
    use TcpState::{
        Closing, Established, HalfClosed, PickedUp, Refused, Reopened, Reset, SynReceived, SynSent,
    };
    match (kind, from, state) {
        // Again, or with another number.
        (Syn, Original, SynSent | SynReceived) => &[Unmoved, Begin],
        (Syn, Original, PickedUp | Closing | Reset | Refused | Reopened) => &[Begin],
        (Syn, Original, Established | HalfClosed) => &[Unmoved],
        (Syn, Reply, SynSent | Closing | Reset | Refused) => &[Follow],
        (Syn, Reply, SynReceived | PickedUp | Established | HalfClosed | Reopened) => &[Unmoved],
        // Whether it acknowledges the SYN.
        (SynAck, Reply, SynSent | SynReceived) | (SynAck, Original, SynReceived) => {
            &[Follow, Unmoved]
        }
        // Its old answer, or a new one.
        (SynAck, Reply, Established | HalfClosed) => &[Unmoved, Restart],
        (SynAck, Reply, PickedUp | Closing | Reset | Refused | Reopened)
        | (
            SynAck,
            Original,
            SynSent | PickedUp | Established | HalfClosed | Closing | Reset | Refused | Reopened,
        ) => &[Unmoved],
        // Whether it is the one that counts; once there is a connection it may be out of the window.
        (Rst, _, SynSent | SynReceived | PickedUp | Reopened) => &[Follow, Unmoved],
        (Rst, _, Established | HalfClosed | Closing | Reset) => &[Follow, Unmoved, Refuse],
        (Rst | Fin | Ack, _, Refused) | (Fin | Ack, _, SynSent) => &[Unmoved],
        // Whether it acknowledges the SYN of the backend, which itself may send before.
        (Fin | Ack, Original, SynReceived | Reopened) => &[Follow, Unmoved],
        (Fin | Ack, Reply, SynReceived | Reopened)
        | (Fin | Ack, _, PickedUp | Established | HalfClosed | Closing | Reset) => &[Follow],
        (Nonsense, _, _) => &[Unmoved],
    }
}

/// What becomes of a RST in a connection, by where its receiver has its number, and whether it is right behind its sender's data.
fn outcome_of_reset(place: Place, is_behind_data: bool) -> Action {
    match (place, is_behind_data) {
        (Place::Next, _) | (Place::Inside | Place::Outside | Place::Unknown, true) => {
            Action::Follow
        }
        (Place::Inside | Place::Unknown, false) => Action::Unmoved,
        (Place::Outside, false) => Action::Refuse,
    }
}

/// The states that one segment can lead to.
fn successors(state: TcpState) -> &'static [TcpState] {
    use TcpState::{
        Closing, Established, HalfClosed, PickedUp, Refused, Reopened, Reset, SynReceived, SynSent,
    };
    match state {
        SynSent => &[SynSent, SynReceived, Refused],
        SynReceived => &[SynReceived, Established, HalfClosed, Refused],
        PickedUp => &[PickedUp, Established, HalfClosed, Refused],
        Established => &[Established, HalfClosed, Reset, Reopened],
        HalfClosed => &[HalfClosed, Closing, Reset, Reopened],
        Closing => &[Closing, Reset, Reopened],
        Reset => &[Reset, Established, HalfClosed, Closing, Reopened],
        Refused => &[Refused, Reopened],
        Reopened => &[Reopened, Established, HalfClosed, Refused],
    }
}

#[test]
fn every_state_is_reached_and_every_arm_of_the_table_is_taken() {
    let mut taken = HashMap::<_, Vec<Action>>::new();
    let mut resets = Vec::new();
    let mut followed = HashMap::<TcpState, HashSet<TcpState>>::new();
    explore(|before, after, action, arm, segment| {
        let (kind, from, state) = arm;
        check(before, after, action, from, kind, segment);
        let taken = taken.entry((kind as usize, from, state)).or_default();
        if !taken.contains(&action) {
            taken.push(action);
        }
        if kind == SegmentKind::Rst && state.is_proven() {
            let (sender, receiver) = before.sides(from);
            let case = (
                receiver.place(segment.sequence),
                segment.sequence == sender.sent,
            );
            assert_eq!(
                action,
                outcome_of_reset(case.0, case.1),
                "{before:?} {segment:?}"
            );
            if !resets.contains(&case) {
                resets.push(case);
            }
        }
        followed.entry(state).or_default().insert(after.state());
    });
    assert_eq!(resets.len(), 8, "{resets:?}");
    for state in TcpState::ALL {
        let expected = successors(state).iter().copied().collect();
        assert_eq!(followed.get(&state), Some(&expected), "{state:?}");
        for from in [FlowDir::Original, FlowDir::Reply] {
            for kind in KINDS {
                let expected = outcomes((kind, from, state));
                let taken = &taken[&(kind as usize, from, state)];
                assert!(
                    taken.len() == expected.len() && expected.iter().all(|a| taken.contains(a)),
                    "{kind:?} of {from:?} in {state:?}: {taken:?} instead of {expected:?}"
                );
            }
        }
    }
}

/// What must hold of every segment in every state.
fn check(
    before: &Connection,
    after: &Connection,
    action: Action,
    from: FlowDir,
    kind: SegmentKind,
    segment: &Numbers,
) {
    let (was, is) = (before.state(), after.state());
    let story = || std::format!("{before:?} {from:?} {kind:?} {segment:?}: {action:?}");
    // Only a RST is ever refused.
    assert!(
        action != Action::Refuse || kind == SegmentKind::Rst,
        "{}",
        story()
    );
    // Only the client's SYN begins anew, and never in a connection that lives.
    if action == Action::Begin {
        assert_eq!(
            (from, kind),
            (FlowDir::Original, SegmentKind::Syn),
            "{}",
            story()
        );
        assert!(
            !matches!(was, TcpState::Established | TcpState::HalfClosed),
            "{}",
            story()
        );
    }
    if action == Action::Restart {
        assert_eq!(
            (from, kind),
            (FlowDir::Reply, SegmentKind::SynAck),
            "{}",
            story()
        );
    }
    // Established comes of the third segment, of both sides' data, or of what follows a reset.
    if is == TcpState::Established && was != TcpState::Established && was != TcpState::Reset {
        let (sender, receiver) = before.sides(from);
        assert!(
            receiver.is_answered_by(segment.acknowledgement)
                || (was == TcpState::PickedUp && from == FlowDir::Reply),
            "{sender:?} {}",
            story()
        );
    }
    // A reset needs a RST.
    if matches!(is, TcpState::Reset | TcpState::Refused) && is != was {
        assert_eq!(kind, SegmentKind::Rst, "{}", story());
    }
    // What means nothing changes nothing.
    if kind == SegmentKind::Nonsense {
        assert_eq!(action, Action::Unmoved);
    }
}

#[test]
fn legal_flag_sets_are_those_a_stack_sends() {
    for byte in 0..=u8::MAX {
        let flags = TcpFlags(byte);
        let (fin, syn, rst, ack) = (
            flags.any(TcpFlags::FIN),
            flags.any(TcpFlags::SYN),
            flags.any(TcpFlags::RST),
            flags.any(TcpFlags::ACK),
        );
        // A SYN or a RST alone with or without ACK; data or FIN only with it.
        let legal = matches!(
            (syn, rst, fin, ack),
            (true, false, false, _) | (false, true, false, _) | (false, false, _, true)
        );
        assert_eq!(flags.is_legal(), legal, "{byte:#010b}");
        let kind = match (syn, rst, fin, ack) {
            (true, false, false, false) => SegmentKind::Syn,
            (true, false, false, true) => SegmentKind::SynAck,
            (false, true, false, _) => SegmentKind::Rst,
            (false, false, true, true) => SegmentKind::Fin,
            (false, false, false, true) => SegmentKind::Ack,
            _ => SegmentKind::Nonsense,
        };
        assert_eq!(flags.kind(), kind, "{byte:#010b}");
    }
}

mod arithmetic {
    use proptest::prelude::*;

    use super::*;

    /// A number of 64 bits, and what is left of it in 32: wherever it lies, comparisons must be those of the whole.
    fn wrapped(number: i64) -> u32 {
        number as u32
    }

    fn settled(sent: i64, acked: i64, window: u16, scale: u8) -> Side {
        Side {
            seen: Side::SYN | Side::ACK | Side::SETTLED,
            scale,
            window,
            sent: wrapped(sent),
            acked: wrapped(acked),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(crate::model::effort::cases(50_000)))]

        #[test]
        fn places_in_the_window_are_those_of_numbers_that_do_not_wrap(
            acked in 0..(1_i64 << 40), off in -(1_i64 << 31)..(1_i64 << 31), window: u16, scale in 0..15_u8,
        ) {
            let receiver = settled(0, acked, window, scale);
            let reach = i64::from(window) << scale;
            let expected = if off == 0 {
                Place::Next
            } else if (1..=reach).contains(&off) {
                Place::Inside
            } else {
                Place::Outside
            };
            prop_assert_eq!(receiver.place(wrapped(acked + off)), expected);
        }

        #[test]
        fn acknowledgements_move_on_as_those_of_numbers_that_do_not_wrap(
            acked in 0..(1_i64 << 40), off in -(1_i64 << 31)..(1_i64 << 31), window: u16, scale in 0..15_u8,
        ) {
            let mut side = settled(0, acked, window, scale);
            side.follow(&Numbers { acknowledgement: wrapped(acked + off), window: 9, ..Numbers::default() });
            let limit = (i64::from(window) << scale) + 0x1_0000;
            let moved = (0..=limit).contains(&off);
            prop_assert_eq!(side.acked, wrapped(if moved { acked + off } else { acked }));
            prop_assert_eq!(side.window, if moved { 9 } else { window });
        }

        #[test]
        fn data_moves_on_as_that_of_numbers_that_do_not_wrap(
            sent in 0..(1_i64 << 40), off in -(1_i64 << 30)..(1_i64 << 30), payload in 0..70_000_u32,
        ) {
            let mut side = settled(sent, 0, 0, 0);
            side.reach(&Numbers { sequence: wrapped(sent + off), payload, ..Numbers::default() });
            let end = off + i64::from(payload);
            let expected = if end > 0 && off <= 1 << 20 { sent + end } else { sent };
            prop_assert_eq!(side.sent, wrapped(expected));
        }

        #[test]
        fn a_syn_is_answered_by_what_lies_behind_it_and_not_beyond(
            isn in 0..(1_i64 << 40), data in 0..1_500_i64, off in -(1_i64 << 31)..(1_i64 << 31),
        ) {
            let side = Side::opened(&Numbers { sequence: wrapped(isn), payload: data as u32, ..Numbers::default() }, 0);
            prop_assert_eq!(side.is_answered_by(wrapped(isn + off)), (1..=1 + data).contains(&off));
            prop_assert_eq!(side.is_answered_by(wrapped(isn + 1)), true);
        }

        #[test]
        fn a_window_of_a_syn_is_rounded_up(window: u16, scale in 0..15_u8) {
            let side = Side::opened(&Numbers { window, scale, ..Numbers::default() }, 0);
            let bytes = u32::from(side.window) << scale;
            prop_assert!(bytes >= u32::from(window) && bytes < u32::from(window) + (1 << scale));
        }
    }
}

mod options {
    use std::cell::Cell;

    use super::*;
    use crate::model::{Bytes, maps::Plainly};

    fn read(options: &[u8]) -> Options {
        let mut header = std::vec![0; 20];
        header.extend(options);
        let len = header.len() as u32;
        let mut read = Options::default();
        let transport = Bytes::new(Cell::from_mut(&mut header[..]).as_slice_of_cells());
        read.read(transport, len, &Plainly);
        read
    }

    fn scale_of(options: &[u8]) -> u8 {
        read(options).scale
    }

    #[test]
    fn scale_and_segment_size_of_real_stacks_are_found() {
        for (stack, options, scale, at) in [
            (
                "Linux",
                &[
                    2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3, 7,
                ][..],
                7,
                22,
            ),
            (
                "macOS",
                &[
                    2, 4, 5, 180, 1, 3, 3, 6, 1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 4, 2, 0, 0,
                ],
                6,
                22,
            ),
            ("Windows", &[2, 4, 5, 180, 1, 3, 3, 8, 1, 1, 4, 2], 8, 22),
            ("without a scale", &[2, 4, 5, 180], 0, 22),
            ("without a size", &[1, 3, 3, 7], 7, 0),
            ("none", &[], 0, 0),
        ] {
            let read = read(options);
            assert_eq!(read.scale, scale, "{stack}");
            let value = if at == 0 { 0 } else { 1460 };
            assert_eq!(read.segment_size, SegmentSize { at, value }, "{stack}");
        }
    }

    #[test]
    fn options_that_make_no_sense_are_as_good_as_none() {
        for (what, options, scale) in [
            ("too large", &[3, 3, 15, 0][..], 14),
            ("much too large", &[3, 3, 255, 0], 14),
            ("length 0", &[5, 0, 3, 3, 7, 0, 0, 0], 0),
            ("length 1", &[5, 1, 3, 3, 7, 0, 0, 0], 0),
            ("beyond the end", &[5, 9, 3, 3, 7, 0, 0, 0], 0),
            ("another length", &[3, 4, 7, 0], 0),
            ("after the end of options", &[0, 3, 3, 7], 0),
            ("kind in the last byte", &[1, 1, 1, 3], 0),
            ("kind and length in the last bytes", &[1, 1, 3, 3], 0),
            ("nothing but padding", &[1; 40], 0),
            ("twice: the last counts", &[3, 3, 5, 1, 3, 3, 9, 1], 9),
        ] {
            assert_eq!(scale_of(options), scale, "{what}");
        }
        let nothing = SegmentSize::default();
        let size = |at, value| SegmentSize { at, value };
        for (what, options, found) in [
            ("length 0", &[2, 0, 5, 180][..], nothing),
            ("length 1", &[2, 1, 5, 180], nothing),
            ("length 3", &[2, 3, 5, 1], nothing),
            ("length 5", &[2, 5, 5, 180, 1, 1, 1, 1], nothing),
            ("beyond the end", &[1, 2, 4, 5], nothing),
            ("kind in the last byte", &[1, 1, 1, 2], nothing),
            ("kind and length in the last bytes", &[1, 1, 2, 4], nothing),
            (
                "after the end of options",
                &[0, 0, 0, 0, 2, 4, 5, 180],
                nothing,
            ),
            ("after no length", &[5, 0, 2, 4, 5, 180, 1, 1], nothing),
            (
                "before no length",
                &[2, 4, 5, 180, 5, 0, 1, 1],
                size(22, 1460),
            ),
            (
                "twice: the last counts",
                &[2, 4, 5, 180, 2, 4, 1, 2],
                size(26, 258),
            ),
            (
                "behind as much padding as fits",
                &last_of_all(),
                size(58, 65_535),
            ),
        ] {
            assert_eq!(read(options).segment_size, found, "{what}");
        }
    }

    fn last_of_all() -> [u8; 40] {
        let mut options = [1; 40];
        options[36..].copy_from_slice(&[2, 4, 255, 255]);
        options
    }

    #[test]
    fn any_bytes_are_read_to_an_end() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..100_000 {
            let options: Vec<u8> = (0..4 * random.usize(..=10))
                .map(|_| random.u8(..12))
                .collect();
            let read = read(&options);
            assert!(read.scale <= 14);
            let at = usize::from(read.segment_size.at);
            assert!(at == 0 || (22..=18 + options.len()).contains(&at));
        }
    }
}
