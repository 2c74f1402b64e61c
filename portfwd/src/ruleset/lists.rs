//! The lists of sources in the maps: a number each, never one that is in use, so that a list is
//! whole before a rule names it.

use std::{collections::BTreeMap, sync::Arc};

use portfwd_common::abi::{Admission, MAX_SOURCES};

use super::{
    Refusal, RuleSpec,
    sources::{SourceEntry, SourcePrefix},
};

/// A list in the maps. Without prefixes it is no list, and its number is 0.
#[derive(Clone, Debug, Default)]
pub struct List {
    number: u32,
    entries: Arc<[SourceEntry]>,
}

/// All lists, by number.
#[derive(Debug, Default)]
pub struct Lists {
    lists: BTreeMap<u32, List>,
    last: u32,
    prefixes: u32,
}

impl List {
    /// What [`portfwd_common::abi::Rule::sources`] says.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// What makes it.
    pub fn entries(&self) -> impl Iterator<Item = SourceEntry> {
        self.entries.iter().copied()
    }

    /// What takes it away.
    pub fn removal(&self) -> impl Iterator<Item = SourceEntry> {
        self.entries().map(|entry| SourceEntry {
            admission: None,
            ..entry
        })
    }

    /// Whether it lets the same sources in as another, whatever their numbers are.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let what = |entry: SourceEntry| {
            let SourceEntry { prefix, admission } = entry;
            (prefix.length, prefix.key.address, admission)
        };
        self.entries().map(what).eq(other.entries().map(what))
    }
}

impl Lists {
    /// Those that are in the maps already.
    pub fn found(prefixes: &[(SourcePrefix, Admission)]) -> Self {
        let mut by_number: BTreeMap<u32, Vec<SourceEntry>> = BTreeMap::new();
        for (prefix, admission) in prefixes {
            let entries = by_number.entry(prefix.key.list()).or_default();
            entries.push(SourceEntry {
                prefix: *prefix,
                admission: Some(*admission),
            });
        }
        let list = |(number, entries): (u32, Vec<SourceEntry>)| {
            let entries = entries.into();
            (number, List { number, entries })
        };
        let lists: BTreeMap<_, _> = by_number.into_iter().map(list).collect();
        Self {
            last: lists.keys().next_back().copied().unwrap_or(0),
            prefixes: prefixes.len() as u32,
            lists,
        }
    }

    /// A list for a rule.
    pub fn take(&mut self, spec: &RuleSpec) -> Result<List, Refusal> {
        if spec.sources().is_empty() {
            return Ok(List::default());
        }
        let number = self.free_number();
        let list = List {
            number,
            entries: spec.sources().entries(number, spec.family()).into(),
        };
        let prefixes = self.prefixes.saturating_add(list.entries.len() as u32);
        if prefixes > MAX_SOURCES {
            return Err(Refusal::TooManySources {
                capacity: MAX_SOURCES,
            });
        }
        self.prefixes = prefixes;
        self.last = number;
        self.lists.insert(number, list.clone());
        Ok(list)
    }

    /// Takes a list back that no rule names.
    pub fn give(&mut self, list: &List) {
        if let Some(list) = self.lists.remove(&list.number) {
            self.prefixes -= list.entries.len() as u32;
        }
    }

    /// The list of a number.
    pub fn list(&self, number: u32) -> List {
        self.lists.get(&number).cloned().unwrap_or_default()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &List> {
        self.lists.values()
    }

    /// Numbers are given one after another; after four billion changes, those in use are left out.
    fn free_number(&self) -> u32 {
        let mut number = self.last;
        loop {
            number = number.checked_add(1).unwrap_or(1);
            if !self.lists.contains_key(&number) {
                return number;
            }
        }
    }
}
