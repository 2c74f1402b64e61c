//! Taking maps over that another daemon has filled, whenever it ended.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use portfwd_common::abi::{self, Admission};

use super::{
    Refusal, element,
    lists::Lists,
    lower::{Lowering, made, unmade},
    movement::{Coming, Opening},
    prefix::{Entry, PortBlock, Prefix},
    sources::SourcePrefix,
    standing::Standing,
    write::{Remembering, Write},
};

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
        elements: &[(u16, abi::Rule)],
        sources: &[(SourcePrefix, Admission)],
        rests: &[Prefix],
        max_ports: u32,
        cursor: u16,
        wan: &[IpAddr],
    ) -> Result<(Self, Vec<Write>), Refusal> {
        let found = Found::new(elements);
        let taken: BTreeMap<u16, abi::Rule> = elements.iter().copied().collect();
        let lists = Lists::found(sources);
        let is_taken = |slot| taken.contains_key(&slot);
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
        let mut writes = Vec::new();
        for (rule, opening, spec) in fresh {
            writes.push(lowering.settle(rule, opening, spec)?);
        }
        let is_stale = |(slot, _): &&(u16, abi::Rule)| !lowering.has(*slot);
        let stale: Vec<_> = elements.iter().filter(is_stale).copied().collect();
        // A rule names a new list from here on; what it named before, and what nobody named, goes.
        let (named, unnamed) = lowering.sort_lists();
        writes.extend(made(&named));
        lowering.write_rests(rests, &mut writes);
        lowering.write_all(&stale, &mut writes);
        writes.push(Write::Light(lowering.lighting()));
        if !unnamed.is_empty() {
            writes.push(Write::BumpGeneration);
            writes.extend(unmade(&unnamed));
        }
        lowering.give_slots(stale.iter().map(|(slot, _)| *slot));
        Ok((lowering, writes))
    }

    /// What RESTS must hold, and the removal of the rest of `found`, the keys that it holds. An exception goes before what it is one of.
    fn write_rests(&self, found: &[Prefix], writes: &mut Vec<Write>) {
        let mut rests: Vec<_> = self.rest_entries().collect();
        rests.sort_by_key(|entry| Reverse(entry.prefix.length));
        let is_stale = |prefix: &&Prefix| rests.iter().all(|entry| entry.prefix != **prefix);
        let mut stale: Vec<_> = found.iter().filter(is_stale).copied().collect();
        stale.sort_by_key(|prefix| prefix.length);
        let remembering = self.remembering();
        // What is remembered already stays: the maps tell whether it is.
        if remembering == Remembering::On {
            writes.push(Write::Remember(remembering));
        }
        writes.extend(rests.into_iter().map(Write::Rest));
        let removal = |prefix| Write::Rest(Entry { prefix, slot: None });
        writes.extend(stale.into_iter().map(removal));
        if remembering == Remembering::Off {
            writes.push(Write::Remember(remembering));
        }
    }

    /// Everything the maps must hold, and the removal of what stale rules left in them.
    fn write_all(&self, stale: &[(u16, abi::Rule)], writes: &mut Vec<Write>) {
        // What stale rules had is removed, unless a rule has it.
        let (mut listens, mut targets) = (HashMap::new(), HashMap::new());
        for (_, rule) in stale {
            listens.extend(listen_keys(rule).map(|prefix| (prefix, None)));
            targets.extend(target_keys(rule).map(|prefix| (prefix, None)));
        }
        listens.extend(self.listens().map(|entry| (entry.prefix, entry.slot)));
        targets.extend(self.targets().map(|entry| (entry.prefix, entry.slot)));
        let entry = |(prefix, slot): (Prefix, Option<u16>)| Entry { prefix, slot };
        writes.extend(self.rules().map(|(slot, rule)| Write::Rule { slot, rule }));
        writes.extend(listens.into_iter().map(entry).map(Write::Listen));
        writes.extend(targets.into_iter().map(entry).map(Write::Target));
        writes.extend(self.all_ports());
        let inactive = |(slot, rule): &(u16, abi::Rule)| Write::Rule {
            slot: *slot,
            rule: element::standing(rule, Standing::Free),
        };
        writes.extend(stale.iter().map(inactive));
        if !stale.is_empty() {
            writes.push(Write::BumpGeneration);
        }
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
