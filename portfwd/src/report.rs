//! Answers to the nouns (`rules`, `flows`, `counters`, `status`), from the rules and the kernel's
//! tables. The daemon and, when none runs, the command line itself give the same.

use std::collections::{BTreeMap, HashMap, HashSet};

use portfwd_common::{
    abi::{self, PortCounters},
    datapath::verdict::{DropReason, Event, PassReason},
};

use crate::{
    bpf::{Flow, Tables},
    control::protocol::{
        CountersReport, DaemonReport, FlowReport, HostReport, InterfaceReport, LimitsReport,
        PortReport, RuleReport, StatusReport, TableReport, Traffic, directions,
    },
    failure::Result,
    instance::Instance,
    ruleset::{RuleProtocol, RuleSpec},
};

/// Counters are read in runs of about this many elements.
const RUN: u32 = 1 << 16;

/// The rules, and where the kernel has them.
#[derive(Debug)]
pub struct View<'a> {
    rules: BTreeMap<u32, &'a RuleSpec>,
    /// What the rules have, by first counter.
    placed: Vec<(u16, abi::Rule)>,
    /// Rule ids by slot, also of rules that are gone or say something else while flows go on.
    ids: HashMap<u16, u32>,
}

impl<'a> View<'a> {
    /// Of rules by id and the elements of RULES by slot.
    pub fn new(
        rules: impl Iterator<Item = (u32, &'a RuleSpec)>,
        placed: impl Iterator<Item = (u16, abi::Rule)>,
    ) -> Self {
        let rules: BTreeMap<_, _> = rules.collect();
        let placed: Vec<_> = placed.collect();
        let ids = placed.iter().map(|(slot, rule)| (*slot, rule.id)).collect();
        let is_of_rule = |(_, element): &(u16, abi::Rule)| {
            let spec = rules.get(&element.id);
            spec.is_some_and(|spec| spec.is_at(element))
        };
        let mut placed: Vec<_> = placed.into_iter().filter(is_of_rule).collect();
        placed.sort_by_key(|(_, rule)| rule.counter_base);
        Self { rules, placed, ids }
    }

    /// Visits every rule's block of counters. Blocks that lie together are read together.
    fn for_each_block(
        &self,
        read: impl Fn(u32, u32) -> anyhow::Result<Vec<PortCounters>>,
        mut visit: impl FnMut(&abi::Rule, &[PortCounters]),
    ) -> Result<()> {
        let mut rest = self.placed.as_slice();
        while let Some((_, head)) = rest.first() {
            let (first, mut end, mut blocks) = (head.counter_base, head.counter_base, 0);
            for (_, rule) in rest {
                if rule.counter_base != end || (end > first && end - first + ports(rule) > RUN) {
                    break;
                }
                end += ports(rule);
                blocks += 1;
            }
            let counters = read(first, end - first)?;
            let (run, after) = rest.split_at(blocks);
            for (_, rule) in run {
                let from = (rule.counter_base - first) as usize;
                visit(
                    rule,
                    counters
                        .get(from..from + ports(rule) as usize)
                        .unwrap_or_default(),
                );
            }
            rest = after;
        }
        Ok(())
    }
}

fn ports(rule: &abi::Rule) -> u32 {
    rule.counters()
}

/// Answer to `rules`. Without tables, as after a reboot, nothing was counted.
pub fn rules(view: &View<'_>, tables: Option<&Tables>) -> Result<Vec<RuleReport>> {
    let mut totals: HashMap<u32, (Traffic, Traffic)> = HashMap::new();
    view.for_each_block(
        |first, count| tables.map_or(Ok(Vec::new()), |tables| tables.counters(first, count)),
        |rule, counters| {
            let total = totals.entry(rule.id).or_default();
            for (to_target, to_client) in counters.iter().copied().map(directions) {
                total.0.add(to_target);
                total.1.add(to_client);
            }
        },
    )?;
    let takes_flows = view.placed.iter().filter(|(_, rule)| rule.takes_flows());
    let open: HashSet<u32> = takes_flows.map(|(_, rule)| rule.id).collect();
    let own: HashSet<u16> = view.placed.iter().map(|(slot, _)| *slot).collect();
    let mut flows: HashMap<u32, (u64, u64)> = HashMap::new();
    for flow in live_flows(tables)? {
        if let Some(id) = view.ids.get(&flow.rule) {
            let (count, draining) = flows.entry(*id).or_default();
            if own.contains(&flow.rule) {
                *count += 1;
            } else {
                *draining += 1;
            }
        }
    }
    let usages = tables.map_or(Ok(HashMap::new()), Tables::rule_usages)?;
    let report = |(id, spec): (&u32, &&RuleSpec)| {
        let (to_target, to_client) = totals.get(id).copied().unwrap_or_default();
        let (flows, draining) = flows.get(id).copied().unwrap_or_default();
        RuleReport {
            id: *id,
            name: spec.name().map(str::to_owned),
            proto: spec.protocol(),
            listen: spec.listen().to_string(),
            target: spec.target().to_string(),
            host: spec.host().map(|host| HostReport {
                name: host.to_string(),
                error: None,
            }),
            source: spec.source().words(),
            mss_clamp: !spec.keeps_mss(),
            track: spec.track().word().to_owned(),
            flows,
            draining,
            enabled: spec.is_enabled(),
            open: open.contains(id),
            comment: spec.comment().map(str::to_owned),
            tags: spec.tags().to_vec(),
            expires: spec.expires().map(|expires| expires.to_string()),
            schedule: spec.schedule().map(ToString::to_string),
            to_target,
            to_client,
            from: spec.sources().from(),
            not_from: spec.sources().not_from(),
            limits: limits(spec, usages.get(id)),
            except: spec.words().except,
        }
    };
    Ok(view.rules.iter().map(report).collect())
}

/// The limits of a rule, if it has any, and what they have refused.
fn limits(spec: &RuleSpec, usage: Option<&abi::Usage>) -> Option<LimitsReport> {
    let lowered = spec.limits().lowered(spec.family());
    let words = spec.words();
    lowered.bind().then(|| LimitsReport {
        rate: words.rate,
        rate_per_source: words.rate_per_source,
        max_flows: words.max_flows,
        max_flows_per_source: words.max_flows_per_source,
        source_prefix: lowered.source_bits,
        refused: usage.map_or(0, |usage| usage.refused),
    })
}

fn live_flows(tables: Option<&Tables>) -> Result<Vec<Flow>> {
    Ok(tables.map_or(Ok(Vec::new()), Tables::flows)?)
}

/// Answer to `flows`, those that were active last first.
pub fn flows(view: &View<'_>, tables: Option<&Tables>) -> Result<Vec<FlowReport>> {
    let mut flows = live_flows(tables)?;
    flows.sort_by_key(|flow| flow.idle);
    // A flow whose rule is gone ends with its next packet; it is no flow of any rule.
    let known = flows
        .into_iter()
        .filter_map(|flow| Some((*view.ids.get(&flow.rule)?, flow)));
    let report = |(rule, flow): (u32, Flow)| FlowReport {
        proto: flow.protocol.into(),
        client: flow.client.to_string(),
        listen: flow.listen.to_string(),
        target: flow.target.to_string(),
        source: flow.source.to_string(),
        state: flow.state.to_owned(),
        age_s: flow.age.as_secs_f64(),
        idle_s: flow.idle.as_secs_f64(),
        to_target: flow.to_target.into(),
        to_client: flow.to_client.into(),
        rule,
    };
    Ok(known.map(report).collect())
}

/// Answer to `counters`.
pub fn counters(view: &View<'_>, tables: Option<&Tables>) -> Result<CountersReport> {
    let mut ports = Vec::new();
    view.for_each_block(
        |first, count| tables.map_or(Ok(Vec::new()), |tables| tables.counters(first, count)),
        |rule, counters| ports.extend(port_reports(rule, counters)),
    )?;
    ports.sort_by_key(|port: &PortReport| (port.rule, port.proto.word(), port.port));
    let reasons = tables.map_or(Ok(Vec::new()), Tables::reasons)?;
    let count = |index: u32| reasons.get(index as usize).copied().unwrap_or_default();
    Ok(CountersReport {
        ports,
        drops: DropReason::ALL
            .iter()
            .map(|reason| (reason.name().to_owned(), count(reason.index())))
            .collect(),
        passes: PassReason::ALL
            .iter()
            .map(|reason| (reason.name().to_owned(), count(reason.index())))
            .collect(),
        events: Event::ALL
            .iter()
            .map(|event| (event.name().to_owned(), count(event.index())))
            .collect(),
    })
}

/// The ports of a rule that have seen a packet.
fn port_reports(rule: &abi::Rule, counters: &[PortCounters]) -> Vec<PortReport> {
    let proto = RuleProtocol::from(rule.protocol());
    let port = |(port, counters): (u16, &PortCounters)| {
        let (to_target, to_client) = directions(*counters);
        let seen = !(to_target.is_zero() && to_client.is_zero());
        seen.then_some(PortReport {
            rule: rule.id,
            proto,
            port,
            to_target,
            to_client,
        })
    };
    // All that a rule for everything else forwards is counted as one, under port 0.
    let first = if rule.is_rest() { 0 } else { rule.first };
    (first..=rule.last).zip(counters).filter_map(port).collect()
}

/// Answer to `status`.
pub fn status(
    instance: &Instance,
    interfaces: Vec<InterfaceReport>,
    tables: Option<&Tables>,
    daemon: Option<DaemonReport>,
) -> Result<StatusReport> {
    let none = TableReport {
        entries: 0,
        capacity: 0,
    };
    let (flows, half_open) = match tables {
        Some(tables) => (
            TableReport {
                entries: tables.flow_entries()?,
                capacity: u64::from(tables.max_flows()),
            },
            TableReport {
                entries: tables.half_open_entries()?,
                capacity: u64::from(tables.max_half_open()?),
            },
        ),
        None => (none, none),
    };
    Ok(StatusReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        instance: instance.name().to_owned(),
        interfaces,
        flows,
        half_open,
        daemon,
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::ruleset::RuleWords;

    fn placed(slot: u16, id: u32, first: u16, last: u16, counter_base: u32) -> (u16, abi::Rule) {
        let protocol = u32::from(abi::Protocol::Udp.number());
        (
            slot,
            abi::Rule {
                id,
                first,
                last,
                counter_base,
                protocol,
                flags: abi::Rule::ACTIVE,
                ..abi::Rule::default()
            },
        )
    }

    fn spec(range: &str) -> RuleSpec {
        RuleSpec::parse(&RuleWords::new("udp", range, "10.0.0.2")).unwrap()
    }

    /// The element of a rule as it is lowered.
    fn lowered(slot: u16, id: u32, spec: &RuleSpec, counter_base: u32) -> (u16, abi::Rule) {
        let listen = spec.listen();
        let (_, rule) = placed(
            slot,
            id,
            listen.ports.first(),
            listen.ports.last(),
            counter_base,
        );
        let rule = abi::Rule {
            target: spec.target().address.into(),
            target_first: spec.target().ports.first(),
            flags: rule.flags | abi::Rule::ANY_ADDRESS,
            ..rule
        };
        (slot, rule)
    }

    #[test]
    fn blocks_that_lie_together_are_read_together_and_each_rule_gets_its_own() {
        let specs = ["80", "100-101", "1-65535", "7", "8"].map(spec);
        let elements = [
            lowered(9, 3, &specs[2], 3),
            lowered(1, 1, &specs[0], 0),
            lowered(2, 2, &specs[1], 1),
            lowered(4, 4, &specs[3], 80_000),
            // Of a rule that is gone, and of what rule 4 said before.
            lowered(5, 77, &specs[3], 90_000),
            lowered(6, 4, &specs[4], 91_000),
        ];
        let view = View::new((1..).zip(&specs), elements.into_iter());
        let reads = RefCell::new(Vec::new());
        let read = |first: u32, count: u32| {
            reads.borrow_mut().push((first, count));
            let counter = |n: u32| PortCounters {
                to_target: abi::Traffic {
                    packets: u64::from(n),
                    bytes: 0,
                },
                ..PortCounters::default()
            };
            Ok((first..first + count).map(counter).collect())
        };
        let mut blocks = Vec::new();
        view.for_each_block(read, |rule, counters| {
            blocks.push((rule.id, counters.len(), counters[0].to_target.packets));
        })
        .unwrap();
        assert_eq!(
            blocks,
            [(1, 1, 0), (2, 2, 1), (3, 65535, 3), (4, 1, 80_000)]
        );
        assert_eq!(*reads.borrow(), [(0, 3), (3, 65535), (80_000, 1)]);
    }

    #[test]
    fn only_ports_that_saw_a_packet_are_listed() {
        let (_, rule) = placed(1, 7, 1000, 1003, 0);
        let mut counters = [PortCounters::default(); 4];
        counters[1].to_client = abi::Traffic {
            packets: 2,
            bytes: 99,
        };
        counters[3].to_target = abi::Traffic {
            packets: 1,
            bytes: 60,
        };
        let ports = port_reports(&rule, &counters);
        assert_eq!(
            ports
                .iter()
                .map(|p| (p.port, p.to_target.packets, p.to_client.bytes))
                .collect::<Vec<_>>(),
            [(1001, 0, 99), (1003, 1, 0)]
        );
    }
}

#[cfg(test)]
#[path = "report_documents.rs"]
mod documents;
