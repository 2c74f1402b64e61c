//! TCP: flags, states, and how long they last.

use std::net::IpAddr;

use portfwd_common::{
    abi::{FlowEntry, FlowKey, Protocol, Rule},
    datapath::{DropReason, Event, Hook, tcp::TcpState},
    model::{
        frame::Draft,
        rules::Forward,
        world::{World, at},
    },
    net::Address,
};

use crate::conversation::{
    ACK, Backend, Client, Conversation, FIN, HANDSHAKE, RST, RST_ACK, SYN, SYN_ACK, Segments,
};

/// Sets of FIN, SYN, RST and ACK that some stack sends, by the bits of the flags byte.
fn is_sent_by_stacks(flags: u8) -> bool {
    [SYN, SYN_ACK, RST, RST_ACK, ACK, FIN].contains(&(flags & 0x17))
}

/// All sets of flags: the byte, and the ninth in front of it.
fn all_flags() -> impl Iterator<Item = (u8, bool)> {
    (0..=u8::MAX).flat_map(|flags| [(flags, false), (flags, true)])
}

#[test]
fn a_first_segment_with_any_flags_is_carried_or_refused() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            for (flags, accurate_ecn) in all_flags() {
                let mut tcp = Conversation::new(&world);
                tcp.gateway.hook = hook;
                let segment = Draft {
                    accurate_ecn,
                    ..tcp.segment(Client, flags)
                };
                if is_sent_by_stacks(flags) {
                    tcp.forge(Client, &segment);
                    // A RST begins nothing.
                    let flows = usize::from(flags & RST == 0);
                    assert_eq!(tcp.gateway.flows(), flows, "{flags:#04x}");
                } else {
                    tcp.pass(Client, &segment).dropped(DropReason::BadTcpFlags);
                    assert_eq!(tcp.gateway.flows(), 0, "{flags:#04x}");
                    assert_eq!(tcp.gateway.drops(DropReason::BadTcpFlags), 1);
                }
            }
        }
    }
}

#[test]
fn a_known_connection_carries_any_flags_either_way() {
    for world in World::both() {
        for sender in [Client, Backend] {
            for (flags, accurate_ecn) in all_flags() {
                let mut tcp = Conversation::established(&world);
                let segment = Draft {
                    accurate_ecn,
                    ..tcp.segment(sender, flags)
                };
                tcp.forge(sender, &segment);
                let begun = if sender == Client && flags & 0x17 == SYN {
                    TcpState::Established
                } else {
                    tcp.state().unwrap()
                };
                assert_eq!(tcp.state(), Some(begun));
                assert_eq!(tcp.gateway.events(Event::FlowCreated), 1);
            }
        }
    }
}

#[test]
fn a_connection_lives_as_long_as_its_state_allows_and_no_longer() {
    let rows: [(&str, &Segments, TcpState, u32); 17] = [
        (
            "a SYN without answer",
            &[(Client, SYN)],
            TcpState::SynSent,
            240,
        ),
        (
            "SYN and SYN-ACK, but no third segment",
            &[(Client, SYN), (Backend, SYN_ACK)],
            TcpState::SynReceived,
            240,
        ),
        ("a handshake", HANDSHAKE, TcpState::Established, 7_440),
        (
            "data both ways",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Backend, ACK),
            ],
            TcpState::Established,
            7_440,
        ),
        (
            "both SYNs on their way at once",
            &[(Client, SYN), (Backend, SYN)],
            TcpState::SynReceived,
            240,
        ),
        (
            "one side done",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN),
            ],
            TcpState::HalfClosed,
            7_440,
        ),
        (
            "one side done, and data of the other",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN),
                (Backend, ACK),
                (Client, ACK),
                (Backend, ACK),
            ],
            TcpState::HalfClosed,
            7_440,
        ),
        (
            "the other side done",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Backend, FIN),
            ],
            TcpState::HalfClosed,
            7_440,
        ),
        (
            "done with the third segment",
            &[(Client, SYN), (Backend, SYN_ACK), (Client, FIN)],
            TcpState::HalfClosed,
            7_440,
        ),
        (
            "both sides done",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN),
                (Backend, FIN),
            ],
            TcpState::Closing,
            240,
        ),
        (
            "both sides done, and the last ACK",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, FIN),
                (Backend, FIN),
                (Client, ACK),
            ],
            TcpState::Closing,
            240,
        ),
        (
            "a connection refused",
            &[(Client, SYN), (Backend, RST_ACK)],
            TcpState::Refused,
            10,
        ),
        (
            "a SYN taken back",
            &[(Client, SYN), (Client, RST)],
            TcpState::Refused,
            10,
        ),
        (
            "a connection reset by the client",
            &[
                (Client, SYN),
                (Backend, SYN_ACK),
                (Client, ACK),
                (Client, RST),
            ],
            TcpState::Reset,
            240,
        ),
        (
            "somebody in the middle of a connection",
            &[(Client, ACK)],
            TcpState::PickedUp,
            240,
        ),
        (
            "a connection picked up in its middle",
            &[(Client, ACK), (Backend, ACK)],
            TcpState::Established,
            7_440,
        ),
        (
            "a connection picked up that the backend does not know",
            &[(Client, ACK), (Backend, RST)],
            TcpState::Refused,
            10,
        ),
    ];
    for world in World::both() {
        for (name, segments, state, lifetime) in rows {
            println!("{name}");
            let mut tcp = Conversation::after(&world, segments);
            assert_eq!(tcp.state(), Some(state));
            tcp.lives_for(lifetime);
        }
    }
}

/// A retransmitted SYN kept a half-open connection for as long as it went on.
#[test]
fn a_syn_that_comes_again_keeps_nothing() {
    for world in World::both() {
        for answered in [false, true] {
            let mut tcp = Conversation::after(&world, &[(Client, SYN)]);
            let mut syn = tcp.segment(Client, SYN);
            syn.sequence = syn.sequence.wrapping_sub(1);
            if answered {
                tcp.send(Backend, SYN_ACK);
            }
            let mut waited = 0;
            for seconds in [1, 2, 4, 8, 16, 32, 64] {
                tcp.gateway.wait(seconds);
                waited += seconds;
                tcp.forge(Client, &syn);
            }
            assert_eq!(tcp.gateway.events(Event::FlowCreated), 1);
            tcp.lives_for(240 - waited);
        }
    }
}

#[test]
fn a_syn_with_another_number_is_another_attempt() {
    for world in World::both() {
        let mut tcp = Conversation::after(&world, &[(Client, SYN)]);
        tcp.gateway.wait(100);
        let again = tcp.segment(Client, SYN).numbers(77, 0);
        tcp.carry(Client, &again);
        assert_eq!(tcp.gateway.events(Event::FlowCreated), 2);
        tcp.send_all(&[(Backend, SYN_ACK), (Client, ACK)]);
        assert_eq!(tcp.state(), Some(TcpState::Established));
    }
}

#[test]
fn data_that_nobody_answers_keeps_nothing() {
    for world in World::both() {
        let mut tcp = Conversation::after(&world, &[(Client, ACK)]);
        for _ in 0..8 {
            tcp.gateway.wait(30);
            let data = tcp.segment(Client, ACK).payload([1; 100]);
            tcp.carry(Client, &data);
        }
        tcp.lives_for(0);
    }
}

#[test]
fn only_the_right_acknowledgements_establish() {
    for world in World::both() {
        for wrong in [-1_i64, 1, 2, 1_000, -70_000, 1 << 31] {
            let off = |number: u32| number.wrapping_add(wrong as u32);
            let mut tcp = Conversation::after(&world, &[(Client, SYN)]);
            let right = tcp.segment(Backend, SYN_ACK);
            let old = right
                .clone()
                .numbers(right.sequence, off(right.acknowledgement));
            tcp.forge(Backend, &old);
            assert_eq!(tcp.state(), Some(TcpState::SynSent), "{wrong}");
            // The client resets what it did not ask for; that must reach the backend, and ends nothing here.
            let reset = tcp.segment(Client, RST).numbers(old.acknowledgement, 0);
            if wrong != -1 || old.acknowledgement != right.acknowledgement {
                tcp.forge(Client, &reset);
            }
            tcp.carry(Backend, &right);
            assert_eq!(tcp.state(), Some(TcpState::SynReceived), "{wrong}");
            let third = tcp.segment(Client, ACK);
            let forged = third
                .clone()
                .numbers(third.sequence, off(third.acknowledgement));
            tcp.forge(Client, &forged);
            assert_eq!(tcp.state(), Some(TcpState::SynReceived), "{wrong}");
            tcp.carry(Client, &third);
            assert_eq!(tcp.state(), Some(TcpState::Established), "{wrong}");
        }
    }
}

#[test]
fn data_in_syn_and_syn_ack_may_be_acknowledged_or_not() {
    for world in World::both() {
        for (client_data, taken) in [(0, 0), (100, 0), (100, 100), (100, 7)] {
            for backend_data in [0, 50] {
                let mut tcp = Conversation::new(&world);
                let syn = tcp.segment(Client, SYN).payload(vec![1; client_data]);
                tcp.carry(Client, &syn);
                let mut answer = tcp.segment(Backend, SYN_ACK).payload(vec![2; backend_data]);
                answer.acknowledgement = syn.sequence.wrapping_add(1 + taken);
                tcp.carry(Backend, &answer);
                assert_eq!(tcp.state(), Some(TcpState::SynReceived));
                let mut third = tcp.segment(Client, ACK);
                third.sequence = answer.acknowledgement;
                tcp.carry(Client, &third);
                assert_eq!(tcp.state(), Some(TcpState::Established));
            }
        }
    }
}

#[test]
fn syns_that_cross_open_a_connection() {
    for world in World::both() {
        let mut tcp = Conversation::new(&world);
        let (client, backend) = (tcp.segment(Client, SYN), tcp.segment(Backend, SYN));
        tcp.carry(Client, &client);
        tcp.carry(Backend, &backend);
        let mut answer = tcp.segment(Client, SYN_ACK);
        answer.sequence = client.sequence;
        tcp.carry(Client, &answer);
        assert_eq!(tcp.state(), Some(TcpState::SynReceived));
        let mut answer = tcp.segment(Backend, SYN_ACK);
        answer.sequence = backend.sequence;
        tcp.carry(Backend, &answer);
        assert_eq!(tcp.state(), Some(TcpState::Established));
        tcp.send_all(&[(Client, ACK), (Backend, ACK)]);
        tcp.lives_for(7_440);
    }
}

#[test]
fn what_is_late_after_both_fins_is_carried_and_ends_nothing_sooner() {
    for world in World::both() {
        let mut tcp = Conversation::established(&world);
        tcp.send(Client, FIN);
        let mut fin = tcp.segment(Client, FIN);
        fin.sequence = fin.sequence.wrapping_sub(1);
        tcp.send(Backend, FIN);
        tcp.gateway.wait(100);
        // The last ACK was lost, and the FIN comes again.
        tcp.forge(Client, &fin);
        tcp.send(Backend, ACK);
        assert_eq!(tcp.state(), Some(TcpState::Closing));
        tcp.lives_for(240);
    }
}

/// Ways in which a connection ends.
const ENDS: [(&str, &Segments); 3] = [
    ("both FINs", &[(Client, FIN), (Backend, FIN)]),
    ("a RST of the client", &[(Client, RST_ACK)]),
    ("a RST of the backend", &[(Backend, RST)]),
];

#[test]
fn a_syn_after_the_end_begins_a_new_connection_with_a_fresh_look_at_the_rules() {
    for world in World::both() {
        for (name, end) in ENDS {
            for hook in [Hook::Xdp, Hook::Tc] {
                println!("{name}, by {hook:?}");
                let mut tcp = Conversation::established(&world);
                tcp.gateway.hook = hook;
                tcp.send_all(end);
                // Within the second in which entries are good without another look.
                tcp.send(Client, SYN);
                assert_eq!(tcp.gateway.events(Event::FlowCreated), 2);
                assert_eq!(tcp.gateway.flows(), 1);
                tcp.send_all(&[(Backend, SYN_ACK), (Client, ACK)]);
                tcp.lives_for(7_440);
                assert_eq!(tcp.gateway.events(Event::FlowCreated), 2);
            }
        }
    }
}

/// The addresses that a half of a flow has to do with.
fn ends_of<A: Address>((key, entry): &(FlowKey<A>, FlowEntry<A>)) -> [IpAddr; 4] {
    let partner = entry.partner(key);
    [key.src, key.dst, partner.src, partner.dst].map(Address::ip)
}

/// The rule was pointed elsewhere while the connection went on, which was spared. Its client uses the port again, within the second
/// in which entries are good without another look: the new connection is the new target's, and nothing is left of the old one.
#[test]
fn a_syn_after_the_end_goes_where_its_rule_leads_by_then() {
    for world in World::both() {
        let (old, new) = (at(world.target, 8080), at(world.second_target, 8080));
        for (name, end) in ENDS {
            for hook in [Hook::Xdp, Hook::Tc] {
                println!("{name}, by {hook:?}");
                let mut tcp = Conversation::established(&world);
                tcp.gateway.hook = hook;
                // As the daemon leaves it: the old slot is closed, the port leads to another.
                let before = *tcp.gateway.model.maps.rules.rules.get(&1).unwrap();
                let rule = |port, target| Forward::new(Protocol::Tcp, port, target);
                tcp.gateway.set_rules(&[rule(81, old), rule(80, new)]);
                let closed = Rule {
                    flags: before.flags | Rule::CLOSED,
                    ..before
                };
                tcp.gateway.model.maps.rules.rules.insert(1, closed);
                tcp.send_all(&[(Client, ACK), (Backend, ACK)]);
                tcp.send_all(end);
                let syn = tcp.segment(Client, SYN);
                tcp.pass(Client, &syn)
                    .reached_lan(&syn.between(syn.source, new).hop().packet());
                assert_eq!(tcp.gateway.model.flows.len(), 2, "the halves of one flow");
                let books = tcp.gateway.books();
                let halves = books.v4.iter().map(ends_of);
                for half in halves.chain(books.v6.iter().map(ends_of)) {
                    assert!(!half.contains(&old.ip()), "{half:?}");
                    assert!(half.contains(&new.ip()), "{half:?}");
                }
                let mut answer = tcp.segment(Backend, SYN_ACK);
                answer.acknowledgement = syn.sequence.wrapping_add(1);
                let answer = answer.between(new, syn.source);
                let leaving = answer.between(syn.destination, syn.source).hop();
                tcp.gateway
                    .lan(&answer.packet())
                    .reached_wan(&leaving.packet());
                assert_eq!(tcp.gateway.events(Event::FlowCreated), 2);
            }
        }
    }
}

#[test]
fn a_backend_that_opens_after_the_end_must_be_answered() {
    for world in World::both() {
        let mut tcp = Conversation::established(&world);
        tcp.send_all(&[(Client, FIN), (Backend, FIN), (Client, ACK)]);
        let late = tcp.segment(Client, ACK);
        let syn = tcp.segment(Backend, SYN).numbers(4_000_000, 0);
        tcp.carry(Backend, &syn);
        assert_eq!(tcp.state(), Some(TcpState::Reopened));
        // What is late of the old connection is still carried, and proves nothing.
        tcp.forge(Client, &late);
        assert_eq!(tcp.state(), Some(TcpState::Reopened));
        tcp.lives_for(240);
        tcp.send(Client, SYN);
        assert_eq!(tcp.state(), Some(TcpState::SynSent));
        tcp.send_all(&[(Backend, SYN_ACK), (Client, ACK)]);
        assert_eq!(tcp.state(), Some(TcpState::Established));
        assert_eq!(tcp.gateway.flows(), 1);
    }
}

#[test]
fn any_data_refreshes_a_connection_whatever_its_numbers() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let mut tcp = Conversation::established(&world);
            let next = tcp.segment(sender, ACK);
            for (name, before, payload) in [
                ("a keep-alive", 1, 0),
                ("a keep-alive with a byte", 1, 1),
                ("a retransmission", 100, 100),
                ("a duplicate acknowledgement", 0, 0),
                ("far ahead", 0_u32.wrapping_sub(1 << 29), 10),
                ("from long ago", 1 << 30, 10),
            ] {
                println!("{name} of {sender:?}");
                tcp.gateway.wait(7_000);
                let segment = next
                    .clone()
                    .numbers(next.sequence.wrapping_sub(before), next.acknowledgement)
                    .payload(vec![9; payload]);
                tcp.forge(sender, &segment);
                assert_eq!(tcp.state(), Some(TcpState::Established));
            }
            tcp.lives_for(7_440);
            assert_eq!(tcp.gateway.events(Event::FlowCreated), 1);
        }
    }
}

#[test]
fn a_reply_from_another_endpoint_is_none_of_the_connection() {
    for world in World::both() {
        let mut tcp = Conversation::established(&world);
        let answer = tcp.segment(Backend, ACK);
        let elsewhere = answer.between(at(world.second_target, 8080), tcp.client());
        let before = tcp.gateway.books();
        let _ = tcp.pass(Backend, &elsewhere);
        assert_eq!(tcp.gateway.books(), before);
        let other_port: Draft = answer.between(at(world.target, 8081), tcp.client());
        let _ = tcp.pass(Backend, &other_port);
        assert_eq!(tcp.gateway.books(), before);
    }
}
