//! Which rule a packet meets.

use std::net::IpAddr;

use portfwd_common::model::effort::cases;
use portfwd_common::{
    abi::{Limits, Protocol},
    datapath::{DropReason, Event, PassReason, Verdict},
    model::{
        frame::Draft,
        rules::{Forward, Source},
    },
};
use proptest::prelude::*;

use crate::gateway::{Gateway, Outcome};
use portfwd_common::model::world::{World, at};

fn syn(world: &World, listen: IpAddr, port: u16) -> Draft {
    Draft::tcp(at(world.client, 40_000), at(listen, port), 0x02)
}

/// Where a SYN to a listen endpoint was sent, `None` if no rule took it.
fn target_of(outcome: &Outcome) -> Option<(IpAddr, u16)> {
    if outcome.verdict == Verdict::Pass(PassReason::NoRule) {
        assert_eq!(outcome.before, outcome.after);
        return None;
    }
    let _ = outcome.departure();
    let sliced = etherparse::SlicedPacket::from_ethernet(&outcome.after).unwrap();
    let address = match sliced.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => IpAddr::V4(ip.header().destination_addr()),
        etherparse::NetSlice::Ipv6(ip) => IpAddr::V6(ip.header().destination_addr()),
        etherparse::NetSlice::Arp(_) => panic!("ARP"),
    };
    let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else {
        panic!("{:?} is no TCP", sliced.transport);
    };
    Some((address, tcp.destination_port()))
}

#[test]
fn an_address_goes_before_any_and_an_exact_port_before_a_range() {
    for world in World::both() {
        let tcp = |port, target| Forward::new(Protocol::Tcp, port, target);
        let rules = [
            tcp(1, at(world.target, 1)).to(65_535),
            tcp(80, at(world.target, 1080)),
            tcp(70, at(world.second_target, 2070))
                .to(89)
                .on(world.listen),
            tcp(80, at(world.second_target, 3080)).on(world.listen),
            tcp(90, at(world.second_target, 90)).on(world.listen),
        ];
        let rows = [
            (
                "an exact port of an address",
                world.listen,
                80,
                (world.second_target, 3080),
            ),
            (
                "a range of an address before an exact port of any",
                world.listen,
                81,
                (world.second_target, 2081),
            ),
            (
                "the other address has its own exact port",
                world.second_listen,
                80,
                (world.target, 1080),
            ),
            (
                "and else the range of any",
                world.second_listen,
                81,
                (world.target, 81),
            ),
            ("the first port of all", world.listen, 1, (world.target, 1)),
            (
                "the last port of all",
                world.second_listen,
                65_535,
                (world.target, 65_535),
            ),
            (
                "below a range of an address",
                world.listen,
                69,
                (world.target, 69),
            ),
            (
                "the first of a range of an address",
                world.listen,
                70,
                (world.second_target, 2070),
            ),
            (
                "the last of a range of an address",
                world.listen,
                89,
                (world.second_target, 2089),
            ),
            (
                "next to a range of an address",
                world.listen,
                90,
                (world.second_target, 90),
            ),
            (
                "past a range of an address",
                world.listen,
                91,
                (world.target, 91),
            ),
        ];
        // The order in which rules were added is of no meaning.
        for rotation in 0..rules.len() {
            let mut rotated = rules;
            rotated.rotate_left(rotation);
            let mut gateway = Gateway::new(&rotated);
            for (name, listen, port, target) in rows {
                let outcome = gateway.wan(&syn(&world, listen, port).packet());
                assert_eq!(target_of(&outcome), Some(target), "{name}");
            }
        }
    }
}

/// All ports through the whole pipeline, for rules that begin or end at every kind of edge.
#[test]
fn every_port_of_every_range_is_translated_one_to_one_and_no_other() {
    for world in World::both() {
        for (first, last, target_first) in [
            (1, 65_535, 1),
            (1000, 1999, 2000),
            (1, 32_768, 32_768),
            (60_000, 65_535, 1),
            (65_535, 65_535, 1),
            (1, 1, 65_535),
        ] {
            let rule = Forward::new(Protocol::Tcp, first, at(world.target, target_first)).to(last);
            let mut gateway = Gateway::with_room(&[rule], 1 << 16);
            for port in 0..=u16::MAX {
                let outcome = gateway.wan(&syn(&world, world.listen, port).packet());
                let expected = (first..=last)
                    .contains(&port)
                    .then(|| (world.target, target_first + (port - first)));
                assert_eq!(
                    target_of(&outcome),
                    expected,
                    "{first}-{last} to {target_first}: port {port}"
                );
            }
            let ports = usize::from(last - first) + 1;
            assert_eq!(gateway.flows(), ports);
            assert_eq!(gateway.model.maps.counters().len(), ports);
            assert!(
                gateway
                    .model
                    .maps
                    .counters()
                    .values()
                    .all(|counted| counted.to_target.packets == 1)
            );
        }
    }
}

/// The rule that takes a port, by looking at all of them.
fn winner(rules: &[Forward], listen: IpAddr, port: u16) -> Option<&Forward> {
    let covering = rules.iter().filter(|rule| {
        rule.protocol == Protocol::Tcp
            && rule.first <= port
            && port <= rule.last
            && rule.target.is_ipv4() == listen.is_ipv4()
            && rule.listen.is_none_or(|address| address == listen)
    });
    covering.max_by_key(|rule| (rule.listen.is_some(), rule.first == rule.last))
}

prop_compose! {
    fn any_rule()(
        v6 in any::<bool>(),
        protocol in prop::sample::select(vec![Protocol::Tcp, Protocol::Udp]),
        listen in 0..3_usize,
        first in 1..40_u16,
        length in prop::sample::select(vec![0_u16, 0, 3, 9, 20]),
        target_first in 1..60_000_u16,
        second in any::<bool>(),
    ) -> Forward {
        let world = World::both()[usize::from(v6)];
        let target = if second { world.second_target } else { world.target };
        Forward {
            protocol,
            listen: [None, Some(world.listen), Some(world.second_listen)][listen],
            first,
            last: first + length,
            target,
            target_first,
            source: Source::Client,
            keeps_mss: false,
            limits: Limits::NONE,
            is_rest: false,
            is_light: false,
        }
    }
}

/// Rules that the daemon would take: no two of equal precedence share a port.
fn without_conflicts(rules: Vec<Forward>) -> Vec<Forward> {
    let mut taken: Vec<Forward> = Vec::new();
    for rule in rules {
        let conflicts = |other: &Forward| {
            other.protocol == rule.protocol
                && other.target.is_ipv4() == rule.target.is_ipv4()
                && other.listen == rule.listen
                && (other.first == other.last) == (rule.first == rule.last)
                && other.first <= rule.last
                && rule.first <= other.last
        };
        if !taken.iter().any(conflicts) {
            taken.push(rule);
        }
    }
    taken
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(300)))]
    #[test]
    fn any_set_of_rules_is_met_as_by_looking_at_all_of_them(rules in prop::collection::vec(any_rule(), 1..12)) {
        let rules = without_conflicts(rules);
        let mut gateway = Gateway::with_room(&rules, 1 << 12);
        for world in World::both() {
            for listen in [world.listen, world.second_listen, world.lan_address] {
                for port in 0..64 {
                    // A client of its own, so that no two rules clash over one target.
                    let client = at(world.client, 1 + port + if listen == world.listen { 1000 } else { 2000 });
                    let draft = syn(&world, listen, port).between(client, at(listen, port));
                    let outcome = gateway.wan(&draft.packet());
                    let is_own = listen != world.lan_address;
                    let expected = winner(&rules, listen, port)
                        .filter(|_| is_own)
                        .map(|rule| (rule.target, rule.target_first + (port - rule.first)));
                    prop_assert_eq!(target_of(&outcome), expected, "{} port {}", listen, port);
                }
            }
        }
    }
}

fn dns(target: IpAddr) -> Forward {
    Forward::new(Protocol::Udp, 53, at(target, 53))
}

#[test]
fn a_rule_that_goes_takes_its_flows_with_it() {
    for world in World::both() {
        let other = Forward::new(Protocol::Udp, 99, at(world.target, 99));
        let mut gateway = Gateway::new(&[other, dns(world.target)]);
        let question = Draft::udp(at(world.client, 5), at(world.listen, 53));
        let answer = Draft::udp(at(world.target, 53), at(world.client, 5));
        for from_client in [true, false] {
            gateway.set_rules(&[other, dns(world.target)]);
            let _ = gateway.wan(&question.packet()).departure();
            let kept = Draft::udp(at(world.client, 5), at(world.listen, 99));
            let _ = gateway.wan(&kept.packet()).departure();
            assert_eq!(gateway.flows(), 2);
            gateway.set_rules(&[other]);
            if from_client {
                gateway.wan(&question.packet()).passed(PassReason::NoRule);
            } else {
                gateway
                    .lan(&answer.packet())
                    .dropped(DropReason::PrivateSource);
            }
            assert_eq!(gateway.flows(), 1);
            // The flow of the other rule is the same as before.
            let created = gateway.events(Event::FlowCreated);
            let _ = gateway.wan(&kept.packet()).departure();
            assert_eq!(gateway.events(Event::FlowCreated), created);
        }
    }
}

#[test]
fn a_rule_that_changes_is_followed_with_the_next_packet() {
    for world in World::both() {
        let rows = [
            (
                "another target",
                Forward::new(Protocol::Udp, 53, at(world.second_target, 53)),
                (world.second_target, 53),
            ),
            (
                "another target port",
                Forward::new(Protocol::Udp, 53, at(world.target, 54)),
                (world.target, 54),
            ),
            (
                "a range that moves the port",
                Forward::new(Protocol::Udp, 50, at(world.target, 1000)).to(59),
                (world.target, 1003),
            ),
        ];
        for (name, changed, (target, port)) in rows {
            println!("{name}");
            let mut gateway = Gateway::new(&[dns(world.target)]);
            let question = Draft::udp(at(world.client, 5), at(world.listen, 53));
            let _ = gateway.wan(&question.packet()).departure();
            gateway.set_rules(&[changed]);
            gateway.wan(&question.packet()).reached_lan(
                &question
                    .between(question.source, at(target, port))
                    .hop()
                    .packet(),
            );
            assert_eq!(gateway.events(Event::FlowCreated), 2);
            assert_eq!(gateway.flows(), 1);
            let late = Draft::udp(at(world.target, 53), at(world.client, 5));
            gateway
                .lan(&late.packet())
                .dropped(DropReason::PrivateSource);
        }
    }
}

#[test]
fn a_rule_slot_that_another_rule_takes_ends_the_old_flows() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[dns(world.target)]);
        let question = Draft::udp(at(world.client, 5), at(world.listen, 53));
        let _ = gateway.wan(&question.packet()).departure();
        gateway.set_rules(&[Forward::new(Protocol::Udp, 99, at(world.target, 53))]);
        let answer = Draft::udp(at(world.target, 53), at(world.client, 5));
        // What the backend sends is the new rule's.
        let sent = answer.between(at(world.listen, 99), at(world.client, 5));
        gateway
            .lan(&answer.packet())
            .reached_wan(&sent.hop().packet());
        assert_eq!(gateway.flows(), 1);
        gateway.wan(&question.packet()).passed(PassReason::NoRule);
    }
}

#[test]
fn the_counters_of_a_rule_that_moved_are_not_mixed_up() {
    let world = World::v4();
    let mut gateway = Gateway::new(&[dns(world.target)]);
    let question = Draft::udp(at(world.client, 5), at(world.listen, 53));
    let _ = gateway.wan(&question.packet()).departure();
    // The same rule in another slot, with other counters.
    gateway.set_rules(&[
        Forward::new(Protocol::Udp, 99, at(world.target, 99)).to(108),
        dns(world.target),
    ]);
    let _ = gateway.wan(&question.packet()).departure();
    let counters = gateway.model.maps.counters();
    assert_eq!(counters[&0].to_target.packets, 1);
    assert_eq!(counters[&10].to_target.packets, 1);
}

#[test]
fn an_address_that_goes_takes_the_flows_to_it_with_it() {
    for world in World::both() {
        let mut gateway = Gateway::new(&[dns(world.target)]);
        let to = |listen| Draft::udp(at(world.client, 5), at(listen, 53)).packet();
        let mut other_client = Draft::udp(at(world.second_client, 5), at(world.second_listen, 53));
        let _ = gateway.wan(&to(world.listen)).departure();
        let _ = gateway.wan(&other_client.packet()).departure();
        gateway.model.maps.remove_address(world.listen);
        gateway.bump_generation();
        gateway.wan(&to(world.listen)).passed(PassReason::NoRule);
        other_client.payload = b"still here".to_vec();
        let _ = gateway.wan(&other_client.packet()).departure();
        assert_eq!(gateway.flows(), 1);
        assert_eq!(gateway.events(Event::FlowCreated), 2);
    }
}
