//! Rules to map entries. Pure: a change comes out as the writes that carry it out, in the order that leaves the datapath
//! consistent after each of them.
//!
//! - A rule becomes visible with the last write (PORTS), when all that PORTS leads to is there; it disappears with the first.
//! - LISTENS holds every rule with a listen address, its ports cut into aligned blocks; the longest prefix is the exact port.
//!   Where a range's block is a single port that an exact rule has too, the exact rule owns the key.
//! - PORTS names the winner where one scope covers a port, and sends the datapath to LISTENS where several do.
//! - TARGETS names a rule where it alone has that target, so that its replies can be translated without a flow entry.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use portfwd_common::{
    abi::{self, EndpointKey, MAX_PREFIXES, MAX_RULES, PortSlot, Protocol},
    net::{Family, Ipv6},
};

use super::{
    Refusal, RuleSpec,
    allocate::{Blocks, Slots},
    ports::{ListenEntry, ListenScope, PortBlock, PortTable},
    targets::{TargetEntry, TargetScope, Targets},
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
    /// Sets or removes a prefix of LISTENS.
    Listen {
        /// Bits of the key that count.
        prefix_len: u32,
        /// The prefix.
        key: EndpointKey,
        /// Rule slot; `None` to remove it.
        slot: Option<u16>,
    },
    /// Sets or removes a prefix of TARGETS.
    Target {
        /// Bits of the key that count.
        prefix_len: u32,
        /// The prefix.
        key: EndpointKey,
        /// Rule slot, 0 for several; `None` to remove it.
        slot: Option<u16>,
    },
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

/// The own addresses of the WAN interfaces, as far as lowering cares: with exactly one of a family, a listen without address
/// is a certain address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct WanAddresses {
    v4: usize,
    v6: usize,
}

/// A rule of one protocol in its slot.
#[derive(Clone, Copy, Debug)]
struct Placed {
    rule: abi::Rule,
    /// Other rules that share a target endpoint with it.
    overlaps: u32,
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

/// The classes of family and protocol, in the order of [`Protocol::class`].
const CLASSES: [(Family, Protocol); 4] = [
    (Family::V4, Protocol::Tcp),
    (Family::V4, Protocol::Udp),
    (Family::V6, Protocol::Tcp),
    (Family::V6, Protocol::Udp),
];

fn family(rule: &abi::Rule) -> Family {
    if rule.flags & abi::Rule::V6 == 0 {
        Family::V4
    } else {
        Family::V6
    }
}

/// What does not depend on other rules: slot and counters are not set, nor are flags that others decide.
fn lower(id: u32, protocol: Protocol, spec: &RuleSpec) -> abi::Rule {
    let (listen, target) = (spec.listen(), spec.target());
    let mut flags = abi::Rule::ACTIVE;
    if spec.family() == Family::V6 {
        flags |= abi::Rule::V6;
    }
    if listen.address.is_none() {
        flags |= abi::Rule::ANY_ADDRESS;
    }
    abi::Rule {
        listen: listen.address.map_or(Ipv6::UNSPECIFIED, Ipv6::from),
        target: target.address.into(),
        first: listen.ports.first(),
        last: listen.ports.last(),
        target_first: target.ports.first(),
        flags,
        counter_base: 0,
        id,
        protocol: u32::from(protocol.number()),
    }
}

/// Whether an element of RULES is this rule, wherever its counters are.
fn is_same(kernel: &abi::Rule, rule: &abi::Rule) -> bool {
    let flags = kernel.flags & !abi::Rule::STATELESS;
    abi::Rule {
        flags,
        counter_base: rule.counter_base,
        ..*kernel
    } == *rule
}

fn count(rule: &abi::Rule) -> u32 {
    u32::from(rule.last) - u32::from(rule.first) + 1
}

fn class(rule: &abi::Rule) -> u16 {
    let protocol = if rule.protocol == u32::from(Protocol::Tcp.number()) {
        Protocol::Tcp
    } else {
        Protocol::Udp
    };
    protocol.class(family(rule))
}

fn listen_scope(rule: &abi::Rule) -> ListenScope {
    ListenScope {
        address: (!rule.is_any_address()).then_some(rule.listen),
        first: rule.first,
        last: rule.last,
    }
}

fn target_scope(rule: &abi::Rule) -> TargetScope {
    TargetScope {
        class: class(rule),
        address: rule.target,
        first: rule.target_first,
        last: rule.target_port(rule.last),
    }
}

fn listen_writes(class: u16, entries: Vec<ListenEntry>) -> impl Iterator<Item = Write> {
    entries.into_iter().map(
        move |ListenEntry {
                  address,
                  block,
                  slot,
              }| {
            let (prefix_len, key) = block.key(address, class);
            Write::Listen {
                prefix_len,
                key,
                slot,
            }
        },
    )
}

fn target_writes(entries: Vec<TargetEntry>) -> impl Iterator<Item = Write> {
    entries.into_iter().map(
        |TargetEntry {
             class,
             address,
             block,
             slot,
         }| {
            let (prefix_len, key) = block.key(address, class);
            Write::Target {
                prefix_len,
                key,
                slot,
            }
        },
    )
}

/// Prefixes a rule takes in LISTENS or TARGETS, whichever is more.
fn prefixes(rule: &abi::Rule) -> u32 {
    let listens = PortBlock::cover(rule.first, rule.last).len();
    let targets = PortBlock::cover(rule.target_first, rule.target_port(rule.last)).len();
    listens.max(targets) as u32
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
        let one_listen = !self.rule.is_any_address() || wan.count(family(&self.rule)) == 1;
        let flags = if one_listen && self.overlaps == 0 {
            self.rule.flags | abi::Rule::STATELESS
        } else {
            self.rule.flags
        };
        abi::Rule { flags, ..self.rule }
    }
}

impl Lowering {
    /// No rules; `cursor` is the slot that was given out last by whoever used the maps before.
    fn new(max_ports: u32, cursor: u16, wan: &[IpAddr], taken: impl Fn(u16) -> bool) -> Self {
        Self {
            ports: std::array::from_fn(|_| PortTable::new()),
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

    /// Takes maps over: a rule that is in them already keeps its slot and its counters, whatever else is in them goes.
    pub fn adopt<'a>(
        rules: impl Iterator<Item = (u32, &'a RuleSpec)>,
        kernel: &[(u16, abi::Rule)],
        max_ports: u32,
        cursor: u16,
        wan: &[IpAddr],
    ) -> Result<(Self, Vec<Write>), Refusal> {
        let in_kernel: BTreeMap<u16, abi::Rule> = kernel.iter().copied().collect();
        let by_rule: BTreeMap<(u32, u32), u16> = kernel
            .iter()
            .map(|(slot, rule)| ((rule.id, rule.protocol), *slot))
            .collect();
        let mut lowering = Self::new(max_ports, cursor, wan, |slot| in_kernel.contains_key(&slot));
        let mut writes = Vec::new();
        let mut fresh = Vec::new();
        for (id, spec) in rules {
            for protocol in spec.protocol().protocols() {
                let rule = lower(id, *protocol, spec);
                let found = by_rule
                    .get(&(rule.id, rule.protocol))
                    .and_then(|slot| Some((*slot, in_kernel.get(slot)?)));
                match found {
                    Some((slot, old))
                        if is_same(old, &rule)
                            && lowering.blocks.reserve(old.counter_base, count(&rule)) =>
                    {
                        lowering.prefixes += prefixes(&rule);
                        lowering.index(
                            slot,
                            abi::Rule {
                                counter_base: old.counter_base,
                                ..rule
                            },
                        );
                    }
                    Some(_) | None => fresh.push(rule),
                }
            }
        }
        // Only now are all blocks known that must stay where they are.
        for rule in fresh {
            let (slot, rule) = lowering.place(rule)?;
            writes.push(Write::ClearCounters {
                first: rule.counter_base,
                count: count(&rule),
            });
            lowering.index(slot, rule);
        }
        let stale: Vec<_> = kernel
            .iter()
            .filter(|(slot, _)| !lowering.placed.contains_key(slot))
            .copied()
            .collect();
        lowering.write_all(&stale, &mut writes);
        stale
            .iter()
            .for_each(|(slot, _)| lowering.slots.give(*slot));
        Ok((lowering, writes))
    }

    /// Everything the maps must hold, and the removal of what stale rules left in them.
    fn write_all(&self, stale: &[(u16, abi::Rule)], writes: &mut Vec<Write>) {
        let (mut listens, mut targets) = (BTreeMap::new(), BTreeMap::new());
        let order =
            |prefix_len: u32, key: &EndpointKey| (prefix_len, bytemuck::cast::<_, [u8; 20]>(*key));
        // Later entries win: what stale rules had is removed unless a rule has it.
        let stale_entries = stale.iter().flat_map(|(_, rule)| {
            let listen = PortBlock::cover(rule.first, rule.last)
                .into_iter()
                .map(|block| (block, rule.listen));
            let target = target_scope(rule);
            let target = PortBlock::cover(target.first, target.last)
                .into_iter()
                .map(move |block| (block, rule.target));
            let is_any = rule.is_any_address();
            let listen = listen
                .filter(move |_| !is_any)
                .map(|(block, address)| (true, block, address));
            listen
                .chain(target.map(|(block, address)| (false, block, address)))
                .map(move |entry| (class(rule), entry))
        });
        for (class, (is_listen, block, address)) in stale_entries {
            let (prefix_len, key) = block.key(address, class);
            let keys = if is_listen {
                &mut listens
            } else {
                &mut targets
            };
            keys.insert(order(prefix_len, &key), (prefix_len, key, None));
        }
        for (class, table) in (0..).zip(&self.ports) {
            for ListenEntry {
                address,
                block,
                slot,
            } in table.all()
            {
                let (prefix_len, key) = block.key(address, class);
                listens.insert(order(prefix_len, &key), (prefix_len, key, slot));
            }
        }
        for TargetEntry {
            class,
            address,
            block,
            slot,
        } in self.targets.all()
        {
            let (prefix_len, key) = block.key(address, class);
            targets.insert(order(prefix_len, &key), (prefix_len, key, slot));
        }
        writes.extend(self.placed.iter().map(|(slot, placed)| Write::Rule {
            slot: *slot,
            rule: placed.element(self.wan),
        }));
        writes.extend(
            listens
                .into_values()
                .map(|(prefix_len, key, slot)| Write::Listen {
                    prefix_len,
                    key,
                    slot,
                }),
        );
        writes.extend(
            targets
                .into_values()
                .map(|(prefix_len, key, slot)| Write::Target {
                    prefix_len,
                    key,
                    slot,
                }),
        );
        for ((family, protocol), table) in CLASSES.into_iter().zip(&self.ports) {
            writes.push(Write::Ports {
                first_index: abi::rule::port_index(family, protocol, 0),
                words: table.words(0, u16::MAX),
            });
        }
        writes.extend(stale.iter().map(|(slot, rule)| Write::Rule {
            slot: *slot,
            rule: inactive(rule),
        }));
        if !stale.is_empty() {
            writes.push(Write::BumpGeneration);
        }
    }

    /// Adds a rule. Either all its protocols have a place, or nothing is changed.
    pub fn add(&mut self, id: u32, spec: &RuleSpec) -> Result<Vec<Write>, Refusal> {
        let mut places = Vec::new();
        for protocol in spec.protocol().protocols() {
            match self.place(lower(id, *protocol, spec)) {
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
            writes.push(Write::ClearCounters {
                first: rule.counter_base,
                count: count(&rule),
            });
            self.activate(slot, rule, &mut writes);
        }
        Ok(writes)
    }

    /// Removes a rule. Its places stay reserved until [`Self::finish`], so that [`Self::put_back`] can undo it, counters and all.
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
        let more = prefixes(&rule);
        if self.prefixes + more > MAX_PREFIXES {
            return Err(Refusal::TooManyPrefixes {
                capacity: MAX_PREFIXES,
            });
        }
        let slot = self.slots.take().ok_or(Refusal::TooManyRules {
            capacity: MAX_RULES - 1,
        })?;
        let Some(counter_base) = self.blocks.take(count(&rule)) else {
            self.slots.untake(slot);
            return Err(Refusal::TooManyPorts {
                count: count(&rule),
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
        self.blocks.give(rule.counter_base, count(rule));
        self.prefixes -= prefixes(rule);
    }

    fn free(&mut self, slot: u16, rule: &abi::Rule) {
        self.slots.give(slot);
        self.blocks.give(rule.counter_base, count(rule));
        self.prefixes -= prefixes(rule);
    }

    /// Enters a rule that has its place, without writes.
    fn index(&mut self, slot: u16, rule: abi::Rule) {
        let mut unneeded = Vec::new();
        self.activate(slot, rule, &mut unneeded);
    }

    fn activate(&mut self, slot: u16, rule: abi::Rule, writes: &mut Vec<Write>) {
        let targets = self.targets.insert(target_scope(&rule), slot);
        let overlaps = targets.shared_with.len() as u32;
        let placed = Placed { rule, overlaps };
        writes.push(Write::Rule {
            slot,
            rule: placed.element(self.wan),
        });
        self.placed.insert(slot, placed);
        self.by_id.insert((rule.id, slot));
        writes.extend(target_writes(targets.entries));
        self.recount(&targets.shared_with, |overlaps| *overlaps += 1, writes);
        let listens = self.table(&rule).insert(listen_scope(&rule), slot);
        writes.extend(listen_writes(class(&rule), listens));
        writes.push(self.ports_write(&rule));
    }

    fn deactivate(&mut self, slot: u16, rule: &abi::Rule, writes: &mut Vec<Write>) {
        let listens = self.table(rule).remove(listen_scope(rule), slot);
        writes.push(self.ports_write(rule));
        writes.extend(listen_writes(class(rule), listens));
        let targets = self.targets.remove(target_scope(rule), slot);
        writes.extend(target_writes(targets.entries));
        writes.push(Write::Rule {
            slot,
            rule: inactive(rule),
        });
        self.placed.remove(&slot);
        self.by_id.remove(&(rule.id, slot));
        self.recount(&targets.shared_with, |overlaps| *overlaps -= 1, writes);
    }

    /// Another rule that shares targets has come or gone.
    fn recount(&mut self, slots: &[u16], change: impl Fn(&mut u32), writes: &mut Vec<Write>) {
        for slot in slots {
            let Some(placed) = self.placed.get_mut(slot) else {
                continue;
            };
            let before = placed.element(self.wan);
            change(&mut placed.overlaps);
            let rule = placed.element(self.wan);
            if rule != before {
                writes.push(Write::Rule { slot: *slot, rule });
            }
        }
    }

    fn table(&mut self, rule: &abi::Rule) -> &mut PortTable {
        &mut self.ports[usize::from(class(rule))]
    }

    fn ports_write(&self, rule: &abi::Rule) -> Write {
        let words = self.ports[usize::from(class(rule))].words(rule.first, rule.last);
        Write::Ports {
            first_index: u32::from(class(rule)) << 16 | u32::from(rule.first),
            words,
        }
    }
}

/// A rule that was taken out of the maps but keeps its places.
#[derive(Debug)]
pub struct TakenOut {
    places: Vec<(u16, abi::Rule)>,
    /// The writes that do it.
    pub writes: Vec<Write>,
}

/// The element without its active bit: all a packet in flight may still read is whole, and it is refused.
fn inactive(rule: &abi::Rule) -> abi::Rule {
    abi::Rule { flags: 0, ..*rule }
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
