//! What is lowered against a scan of the list of rules.

use std::{collections::BTreeMap, net::IpAddr};

use portfwd_common::{
    abi::{Bank, PortSlot, Protocol},
    net::Ipv6,
};
use proptest::prelude::*;

use super::*;
use crate::ruleset::{
    FlowPolicy, RuleMaps, RuleProtocol, RuleWords, Ruleset, adopt::Held, model::Model,
    write::Step as Stage,
};

const MAX_PORTS: u32 = 1 << 20;
const V4: [&str; 3] = ["203.0.113.1", "203.0.113.2", "203.0.113.3"];
const V6: [&str; 3] = ["2001:db8::1", "2001:db8::2", "2001:db8::3"];
const TARGETS: [[&str; 2]; 2] = [["10.0.0.1", "10.0.0.2"], ["fd00::1", "fd00::2"]];

/// Prefixes of both families that may use a rule, and that may not.
const SOURCES: [(&[&str], &[&str]); 4] = [
    (&[], &[]),
    (&["198.51.100.0/24", "2001:db8:1::/48"], &[]),
    (&[], &["192.0.2.0/24", "192.0.2.7", "2001:db8:2::/48"]),
    (&["0.0.0.0/0", "::/0"], &["192.0.2.0/24", "2001:db8:2::/48"]),
];

/// Ports at which something can change: small ones, and those around powers of two and the end.
fn ports() -> impl Iterator<Item = u16> {
    (0..=70)
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
        sources: usize,
    },
    Remove(prop::sample::Index, FlowPolicy),
    /// One change: so many rules go, and these come.
    Swap(Vec<prop::sample::Index>, FlowPolicy, Vec<Step>),
    /// A rule closes if it is open, and opens if it is closed.
    Toggle(prop::sample::Index, FlowPolicy),
    /// A rule lets other sources in.
    Relist(prop::sample::Index, usize),
    Wan {
        v4: usize,
        v6: usize,
    },
}

fn policy() -> impl Strategy<Value = FlowPolicy> {
    prop::sample::select(FlowPolicy::ALL.to_vec())
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let swap = (
        prop::collection::vec(index(), 0..4),
        policy(),
        prop::collection::vec(add(), 0..4),
    );
    prop_oneof![
        8 => add(),
        3 => (index(), policy()).prop_map(|(index, flows)| Step::Remove(index, flows)),
        4 => swap.prop_map(|(out, flows, into)| Step::Swap(out, flows, into)),
        1 => (index(), policy()).prop_map(|(index, flows)| Step::Toggle(index, flows)),
        1 => (index(), 0..SOURCES.len()).prop_map(|(index, sources)| Step::Relist(index, sources)),
        1 => (0..3_usize, 0..3_usize).prop_map(|(v4, v6)| Step::Wan { v4, v6 }),
    ]
}

fn add() -> impl Strategy<Value = Step> {
    let port = || prop_oneof![6 => 1..=12_u16, 2 => 1..=64_u16, 1 => Just(127), 1 => Just(32767), 1 => Just(65531)];
    let length = prop_oneof![4 => Just(0_u16), 3 => 0..20_u16, 1 => 0..=u16::MAX];
    (
        prop_oneof![
            Just("tcp"),
            Just("udp"),
            Just("both"),
            Just("icmp"),
            Just("dmz")
        ],
        any::<bool>(),
        proptest::option::of(0..2_usize),
        port(),
        length,
        0..2_usize,
        port(),
        0..SOURCES.len(),
    )
        .prop_map(
            |(protocol, v6, listen, first, length, target, target_first, sources)| Step::Add {
                protocol,
                v6,
                listen,
                first,
                length,
                target,
                target_first,
                sources,
            },
        )
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
        sources,
    } = step
    else {
        return None;
    };
    let length = (*length).min(u16::MAX - first).min(u16::MAX - target_first);
    let range = |first: u16| {
        if *protocol == "icmp" {
            "echo".to_owned()
        } else if *protocol == "dmz" {
            "rest".to_owned()
        } else if length == 0 {
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
    let mut words = RuleWords::new(protocol, &listen, &target);
    if *protocol == "dmz" {
        words.except = exceptions(*target_first, length);
    }
    // Some with light tracking.
    if first % 3 == 0 && !matches!(*protocol, "icmp" | "dmz") {
        words.track = Some("light".to_owned());
    }
    Some(RuleSpec::parse(&restricted(words, *sources)).unwrap())
}

/// Some exceptions or none.
fn exceptions(first: u16, length: u16) -> Vec<String> {
    let last = first.saturating_add(length % 20);
    match first % 4 {
        0 => Vec::new(),
        1 => vec![format!("tcp/{first}-{last}"), "icmp".to_owned()],
        2 => vec![format!("both/{first}"), format!("udp/{first}-{last}")],
        _ => vec![format!("udp/{last}"), format!("tcp/{first}")],
    }
}

/// The same rule for the sources of [`SOURCES`].
fn restricted(words: RuleWords, sources: usize) -> RuleWords {
    let option = |list: &[&str]| {
        let words = list.iter().map(|prefix| (*prefix).to_owned());
        (!list.is_empty()).then(|| words.collect())
    };
    let (from, not_from) = SOURCES[sources];
    RuleWords {
        from: option(from),
        not_from: option(not_from),
        ..words
    }
}

/// Everything under test, and the list that is scanned.
struct World {
    ruleset: Ruleset,
    lowering: Lowering,
    model: Model,
    wan: Vec<IpAddr>,
    next_id: u32,
    /// Rules that packets do not find.
    closed: BTreeSet<u32>,
}

fn open(id: u32, spec: &RuleSpec) -> Coming<'_> {
    Coming {
        id,
        spec,
        opening: Opening::Open,
    }
}

fn add_one(lowering: &mut Lowering, id: u32, spec: &RuleSpec) -> Result<Writes, Refusal> {
    let change = lowering.change(&[], &[], &[open(id, spec)], &[])?;
    lowering.finish(&change);
    Ok(change.writes)
}

impl World {
    fn new() -> Self {
        let wan = vec![address(V4[0]), address(V6[0])];
        let lowering = Lowering::new(MAX_PORTS, 0, &wan, Lists::default(), |_| false);
        Self {
            ruleset: Ruleset::default(),
            lowering,
            model: Model::new(MAX_PORTS),
            wan,
            next_id: 1,
            closed: BTreeSet::new(),
        }
    }

    /// The writes of a step; `None` if the ruleset refuses it.
    fn lower(&mut self, step: &Step) -> Option<Writes> {
        match step {
            Step::Add { .. } => self.swap(&[], FlowPolicy::Kill, std::slice::from_ref(step)),
            Step::Remove(index, flows) => self.swap(&[*index], *flows, &[]),
            Step::Swap(out, flows, into) => self.swap(out, *flows, into),
            Step::Toggle(index, flows) => {
                let id = self.pick(index)?;
                let opening = if self.closed.remove(&id) {
                    Opening::Open
                } else {
                    self.closed.insert(id);
                    Opening::Closed
                };
                let staying = Staying {
                    id,
                    opening,
                    flows: *flows,
                };
                Some(
                    self.lowering
                        .change(&[], &[staying], &[], &[])
                        .unwrap()
                        .writes,
                )
            }
            Step::Relist(index, sources) => {
                let id = self.pick(index)?;
                let before = self.ruleset.remove(id)?;
                let spec = RuleSpec::parse(&restricted(before.words(), *sources)).unwrap();
                self.ruleset.insert(id, spec.clone());
                let relisted = [Relisted { id, spec: &spec }];
                let change = self.lowering.change(&[], &[], &[], &relisted).unwrap();
                self.lowering.finish(&change);
                Some(change.writes)
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

    fn pick(&self, index: &prop::sample::Index) -> Option<u32> {
        let ids: Vec<_> = self.ruleset.iter().map(|(id, _)| id).collect();
        Some(*index.get(ids.get(..).filter(|ids| !ids.is_empty())?))
    }

    fn swap(
        &mut self,
        out: &[prop::sample::Index],
        flows: FlowPolicy,
        into: &[Step],
    ) -> Option<Writes> {
        let mut out: Vec<_> = out.iter().filter_map(|index| self.pick(index)).collect();
        out.sort_unstable();
        out.dedup();
        let before: Vec<_> = out
            .iter()
            .filter_map(|id| Some((*id, self.ruleset.remove(*id)?)))
            .collect();
        let mut coming = Vec::new();
        for spec in into.iter().filter_map(spec) {
            if self.ruleset.check(&spec, &self.wan).is_ok() {
                self.ruleset.insert(self.next_id, spec.clone());
                coming.push((self.next_id, spec));
                self.next_id += 1;
            }
        }
        if coming.is_empty() && before.is_empty() {
            return None;
        }
        let change = self.change(&out, flows, &coming);
        self.closed.retain(|id| !out.contains(id));
        self.lowering.finish(&change);
        Some(change.writes)
    }

    fn change(&mut self, out: &[u32], flows: FlowPolicy, into: &[(u32, RuleSpec)]) -> Change {
        let going: Vec<_> = out.iter().map(|id| Going { id: *id, flows }).collect();
        let coming: Vec<_> = into.iter().map(|(id, spec)| open(*id, spec)).collect();
        self.lowering.change(&going, &[], &coming, &[]).unwrap()
    }

    fn step(&mut self, step: &Step) {
        if let Some(writes) = self.lower(step) {
            self.model.apply(&writes);
        }
    }

    /// The rule that should get a packet: an address before any address, an exact port before a
    /// range; one for everything else behind all others, unless it leaves the port to the gateway.
    fn scan(&self, to: IpAddr, protocol: Protocol, port: u16) -> Option<u32> {
        let precedence = |spec: &RuleSpec| {
            (
                spec.protocol() != RuleProtocol::Dmz,
                spec.listen().address.is_some(),
                spec.listen().ports.is_exact(),
            )
        };
        let matches = |spec: &RuleSpec| {
            let ports = spec.listen().ports;
            let is_port = (protocol == Protocol::Echo) == (port == 0);
            spec.protocol().protocols().contains(&protocol)
                && (is_port || spec.protocol() != RuleProtocol::Dmz)
                && spec.target().address.is_ipv4() == to.is_ipv4()
                && (ports.first()..=ports.last()).contains(&port)
                && spec
                    .listen()
                    .address
                    .map_or_else(|| self.wan.contains(&to), |address| address == to)
        };
        self.ruleset
            .iter()
            .filter(|(id, spec)| !self.closed.contains(id) && matches(spec))
            .max_by_key(|(_, spec)| precedence(spec))
            .filter(|(_, spec)| !is_excepted(spec, protocol, port))
            .map(|(id, _)| id)
    }

    /// The rule that gets a packet.
    fn winner(&self, to: IpAddr, protocol: Protocol, port: u16) -> Option<u32> {
        self.winner_in(self.model.bank, to, protocol, port)
    }

    /// The rule that gets one that looks at a bank.
    fn winner_in(&self, bank: Bank, to: IpAddr, protocol: Protocol, port: u16) -> Option<u32> {
        let bank = &self.model.banks[bank as usize];
        bank.winner(to, protocol, port, &self.wan)
            .map(|slot| bank.rules[&slot].id)
    }

    /// Every listen endpoint finds the rule that the scan finds, with the right target port and
    /// counter.
    fn check_listens(&self) {
        for to in V4.iter().chain(&V6).map(|text| address(text)) {
            for protocol in Protocol::ALL {
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

    /// Whatever a rule names as its list of sources is in the maps, whole.
    fn check_lists(&self) {
        let rules = Bank::ALL.map(|bank| self.model.rules_in(bank).unwrap());
        for (_, rule) in rules.into_iter().flatten() {
            let Some(spec) = self.ruleset.rule(rule.id) else {
                continue;
            };
            // A rule that is being replaced may name its old list or the new one.
            let is_whole = |sources: usize| {
                let words = restricted(spec.words(), sources);
                let spec = RuleSpec::parse(&words).unwrap();
                let mut entries = spec
                    .sources()
                    .entries(rule.sources, spec.family())
                    .into_iter();
                entries
                    .all(|entry| self.model.sources.get(&entry.prefix).copied() == entry.admission)
            };
            assert!(rule.sources == 0 || (1..SOURCES.len()).any(is_whole));
        }
    }

    /// Every rule names the list that it says, and no other is there.
    fn check_sources(&self) {
        let rules = self.model.rules().unwrap();
        for (_, rule) in &rules {
            let Some(spec) = self.ruleset.rule(rule.id).filter(|_| rule.takes_flows()) else {
                continue;
            };
            for entry in spec.sources().entries(rule.sources, spec.family()) {
                let found = self.model.sources.get(&entry.prefix).copied();
                assert_eq!(found, entry.admission);
            }
            assert_eq!(rule.sources == 0, spec.sources().is_empty());
        }
        // What a closed rule keeps its place with, it keeps its list with.
        let named: BTreeSet<u32> = self
            .lowering
            .rules()
            .map(|(_, rule)| rule.sources)
            .collect();
        for prefix in self.model.sources.keys() {
            assert!(named.contains(&prefix.key.list()), "{prefix:?}");
        }
    }

    /// Every target endpoint finds the only rule that has it; a rule is stateless if replies say
    /// which listen they belong to.
    fn check_targets(&self) {
        let rules: Vec<_> = self.model.rules().unwrap();
        let rules: Vec<_> = rules
            .into_iter()
            .filter(|(_, rule)| rule.is_active())
            .collect();
        for target in TARGETS.iter().flatten().map(|text| address(text)) {
            for protocol in Protocol::ALL {
                for port in ports() {
                    let has = |rule: &abi::Rule| {
                        !rule.is_rest()
                            && rule.target == Ipv6::from(target)
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
                !other.is_rest()
                    && other.target == rule.target
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
            let expected = one_listen && !is_shared && rule.takes_flows() && !rule.is_rest();
            assert_eq!(rule.is_stateless(), expected, "{rule:?}");
            // Its packets go by it alone if they can be of no other rule's flow.
            let in_the_way = |other: &abi::Rule| {
                let at_its_port = other.first <= rule.last && rule.first <= other.last;
                let drains = !other.takes_flows() && (at_its_port || other.target == rule.target);
                element::class(other) == element::class(rule)
                    && (drains || other.is_rest() && other.target == rule.target)
            };
            let is_shaded = rules
                .iter()
                .any(|(other_slot, other)| other_slot != slot && in_the_way(other));
            assert_eq!(
                rule.carries_by_itself(),
                rule.is_light() && expected && !is_shaded,
                "{rule:?}"
            );
        }
        let lights = rules
            .iter()
            .any(|(_, rule)| rule.is_light() && rule.takes_flows());
        assert_eq!(self.model.lighting == Some(Lighting::On), lights);
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
        let is_cleared = |(first, count): &(u32, u32)| {
            let holds =
                |(start, length): &(u32, u32)| start <= first && first + count <= start + length;
            self.model.cleared.iter().any(holds)
        };
        assert!(blocks.iter().all(is_cleared));
        blocks.sort_unstable();
        assert!(
            blocks
                .windows(2)
                .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
        );
    }
}

/// Whether a rule leaves a port to the gateway.
fn is_excepted(spec: &RuleSpec, protocol: Protocol, port: u16) -> bool {
    let blocks = spec.exceptions().iter();
    let mut blocks = blocks.flat_map(|exception| exception.blocks(protocol));
    blocks.any(|block| block.port == port & (u16::MAX << block.bits))
}

/// A rule goes together with one for everything else, or comes with it: its port is at no time the other's.
#[test]
fn rules_come_and_go_together_with_one_for_everything_else() {
    let specs = [
        "both 80 10.0.0.1",
        "dmz rest 10.0.0.2",
        "tcp 203.0.113.1:81 10.0.0.1",
    ]
    .map(|words| RuleSpec::parse(&RuleWords::line(words)).unwrap());
    let mut world = World::new();
    let coming: Vec<_> = (1..).zip(&specs).map(|(id, spec)| open(id, spec)).collect();
    let going: Vec<_> = (1..=3)
        .map(|id| Going {
            id,
            flows: FlowPolicy::Kill,
        })
        .collect();
    for (going, coming) in [(&[][..], &coming[..]), (&going[..], &[][..])] {
        let change = world.lowering.change(going, &[], coming, &[]).unwrap();
        world.lowering.finish(&change);
        for step in change.writes.steps(world.model.bank) {
            world.model.carry_out(step).unwrap();
            // Packets under way look at either bank.
            for bank in Bank::ALL {
                for (port, rule) in [(80, 1), (81, 3), (82, 2)] {
                    let found = world.winner_in(bank, address(V4[0]), Protocol::Tcp, port);
                    assert!(
                        found.is_none_or(|found| found == rule),
                        "{port} has {found:?} after {step:?}"
                    );
                }
            }
        }
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
        model.sources.clone(),
        model.rests.clone().into_iter().collect::<BTreeMap<_, _>>(),
        model.remembering == Some(Remembering::On),
        model.lighting == Some(Lighting::On),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(portfwd_common::model::effort::cases(200)))]

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

    /// In the middle of a change all packets find what held before, and from one step on all find what holds after. One that was
    /// under way at that step finds for itself what held before or what holds after, never a third.
    #[test]
    fn no_packet_sees_half_a_change(steps in prop::collection::vec(step(), 1..20), last in step()) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        let endpoints: Vec<_> = V4.iter().chain(&V6).flat_map(|to| {
            let port_of = move |protocol| ports().map(move |port| (address(to), protocol, port));
            Protocol::ALL.into_iter().flat_map(port_of)
        }).collect();
        let winner = |(to, protocol, port): &(IpAddr, Protocol, u16)| world.winner(*to, *protocol, *port);
        let before: Vec<_> = endpoints.iter().map(winner).collect();
        let wan_before = world.wan.clone();
        let Some(writes) = world.lower(&last) else { return Ok(()) };
        prop_assume!(world.wan == wan_before);
        let scan = |(to, protocol, port): &(IpAddr, Protocol, u16)| world.scan(*to, *protocol, *port);
        let after: Vec<_> = endpoints.iter().map(scan).collect();
        for step in writes.steps(world.model.bank) {
            world.model.carry_out(step).unwrap();
            match step {
                Stage::Once(_) => {}
                Stage::In(bank, _) => {
                    prop_assert_ne!(bank, world.model.bank);
                    // What a packet finds that looks at it still.
                    for (((to, protocol, port), before), after) in endpoints.iter().zip(&before).zip(&after) {
                        let late = world.winner_in(bank, *to, *protocol, *port);
                        prop_assert!(
                            late == *before || late == *after,
                            "{} {:?} {} after {:?}: {:?}, not {:?} or {:?}", to, protocol, port, step, late, before, after
                        );
                    }
                }
                Stage::Turn { .. } => {
                    let now: Vec<_> = endpoints.iter().map(|(to, protocol, port)| world.winner(*to, *protocol, *port)).collect();
                    prop_assert_eq!(&now, &after);
                }
            }
        }
        prop_assert!(world.model.is_settled());
    }

    /// Without rules and flows nothing is left; a change that is undone leaves no trace.
    #[test]
    fn what_is_undone_leaves_no_trace(
        steps in prop::collection::vec(step(), 1..25),
        into in prop::collection::vec(add(), 0..4),
        out in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        flows in policy(),
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        let (before, ports) = (contents(&world.model), world.model.ports.clone());
        let mut out: Vec<_> = out.iter().filter_map(|index| world.pick(index)).collect();
        out.sort_unstable();
        out.dedup();
        // What fits in while those that go are still there fits in without them.
        let mut coming: Vec<(u32, RuleSpec)> = Vec::new();
        for (id, spec) in (90_000..).zip(into.iter().filter_map(spec)) {
            if world.ruleset.check(&spec, &world.wan).is_ok() {
                world.ruleset.insert(id, spec.clone());
                coming.push((id, spec));
            }
        }
        let change = world.change(&out, flows, &coming);
        world.model.apply(&change.writes);
        let undo = world.lowering.undo(&change);
        world.model.apply(&undo);
        coming.iter().for_each(|(id, _)| drop(world.ruleset.remove(*id)));
        prop_assert_eq!(&contents(&world.model), &before);
        prop_assert!(world.model.ports == ports);
        let ids: Vec<_> = world.ruleset.iter().map(|(id, _)| id).collect();
        let change = world.change(&ids, flows, &[]);
        world.lowering.finish(&change);
        world.model.apply(&change.writes);
        prop_assert!(world.model.listens.is_empty());
        prop_assert!(world.model.ports.iter().all(|word| *word == PortSlot::EMPTY));
        // The last flows end.
        let change = world.lowering.release(|_| false);
        world.lowering.finish(&change);
        world.model.apply(&change.writes);
        prop_assert!(world.model.rules().unwrap().is_empty());
        prop_assert!(world.model.targets.is_empty());
        prop_assert!(world.model.sources.is_empty());
        prop_assert_eq!(world.lowering.prefixes, 0);
        prop_assert_eq!(world.lowering.blocks.take(MAX_PORTS), Some(0));
    }

    /// Rules that go while their flows are spared hold them by their slots, and no longer; nobody
    /// else gets a slot meanwhile, nor does a new daemon forget it.
    #[test]
    fn slots_of_spared_flows_stay_until_the_last_is_gone(
        steps in prop::collection::vec(step(), 1..25), in_use in any::<u16>(), restarts in any::<bool>(),
    ) {
        let mut world = World::new();
        let mut spared: BTreeMap<u16, abi::Rule> = BTreeMap::new();
        for step in &steps {
            let before: BTreeMap<_, _> = world.model.rules().unwrap().into_iter().collect();
            world.step(step);
            for (slot, rule) in before {
                let now = world.model.rules[&slot];
                if !rule.takes_flows() || now.takes_flows() {
                    continue;
                }
                let policy = match step {
                    Step::Remove(_, flows) | Step::Swap(_, flows, _) | Step::Toggle(_, flows) => *flows,
                    Step::Add { .. } | Step::Relist(..) | Step::Wan { .. } => FlowPolicy::Kill,
                };
                let spares = policy.spares(rule.protocol()) && !rule.is_light();
                prop_assert_eq!(now.is_active(), spares);
                if now.is_active() {
                    spared.insert(slot, rule);
                }
            }
            spared.retain(|slot, _| !world.model.rules[slot].takes_flows());
            for (slot, rule) in &spared {
                let now = world.model.rules[slot];
                if now.is_active() {
                    prop_assert!(element::is_same(&now, rule) && now.counter_base == rule.counter_base);
                }
            }
        }
        if restarts {
            let held = Held::by(&world.model).unwrap();
            let specs = world.ruleset.iter().map(|(id, spec)| Coming {
                opening: if world.closed.contains(&id) { Opening::Closed } else { Opening::Open },
                ..open(id, spec)
            });
            let cursor = world.lowering.cursor();
            let (lowering, writes) = Lowering::adopt(specs, &held, MAX_PORTS, cursor, &world.wan).unwrap();
            world.lowering = lowering;
            world.model.apply(&writes);
            let but_for_lists = |(slot, rule): (u16, abi::Rule)| (slot, abi::Rule { sources: 0, ..rule });
            let found: Vec<_> = held.rules.into_iter().map(but_for_lists).collect();
            let now: Vec<_> = world.model.rules().unwrap().into_iter().map(but_for_lists).collect();
            prop_assert_eq!(now, found);
            world.check_sources();
        }
        let draining: Vec<_> = world.lowering.draining().collect();
        let change = world.lowering.release(|slot| slot & in_use != 0);
        world.lowering.finish(&change);
        world.model.apply(&change.writes);
        for slot in draining {
            prop_assert_eq!(world.model.rules[&slot].is_active(), slot & in_use != 0);
        }
        world.check_listens();
        world.check_targets();
        world.check_counters();
    }

    /// A rule never names a list that is half there, whatever write comes next.
    #[test]
    fn a_list_of_sources_is_whole_for_as_long_as_a_rule_names_it(
        steps in prop::collection::vec(step(), 1..25),
    ) {
        let mut world = World::new();
        for step in &steps {
            let writes = world.lower(step).unwrap_or_default();
            for step in writes.steps(world.model.bank) {
                world.model.carry_out(step).unwrap();
                world.check_lists();
            }
            world.check_sources();
        }
    }

    /// A new daemon finds maps of another list of rules, some of it the same: those keep their
    /// place, everything else is made right, whatever was left half done.
    #[test]
    fn a_new_daemon_makes_everything_right_and_moves_nothing(
        steps in prop::collection::vec(step(), 1..25),
        later in prop::collection::vec(step(), 0..8),
        interrupted in 0..100_usize,
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        let kept: Vec<_> = world.ruleset.iter().map(|(id, _)| id).collect();
        let stored: Vec<_> = world.ruleset.iter().map(|(id, spec)| (id, spec.clone())).collect();
        // Changes that are in the maps, the last one in part, but not in the state file.
        let closed_before = world.closed.clone();
        let is_of_rules = |step: &&Step| !matches!(step, Step::Wan { .. } | Step::Toggle(..));
        let rules = later.iter().filter(is_of_rules);
        let changes: Vec<Writes> = rules.filter_map(|step| world.lower(step)).collect();
        let mut left = interrupted;
        for writes in changes {
            for step in writes.steps(world.model.bank).take(left) {
                left -= 1;
                world.model.carry_out(step).unwrap();
            }
        }
        world.closed.clone_from(&closed_before);
        let held = Held::by(&world.model).unwrap();
        let closed = world.closed.clone();
        let specs = stored.iter().map(|(id, spec)| Coming {
            opening: if closed.contains(id) { Opening::Closed } else { Opening::Open },
            ..open(*id, spec)
        });
        let cursor = world.lowering.cursor();
        let (lowering, writes) = Lowering::adopt(specs, &held, MAX_PORTS, cursor, &world.wan).unwrap();
        world.lowering = lowering;
        world.model.apply(&writes);
        world.ruleset = Ruleset::default();
        stored.into_iter().for_each(|(id, spec)| world.ruleset.insert(id, spec));
        world.check_listens();
        world.check_targets();
        world.check_counters();
        world.check_sources();
        let stands = |rule: &abi::Rule| kept.contains(&rule.id) && rule.takes_flows();
        for (slot, rule) in held.rules.iter().filter(|(_, rule)| stands(rule)) {
            prop_assert_eq!(world.model.rules[slot].counter_base, rule.counter_base);
            prop_assert_eq!(world.model.rules[slot].id, rule.id);
            let clears = |write: &Write| {
                matches!(write, Write::ClearCounters { first, .. } if *first == rule.counter_base)
            };
            prop_assert!(!writes.ahead.iter().any(clears));
        }
        let all: usize = world.ruleset.iter().map(|(_, spec)| spec.protocol().protocols().len()).sum();
        let retired = world.lowering.retired.len();
        prop_assert_eq!(world.model.rules().unwrap().len(), all + retired);
        // And goes on from there.
        later.iter().for_each(|step| world.step(step));
        world.check_listens();
        world.check_targets();
    }
}

#[test]
fn places_run_out_with_a_reason_and_nothing_is_taken() {
    let any = RuleSpec::parse(&RuleWords::line("both 1-100 10.0.0.1")).unwrap();
    let mut lowering = Lowering::new(150, 0, &[], Lists::default(), |_| false);
    assert_eq!(
        add_one(&mut lowering, 1, &any),
        Err(Refusal::TooManyPorts {
            count: 100,
            capacity: 150
        })
    );
    assert_eq!(lowering.prefixes, 0);
    assert_eq!(lowering.blocks.take(150), Some(0));
    assert_eq!(lowering.rules().count(), 0);

    let mut lowering = Lowering::new(MAX_PORTS, 0, &[], Lists::default(), |slot| slot > 1);
    assert_eq!(
        add_one(&mut lowering, 1, &any),
        Err(Refusal::TooManyRules {
            capacity: MAX_RULES - 1
        })
    );
    let one = RuleSpec::parse(&RuleWords::line("tcp 1-100 10.0.0.1")).unwrap();
    assert!(add_one(&mut lowering, 1, &one).is_ok());
}

/// A rule costs a few writes, however many there are: of 10,000 that share a target, only the first
/// has ever been alone.
#[test]
fn the_cost_of_a_rule_does_not_grow_with_the_list() {
    let mut lowering = Lowering::new(MAX_PORTS, 0, &[], Lists::default(), |_| false);
    for n in 0..10_000_u32 {
        let listen = format!("203.0.{}.{}:{}", n / 250, n % 250 + 1, 1000 + n);
        let spec = RuleSpec::parse(&RuleWords::new("tcp", &listen, "10.0.0.2:80")).unwrap();
        let writes = add_one(&mut lowering, n + 1, &spec).unwrap();
        assert!(writes.rules.len() <= 5, "{n}: {writes:?}");
    }
    let going = Going {
        id: 5_000,
        flows: FlowPolicy::Kill,
    };
    let change = lowering.change(&[going], &[], &[], &[]).unwrap();
    assert!(change.writes.rules.len() <= 5, "{:?}", change.writes);
}

/// Seen by reading: when another rule got the target of a rule with light tracking, what was known of the ways back to its clients
/// stayed good, and answers to who had dialled the new rule left from the port of the old one.
#[test]
fn what_a_rule_knows_by_itself_is_forgotten_when_its_target_has_another() {
    let mut world = World::new();
    let light = RuleWords {
        track: Some("light".to_owned()),
        ..RuleWords::line("udp 203.0.113.1:80 10.0.0.2:80")
    };
    let rules = [light, RuleWords::line("udp 203.0.113.1:8080 10.0.0.2:80")];
    let [light, other] = rules.map(|words| RuleSpec::parse(&words).unwrap());
    let writes = add_one(&mut world.lowering, 1, &light).unwrap();
    assert!(writes.asks_flows, "it takes over");
    let writes = add_one(&mut world.lowering, 2, &other).unwrap();
    let loses = |write: &RuleWrite| matches!(write, RuleWrite::Rule { rule, .. } if rule.is_light() && !rule.carries_by_itself());
    assert!(writes.rules.iter().any(loses), "{writes:?}");
    assert!(writes.asks_flows, "{writes:?}");
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
        sources: 0,
    };
    // The rule without address makes the datapath ask LISTENS.
    for step in [port(Some(0), 7), port(Some(0), 0), port(None, 0)] {
        world.step(&step);
    }
    let to = address(V4[0]);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(2));
    let change = world.change(&[2], FlowPolicy::Kill, &[]);
    world.model.apply(&change.writes);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(1));
    let undo = world.lowering.undo(&change);
    world.model.apply(&undo);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(2));
    // The other way round the exact rule keeps its key.
    let change = world.change(&[1], FlowPolicy::Kill, &[]);
    world.model.apply(&change.writes);
    assert_eq!(world.winner(to, Protocol::Tcp, 1), Some(2));
}
