//! Rows about targets that speak first.

use portfwd_common::{
    datapath::DropReason,
    model::{
        frame::{Draft, after_hop, error, ethernet},
        world::{BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN_MAC, World, at},
    },
};

use crate::rows::{
    Becomes::{Dropped, Redirected},
    CLIENT, Row, by_lan, to_wan,
};

const SYN: u8 = 0x02;

/// What they become.
pub fn rows(world: &World) -> Vec<Row> {
    let client = at(world.client, CLIENT);
    let unasked = Draft::udp(at(world.target, 1053), client);
    let quoted = |target| Draft::udp(client, target).hop().packet();
    let error = |source, quoted: &[u8]| {
        let kind = if world.is_v4() { 3 } else { 1 };
        error(source, world.client, kind, 3, [0; 4], quoted)
    };
    vec![
        Row::new(
            "what a target sends first leaves from the listen endpoint",
            by_lan(&unasked),
            to_wan(unasked.between(at(world.listen, 53), client)),
        ),
        Row::new(
            "an error about a flow that is gone leaves from the listen endpoint",
            (
                LAN,
                ethernet(
                    LAN_MAC,
                    BACKEND_MAC,
                    &error(world.target, &quoted(at(world.target, 1053))),
                ),
            ),
            Redirected(ethernet(
                UPSTREAM_MAC,
                WAN_MAC,
                &after_hop(error(world.listen, &quoted(at(world.listen, 53)))),
            )),
        ),
        Row::new(
            "what a target of two rules sends first does not leave",
            by_lan(&Draft::tcp(at(world.target, 8080), client, SYN)),
            Dropped(DropReason::PrivateSource),
        ),
    ]
}
