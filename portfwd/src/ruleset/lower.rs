//! Rules to map entries. Pure: a change comes out as the writes that carry it out, in the order
//! that leaves the datapath consistent after each of them.
//!
//! - A rule becomes visible with the last write (PORTS), when all that PORTS leads to is there; it
//!   disappears with the first.
//! - LISTENS holds every rule with a listen address, its ports cut into aligned blocks; the longest
//!   prefix is the exact port. Where a range's block is a single port that an exact rule has too,
//!   the exact rule owns the key.
//! - PORTS names the winner where one scope covers a port, and sends the datapath to LISTENS where
//!   several do.
//! - TARGETS names a rule where it alone has that target, so that its replies can be translated
//!   without a flow entry.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use portfwd_common::{
    abi::{self, MAX_PREFIXES, MAX_RULES, PortSlot},
    net::Family,
};

use super::{
    Refusal, RuleSpec,
    allocate::{Blocks, Slots},
    element,
    ports::PortTable,
    prefix::Entry,
    targets::Targets,
};

/// One write to one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Zeroes elements of COUNTERS.
    ClearCounters {
        /// First element.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Sets an element of RULES.
    Rule {
        /// The element.
        slot: u16,
        /// Its new value.
        rule: abi::Rule,
    },
    /// Sets or removes a key of LISTENS.
    Listen(Entry),
    /// Sets or removes a key of TARGETS; slot 0 stands for several rules.
    Target(Entry),
    /// Sets consecutive elements of PORTS.
    Ports {
        /// First element.
        first_index: u32,
        /// New values.
        words: Vec<PortSlot>,
    },
    /// Makes every flow look at rule and route again.
    BumpGeneration,
}

/// The own addresses of the WAN interfaces, as far as lowering cares: with exactly one of a family,
/// a listen without address is a certain address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct WanAddresses {
    v4: usize,
    v6: usize,
}

/// A rule of one protocol in its slot.
#[derive(Clone, Copy, Debug)]
struct Placed {
    rule: abi::Rule,
    /// Another rule has one of its target endpoints too.
    is_shared: bool,
}

/// What the maps hold on behalf of the rules.
#[derive(Debug)]
pub struct Lowering {
    /// By [`Protocol::class`].
    ports: [PortTable; 4],
    targets: Targets,
    placed: BTreeMap<u16, Placed>,
    /// Rule id and slot of everything placed.
    by_id: BTreeSet<(u32, u16)>,
    slots: Slots,
    cursor: u16,
    blocks: Blocks,
    max_ports: u32,
    /// Upper bound of the keys in LISTENS, and of those in TARGETS.
    prefixes: u32,
    wan: WanAddresses,
}

impl WanAddresses {
    fn of(addresses: &[IpAddr]) -> Self {
        let v4 = addresses.iter().filter(|address| address.is_ipv4()).count();
        Self {
            v4,
            v6: addresses.len() - v4,
        }
    }

    fn count(self, family: Family) -> usize {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

impl Placed {
    /// The element of RULES, with the flag that depends on other rules and on the WAN's addresses.
    fn element(&self, wan: WanAddresses) -> abi::Rule {
        let one_listen = !self.rule.is_any_address() || wan.count(element::family(&self.rule)) == 1;
        let flags = if one_listen && !self.is_shared {
            self.rule.flags | abi::Rule::STATELESS
        } else {
            self.rule.flags
        };
        abi::Rule { flags, ..self.rule }
    }
}

impl Lowering {
    /// No rules; `cursor` is the slot that was given out last by whoever used the maps before.
    pub(super) fn new(
        max_ports: u32,
        cursor: u16,
        wan: &[IpAddr],
        taken: impl Fn(u16) -> bool,
    ) -> Self {
        Self {
            ports: std::array::from_fn(|class| PortTable::new(class as u16)),
            targets: Targets::default(),
            placed: BTreeMap::new(),
            by_id: BTreeSet::new(),
            slots: Slots::new(MAX_RULES as u16, cursor, taken),
            cursor,
            blocks: Blocks::new(max_ports),
            max_ports,
            prefixes: 0,
            wan: WanAddresses::of(wan),
        }
    }

    /// Adds a rule. Either all its protocols have a place, or nothing is changed.
    pub fn add(&mut self, id: u32, spec: &RuleSpec) -> Result<Vec<Write>, Refusal> {
        let mut places = Vec::new();
        for protocol in spec.protocol().protocols() {
            match self.place(element::element(id, *protocol, spec)) {
                Ok(place) => places.push(place),
                Err(refusal) => {
                    places
                        .iter()
                        .rev()
                        .for_each(|(slot, rule)| self.unplace(*slot, rule));
                    return Err(refusal);
                }
            }
        }
        let mut writes = Vec::new();
        for (slot, rule) in places {
            writes.push(clear(&rule));
            self.activate(slot, rule, &mut writes);
        }
        Ok(writes)
    }

    /// Removes a rule. Its places stay reserved until [`Self::finish`], so that [`Self::put_back`]
    /// can undo it, counters and all.
    pub fn take_out(&mut self, id: u32) -> TakenOut {
        let places = self.places(id);
        let mut writes = Vec::new();
        for (slot, rule) in &places {
            self.deactivate(*slot, rule, &mut writes);
        }
        writes.push(Write::BumpGeneration);
        TakenOut { places, writes }
    }

    /// Undoes [`Self::take_out`].
    pub fn put_back(&mut self, taken: &TakenOut) -> Vec<Write> {
        let mut writes = Vec::new();
        for (slot, rule) in &taken.places {
            self.activate(*slot, *rule, &mut writes);
        }
        writes
    }

    /// Frees the places of what was taken out.
    pub fn finish(&mut self, taken: &TakenOut) {
        taken
            .places
            .iter()
            .for_each(|(slot, rule)| self.free(*slot, rule));
    }

    /// Undoes [`Self::add`].
    pub fn undo_add(&mut self, id: u32) -> Vec<Write> {
        let taken = self.take_out(id);
        self.finish(&taken);
        taken.writes
    }

    /// The WAN's own addresses are these now.
    pub fn set_wan_addresses(&mut self, addresses: &[IpAddr]) -> Vec<Write> {
        let (before, after) = (self.wan, WanAddresses::of(addresses));
        self.wan = after;
        let changed = self
            .placed
            .iter()
            .map(|(slot, placed)| (*slot, placed.element(before), placed.element(after)));
        changed
            .filter(|(_, old, new)| old != new)
            .map(|(slot, _, rule)| Write::Rule { slot, rule })
            .collect()
    }

    /// The elements of RULES that a rule has, by slot.
    fn places(&self, id: u32) -> Vec<(u16, abi::Rule)> {
        let slots = self
            .by_id
            .range((id, 0)..=(id, u16::MAX))
            .map(|(_, slot)| slot);
        slots
            .filter_map(|slot| Some((*slot, self.placed.get(slot)?.rule)))
            .collect()
    }

    /// Everything in RULES, by slot.
    pub fn rules(&self) -> impl Iterator<Item = (u16, abi::Rule)> {
        self.placed
            .iter()
            .map(|(slot, placed)| (*slot, placed.element(self.wan)))
    }

    /// The slot that was given out last, for the next [`Self::adopt`].
    pub fn cursor(&self) -> u16 {
        self.cursor
    }

    fn place(&mut self, rule: abi::Rule) -> Result<(u16, abi::Rule), Refusal> {
        let more = element::prefixes(&rule);
        if self.prefixes + more > MAX_PREFIXES {
            return Err(Refusal::TooManyPrefixes {
                capacity: MAX_PREFIXES,
            });
        }
        let slot = self.slots.take().ok_or(Refusal::TooManyRules {
            capacity: MAX_RULES - 1,
        })?;
        let Some(counter_base) = self.blocks.take(element::ports(&rule)) else {
            self.slots.untake(slot);
            return Err(Refusal::TooManyPorts {
                count: element::ports(&rule),
                capacity: self.max_ports,
            });
        };
        self.prefixes += more;
        self.cursor = slot;
        Ok((
            slot,
            abi::Rule {
                counter_base,
                ..rule
            },
        ))
    }

    fn unplace(&mut self, slot: u16, rule: &abi::Rule) {
        self.slots.untake(slot);
        self.blocks.give(rule.counter_base, element::ports(rule));
        self.prefixes -= element::prefixes(rule);
    }

    fn free(&mut self, slot: u16, rule: &abi::Rule) {
        self.slots.give(slot);
        self.blocks.give(rule.counter_base, element::ports(rule));
        self.prefixes -= element::prefixes(rule);
    }

    /// Keeps a rule in the slot and the counters that it has in the maps; `false` if another rule
    /// counts there.
    pub(super) fn keep(&mut self, slot: u16, rule: abi::Rule, counter_base: u32) -> bool {
        let is_free = self.blocks.reserve(counter_base, element::ports(&rule));
        if is_free {
            self.prefixes += element::prefixes(&rule);
            self.index(
                slot,
                abi::Rule {
                    counter_base,
                    ..rule
                },
            );
        }
        is_free
    }

    /// Gives a rule a place that is not in the maps yet. The write clears its counters; the others
    /// are the caller's.
    pub(super) fn settle(&mut self, rule: abi::Rule) -> Result<Write, Refusal> {
        let (slot, rule) = self.place(rule)?;
        self.index(slot, rule);
        Ok(clear(&rule))
    }

    /// Whether a slot is in use.
    pub(super) fn has(&self, slot: u16) -> bool {
        self.placed.contains_key(&slot)
    }

    /// Slots that others had can be used from here on.
    pub(super) fn release(&mut self, slots: impl Iterator<Item = u16>) {
        slots.for_each(|slot| self.slots.give(slot));
    }

    /// Everything LISTENS must hold.
    pub(super) fn listens(&self) -> impl Iterator<Item = Entry> {
        self.ports.iter().flat_map(PortTable::all)
    }

    /// Everything TARGETS must hold.
    pub(super) fn targets(&self) -> impl Iterator<Item = Entry> {
        self.targets.all()
    }

    /// All of PORTS.
    pub(super) fn all_ports(&self) -> impl Iterator<Item = Write> {
        (0..)
            .zip(&self.ports)
            .map(|(class, table)| ports_write(class, table, 0, u16::MAX))
    }

    /// Enters a rule that has its place, without writes.
    fn index(&mut self, slot: u16, rule: abi::Rule) {
        let mut unneeded = Vec::new();
        self.activate(slot, rule, &mut unneeded);
    }

    fn activate(&mut self, slot: u16, rule: abi::Rule, writes: &mut Vec<Write>) {
        let targets = self.targets.insert(element::target_scope(&rule), slot);
        let is_shared = self.targets.is_shared(slot);
        let placed = Placed { rule, is_shared };
        writes.push(Write::Rule {
            slot,
            rule: placed.element(self.wan),
        });
        self.placed.insert(slot, placed);
        self.by_id.insert((rule.id, slot));
        writes.extend(targets.entries.into_iter().map(Write::Target));
        self.refresh_shared(&targets.changed, writes);
        let listens = self.table(&rule).insert(element::listen_scope(&rule), slot);
        writes.extend(listens.into_iter().map(Write::Listen));
        writes.push(self.ports_write(&rule));
    }

    fn deactivate(&mut self, slot: u16, rule: &abi::Rule, writes: &mut Vec<Write>) {
        let listens = self.table(rule).remove(element::listen_scope(rule), slot);
        writes.push(self.ports_write(rule));
        writes.extend(listens.into_iter().map(Write::Listen));
        let targets = self.targets.remove(element::target_scope(rule), slot);
        writes.extend(targets.entries.into_iter().map(Write::Target));
        writes.push(Write::Rule {
            slot,
            rule: element::inactive(rule),
        });
        self.placed.remove(&slot);
        self.by_id.remove(&(rule.id, slot));
        self.refresh_shared(&targets.changed, writes);
    }

    /// Rules that began or ceased to share targets with others.
    fn refresh_shared(&mut self, slots: &[u16], writes: &mut Vec<Write>) {
        for slot in slots {
            let Some(placed) = self.placed.get_mut(slot) else {
                continue;
            };
            let before = placed.element(self.wan);
            placed.is_shared = self.targets.is_shared(*slot);
            let rule = placed.element(self.wan);
            if rule != before {
                writes.push(Write::Rule { slot: *slot, rule });
            }
        }
    }

    fn table(&mut self, rule: &abi::Rule) -> &mut PortTable {
        &mut self.ports[usize::from(element::class(rule))]
    }

    fn ports_write(&self, rule: &abi::Rule) -> Write {
        let class = element::class(rule);
        ports_write(
            class,
            &self.ports[usize::from(class)],
            rule.first,
            rule.last,
        )
    }
}

fn ports_write(class: u16, table: &PortTable, first: u16, last: u16) -> Write {
    let first_index = u32::from(class) << 16 | u32::from(first);
    Write::Ports {
        first_index,
        words: table.words(first, last),
    }
}

fn clear(rule: &abi::Rule) -> Write {
    Write::ClearCounters {
        first: rule.counter_base,
        count: element::ports(rule),
    }
}

/// A rule that was taken out of the maps but keeps its places.
#[derive(Debug)]
pub struct TakenOut {
    places: Vec<(u16, abi::Rule)>,
    /// The writes that do it.
    pub writes: Vec<Write>,
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
