//! What is lowered against a scan of the list of rules.

use std::net::IpAddr;

use portfwd_common::{abi::Protocol, net::Ipv6};
use proptest::prelude::*;

use super::*;
use crate::ruleset::{RuleMaps, RuleWords, Ruleset, model::Model};

const MAX_PORTS: u32 = 1 << 20;
const V4: [&str; 3] = ["203.0.113.1", "203.0.113.2", "203.0.113.3"];
const V6: [&str; 3] = ["2001:db8::1", "2001:db8::2", "2001:db8::3"];
const TARGETS: [[&str; 2]; 2] = [["10.0.0.1", "10.0.0.2"], ["fd00::1", "fd00::2"]];

/// Ports at which something can change: small ones, and those around powers of two and the end.
fn ports() -> impl Iterator<Item = u16> {
    (1..=70)
        .chain(126..=130)
        .chain(32765..=32770)
        .chain(65530..=65535)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A step of a history.
#[derive(Clone, Debug)]
enum Step {
    Add {
        protocol: &'static str,
        v6: bool,
        listen: Option<usize>,
        first: u16,
        length: u16,
        target: usize,
        target_first: u16,
    },
    Remove(prop::sample::Index),
    Wan {
        v4: usize,
        v6: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let port = || prop_oneof![6 => 1..=12_u16, 2 => 1..=64_u16, 1 => Just(127), 1 => Just(32767), 1 => Just(65531)];
    let length = prop_oneof![4 => Just(0_u16), 3 => 0..20_u16, 1 => 0..=u16::MAX];
    let add = (
        prop_oneof![Just("tcp"), Just("udp"), Just("both")],
        any::<bool>(),
        proptest::option::of(0..2_usize),
        port(),
        length,
        0..2_usize,
        port(),
    )
        .prop_map(
            |(protocol, v6, listen, first, length, target, target_first)| Step::Add {
                protocol,
                v6,
                listen,
                first,
                length,
                target,
                target_first,
            },
        );
    prop_oneof![
        8 => add,
        3 => any::<prop::sample::Index>().prop_map(Step::Remove),
        1 => (0..3_usize, 0..3_usize).prop_map(|(v4, v6)| Step::Wan { v4, v6 }),
    ]
}

/// The words of a rule, as long as the ports allow.
fn spec(step: &Step) -> Option<RuleSpec> {
    let Step::Add {
        protocol,
        v6,
        listen,
        first,
        length,
        target,
        target_first,
    } = step
    else {
        return None;
    };
    let length = (*length).min(u16::MAX - first).min(u16::MAX - target_first);
    let range = |first: u16| {
        if length == 0 {
            first.to_string()
        } else {
            format!("{first}-{}", first + length)
        }
    };
    let endpoint = |address: &str, first| {
        if *v6 {
            format!("[{address}]:{}", range(first))
        } else {
            format!("{address}:{}", range(first))
        }
    };
    let addresses = if *v6 { V6 } else { V4 };
    let listen = listen.map_or_else(|| range(*first), |i| endpoint(addresses[i], *first));
    let target = endpoint(TARGETS[usize::from(*v6)][*target], *target_first);
    Some(RuleSpec::parse(&RuleWords::new(protocol, &listen, &target)).unwrap())
}

/// Everything under test, and the list that is scanned.
struct World {
    ruleset: Ruleset,
    lowering: Lowering,
    model: Model,
    wan: Vec<IpAddr>,
    next_id: u32,
}

impl World {
    fn new() -> Self {
        let wan = vec![address(V4[0]), address(V6[0])];
        let lowering = Lowering::new(MAX_PORTS, 0, &wan, |_| false);
        Self {
            ruleset: Ruleset::default(),
            lowering,
            model: Model::new(MAX_PORTS),
            wan,
            next_id: 1,
        }
    }

    /// The writes of a step; `None` if the ruleset refuses it.
    fn lower(&mut self, step: &Step) -> Option<Vec<Write>> {
        match step {
            Step::Add { .. } => {
                let spec = spec(step)?;
                self.ruleset.check(&spec, &self.wan).ok()?;
                let id = self.next_id;
                self.next_id += 1;
                let writes = self.lowering.add(id, &spec).unwrap();
                self.ruleset.insert(id, spec);
                Some(writes)
            }
            Step::Remove(index) => {
                let ids: Vec<_> = self.ruleset.iter().map(|(id, _)| id).collect();
                let id = *index.get(ids.get(..).filter(|ids| !ids.is_empty())?);
                self.ruleset.remove(id);
                let taken = self.lowering.take_out(id);
                self.lowering.finish(&taken);
                Some(taken.writes)
            }
            Step::Wan { v4, v6 } => {
                self.wan = V4
                    .iter()
                    .take(*v4)
                    .chain(V6.iter().take(*v6))
                    .map(|text| address(text))
                    .collect();
                Some(self.lowering.set_wan_addresses(&self.wan))
            }
        }
    }

    fn step(&mut self, step: &Step) {
        if let Some(writes) = self.lower(step) {
            self.model.apply(&writes);
        }
    }

    /// The rule that should get a packet: an address before any address, an exact port before a
    /// range.
    fn scan(&self, to: IpAddr, protocol: Protocol, port: u16) -> Option<u32> {
        let precedence = |spec: &RuleSpec| {
            (
                spec.listen().address.is_some(),
                spec.listen().ports.is_exact(),
            )
        };
        let matches = |spec: &RuleSpec| {
            let ports = spec.listen().ports;
            spec.protocol().protocols().contains(&protocol)
                && spec.target().address.is_ipv4() == to.is_ipv4()
                && (ports.first()..=ports.last()).contains(&port)
                && spec
                    .listen()
                    .address
                    .map_or_else(|| self.wan.contains(&to), |address| address == to)
        };
        self.ruleset
            .iter()
            .filter(|(_, spec)| matches(spec))
            .max_by_key(|(_, spec)| precedence(spec))
            .map(|(id, _)| id)
    }

    fn winner(&self, to: IpAddr, protocol: Protocol, port: u16) -> Option<u32> {
        self.model
            .winner(to, protocol, port, &self.wan)
            .map(|slot| self.model.rules[&slot].id)
    }

    /// Every listen endpoint finds the rule that the scan finds, with the right target port and
    /// counter.
    fn check_listens(&self) {
        for to in V4.iter().chain(&V6).map(|text| address(text)) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for port in ports() {
                    let expected = self.scan(to, protocol, port);
                    assert_eq!(
                        self.winner(to, protocol, port),
                        expected,
                        "{to} {protocol:?} {port}"
                    );
                    let Some(slot) = self.model.winner(to, protocol, port, &self.wan) else {
                        continue;
                    };
                    let (rule, spec) = (
                        self.model.rules[&slot],
                        self.ruleset.rule(expected.unwrap()).unwrap(),
                    );
                    let offset = port - spec.listen().ports.first();
                    assert_eq!(rule.target_port(port), spec.target().ports.first() + offset);
                    assert_eq!(
                        (rule.target, rule.protocol),
                        (spec.target().address.into(), u32::from(protocol.number()))
                    );
                }
            }
        }
    }

    /// Every target endpoint finds the only rule that has it; a rule is stateless if replies say
    /// which listen they belong to.
    fn check_targets(&self) {
        let rules: Vec<_> = self.model.rules().unwrap();
        for target in TARGETS.iter().flatten().map(|text| address(text)) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for port in ports() {
                    let has = |rule: &abi::Rule| {
                        rule.target == Ipv6::from(target)
                            && rule.protocol == u32::from(protocol.number())
                            && rule.listen_port(port).is_some()
                    };
                    let mut having = rules
                        .iter()
                        .filter(|(_, rule)| has(rule))
                        .map(|(slot, _)| *slot);
                    let expected = match (having.next(), having.next()) {
                        (None, _) => None,
                        (Some(slot), None) => Some(slot),
                        (Some(_), Some(_)) => Some(0),
                    };
                    assert_eq!(
                        self.model.target(target, protocol, port),
                        expected,
                        "{target} {protocol:?} {port}"
                    );
                }
            }
        }
        for (slot, rule) in &rules {
            let end = |rule: &abi::Rule| rule.target_port(rule.last);
            let shares = |other: &abi::Rule| {
                other.target == rule.target
                    && other.protocol == rule.protocol
                    && other.target_first <= end(rule)
                    && rule.target_first <= end(other)
            };
            let is_shared = rules
                .iter()
                .any(|(other_slot, other)| other_slot != slot && shares(other));
            let is_v6 = rule.flags & abi::Rule::V6 != 0;
            let one_listen = !rule.is_any_address()
                || self.wan.iter().filter(|own| own.is_ipv6() == is_v6).count() == 1;
            assert_eq!(rule.is_stateless(), one_listen && !is_shared, "{rule:?}");
        }
    }

    /// No two rules count in the same place, and all places were zeroed.
    fn check_counters(&self) {
        let mut blocks: Vec<_> = self
            .model
            .rules()
            .unwrap()
            .into_iter()
            .map(|(_, rule)| (rule.counter_base, element::ports(&rule)))
            .collect();
        assert!(
            blocks
                .iter()
                .all(|block| self.model.cleared.contains(block))
        );
        blocks.sort_unstable();
        assert!(
            blocks
                .windows(2)
                .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
        );
    }
}

/// What is in the maps, without what no longer matters.
fn contents(model: &Model) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        model.rules().unwrap(),
        model
            .listens
            .clone()
            .into_iter()
            .collect::<BTreeMap<_, _>>(),
        model
            .targets
            .clone()
            .into_iter()
            .collect::<BTreeMap<_, _>>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_endpoint_finds_what_a_scan_of_the_list_finds(steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new();
        for (i, step) in steps.iter().enumerate() {
            world.step(step);
            if i % 8 == 7 {
                world.check_listens();
            }
        }
        world.check_listens();
        world.check_targets();
        world.check_counters();
    }

    /// In the middle of a change a packet finds what held before or what holds after, never a
    /// third.
    #[test]
    fn no_packet_sees_half_a_change(steps in prop::collection::vec(step(), 1..20), last in step()) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        let endpoints: Vec<_> = V4.iter().chain(&V6).flat_map(|to| {
            let port_of = move |protocol| ports().map(move |port| (address(to), protocol, port));
            [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(port_of)
        }).collect();
        let winner = |(to, protocol, port): &(IpAddr, Protocol, u16)| world.winner(*to, *protocol, *port);
        let before: Vec<_> = endpoints.iter().map(winner).collect();
        let wan_before = world.wan.clone();
        let Some(writes) = world.lower(&last) else { return Ok(()) };
        prop_assume!(world.wan == wan_before);
        let scan = |(to, protocol, port): &(IpAddr, Protocol, u16)| world.scan(*to, *protocol, *port);
        let after: Vec<_> = endpoints.iter().map(scan).collect();
        for write in &writes {
            world.model.write(write).unwrap();
            for ((endpoint, before), after) in endpoints.iter().zip(&before).zip(&after) {
                let now = world.winner(endpoint.0, endpoint.1, endpoint.2);
                prop_assert!(
                    now == *before || now == *after,
                    "{:?} after {:?}: {:?}, not {:?} or {:?}", endpoint, write, now, before, after
                );
            }
        }
    }

    /// Without rules nothing is left; a change that is undone leaves no trace.
    #[test]
    fn what_is_undone_leaves_no_trace(steps in prop::collection::vec(step(), 1..25), last in step()) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        let (before, ports) = (contents(&world.model), world.model.ports.clone());
        if let Some(spec) = spec(&last).filter(|spec| world.ruleset.check(spec, &world.wan).is_ok()) {
            let writes = world.lowering.add(9_999, &spec).unwrap();
            world.model.apply(&writes);
            let undo = world.lowering.undo_add(9_999);
            world.model.apply(&undo);
            prop_assert_eq!(&contents(&world.model), &before);
            prop_assert!(world.model.ports == ports);
        }
        let ids: Vec<_> = world.ruleset.iter().map(|(id, _)| id).collect();
        for id in &ids {
            let taken = world.lowering.take_out(*id);
            world.model.apply(&taken.writes);
            let undo = world.lowering.put_back(&taken);
            world.model.apply(&undo);
        }
        prop_assert_eq!(&contents(&world.model), &before);
        prop_assert!(world.model.ports == ports);
        ids.iter().for_each(|id| {
            let taken = world.lowering.take_out(*id);
            world.lowering.finish(&taken);
            world.model.apply(&taken.writes);
        });
        prop_assert!(world.model.rules().unwrap().is_empty());
        prop_assert!(world.model.listens.is_empty() && world.model.targets.is_empty());
        prop_assert!(world.model.ports.iter().all(|word| *word == PortSlot::EMPTY));
        prop_assert_eq!(world.lowering.prefixes, 0);
        prop_assert_eq!(world.lowering.blocks.take(MAX_PORTS), Some(0));
    }

    /// A new daemon finds maps of another list of rules, some of it the same: those keep their
    /// place, everything else is made right, whatever was left half done.
    #[test]
    fn a_new_daemon_makes_everything_right_and_moves_nothing(
        steps in prop::collection::vec(step(), 1..25),
        later in prop::collection::vec(step(), 0..8),
        interrupted in 0..60_usize,
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        let kept: Vec<_> = world.ruleset.iter().map(|(id, _)| id).collect();
        let stored: Vec<_> = world.ruleset.iter().map(|(id, spec)| (id, spec.clone())).collect();
        // Changes that are in the maps, the last one in part, but not in the state file.
        let rules = later.iter().filter(|step| !matches!(step, Step::Wan { .. }));
        let mut left: Vec<Write> = rules.filter_map(|step| world.lower(step)).flatten().collect();
        left.truncate(interrupted);
        world.model.apply(&left);
        let kernel = world.model.rules().unwrap();
        let specs = stored.iter().map(|(id, spec)| (*id, spec));
        let cursor = world.lowering.cursor();
        let (lowering, writes) =
            Lowering::adopt(specs, &kernel, MAX_PORTS, cursor, &world.wan).unwrap();
        world.lowering = lowering;
        world.model.apply(&writes);
        world.ruleset = Ruleset::default();
        stored.into_iter().for_each(|(id, spec)| world.ruleset.insert(id, spec));
        world.check_listens();
        world.check_targets();
        world.check_counters();
        for (slot, rule) in kernel.iter().filter(|(_, rule)| kept.contains(&rule.id)) {
            prop_assert_eq!(world.model.rules[slot].counter_base, rule.counter_base);
            prop_assert_eq!(world.model.rules[slot].id, rule.id);
            let clears = |write: &Write| {
                matches!(write, Write::ClearCounters { first, .. } if *first == rule.counter_base)
            };
            prop_assert!(!writes.iter().any(clears));
        }
        let all: usize = world.ruleset.iter().map(|(_, spec)| spec.protocol().protocols().len()).sum();
        prop_assert_eq!(world.model.rules().unwrap().len(), all);
        // And goes on from there.
        later.iter().for_each(|step| world.step(step));
        world.check_listens();
        world.check_targets();
    }
}

#[test]
fn places_run_out_with_a_reason_and_nothing_is_taken() {
    let any = RuleSpec::parse(&RuleWords::line("both 1-100 10.0.0.1")).unwrap();
    let mut lowering = Lowering::new(150, 0, &[], |_| false);
    assert_eq!(
        lowering.add(1, &any),
        Err(Refusal::TooManyPorts {
            count: 100,
            capacity: 150
        })
    );
    assert_eq!(lowering.prefixes, 0);
    assert_eq!(lowering.blocks.take(150), Some(0));
    assert_eq!(lowering.rules().count(), 0);

    let mut lowering = Lowering::new(MAX_PORTS, 0, &[], |slot| slot > 1);
    assert_eq!(
        lowering.add(1, &any),
        Err(Refusal::TooManyRules {
            capacity: MAX_RULES - 1
        })
    );
    let one = RuleSpec::parse(&RuleWords::line("tcp 1-100 10.0.0.1")).unwrap();
    assert!(lowering.add(1, &one).is_ok());
}

/// A rule costs a few writes, however many there are: of 10,000 that share a target, only the first
/// has ever been alone.
#[test]
fn the_cost_of_a_rule_does_not_grow_with_the_list() {
    let mut lowering = Lowering::new(MAX_PORTS, 0, &[], |_| false);
    for n in 0..10_000_u32 {
        let listen = format!("203.0.{}.{}:{}", n / 250, n % 250 + 1, 1000 + n);
        let spec = RuleSpec::parse(&RuleWords::new("tcp", &listen, "10.0.0.2:80")).unwrap();
        let writes = lowering.add(n + 1, &spec).unwrap();
        assert!(writes.len() <= 6, "{n}: {writes:?}");
    }
    let taken = lowering.take_out(5_000);
    assert!(taken.writes.len() <= 6, "{:?}", taken.writes);
}

/// A range's block of a single port has the key of an exact rule, which gives it back.
#[test]
fn a_range_gets_its_single_port_back() {
    let mut world = World::new();
    let port = |address: Option<usize>, length| Step::Add {
        protocol: "tcp",
        v6: false,
        listen: address,
        first: 1,
        length,
        target: 0,
        target_first: 1,
    };
    // The rule without address makes the datapath ask LISTENS.
    for step in [port(Some(0), 7), port(Some(0), 0), port(None, 0)] {
        world.step(&step);
    }
    let to = address(V4[0]);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(2));
    let taken = world.lowering.take_out(2);
    world.model.apply(&taken.writes);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(1));
    let undo = world.lowering.put_back(&taken);
    world.model.apply(&undo);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(2));
    // The other way round the exact rule keeps its key.
    let taken = world.lowering.take_out(1);
    world.model.apply(&taken.writes);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(2));
}
