//! TCP: flags and states.

use portfwd_common::{
    abi::Protocol,
    datapath::{DropReason, Event, Hook},
    model::{frame::Draft, rules::Forward},
};

use crate::gateway::Gateway;
use portfwd_common::model::world::{World, at};

const FIN_ACK: u8 = 0x11;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
const RST_ACK: u8 = 0x14;

fn gateway(world: &World) -> Gateway {
    Gateway::new(&[Forward::new(Protocol::Tcp, 80, at(world.target, 8080))])
}

/// Who sends a segment.
#[derive(Clone, Copy, Debug)]
enum Sender {
    Client,
    Backend,
}

use Sender::{Backend, Client};

/// Segments by their flags.
type Segments = [(Sender, u8)];

fn send(gateway: &mut Gateway, world: &World, segments: &Segments) {
    for (sender, flags) in segments {
        match sender {
            Client => client_sends(gateway, world, *flags),
            Backend => backend_sends(gateway, world, *flags),
        }
    }
}

fn client_sends(gateway: &mut Gateway, world: &World, flags: u8) {
    let draft = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), flags);
    gateway.wan(&draft.packet()).reached_lan(
        &draft
            .between(draft.source, at(world.target, 8080))
            .hop()
            .packet(),
    );
}

fn backend_sends(gateway: &mut Gateway, world: &World, flags: u8) {
    let draft = Draft::tcp(at(world.target, 8080), at(world.client, 40_000), flags);
    gateway.lan(&draft.packet()).reached_wan(
        &draft
            .between(at(world.listen, 80), draft.destination)
            .hop()
            .packet(),
    );
}

/// Sets of FIN, SYN, RST and ACK that some stack sends, by the bits of the flags byte.
fn is_sent_by_stacks(flags: u8) -> bool {
    [SYN, SYN_ACK, RST, RST_ACK, ACK, FIN_ACK].contains(&(flags & 0x17))
}

#[test]
fn a_first_segment_with_any_flags_is_carried_or_refused() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            for flags in 0..=u8::MAX {
                let mut gateway = gateway(&world).by(hook);
                let draft = Draft::tcp(at(world.client, 40_000), at(world.listen, 80), flags);
                if is_sent_by_stacks(flags) {
                    client_sends(&mut gateway, &world, flags);
                    // A RST begins nothing.
                    assert_eq!(
                        gateway.flows(),
                        usize::from(flags & RST == 0),
                        "{flags:#04x}"
                    );
                } else {
                    gateway
                        .wan(&draft.packet())
                        .dropped(DropReason::BadTcpFlags);
                    assert_eq!(gateway.flows(), 0, "{flags:#04x}");
                    assert_eq!(gateway.drops(DropReason::BadTcpFlags), 1);
                }
            }
        }
    }
}

#[test]
fn a_known_connection_carries_any_flags_either_way() {
    for world in World::both() {
        for flags in 0..=u8::MAX {
            let mut gateway = gateway(&world);
            client_sends(&mut gateway, &world, SYN);
            backend_sends(&mut gateway, &world, SYN_ACK);
            client_sends(&mut gateway, &world, flags);
            backend_sends(&mut gateway, &world, flags);
            assert_eq!(gateway.events(Event::FlowCreated), 1);
        }
    }
}

#[test]
fn a_connection_lives_as_long_as_its_state_allows_and_no_longer() {
    let rows: [(&str, &Segments, u32); 13] = [
        ("a SYN without answer", &[(Client, SYN)], 240),
        (
            "a SYN sent three times",
            &[(Client, SYN), (Client, SYN), (Client, SYN)],
            240,
        ),
        (
            "SYN and SYN-ACK, but no third segment",
            &[(Client, SYN), (Backend, SYN_ACK)],
            240,
        ),
        (
            "a SYN-ACK sent again",
            &[(Client, SYN), (Backend, SYN_ACK), (Backend, SYN_ACK)],
            240,
        ),
        (
            "a handshake",
            &[(Client, SYN), (Backend, SYN_ACK), (Client, ACK)],
            7_440,
        ),
        (
            "data both ways",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Backend, ACK),
            ],
            7_440,
        ),
        (
            "one side done",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN_ACK),
            ],
            7_440,
        ),
        (
            "the other side done",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Backend, FIN_ACK),
            ],
            7_440,
        ),
        (
            "both sides done",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN_ACK),
                (Backend, FIN_ACK),
            ],
            240,
        ),
        (
            "both sides done, and the last ACK",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN_ACK),
                (Backend, FIN_ACK),
                (Client, ACK),
            ],
            240,
        ),
        (
            "a connection refused",
            &[(Client, SYN), (Backend, RST_ACK)],
            240,
        ),
        (
            "a connection reset by the client",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, RST),
            ],
            240,
        ),
        (
            "a connection picked up in its middle",
            &[(Client, ACK), (Backend, ACK)],
            7_440,
        ),
    ];
    for world in World::both() {
        for (name, segments, lifetime) in rows {
            println!("{name}");
            let mut gateway = gateway(&world);
            send(&mut gateway, &world, segments);
            gateway.wait(lifetime);
            backend_sends(&mut gateway, &world, ACK);
            assert_eq!(gateway.events(Event::FlowCreated), 1);
            // That packet may have made it an established one.
            let mut gateway = self::gateway(&world);
            send(&mut gateway, &world, segments);
            gateway.wait(lifetime + 1);
            let late = Draft::tcp(at(world.target, 8080), at(world.client, 40_000), ACK);
            let _ = gateway.lan(&late.packet()).departure();
            assert_eq!(gateway.events(Event::Stateless), 1);
            assert_eq!(gateway.flows(), 0);
        }
    }
}

#[test]
fn a_reset_is_carried_and_the_connection_kept_for_what_comes_late() {
    for world in World::both() {
        let mut gateway = gateway(&world);
        client_sends(&mut gateway, &world, SYN);
        backend_sends(&mut gateway, &world, SYN_ACK);
        client_sends(&mut gateway, &world, ACK);
        backend_sends(&mut gateway, &world, RST);
        backend_sends(&mut gateway, &world, RST);
        client_sends(&mut gateway, &world, ACK);
        backend_sends(&mut gateway, &world, RST);
        assert_eq!(gateway.flows(), 1);
    }
}

#[test]
fn a_syn_after_the_end_begins_a_new_connection_with_a_fresh_look_at_the_rules() {
    for world in World::both() {
        for (name, end) in [
            ("both FINs", &[(Client, FIN_ACK), (Backend, FIN_ACK)][..]),
            ("a RST of the client", &[(Client, RST_ACK)]),
            ("a RST of the backend", &[(Backend, RST)]),
        ] {
            for hook in [Hook::Xdp, Hook::Tc] {
                println!("{name}, by {hook:?}");
                let mut gateway = gateway(&world).by(hook);
                client_sends(&mut gateway, &world, SYN);
                backend_sends(&mut gateway, &world, SYN_ACK);
                client_sends(&mut gateway, &world, ACK);
                send(&mut gateway, &world, end);
                // Within the second in which entries are good without another look.
                client_sends(&mut gateway, &world, SYN);
                assert_eq!(gateway.events(Event::FlowCreated), 2);
                assert_eq!(gateway.flows(), 1);
                backend_sends(&mut gateway, &world, SYN_ACK);
                client_sends(&mut gateway, &world, ACK);
                gateway.wait(7_440);
                client_sends(&mut gateway, &world, ACK);
                assert_eq!(gateway.events(Event::FlowCreated), 2);
            }
        }
    }
}

#[test]
fn a_syn_of_the_backend_after_the_end_is_a_segment_like_any_other() {
    for world in World::both() {
        for flags in [SYN, SYN | RST, SYN_ACK] {
            let mut gateway = gateway(&world);
            client_sends(&mut gateway, &world, SYN);
            backend_sends(&mut gateway, &world, RST_ACK);
            backend_sends(&mut gateway, &world, flags);
            assert_eq!(gateway.flows(), 1);
        }
    }
}

#[test]
fn a_syn_in_a_live_connection_changes_nothing() {
    for world in World::both() {
        for before in [
            &[][..],
            &[(Backend, SYN_ACK)],
            &[(Backend, SYN_ACK), (Client, ACK)],
            &[(Backend, SYN_ACK), (Client, ACK), (Client, FIN_ACK)],
        ] {
            let mut gateway = gateway(&world);
            client_sends(&mut gateway, &world, SYN);
            send(&mut gateway, &world, before);
            client_sends(&mut gateway, &world, SYN);
            assert_eq!(gateway.events(Event::FlowCreated), 1);
        }
    }
}
