//! Which rules have an endpoint as target: what TARGETS must say, and whose replies the datapath can translate without entry.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use portfwd_common::net::Ipv6;

use super::ports::PortBlock;

/// Blocks by first port, larger before smaller: a block is followed by all that lie in it.
type Order = (u16, Reverse<u32>);

/// Largest block, as power of two.
const MAX_BITS: u32 = 15;

#[derive(Debug, Default)]
struct Block {
    /// Rules whose target range has this very block.
    rules: Vec<u16>,
    /// What TARGETS says: the rule if it is the only one of this block and of those around it, else 0.
    word: u16,
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

/// A key of TARGETS and what it must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetEntry {
    /// [`portfwd_common::abi::Protocol::class`].
    pub class: u16,
    /// Target address.
    pub address: Ipv6,
    /// Ports.
    pub block: PortBlock,
    /// Rule slot, 0 if several rules share it; `None` to remove the key.
    pub slot: Option<u16>,
}

/// All targets of all rules.
#[derive(Debug, Default)]
pub struct Targets {
    blocks: HashMap<(u16, Ipv6), BTreeMap<Order, Block>>,
}

/// What a change of [`Targets`] brings about.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TargetChange {
    /// Writes to TARGETS.
    pub entries: Vec<TargetEntry>,
    /// Other rules that share a target endpoint with the rule, sorted.
    pub shared_with: Vec<u16>,
}

impl Targets {
    /// A rule's target is added.
    pub fn insert(&mut self, target: TargetScope, slot: u16) -> TargetChange {
        self.change(target, slot, |blocks, order| {
            blocks.entry(order).or_default().rules.push(slot);
        })
    }

    /// A rule's target is taken away.
    pub fn remove(&mut self, target: TargetScope, slot: u16) -> TargetChange {
        self.change(target, slot, |blocks, order| {
            if let Some(block) = blocks.get_mut(&order) {
                block.rules.retain(|rule| *rule != slot);
            }
        })
    }

    fn change(
        &mut self,
        target: TargetScope,
        slot: u16,
        edit: impl Fn(&mut BTreeMap<Order, Block>, Order),
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
            let fresh = !blocks.contains_key(&order(block));
            edit(blocks, order(block));
            change.shared_with.extend(
                around(blocks, block).chain(within(blocks, block).flat_map(|(_, b)| &b.rules)),
            );
            let affected: Vec<PortBlock> = within(blocks, block)
                .map(|((port, Reverse(bits)), _)| PortBlock {
                    port: *port,
                    bits: *bits,
                })
                .collect();
            for part in affected {
                let is_fresh = fresh && part == block;
                change
                    .entries
                    .extend(refresh(blocks, part, is_fresh).map(|slot| TargetEntry {
                        class,
                        address,
                        block: part,
                        slot,
                    }));
            }
        }
        if blocks.is_empty() {
            self.blocks.remove(&(class, address));
        }
        change.shared_with.retain(|rule| *rule != slot);
        change.shared_with.sort_unstable();
        change.shared_with.dedup();
        change
    }

    /// Everything TARGETS must hold.
    pub fn all(&self) -> impl Iterator<Item = TargetEntry> {
        self.blocks.iter().flat_map(|((class, address), blocks)| {
            blocks
                .iter()
                .map(|((port, Reverse(bits)), block)| TargetEntry {
                    class: *class,
                    address: *address,
                    block: PortBlock {
                        port: *port,
                        bits: *bits,
                    },
                    slot: Some(block.word),
                })
        })
    }
}

/// Computes a block's word anew; what to write if that changes anything.
fn refresh(
    blocks: &mut BTreeMap<Order, Block>,
    block: PortBlock,
    is_fresh: bool,
) -> Option<Option<u16>> {
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
    let changed = is_fresh || own.word != word;
    own.word = word;
    changed.then_some(Some(word))
}

const fn order(block: PortBlock) -> Order {
    (block.port, Reverse(block.bits))
}

/// The rules of the larger blocks that hold this one.
fn around(blocks: &BTreeMap<Order, Block>, block: PortBlock) -> impl Iterator<Item = &u16> {
    (block.bits + 1..=MAX_BITS)
        .filter_map(move |bits| blocks.get(&(block.port & (u16::MAX << bits), Reverse(bits))))
        .flat_map(|b| &b.rules)
}

/// This block and the smaller ones in it.
fn within(
    blocks: &BTreeMap<Order, Block>,
    block: PortBlock,
) -> impl Iterator<Item = (&Order, &Block)> {
    let last = block.port | !(u16::MAX << block.bits);
    blocks.range(order(block)..=(last, Reverse(0)))
}
