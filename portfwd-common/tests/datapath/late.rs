//! What targets still send of flows that have ended with their rule: it does not leave with an address of the LAN.

use portfwd_common::{
    abi::Protocol,
    datapath::{DropReason, Event, Hook, PassReason, Route},
    model::{
        frame::{Draft, error},
        rules::{Forward, Source},
        world::{World, at},
    },
};

use crate::gateway::Gateway;

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const PSH_ACK: u8 = 0x18;
const FIN_ACK: u8 = 0x11;

fn https(world: &World) -> Forward {
    Forward::new(Protocol::Tcp, 443, at(world.target, 8443))
}

fn dns(world: &World) -> Forward {
    Forward::new(Protocol::Udp, 53, at(world.target, 53))
}

fn from_client(world: &World, flags: u8) -> Draft {
    Draft::tcp(at(world.client, 7), at(world.listen, 443), flags)
}

fn from_target(world: &World, flags: u8) -> Draft {
    Draft::tcp(at(world.target, 8443), at(world.client, 7), flags)
}

/// A gateway whose only connection is established, and whose rule goes then.
fn abandoned(world: &World, hook: Hook) -> Gateway {
    let mut gateway = Gateway::new(&[https(world)]).by(hook);
    let (client, target) = (from_client(world, SYN), from_target(world, SYN_ACK));
    let _ = gateway.wan(&client.numbers(0, 0).packet()).departure();
    let _ = gateway.lan(&target.numbers(1_000, 1).packet()).departure();
    let _ = gateway
        .wan(&from_client(world, ACK).numbers(1, 1_001).packet())
        .departure();
    gateway.set_rules(&[]);
    gateway
}

#[test]
fn what_a_target_still_sends_after_its_rule_is_gone_does_not_leave() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc] {
            for flags in [PSH_ACK, ACK, FIN_ACK, 0x04] {
                let mut gateway = abandoned(&world, hook);
                // Data sent again and again, for as long as stacks do that, and whatever the client's packets meet in between.
                for seconds in [0, 1, 60, 900] {
                    gateway.wait(seconds);
                    gateway
                        .lan(&from_target(&world, flags).numbers(1_001, 1).packet())
                        .dropped(DropReason::PrivateSource);
                    gateway
                        .wan(&from_client(&world, ACK).numbers(1, 1_001).packet())
                        .passed(PassReason::NoRule);
                }
                assert_eq!((gateway.flows(), gateway.model.flows.late()), (0, 1));
            }
        }
    }
}

/// Whichever packet comes first after the rule has gone.
#[test]
fn the_clients_packet_ends_the_flow_as_well_as_the_targets() {
    for world in World::both() {
        let mut gateway = abandoned(&world, Hook::Tc);
        gateway
            .wan(&from_client(&world, ACK).numbers(1, 1_001).packet())
            .passed(PassReason::NoRule);
        gateway
            .lan(&from_target(&world, PSH_ACK).numbers(1_001, 1).packet())
            .dropped(DropReason::PrivateSource);
    }
}

#[test]
fn a_syn_ack_that_is_sent_again_is_late_and_one_of_another_connection_is_not() {
    for world in World::both() {
        let again = from_target(&world, SYN_ACK).numbers(1_000, 1).packet();
        let mut gateway = Gateway::new(&[https(&world)]);
        let _ = gateway.wan(&from_client(&world, SYN).packet()).departure();
        gateway.set_rules(&[]);
        // The first of all is late, too.
        for seconds in [0, 1, 2, 4] {
            gateway.wait(seconds);
            gateway.lan(&again).dropped(DropReason::PrivateSource);
        }
        gateway.wait(241);
        gateway.lan(&again).passed(PassReason::NoFlow);
        assert_eq!(gateway.model.flows.len(), 0);

        // Also after data, as a server sends it that has had data with the SYN.
        let mut gateway = abandoned(&world, Hook::Tc);
        gateway.set_rules(&[https(&world)]);
        let data = from_target(&world, PSH_ACK).payload(vec![0; 1_000]);
        let _ = gateway.lan(&data.numbers(1_001, 1).packet()).departure();
        gateway.set_rules(&[]);
        gateway.lan(&again).dropped(DropReason::PrivateSource);

        let mut gateway = abandoned(&world, Hook::Tc);
        gateway.lan(&again).dropped(DropReason::PrivateSource);
        let another = from_target(&world, SYN_ACK).numbers(77_000, 1).packet();
        gateway.lan(&another).passed(PassReason::NoFlow);
        // From here on the connection is somebody else's.
        gateway
            .lan(&from_target(&world, PSH_ACK).numbers(77_001, 1).packet())
            .passed(PassReason::NoFlow);
        assert_eq!(gateway.model.flows.len(), 0);
    }
}

/// Seen by a reader: the target's own silence counted, not the flow's.
#[test]
fn a_target_that_was_silent_while_its_client_was_not_is_late_too() {
    for world in World::both() {
        for client_ends in [true, false] {
            let question = Draft::udp(at(world.client, 7), at(world.listen, 53)).packet();
            let answer = Draft::udp(at(world.target, 53), at(world.client, 7)).packet();
            let mut gateway = Gateway::new(&[dns(&world)]);
            for _ in 0..5 {
                let _ = gateway.wan(&question).departure();
                gateway.wait(200);
            }
            gateway.set_rules(&[]);
            if client_ends {
                gateway.wan(&question).passed(PassReason::NoRule);
            }
            for (seconds, is_late) in [(0, true), (100, true), (1, false)] {
                gateway.wait(seconds);
                let outcome = gateway.lan(&answer);
                if is_late {
                    outcome.dropped(DropReason::PrivateSource);
                } else {
                    outcome.passed(PassReason::NoFlow);
                }
            }
        }
    }
}

/// A connection that was over is forgotten as soon as it would have been with its rule.
#[test]
fn what_was_closed_is_late_for_four_minutes() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[https(&world)]);
        let last = from_target(&world, ACK).numbers(1_002, 2).packet();
        for (from_client_side, flags, sequence, acknowledgement) in [
            (true, SYN, 0, 0),
            (false, SYN_ACK, 1_000, 1),
            (true, ACK, 1, 1_001),
            (true, FIN_ACK, 1, 1_001),
            (false, FIN_ACK, 1_001, 2),
            (true, ACK, 2, 1_002),
        ] {
            let _ = if from_client_side {
                let segment = from_client(&world, flags);
                gateway.wan(&segment.numbers(sequence, acknowledgement).packet())
            } else {
                let segment = from_target(&world, flags);
                gateway.lan(&segment.numbers(sequence, acknowledgement).packet())
            }
            .departure();
        }
        gateway.set_rules(&[]);
        gateway.lan(&last).dropped(DropReason::PrivateSource);
        gateway.wait(240);
        gateway.lan(&last).dropped(DropReason::PrivateSource);
        gateway.wait(1);
        gateway.lan(&last).passed(PassReason::NoFlow);
    }
}

/// Seen by a reader: another CPU had taken the original half out, and the other one was taken for an orphan.
#[test]
fn a_half_that_is_alone_because_its_rule_is_gone_is_late() {
    for world in World::both() {
        let mut gateway = abandoned(&world, Hook::Tc);
        gateway.model.flows.retain_marked(|marks| marks & 1 != 0);
        for _ in 0..2 {
            gateway
                .lan(&from_target(&world, PSH_ACK).numbers(1_001, 1).packet())
                .dropped(DropReason::PrivateSource);
        }
    }
}

/// A target that is a client too: the half that is late is in the way of its own flow.
#[test]
fn what_a_late_target_dials_takes_the_place_of_the_half() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Udp, 7, at(world.second_target, 7))
            .on(world.client)
            .from(Source::Masquerade);
        let mut gateway = Gateway::new(&[dns(&world)]);
        let question = Draft::udp(at(world.client, 7), at(world.listen, 53));
        let late = Draft::udp(at(world.target, 53), at(world.client, 7)).packet();
        for _ in 0..2 {
            let _ = gateway.wan(&question.packet()).departure();
            let _ = gateway.lan(&late).departure();
        }
        assert_eq!(gateway.proven(), 1);
        gateway.set_rules(&[rule]);
        for _ in 0..3 {
            let _ = gateway.lan(&late).departure();
        }
        assert_eq!((gateway.flows(), gateway.model.flows.late()), (1, 0));
        assert_eq!(gateway.events(Event::Stateless), 0);
    }
}

#[test]
fn a_flow_is_late_for_as_long_as_it_would_have_lived_in_silence() {
    for world in World::both() {
        let answer = Draft::udp(at(world.target, 53), at(world.client, 7)).packet();
        let mut gateway = Gateway::new(&[dns(&world)]);
        let _ = gateway
            .wan(&Draft::udp(at(world.client, 7), at(world.listen, 53)).packet())
            .departure();
        let _ = gateway.lan(&answer).departure();
        gateway.set_rules(&[]);
        for (seconds, is_late) in [(0, true), (200, true), (100, true), (1, false), (0, false)] {
            gateway.wait(seconds);
            let outcome = gateway.lan(&answer);
            if is_late {
                outcome.dropped(DropReason::PrivateSource);
            } else {
                outcome.passed(PassReason::NoFlow);
            }
        }
        assert_eq!(gateway.model.flows.len(), 0);
    }
}

#[test]
fn a_rule_for_the_same_target_takes_the_flow_on() {
    for world in World::both() {
        let (client, listen) = (at(world.client, 7), at(world.listen, 53));
        let question = Draft::udp(client, listen);
        let answer = Draft::udp(at(world.target, 53), client);
        let translated = answer.between(listen, client).hop().packet();
        for client_is_first in [true, false] {
            let mut gateway = Gateway::new(&[dns(&world)]);
            let _ = gateway.wan(&question.packet()).departure();
            gateway.set_rules(&[]);
            gateway
                .lan(&answer.packet())
                .dropped(DropReason::PrivateSource);
            // Behind another, so that its slot is not the old one.
            gateway.set_rules(&[https(&world), dns(&world)]);
            if client_is_first {
                let _ = gateway.wan(&question.packet()).departure();
            }
            gateway.lan(&answer.packet()).reached_wan(&translated);
            assert_eq!((gateway.flows(), gateway.model.flows.late()), (1, 0));
            let _ = gateway.wan(&question.packet()).departure();
            gateway.lan(&answer.packet()).reached_wan(&translated);
            assert_eq!(gateway.flows(), 1);
        }
    }
}

#[test]
fn nothing_but_the_flows_own_5_tuple_is_late() {
    for world in World::both() {
        let mut gateway = abandoned(&world, Hook::Tc);
        gateway
            .lan(&from_target(&world, PSH_ACK).numbers(1_001, 1).packet())
            .dropped(DropReason::PrivateSource);
        let target = at(world.target, 8443);
        for (source, client) in [
            (target, at(world.client, 8)),
            (target, at(world.second_client, 7)),
            (at(world.target, 8444), at(world.client, 7)),
            (at(world.second_target, 8443), at(world.client, 7)),
        ] {
            gateway
                .lan(&Draft::tcp(source, client, PSH_ACK).packet())
                .passed(PassReason::NoFlow);
        }
        gateway
            .lan(&Draft::udp(target, at(world.client, 7)).packet())
            .passed(PassReason::NoFlow);
    }
}

/// A header that makes no sense, and an error about what the client has sent.
#[test]
fn whatever_it_is_that_is_late_it_does_not_leave() {
    for world in World::both() {
        let mut gateway = abandoned(&world, Hook::Tc);
        let mut nonsense = from_target(&world, PSH_ACK).numbers(1_001, 1).packet();
        let transport = nonsense.len() - 20;
        nonsense[transport + 12] = 0x10;
        gateway.lan(&nonsense).dropped(DropReason::PrivateSource);
        let quoted = from_client(&world, PSH_ACK)
            .between(at(world.client, 7), at(world.target, 8443))
            .packet();
        let (kind, code) = match world.target {
            std::net::IpAddr::V4(_) => (3, 3),
            std::net::IpAddr::V6(_) => (1, 4),
        };
        gateway
            .lan(&error(
                world.target,
                world.client,
                kind,
                code,
                [0; 4],
                &quoted,
            ))
            .dropped(DropReason::PrivateSource);
    }
}

/// What answers to the gateway ends there; there is nothing to keep.
#[test]
fn of_a_flow_that_hid_its_client_nothing_stays() {
    for world in World::both() {
        let rule = dns(&world).from(Source::Masquerade);
        let mut gateway = Gateway::new(&[rule]);
        let question = Draft::udp(at(world.client, 7), at(world.listen, 53)).packet();
        let _ = gateway.wan(&question).departure();
        gateway.set_rules(&[]);
        gateway.wan(&question).passed(PassReason::NoRule);
        assert_eq!(gateway.model.flows.len(), 0);
    }
}

/// There is no route to the client any more: the kernel may tell the target so.
#[test]
fn what_does_not_leave_by_a_wan_interface_passes() {
    for world in World::both() {
        let mut gateway = abandoned(&world, Hook::Tc);
        let late = from_target(&world, PSH_ACK).numbers(1_001, 1).packet();
        gateway.lan(&late).dropped(DropReason::PrivateSource);
        gateway
            .model
            .maps
            .set_route(world.client, world.bits(), Route::Refused);
        gateway.lan(&late).passed(PassReason::NoFlow);
    }
}
