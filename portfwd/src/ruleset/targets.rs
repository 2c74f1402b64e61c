//! Which rules have an endpoint as target: what TARGETS must say, and whose replies the datapath
//! can translate without entry.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, HashSet},
};

use portfwd_common::net::Ipv6;

use super::prefix::{Entry, PortBlock};

/// Blocks by first port, larger before smaller: a block is followed by all that lie in it.
type Order = (u16, Reverse<u32>);

type Blocks = BTreeMap<Order, Block>;

/// Largest block, as power of two.
const MAX_BITS: u32 = 15;

#[derive(Debug, Default)]
struct Block {
    /// Rules whose target range has this very block.
    rules: Vec<u16>,
    /// What TARGETS says, once it says anything: the rule if it is the only one of this block and
    /// of those around it, else 0.
    word: Option<u16>,
}

/// The target side of a rule in one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetScope {
    /// [`portfwd_common::abi::Protocol::class`].
    pub class: u16,
    /// Target address.
    pub address: Ipv6,
    /// First target port.
    pub first: u16,
    /// Last target port.
    pub last: u16,
}

/// All targets of all rules.
#[derive(Debug, Default)]
pub struct Targets {
    blocks: HashMap<(u16, Ipv6), Blocks>,
    scopes: HashMap<u16, TargetScope>,
    /// Rules with a target endpoint that another rule has too.
    shared: HashSet<u16>,
}

/// What a change of [`Targets`] brings about.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TargetChange {
    /// Writes to TARGETS.
    pub entries: Vec<Entry>,
    /// Other rules that began or ceased to share an endpoint by it.
    pub changed: Vec<u16>,
}

impl Targets {
    /// A rule's target is added.
    pub fn insert(&mut self, target: TargetScope, slot: u16) -> TargetChange {
        let change = self.change(target, slot, |blocks, order| {
            blocks.entry(order).or_default().rules.push(slot);
        });
        self.scopes.insert(slot, target);
        self.refresh_shared(slot);
        change
    }

    /// A rule's target is taken away.
    pub fn remove(&mut self, target: TargetScope, slot: u16) -> TargetChange {
        self.scopes.remove(&slot);
        self.shared.remove(&slot);
        self.change(target, slot, |blocks, order| {
            if let Some(block) = blocks.get_mut(&order) {
                block.rules.retain(|rule| *rule != slot);
            }
        })
    }

    /// Whether another rule has one of this rule's target endpoints.
    pub fn is_shared(&self, slot: u16) -> bool {
        self.shared.contains(&slot)
    }

    fn change(
        &mut self,
        target: TargetScope,
        slot: u16,
        edit: impl Fn(&mut Blocks, Order),
    ) -> TargetChange {
        let TargetScope {
            class,
            address,
            first,
            last,
        } = target;
        let blocks = self.blocks.entry((class, address)).or_default();
        let mut change = TargetChange::default();
        for block in PortBlock::cover(first, last) {
            edit(blocks, order(block));
            change.changed.extend(loners(blocks, block, slot));
            for part in parts(blocks, block) {
                let prefix = part.prefix(address, class);
                let entry = |slot| Entry { prefix, slot };
                change.entries.extend(refresh(blocks, part).map(entry));
            }
        }
        if blocks.is_empty() {
            self.blocks.remove(&(class, address));
        }
        change.changed.sort_unstable();
        change.changed.dedup();
        change.changed.retain(|other| self.refresh_shared(*other));
        change
    }

    /// Finds out anew whether a rule shares an endpoint; whether that has changed.
    fn refresh_shared(&mut self, slot: u16) -> bool {
        let Some(TargetScope {
            class,
            address,
            first,
            last,
        }) = self.scopes.get(&slot).copied()
        else {
            return false;
        };
        let Some(blocks) = self.blocks.get(&(class, address)) else {
            return false;
        };
        let has_company = |block: PortBlock| {
            let inner = within(blocks, block).flat_map(|(_, block)| &block.rules);
            around(blocks, block).chain(inner).any(|rule| *rule != slot)
        };
        if PortBlock::cover(first, last).into_iter().any(has_company) {
            self.shared.insert(slot)
        } else {
            self.shared.remove(&slot)
        }
    }

    /// Everything TARGETS must hold.
    pub fn all(&self) -> impl Iterator<Item = Entry> {
        self.blocks.iter().flat_map(|((class, address), blocks)| {
            blocks.iter().map(|((port, Reverse(bits)), block)| {
                let own = PortBlock {
                    port: *port,
                    bits: *bits,
                };
                Entry {
                    prefix: own.prefix(*address, *class),
                    slot: block.word,
                }
            })
        })
    }
}

/// Computes a block's word anew; what to write if that changes anything.
fn refresh(blocks: &mut Blocks, block: PortBlock) -> Option<Option<u16>> {
    let own = blocks.get(&order(block))?;
    if own.rules.is_empty() {
        blocks.remove(&order(block));
        return Some(None);
    }
    let word = {
        let mut all = own.rules.iter().chain(around(blocks, block));
        match (all.next(), all.next()) {
            (Some(rule), None) => *rule,
            (_, _) => 0,
        }
    };
    let own = blocks.get_mut(&order(block))?;
    let before = own.word.replace(word);
    (before != own.word).then_some(own.word)
}

/// This block and the smaller ones in it, as a list of their own.
fn parts(blocks: &Blocks, block: PortBlock) -> Vec<PortBlock> {
    let part = |((port, Reverse(bits)), _): (&Order, &Block)| PortBlock {
        port: *port,
        bits: *bits,
    };
    within(blocks, block).map(part).collect()
}

const fn order(block: PortBlock) -> Order {
    (block.port, Reverse(block.bits))
}

/// Rules, but `slot`, that have a block around or within this one for themselves: only they can
/// begin or cease to share it with `slot`. Where several rules have a block, they share it with
/// each other, whatever comes or goes.
fn loners(blocks: &Blocks, block: PortBlock, slot: u16) -> Vec<u16> {
    let inner = within(blocks, block).map(|(_, block)| block);
    let lonely = |block: &Block| {
        let mut others = block.rules.iter().copied().filter(|rule| *rule != slot);
        others.next().filter(|_| others.next().is_none())
    };
    blocks_around(blocks, block)
        .chain(inner)
        .filter_map(lonely)
        .collect()
}

/// The rules of the larger blocks that hold this one.
fn around(blocks: &Blocks, block: PortBlock) -> impl Iterator<Item = &u16> {
    blocks_around(blocks, block).flat_map(|block| &block.rules)
}

fn blocks_around(blocks: &Blocks, block: PortBlock) -> impl Iterator<Item = &Block> {
    (block.bits + 1..=MAX_BITS)
        .filter_map(move |bits| blocks.get(&(block.port & (u16::MAX << bits), Reverse(bits))))
}

/// This block and the smaller ones in it.
fn within(blocks: &Blocks, block: PortBlock) -> impl Iterator<Item = (&Order, &Block)> {
    let last = block.port | !(u16::MAX << block.bits);
    blocks.range(order(block)..=(last, Reverse(0)))
}
