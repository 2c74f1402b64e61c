//! Every arm of the machine, and its arithmetic beside one that does not wrap.

use super::*;
use crate::abi::Instant;
use std::{collections::HashSet, vec::Vec};

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

    /// The connection after a segment, and what became of it.
    fn after(&self, from: FlowDir, kind: SegmentKind, segment: &Numbers) -> (Self, Action) {
        let (mut sender, mut receiver) = match from {
            FlowDir::Original => (self.original.side(), self.reply.side()),
            FlowDir::Reply => (self.reply.side(), self.original.side()),
        };
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

/// Every connection that so many segments of any kind, number and sender lead to.
fn reachable(start: Connection, depth: usize) -> HashSet<Connection> {
    let mut known = HashSet::from([start]);
    let mut edge = known.clone();
    for _ in 0..depth {
        let mut next = HashSet::new();
        for connection in &edge {
            for from in [FlowDir::Original, FlowDir::Reply] {
                for kind in KINDS {
                    for segment in candidates() {
                        let (mut after, _) = connection.after(from, kind, &segment);
                        // How long ago does not matter, only who was last.
                        let later = after.original.at > after.reply.at;
                        (after.original.at, after.reply.at, after.now) = (
                            u32::from(later),
                            u32::from(!later && after.reply.at > after.original.at),
                            2,
                        );
                        if known.insert(after) {
                            next.insert(after);
                        }
                    }
                }
            }
        }
        edge = next;
    }
    known
}

#[test]
fn every_state_is_reached_and_no_segment_breaks_what_must_hold() {
    let mut states = HashSet::new();
    for start in [opening(), begun(Side::picked_up(&numbers(5, 6)))] {
        for connection in reachable(start, 2) {
            let state = connection.state();
            states.insert(state);
            for from in [FlowDir::Original, FlowDir::Reply] {
                for kind in KINDS {
                    for segment in candidates() {
                        let (after, action) = connection.after(from, kind, &segment);
                        check(&connection, &after, action, from, kind, &segment);
                    }
                }
            }
        }
    }
    // The rest takes longer ways.
    for state in [
        TcpState::SynSent,
        TcpState::SynReceived,
        TcpState::PickedUp,
        TcpState::Established,
        TcpState::HalfClosed,
        TcpState::Refused,
    ] {
        assert!(states.contains(&state), "{state:?}");
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
        let (sender, receiver) = match from {
            FlowDir::Original => (before.original.side(), before.reply.side()),
            FlowDir::Reply => (before.reply.side(), before.original.side()),
        };
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
