//! The writes of a change of any size to a bank of the rule tables, in an order in which a packet that looks at the bank meanwhile
//! finds what held before or what holds after. Such packets are few: those that were under way when packets went over to the other
//! bank ([`super::write::Writes::steps`]).
//!
//! 1. New rules are written where nothing leads to them yet; rules that lose their statelessness
//!    lose it.
//! 2. LISTENS gets its new keys, the longest prefix first: a shorter one must not win for a moment
//!    where a longer one is about to.
//! 3. PORTS: a port goes from its old rule to its new one with one write of one word.
//! 4. LISTENS loses its old keys, the shortest prefix first, likewise.
//! 5. Old rules are closed.
//!
//! Where RESTS changes, that is one moment for all ports that no other rule has. A port that gets another rule must get it before
//! that moment, and one that loses its rule must lose it afterwards, or packets would find a rule for everything else that they
//! are to find neither before nor after. So PORTS says first what old and new rules have together, each endpoint of a port by
//! itself ([`Anys::union`]); then RESTS changes; then PORTS says what the new rules have. Before all of that it begins to be
//! remembered what leaves, if there has been nothing in RESTS, and behind all of it that ends.
//!
//! The same order holds for a change that is undone.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, btree_map::Entry as Slot},
};

use portfwd_common::{
    abi::{self, PortSlot},
    net::Ipv6,
};

use super::{
    prefix::{Entry, Prefix},
    write::{RuleWrite, Write, Writes},
};

/// Consecutive ports of a class of family and protocol whose words of PORTS have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// [`portfwd_common::abi::Protocol::class`].
    pub class: u16,
    /// First port.
    pub first: u16,
    /// Last port, inclusive.
    pub last: u16,
}

/// Rules without address that ports had before a change, by class and port; 0 for none.
#[derive(Debug, Default)]
pub struct Anys(HashMap<(u16, u16), u16>);

/// What a change has touched so far.
#[derive(Debug, Default)]
pub struct Edits {
    /// Slots, each with its element as it was before.
    elements: BTreeMap<u16, abi::Rule>,
    listens: HashMap<Prefix, Option<u16>>,
    targets: HashMap<Prefix, Option<u16>>,
    rests: HashMap<Prefix, Option<u16>>,
    ports: Vec<Ports>,
    /// `Some` if RESTS changes, too.
    anys: Option<Anys>,
    cleared: Vec<(u32, u32)>,
    ends_flows: bool,
}

impl Anys {
    /// Notes what ports have, unless a step of the same change has done so.
    fn note(&mut self, ports: Ports, anys: impl Iterator<Item = u16>) {
        for (port, any) in (ports.first..=ports.last).zip(anys) {
            self.0.entry((ports.class, port)).or_insert(any);
        }
    }

    /// The word for a port that has the rule `after` without address from now on: what LISTENS holds, new keys and old ones, goes
    /// before that rule, or before the old one if there is no new one.
    pub fn union(&self, class: u16, port: u16, after: u16) -> PortSlot {
        let before = self.0.get(&(class, port)).copied().unwrap_or(0);
        PortSlot::scoped(if after == 0 { before } else { after })
    }
}

impl Edits {
    /// No edits yet, of a change that changes RESTS, too.
    pub fn with_rests() -> Self {
        Self {
            anys: Some(Anys::default()),
            ..Self::default()
        }
    }

    /// The words of ports are about to change; `anys` are the rules without address that they have.
    pub fn before(&mut self, ports: Ports, anys: impl Iterator<Item = u16>) {
        if let Some(noted) = &mut self.anys {
            noted.note(ports, anys);
        }
    }

    /// An element of RULES is about to change; `before` is what it is now.
    pub fn element(&mut self, slot: u16, before: abi::Rule) {
        if let Slot::Vacant(vacant) = self.elements.entry(slot) {
            vacant.insert(before);
        }
    }

    /// Keys of LISTENS change, and the words of PORTS beside them.
    pub fn listen(&mut self, entries: Vec<Entry>, ports: Ports) {
        let keys = entries.into_iter().map(|entry| (entry.prefix, entry.slot));
        self.listens.extend(keys);
        self.ports.push(ports);
    }

    /// Keys of TARGETS change.
    pub fn target(&mut self, entries: Vec<Entry>) {
        let keys = entries.into_iter().map(|entry| (entry.prefix, entry.slot));
        self.targets.extend(keys);
    }

    /// Keys of RESTS change.
    pub fn rest(&mut self, entries: Vec<Entry>) {
        let keys = entries.into_iter().map(|entry| (entry.prefix, entry.slot));
        self.rests.extend(keys);
    }

    /// A block of counters begins at zero.
    pub fn clear(&mut self, first: u32, count: u32) {
        self.cleared.push((first, count));
    }

    /// Flows end by this change.
    pub fn ends_flows(&mut self) {
        self.ends_flows = true;
    }

    /// All writes. `element` is what a slot holds from here on, `words` what PORTS does, or did and does together. A
    /// slot that is nobody's keeps what it says but for its flags: a packet that is reading it reads
    /// something whole.
    pub fn into_writes(
        self,
        element: impl Fn(u16) -> Option<abi::Rule>,
        words: impl Fn(Ports, Option<&Anys>) -> RuleWrite,
    ) -> Writes {
        let cleared = runs_of_counters(self.cleared);
        let ahead = cleared.map(|(first, count)| Write::ClearCounters { first, count });
        let mut writes = Vec::new();
        let (mut early, mut late) = (Vec::new(), Vec::new());
        let mut changes_carriage = false;
        for (slot, before) in self.elements {
            let rule = element(slot).unwrap_or(abi::Rule { flags: 0, ..before });
            if rule == before {
                continue;
            }
            changes_carriage |= before.carries_by_itself() != rule.carries_by_itself();
            let write = RuleWrite::Rule { slot, rule };
            if is_early(&before, &rule) {
                early.push(write);
            } else {
                late.push(write);
            }
        }
        writes.append(&mut early);
        let (set, removed) = split(self.targets);
        writes.extend(set.into_iter().map(RuleWrite::Target));
        let (mut listens, mut no_listens) = split(self.listens);
        let (mut rests, mut no_rests) = split(self.rests);
        listens.sort_by_key(|entry| Reverse(entry.prefix.length));
        no_listens.sort_by_key(|entry| entry.prefix.length);
        // An address before none, as packets look, and an exception before what it is one of.
        rests.sort_by_key(|entry| (is_any(entry), Reverse(entry.prefix.length)));
        no_rests.sort_by_key(|entry| (!is_any(entry), entry.prefix.length));
        let runs: Vec<_> = runs_of_ports(self.ports).collect();
        writes.extend(listens.into_iter().map(RuleWrite::Listen));
        if let Some(anys) = &self.anys {
            writes.extend(runs.iter().map(|ports| words(*ports, Some(anys))));
        }
        writes.extend(rests.into_iter().map(RuleWrite::Rest));
        writes.extend(no_rests.into_iter().map(RuleWrite::Rest));
        writes.extend(runs.into_iter().map(|ports| words(ports, None)));
        writes.extend(no_listens.into_iter().map(RuleWrite::Listen));
        writes.extend(removed.into_iter().map(RuleWrite::Target));
        writes.append(&mut late);
        Writes {
            ahead: ahead.collect(),
            rules: writes,
            // What is known of the ways back to clients of a rule that no longer carries by itself is forgotten when its target may
            // have something else to answer; and a rule that begins to takes over what others had at its ports.
            asks_flows: self.ends_flows || changes_carriage,
            behind: Vec::new(),
        }
    }
}

/// Whether an element is written before anything leads to it: it opens, or it ceases to promise
/// that replies say where they belong, or that its packets need no entries.
fn is_early(before: &abi::Rule, after: &abi::Rule) -> bool {
    let opens = after.takes_flows() && !before.takes_flows();
    let loses = |has: fn(&abi::Rule) -> bool| has(before) && !has(after) && after.takes_flows();
    opens || loses(abi::Rule::is_stateless) || loses(abi::Rule::carries_by_itself)
}

/// Whether a key of RESTS stands for every address.
fn is_any(entry: &Entry) -> bool {
    entry.prefix.key.address == Ipv6::UNSPECIFIED
}

/// Keys to set and keys to remove.
fn split(keys: HashMap<Prefix, Option<u16>>) -> (Vec<Entry>, Vec<Entry>) {
    keys.into_iter()
        .map(|(prefix, slot)| Entry { prefix, slot })
        .partition(|entry| entry.slot.is_some())
}

/// Ports that lie together or overlap, put together: one system call writes them.
fn runs_of_ports(mut ports: Vec<Ports>) -> impl Iterator<Item = Ports> {
    ports.sort_unstable();
    let mut runs: Vec<Ports> = Vec::new();
    for next in ports {
        match runs.last_mut() {
            Some(run)
                if run.class == next.class && u32::from(next.first) <= u32::from(run.last) + 1 =>
            {
                run.last = run.last.max(next.last);
            }
            Some(_) | None => runs.push(next),
        }
    }
    runs.into_iter()
}

/// Blocks of counters that lie together, likewise.
fn runs_of_counters(mut blocks: Vec<(u32, u32)>) -> impl Iterator<Item = (u32, u32)> {
    blocks.sort_unstable();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for (first, count) in blocks {
        match runs.last_mut() {
            Some((start, length)) if *start + *length == first => *length += count,
            Some(_) | None => runs.push((first, count)),
        }
    }
    runs.into_iter()
}
