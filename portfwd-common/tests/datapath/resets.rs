//! RST, SYN and ICMP errors that somebody forges, or that come late (RFC 5961, RFC 7857 section 2.2, RFC 5927).

use portfwd_common::{
    datapath::{DropReason, Event, tcp::TcpState},
    model::{
        frame::{Draft, after_hop, error},
        world::World,
    },
};

use crate::conversation::{
    ACK, Backend, Client, Conversation, FIN, HANDSHAKE, RST, RST_ACK, SYN, SYN_ACK, Sender,
    WINDOW_BYTES,
};

/// A RST of a side at so much from where the other side expects its next segment.
fn rst(tcp: &Conversation, sender: Sender, off: u32) -> Draft {
    let next = tcp.segment(sender, RST);
    let sequence = next.sequence.wrapping_add(off);
    next.numbers(sequence, 0)
}

#[test]
fn a_reset_that_is_exact_counts_and_the_connection_is_kept_for_four_minutes() {
    for world in World::both() {
        for sender in [Client, Backend] {
            for flags in [RST, RST_ACK] {
                let mut tcp = Conversation::established(&world);
                let reset = tcp.segment(sender, flags);
                tcp.forge(sender, &reset);
                assert_eq!(tcp.state(), Some(TcpState::Reset));
                tcp.gateway.wait(239);
                // It was lost, and comes again.
                tcp.forge(sender, &reset);
                tcp.lives_for(240);
                assert_eq!(tcp.gateway.flows(), 1);
            }
        }
    }
}

#[test]
fn data_after_a_reset_shows_that_it_did_not_count() {
    for world in World::both() {
        for sender in [Client, Backend] {
            for goes_on in [Client, Backend] {
                let mut tcp = Conversation::established(&world);
                let reset = tcp.segment(sender, RST);
                tcp.forge(sender, &reset);
                tcp.gateway.wait(200);
                let data = tcp.segment(goes_on, ACK).payload([3; 10]);
                tcp.carry(goes_on, &data);
                assert_eq!(tcp.state(), Some(TcpState::Established));
                tcp.lives_for(7_440);
            }
        }
    }
}

/// A RST that the other side has answered by data did not count, and is forgotten: what its sender's enemies send out of the window
/// does not bring it back.
#[test]
fn what_nobody_awaits_does_not_bring_a_reset_back() {
    for world in World::both() {
        for (sender, other) in [(Client, Backend), (Backend, Client)] {
            let mut tcp = Conversation::established(&world);
            let reset = tcp.segment(sender, RST);
            tcp.forge(sender, &reset);
            tcp.gateway.wait(1);
            let data = tcp.segment(other, ACK).payload([3; 10]);
            tcp.carry(other, &data);
            assert_eq!(tcp.state(), Some(TcpState::Established));
            tcp.gateway.wait(1);
            let mut forged = tcp.segment(sender, ACK).payload([9; 10]);
            forged.sequence = forged.sequence.wrapping_add(1 << 30);
            tcp.forge(sender, &forged);
            assert_eq!(tcp.state(), Some(TcpState::Established));
        }
    }
}

#[test]
fn a_reset_right_behind_data_that_nobody_has_acknowledged_counts() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let mut tcp = Conversation::established(&world);
            let data = tcp.segment(sender, ACK).payload([3; 1000]);
            tcp.carry(sender, &data);
            let reset = tcp.segment(sender, RST);
            tcp.forge(sender, &reset);
            assert_eq!(tcp.state(), Some(TcpState::Reset));
        }
    }
}

#[test]
fn a_reset_within_the_window_is_for_its_receiver_to_challenge() {
    for world in World::both() {
        for sender in [Client, Backend] {
            for off in [1, 2, 1_000, WINDOW_BYTES] {
                let mut tcp = Conversation::established(&world);
                let sides = tcp.sides();
                tcp.gateway.wait(100);
                let reset = rst(&tcp, sender, off);
                tcp.forge(sender, &reset);
                assert_eq!(tcp.state(), Some(TcpState::Established), "{off}");
                assert_eq!(tcp.sides(), sides);
                // It does not make the connection younger, either.
                tcp.lives_for(7_340);
                // The receiver answers with a challenge; the sender, if it has sent that, resets exactly.
                let challenge = tcp.segment(
                    match sender {
                        Client => Backend,
                        Backend => Client,
                    },
                    ACK,
                );
                tcp.forge(
                    match sender {
                        Client => Backend,
                        Backend => Client,
                    },
                    &challenge,
                );
                let exact = tcp
                    .segment(sender, RST)
                    .numbers(challenge.acknowledgement, 0);
                tcp.forge(sender, &exact);
                assert_eq!(tcp.state(), Some(TcpState::Reset));
            }
        }
    }
}

#[test]
fn a_reset_out_of_the_window_is_refused_and_changes_nothing() {
    for world in World::both() {
        for sender in [Client, Backend] {
            for off in [
                WINDOW_BYTES + 1,
                u32::MAX,
                u32::MAX - 100,
                1 << 30,
                1 << 31,
                (1 << 31) + 1,
            ] {
                let mut tcp = Conversation::established(&world);
                tcp.gateway.wait(100);
                let before = tcp.gateway.books();
                for variant in [
                    rst(&tcp, sender, off),
                    rst(&tcp, sender, off).payload(*b"reason"),
                    Draft {
                        acknowledgement: 0,
                        ..tcp
                            .segment(sender, RST_ACK)
                            .numbers(rst(&tcp, sender, off).sequence, 0)
                    },
                    tcp.segment(sender, RST).numbers(0x1234_0000, 0),
                ] {
                    tcp.refuse(sender, &variant);
                }
                assert_eq!(tcp.gateway.books(), before);
                tcp.lives_for(7_340);
                assert_eq!(tcp.gateway.drops(DropReason::RstOutOfWindow), 4);
            }
        }
    }
}

#[test]
fn a_reset_with_sequence_number_zero_is_one_like_any_other() {
    for world in World::both() {
        for flags in [RST, RST_ACK] {
            let mut tcp = Conversation::established(&world);
            let before = tcp.gateway.books();
            let zero = tcp.segment(Backend, flags).numbers(0, 0);
            tcp.refuse(Backend, &zero);
            assert_eq!(tcp.gateway.books(), before);
        }
    }
}

#[test]
fn a_reset_of_a_connection_that_was_picked_up_is_never_refused() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let mut tcp = Conversation::after(&world, &[(Client, ACK), (Backend, ACK)]);
            let sides = tcp.sides();
            for off in [1, 1_000_000, 1 << 31, u32::MAX] {
                let reset = rst(&tcp, sender, off);
                tcp.forge(sender, &reset);
                assert_eq!(tcp.state(), Some(TcpState::Established), "{off}");
                assert_eq!(tcp.sides(), sides);
            }
            let exact = rst(&tcp, sender, 0);
            tcp.forge(sender, &exact);
            assert_eq!(tcp.state(), Some(TcpState::Reset));
        }
    }
}

#[test]
fn a_refusal_must_acknowledge_the_syn() {
    for world in World::both() {
        let mut tcp = Conversation::after(&world, &[(Client, SYN)]);
        let right = tcp.segment(Backend, RST_ACK).numbers(0, 0xffff_ff01);
        for wrong in [0, 0xffff_ff00, 0xffff_ff02, 0x1234] {
            let forged = right.clone().numbers(0, wrong);
            tcp.forge(Backend, &forged);
            assert_eq!(tcp.state(), Some(TcpState::SynSent), "{wrong:#x}");
        }
        tcp.forge(Backend, &right);
        assert_eq!(tcp.state(), Some(TcpState::Refused));
        // Another attempt asks the rules anew.
        tcp.send(Client, SYN);
        assert_eq!(tcp.state(), Some(TcpState::SynSent));
        assert_eq!(tcp.gateway.events(Event::FlowCreated), 2);
    }
}

#[test]
fn a_fin_out_of_the_window_ends_nothing() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let mut tcp = Conversation::established(&world);
            let next = tcp.segment(sender, FIN);
            for off in [200_000_u32, 1 << 30, 1 << 31, 0xff00_0000] {
                let forged = next
                    .clone()
                    .numbers(next.sequence.wrapping_add(off), next.acknowledgement);
                tcp.forge(sender, &forged);
                assert_eq!(tcp.state(), Some(TcpState::Established), "{off}");
            }
        }
    }
}

#[test]
fn forged_data_does_not_make_a_forged_reset_exact() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let other = match sender {
                Client => Backend,
                Backend => Client,
            };
            let mut tcp = Conversation::established(&world);
            let sides = tcp.sides();
            let next = tcp.segment(sender, ACK);
            for off in [3_000_000_u32, 1 << 30, 1 << 31, 0xf000_0000] {
                // By the hot path, and by the slow path a second later.
                for _ in 0..2 {
                    let forged = next
                        .clone()
                        .numbers(
                            next.sequence.wrapping_add(off),
                            next.acknowledgement.wrapping_add(off),
                        )
                        .payload([6; 20]);
                    tcp.forge(sender, &forged);
                    assert_eq!(tcp.sides(), sides, "{off:#x}");
                    tcp.gateway.wait(1);
                }
                let reset = tcp
                    .segment(other, RST)
                    .numbers(next.acknowledgement.wrapping_add(off), 0);
                tcp.refuse(other, &reset);
                assert_eq!(tcp.state(), Some(TcpState::Established));
            }
        }
    }
}

#[test]
fn a_syn_in_a_live_connection_changes_nothing() {
    for world in World::both() {
        for before in [
            HANDSHAKE,
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN),
            ],
        ] {
            let mut tcp = Conversation::after(&world, before);
            let (state, sides) = (tcp.state(), tcp.sides());
            tcp.gateway.wait(100);
            for sequence in [0, 0xffff_ff02, 0x7000_0000] {
                let syn = tcp.segment(Client, SYN).numbers(sequence, 0);
                tcp.forge(Client, &syn);
            }
            assert_eq!((tcp.state(), tcp.sides()), (state, sides));
            tcp.lives_for(7_340);
            assert_eq!(tcp.gateway.events(Event::FlowCreated), 1);
        }
    }
}

#[test]
fn a_backend_that_answers_a_syn_anew_has_lost_the_connection() {
    for world in World::both() {
        let mut tcp = Conversation::established(&world);
        let old = tcp.segment(Backend, SYN_ACK);
        // Its old answer, come again because the third segment was lost, shows nothing.
        let repeated = old.clone().numbers(0x7fff_ffff, old.acknowledgement);
        tcp.forge(Backend, &repeated);
        assert_eq!(tcp.state(), Some(TcpState::Established));

        let syn = tcp.segment(Client, SYN).numbers(0x5000_0000, 0);
        tcp.carry(Client, &syn);
        assert_eq!(tcp.state(), Some(TcpState::Established));
        let answer = tcp
            .segment(Backend, SYN_ACK)
            .numbers(0x6000_0000, 0x5000_0001);
        tcp.carry(Backend, &answer);
        assert_eq!(tcp.state(), Some(TcpState::Reopened));
        tcp.lives_for(240);
        tcp.send(Client, ACK);
        assert_eq!(tcp.state(), Some(TcpState::Established));
        tcp.send(Backend, ACK);
        // The new numbers count, the old ones do not.
        tcp.refuse(Client, &tcp.segment(Client, RST).numbers(0xffff_ff65, 0));
        let exact = tcp.segment(Backend, RST);
        tcp.forge(Backend, &exact);
        assert_eq!(tcp.state(), Some(TcpState::Reset));
        assert_eq!(tcp.gateway.events(Event::FlowCreated), 1);
    }
}

/// An error from the LAN about a segment of the client, and one from the WAN about one of the backend.
fn error_about(tcp: &Conversation, sender: Sender, sequence: u32) -> Vec<u8> {
    let world = tcp.world;
    let segment = tcp.segment(sender, ACK).numbers(sequence, 1);
    let kind = if world.is_v4() { 3 } else { 1 };
    let (client, listen, target) = (
        tcp.client(),
        portfwd_common::model::world::at(world.listen, 80),
        portfwd_common::model::world::at(world.target, 8080),
    );
    let (router, to, quoted) = match sender {
        Client => (world.lan_router, client, segment.between(client, target)),
        Backend => (world.wan_router, listen, segment.between(listen, client)),
    };
    error(
        router,
        to.ip(),
        kind,
        1,
        [0; 4],
        &after_hop(quoted.packet()),
    )
}

#[test]
fn an_error_must_be_about_a_segment_that_is_on_its_way() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let mut tcp = Conversation::established(&world);
            let data = tcp.segment(sender, ACK).payload([3; 1000]);
            tcp.carry(sender, &data);
            let before = tcp.gateway.books();
            for (off, is_on_its_way) in [
                (0_u32, true),
                (500, true),
                (1_000, true),
                (u32::MAX, true),
                (u32::MAX - 1, false),
                (1 << 20, false),
                (1 << 31, false),
                (0xf000_0000, false),
            ] {
                let packet = error_about(&tcp, sender, data.sequence.wrapping_add(off));
                let outcome = match sender {
                    Client => tcp.gateway.lan(&packet),
                    Backend => tcp.gateway.wan(&packet),
                };
                if is_on_its_way {
                    let _ = outcome.departure();
                } else {
                    outcome.dropped(DropReason::ErrorOutOfWindow);
                }
                assert_eq!(tcp.gateway.books(), before, "{off}");
            }
            assert_eq!(tcp.gateway.drops(DropReason::ErrorOutOfWindow), 4);
        }
    }
}

#[test]
fn an_error_about_a_syn_must_quote_its_number() {
    for world in World::both() {
        let mut tcp = Conversation::after(&world, &[(Client, SYN)]);
        for (sequence, is_on_its_way) in [(0xffff_ff00, true), (0xffff_ff01, false), (7, false)] {
            let packet = error_about(&tcp, Client, sequence);
            let outcome = tcp.gateway.lan(&packet);
            if is_on_its_way {
                let _ = outcome.departure();
            } else {
                outcome.dropped(DropReason::ErrorOutOfWindow);
            }
        }
        assert_eq!(tcp.state(), Some(TcpState::SynSent));
    }
}
