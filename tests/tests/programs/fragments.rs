//! Rows about fragments.

use portfwd_common::{
    datapath::DropReason,
    model::{
        frame::{Draft, ethernet, fragments},
        world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::rows::{
    Becomes::{Dropped, Redirected},
    CLIENT, Row,
};

/// What they become.
pub fn rows(world: &World) -> Vec<Row> {
    let client = at(world.client, CLIENT);
    let pieces = |draft: &Draft| fragments(&draft.packet(), 0x77, 104, 0);
    let question = Draft::udp(client, at(world.listen, 53)).payload(vec![0xa5; 250]);
    let answer = Draft::udp(at(world.target, 1053), client).payload(vec![0x5a; 250]);
    let asked = pieces(&question);
    let heard = pieces(&question.between(client, at(world.target, 1053)).hop());
    let answered = pieces(&answer);
    let told = pieces(&answer.between(at(world.listen, 53), client).hop());
    let to_lan = |packet: &[u8]| Redirected(ethernet(BACKEND_MAC, LAN_MAC, packet));
    let to_wan = |packet: &[u8]| Redirected(ethernet(UPSTREAM_MAC, WAN_MAC, packet));
    let by_wan = |packet: &[u8]| (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet));
    let by_lan = |packet: &[u8]| (LAN, ethernet(LAN_MAC, BACKEND_MAC, packet));
    let mut cut_off = asked[1].clone();
    // One byte less than a multiple of eight, and another fragment to follow.
    let at = if world.is_v4() { 3 } else { 5 };
    cut_off[at] -= 1;
    let mut dropped = Row::slow(
        "a fragment of odd length in the middle of a datagram is dropped",
        by_wan(&cut_off),
        Dropped(DropReason::BadFragment),
    );
    if world.is_v4() {
        // The header's sum, which nobody looks at before.
        dropped.frame.1[14 + 10] = 0;
    }
    vec![
        Row::slow(
            "the first fragment of a question reaches the target",
            by_wan(&asked[0]),
            to_lan(&heard[0]),
        ),
        Row::slow("so does the next one", by_wan(&asked[1]), to_lan(&heard[1]))
            .after(&[by_wan(&asked[0])]),
        Row::slow("and the last one", by_wan(&asked[2]), to_lan(&heard[2]))
            .after(&[by_wan(&asked[0]), by_wan(&asked[1])]),
        Row::slow(
            "the last fragment of an answer leaves from the listen endpoint",
            by_lan(&answered[2]),
            to_wan(&told[2]),
        )
        .after(&[by_lan(&answered[0]), by_lan(&answered[1])]),
        Row::slow(
            "a fragment that comes twice leaves once",
            by_wan(&asked[1]),
            Dropped(DropReason::FragmentOverlap),
        )
        .after(&[by_wan(&asked[0]), by_wan(&asked[1])]),
        dropped,
    ]
}
