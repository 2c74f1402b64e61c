//! Taking maps over that another daemon has filled, whenever it ended.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use portfwd_common::abi::{self, Admission};

use super::{
    Refusal, RuleMaps, element,
    lists::Lists,
    lower::{Lowering, made, unmade},
    movement::{Coming, Opening},
    prefix::{Entry, PortBlock, Prefix},
    sources::SourcePrefix,
    standing::Standing,
    write::{Remembering, RuleWrite, Write, Writes},
};

/// What the maps hold, whoever wrote it, and however far a change had come.
#[derive(Debug, Default)]
pub struct Held {
    /// Elements of RULES in use that packets find, by slot.
    pub rules: Vec<(u16, abi::Rule)>,
    /// Those of the bank that packets do not look at.
    pub hidden: Vec<(u16, abi::Rule)>,
    /// Everything in SOURCES.
    pub sources: Vec<(SourcePrefix, Admission)>,
    /// Keys of RESTS in either bank.
    pub rests: Vec<Prefix>,
}

impl Held {
    /// What is in maps.
    pub fn by(maps: &dyn RuleMaps) -> anyhow::Result<Self> {
        let bank = maps.bank()?;
        Ok(Self {
            rules: maps.rules_in(bank)?,
            hidden: maps.rules_in(bank.other())?,
            sources: maps.sources()?,
            rests: maps.rests()?,
        })
    }
}

/// What the maps hold already: elements of RULES in use, by slot.
struct Found<'a> {
    elements: &'a [(u16, abi::Rule)],
    /// Indices into `elements` by rule id and protocol: a rule that was replaced may have left
    /// others.
    by_rule: HashMap<(u32, u32), Vec<usize>>,
}

impl<'a> Found<'a> {
    fn new(elements: &'a [(u16, abi::Rule)]) -> Self {
        let mut by_rule: HashMap<_, Vec<_>> = HashMap::new();
        for (index, (_, rule)) in elements.iter().enumerate() {
            by_rule
                .entry((rule.id, rule.protocol))
                .or_default()
                .push(index);
        }
        Self { elements, by_rule }
    }

    /// The slot and the element of a rule, if it is in there as it should be; the open one of
    /// several.
    fn find(&self, rule: &abi::Rule) -> Option<(u16, abi::Rule)> {
        let indices = self.by_rule.get(&(rule.id, rule.protocol))?;
        let elements = indices
            .iter()
            .filter_map(|index| self.elements.get(*index).copied());
        elements
            .filter(|(_, element)| element::is_same(element, rule))
            .max_by_key(|(_, element)| (element.takes_flows(), element.is_active()))
    }
}

/// How a rule stands that is found in the maps: one that is to be closed while flows of its may go
/// on is left to the change that closes it.
fn standing(opening: Opening, found: &abi::Rule) -> Standing {
    match (opening, found.takes_flows(), found.is_active()) {
        (Opening::Open, _, _) | (Opening::Closed, true, _) => Standing::Linked,
        (Opening::Closed, false, true) => Standing::Draining,
        (Opening::Closed, false, false) => Standing::Parked,
    }
}

impl Lowering {
    /// Takes maps over. A rule that is in them already keeps its slot and its counters, and a rule
    /// that is gone its slot while its flows go on; whatever else is in them goes. `cursor` is the slot that was given out last, `wan` are the own
    /// addresses of the WAN interfaces.
    pub fn adopt<'a>(
        rules: impl Iterator<Item = Coming<'a>>,
        held: &Held,
        max_ports: u32,
        cursor: u16,
        wan: &[IpAddr],
    ) -> Result<(Self, Writes), Refusal> {
        let elements = &held.rules;
        let found = Found::new(elements);
        let all = || elements.iter().chain(&held.hidden);
        let taken: BTreeSet<u16> = all().map(|(slot, _)| *slot).collect();
        let lists = Lists::found(&held.sources);
        let is_taken = |slot| taken.contains(&slot);
        let mut lowering = Self::new(max_ports, cursor, wan, lists, is_taken);
        let mut fresh = Vec::new();
        for Coming { id, spec, opening } in rules {
            let sources = lowering.take_list(spec)?;
            for protocol in spec.protocol().protocols() {
                let rule = abi::Rule {
                    sources,
                    ..element::element(id, *protocol, spec)
                };
                let kept = found.find(&rule).is_some_and(|(slot, found)| {
                    let standing = standing(opening, &found);
                    lowering.keep(slot, rule, found.counter_base, standing, Some(spec))
                });
                if !kept {
                    fresh.push((rule, opening, spec));
                }
            }
        }
        for (slot, rule) in elements {
            let goes_on = rule.is_active() && !rule.takes_flows();
            if goes_on && !lowering.has(*slot) {
                lowering.keep(*slot, *rule, rule.counter_base, Standing::Retired, None);
            }
        }
        // Only now are all blocks of counters known that must stay where they are.
        let mut writes = Writes::default();
        for (rule, opening, spec) in fresh {
            writes.ahead.push(lowering.settle(rule, opening, spec)?);
        }
        let is_gone = |slot: &u16| !lowering.has(*slot);
        writes.asks_flows = elements.iter().any(|(slot, _)| is_gone(slot));
        let gone: Vec<_> = taken.iter().copied().filter(is_gone).collect();
        // A rule names a new list from here on; what it named before, and what nobody named, goes.
        let (named, unnamed) = lowering.sort_lists();
        writes.ahead.extend(made(&named));
        writes.asks_flows |= !unnamed.is_empty();
        lowering.write_rests(&held.rests, &mut writes);
        lowering.write_all(all(), &mut writes.rules);
        writes.behind.push(Write::Light(lowering.lighting()));
        writes.behind.extend(unmade(&unnamed));
        lowering.give_slots(gone.into_iter());
        Ok((lowering, writes))
    }

    /// What RESTS must hold, and the removal of the rest of `found`, the keys that it holds. An exception goes before what it is one of.
    fn write_rests(&self, found: &[Prefix], writes: &mut Writes) {
        let mut rests: Vec<_> = self.rest_entries().collect();
        rests.sort_by_key(|entry| Reverse(entry.prefix.length));
        let is_stale = |prefix: &&Prefix| rests.iter().all(|entry| entry.prefix != **prefix);
        let mut stale: Vec<_> = found.iter().filter(is_stale).copied().collect();
        stale.sort_by_key(|prefix| prefix.length);
        // What is remembered already stays: the maps tell whether it is.
        let remember = Write::Remember(self.remembering());
        match self.remembering() {
            Remembering::On => writes.ahead.push(remember),
            Remembering::Off => writes.behind.push(remember),
        }
        writes.rules.extend(rests.into_iter().map(RuleWrite::Rest));
        let removal = |prefix| RuleWrite::Rest(Entry { prefix, slot: None });
        writes.rules.extend(stale.into_iter().map(removal));
    }

    /// Everything that a bank must hold, and the removal of what others left in it, of whom `held` are all elements.
    fn write_all<'a>(
        &self,
        held: impl Iterator<Item = &'a (u16, abi::Rule)>,
        writes: &mut Vec<RuleWrite>,
    ) {
        // What anybody had is removed, unless a rule has it.
        let (mut listens, mut targets) = (HashMap::new(), HashMap::new());
        let mut gone = BTreeMap::new();
        for (slot, rule) in held {
            listens.extend(listen_keys(rule).map(|prefix| (prefix, None)));
            targets.extend(target_keys(rule).map(|prefix| (prefix, None)));
            if !self.has(*slot) {
                gone.insert(*slot, element::standing(rule, Standing::Free));
            }
        }
        listens.extend(self.listens().map(|entry| (entry.prefix, entry.slot)));
        targets.extend(self.targets().map(|entry| (entry.prefix, entry.slot)));
        let entry = |(prefix, slot): (Prefix, Option<u16>)| Entry { prefix, slot };
        let element = |(slot, rule)| RuleWrite::Rule { slot, rule };
        writes.extend(self.rules().map(element));
        writes.extend(listens.into_iter().map(entry).map(RuleWrite::Listen));
        writes.extend(targets.into_iter().map(entry).map(RuleWrite::Target));
        writes.extend(self.all_ports());
        writes.extend(gone.into_iter().map(element));
    }
}

fn listen_keys(rule: &abi::Rule) -> impl Iterator<Item = Prefix> {
    let (address, class) = (rule.listen, element::class(rule));
    let blocks = PortBlock::cover(rule.first, rule.last);
    let has_address = !rule.is_any_address();
    blocks
        .into_iter()
        .filter(move |_| has_address)
        .map(move |block| block.prefix(address, class))
}

fn target_keys(rule: &abi::Rule) -> impl Iterator<Item = Prefix> {
    let target = element::target_scope(rule);
    PortBlock::cover(target.first, target.last)
        .into_iter()
        .map(move |block| block.prefix(target.address, target.class))
}
