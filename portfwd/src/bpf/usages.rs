//! Flows of rules with limits, counted anew.
//!
//! The datapath counts flows as they begin and as their packets end them. It does not hear of those that end in silence, make
//! room for others, or are swept; so the sweep counts what the tables have, and corrects what the datapath has counted. It
//! does so by adding, among packets that do the same, and by no more than it is sure of: what begins or ends while the tables
//! are read may be seen in them or not.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use bytemuck::bytes_of;
use portfwd_common::{
    abi::{
        Config, FlowDir, FlowEntry, FlowKey, Instant, Limits, Recount, Rule, Spender, Ticks, Usage,
        UsageKey, UsageTask, names,
    },
    datapath::{
        Table,
        conntrack::{Half, Pair},
    },
    net::{Address, Ipv6},
};

use super::{
    flows::protocol,
    map::{Map, Update},
    pins::Pins,
    tables::Tables,
};

/// For how long a recount keeps the numbers right that limit flows. Without a daemon they only grow, and would let nobody in
/// at last; a daemon that is started again has counted long before.
const TRUST_SECONDS: u32 = 600;

/// Corrects what the datapath has counted.
#[derive(Debug)]
pub struct UsageKeeper {
    program: SchedClassifier,
}

/// Who has used what, at a moment.
#[derive(Debug, Default)]
struct Usages {
    rules: HashMap<u32, Usage>,
    sources: HashMap<UsageKey, Usage>,
}

/// A recount under way.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// Rules that limit flows, by slot.
    limited: HashMap<u16, (u32, Limits)>,
    before: Usages,
    /// Flows seen, by rule and by source.
    rules: HashMap<u32, u64>,
    sources: HashMap<UsageKey, u64>,
    /// Flows seen among those that have not proven themselves: they may be met again where they move to.
    opening: HashSet<KeyBytes>,
}

/// A flow's key, of either family, and when it began.
type KeyBytes = ([u8; 40], u32);

impl UsageKeeper {
    /// With the pinned program that corrects among packets.
    pub fn open(pins: &Pins) -> Result<Self> {
        let path = pins.program(names::PROGRAM_USAGE);
        let program = SchedClassifier::from_pin(&path)
            .with_context(|| format!("cannot open program {}", path.display()))?;
        Ok(Self { program })
    }

    /// Before the tables are read, with the rules of all slots that are in use. What is known of rules that are gone is forgotten.
    pub(super) fn begin(&self, tables: &mut Tables, rules: &[(u16, Rule)]) -> Result<Count> {
        let ids: HashSet<u32> = rules.iter().map(|(_, rule)| rule.id).collect();
        let limited = rules
            .iter()
            .filter(|(_, rule)| rule.is_active() && rule.limits.count_flows());
        let limited: HashMap<_, _> = limited
            .map(|(slot, rule)| (*slot, (rule.id, rule.limits)))
            .collect();
        let mut before = Usages::read(tables, &limited)?;
        for id in before.rules.keys().filter(|id| !ids.contains(id)) {
            tables.rule_usage.delete(id)?;
        }
        before.rules.retain(|id, _| ids.contains(id));
        Ok(Count {
            limited,
            before,
            ..Count::default()
        })
    }

    /// After that.
    pub(super) fn finish(&self, tables: &mut Tables, count: &Count) -> Result<()> {
        if !count.limited.is_empty() {
            let after = Usages::read(tables, &count.limited)?;
            let now = tables.clock().now()?;
            let limited: HashMap<u32, Limits> = count.limited.values().copied().collect();
            for (id, _) in limited.iter().filter(|(_, limits)| limits.flows != 0) {
                let key = UsageKey {
                    rule: *id,
                    source: Ipv6::UNSPECIFIED,
                };
                let change = Change {
                    before: count.before.rules.get(id),
                    after: after.rules.get(id),
                    seen: count.rules.get(id).copied().unwrap_or(0),
                };
                self.correct(tables, Spender::Rule, key, &change, now)?;
            }
            let known = after.sources.keys().chain(count.sources.keys());
            let keys: HashSet<UsageKey> = known.copied().collect();
            let is_limited = |key: &UsageKey| {
                let limits = limited.get(&key.rule);
                limits.is_some_and(|limits| limits.source_flows != 0)
            };
            for key in keys.into_iter().filter(is_limited) {
                let change = Change {
                    before: count.before.sources.get(&key),
                    after: after.sources.get(&key),
                    seen: count.sources.get(&key).copied().unwrap_or(0),
                };
                self.correct(tables, Spender::Source, key, &change, now)?;
            }
        }
        let recount = Recount {
            at: tables.clock().now()?,
            trust: Ticks(TRUST_SECONDS * tables.clock().ticks_per_second()),
        };
        tables.recount.set(&0, &recount)
    }

    fn correct(
        &self,
        tables: &mut Tables,
        spender: Spender,
        key: UsageKey,
        change: &Change<'_>,
        now: Instant,
    ) -> Result<()> {
        if change.after.is_none() {
            if change.seen == 0 {
                return Ok(());
            }
            // Made room for others, or its limit is new.
            let usage = Usage {
                begun: change.seen,
                ..Usage::unused(now)
            };
            let is_new = match spender {
                Spender::Rule => tables.rule_usage.update(&key.rule, &usage, Update::NoExist),
                Spender::Source => tables.source_usage.update(&key, &usage, Update::NoExist),
            };
            return is_new.map(drop);
        }
        let Some(Correction { begun, ended }) = change.correction() else {
            return Ok(());
        };
        /// The kernel wants an Ethernet header at least.
        const FRAME: [u8; 64] = [0; 64];
        let task = UsageTask {
            key,
            is_source: match spender {
                Spender::Rule => 0,
                Spender::Source => 1,
            },
            begun,
            ended,
        };
        tables.usage_task.set(&0, &task)?;
        self.program
            .test_run(TestRunOptions {
                data_in: Some(&FRAME),
                ..TestRunOptions::new()
            })
            .context("cannot run the program that corrects numbers of flows")?;
        Ok(())
    }
}

impl Usages {
    /// Those of sources only if any rule counts their flows.
    fn read(tables: &Tables, limited: &HashMap<u16, (u32, Limits)>) -> Result<Self> {
        let by_source = limited.values().any(|(_, limits)| limits.source_flows != 0);
        Ok(Self {
            rules: tables.rule_usages()?,
            sources: if by_source {
                all(&tables.source_usage)?
            } else {
                HashMap::new()
            },
        })
    }
}

fn all<K: bytemuck::Pod + Eq + std::hash::Hash>(map: &Map<K, Usage>) -> Result<HashMap<K, Usage>> {
    let mut all = HashMap::new();
    map.for_each_batch(|keys, usages| {
        all.extend(keys.iter().copied().zip(usages.iter().copied()));
        Ok(())
    })?;
    Ok(all)
}

impl Tables {
    /// What has been used of rules' limits, by their numbers.
    pub fn rule_usages(&self) -> Result<HashMap<u32, Usage>> {
        all(&self.rule_usage)
    }
}

impl Count {
    /// Whether anybody wants to know.
    pub(super) fn is_about(&self, rule: u16) -> bool {
        self.limited.contains_key(&rule)
    }

    /// An entry of a table, and the other half's if it is there.
    pub(super) fn see<A: Address>(
        &mut self,
        table: Table,
        key: &FlowKey<A>,
        entry: &FlowEntry<A>,
        partner: Option<&FlowEntry<A>>,
        (config, now): (&Config, Instant),
    ) {
        let Some((id, limits)) = self.limited.get(&entry.rule) else {
            return;
        };
        let pair = partner.and_then(|partner| Pair::of(Half::from(entry), Half::from(partner)));
        let (Some(pair), Some(protocol)) = (pair, protocol(key)) else {
            return;
        };
        let is_open = pair.is_open(protocol, config, now.later(pair.last_seen()));
        if entry.dir() != FlowDir::Original || !is_open {
            return;
        }
        let mut bytes = [0; 40];
        bytes[..size_of::<FlowKey<A>>()].copy_from_slice(bytes_of(key));
        let is_new = match table {
            Table::Opening => self.opening.insert((bytes, entry.created.ticks())),
            Table::Flows => !self.opening.contains(&(bytes, entry.created.ticks())),
        };
        if is_new {
            *self.rules.entry(*id).or_default() += 1;
            let source = UsageKey::new(*id, key.src, limits.source_bits);
            *self.sources.entry(source).or_default() += 1;
        }
    }
}

/// What the datapath had counted before and after the tables were read, and the flows that were seen in them.
struct Change<'a> {
    before: Option<&'a Usage>,
    after: Option<&'a Usage>,
    seen: u64,
}

/// What is added to the datapath's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Correction {
    begun: u64,
    ended: u64,
}

impl Change<'_> {
    /// `None` if what was seen is possible.
    fn correction(&self) -> Option<Correction> {
        let before = self.before.copied().unwrap_or_default();
        let after = self.after.copied().unwrap_or_default();
        // Those were there from the beginning to the end, and must have been seen.
        let fewest = before.begun.wrapping_sub(after.ended) as i64;
        // Those were there at some time.
        let most = after.begun.wrapping_sub(before.ended) as i64;
        let seen = self.seen as i64;
        if seen < fewest {
            Some(Correction {
                begun: 0,
                ended: fewest.wrapping_sub(seen) as u64,
            })
        } else if seen > most {
            Some(Correction {
                begun: seen.wrapping_sub(most) as u64,
                ended: 0,
            })
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn usage(begun: u64, ended: u64) -> Usage {
        Usage {
            begun,
            ended,
            ..Usage::default()
        }
    }

    fn corrected(before: Usage, after: Usage, seen: u64) -> i64 {
        let change = Change {
            before: Some(&before),
            after: Some(&after),
            seen,
        };
        let Correction { begun, ended } = change
            .correction()
            .unwrap_or(Correction { begun: 0, ended: 0 });
        let (begun, ended) = (
            after.begun.wrapping_add(begun),
            after.ended.wrapping_add(ended),
        );
        begun.wrapping_sub(ended) as i64
    }

    #[test]
    fn what_nobody_touches_meanwhile_becomes_what_was_seen() {
        for (begun, ended) in [
            (0, 0),
            (7, 7),
            (7, 3),
            (3, 7),
            (u64::MAX, 2),
            (2, u64::MAX - 1),
        ] {
            for seen in 0..20 {
                let usage = usage(begun, ended);
                assert_eq!(corrected(usage, usage, seen), seen as i64);
            }
        }
    }

    proptest! {
        /// Flows begin and end while the tables are read, each of which is looked at once, at some time.
        #[test]
        fn numbers_that_are_right_stay_as_they_are(
            flows in prop::collection::vec((0..30_u32, 0..30_u32, 0..10_u32), 0..60), offset in any::<u64>(),
        ) {
            // The tables are read from 10 to 20. A flow is looked at in that time, if it is there then.
            let lives: Vec<_> = flows.iter().map(|(from, length, look)| (*from, from + length, 10 + look)).collect();
            let count = |time: u32| usage(
                offset.wrapping_add(lives.iter().filter(|(from, ..)| *from < time).count() as u64),
                offset.wrapping_add(lives.iter().filter(|(_, end, _)| *end < time).count() as u64),
            );
            let seen = lives.iter().filter(|(from, end, look)| from < look && look <= end).count();
            let (before, after) = (count(10), count(20));
            let change = Change { before: Some(&before), after: Some(&after), seen: seen as u64 };
            prop_assert_eq!(change.correction(), None);
        }
    }
}
