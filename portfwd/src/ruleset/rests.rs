//! Rules for everything else as RESTS holds them.

use std::collections::BTreeMap;

use portfwd_common::{abi, net::Ipv6};

use super::{
    RuleSpec, element,
    prefix::{Entry, PortBlock, Prefix},
};

/// What rules for everything else leave to the gateway, by slot. An element of RULES does not say it.
#[derive(Debug, Default)]
pub struct Rests(BTreeMap<u16, Vec<PortBlock>>);

impl Rests {
    /// The rule of this slot says this from here on.
    pub fn set(&mut self, slot: u16, rule: &abi::Rule, spec: &RuleSpec) {
        if rule.is_rest() {
            let blocks = spec.exceptions().iter();
            let blocks = blocks.flat_map(|exception| exception.blocks(rule.protocol()));
            self.0.insert(slot, blocks.collect());
        }
    }

    /// Nobody has the slot any more.
    pub fn forget(&mut self, slot: u16) {
        self.0.remove(&slot);
    }

    /// The slots of all such rules, whether packets find them or not.
    pub fn slots(&self) -> impl Iterator<Item = u16> {
        self.0.keys().copied()
    }

    /// The keys of RESTS that belong to a rule, each with what it holds.
    pub fn entries(&self, slot: u16, rule: &abi::Rule) -> Vec<Entry> {
        let exceptions = self.0.get(&slot).into_iter().flatten();
        let exceptions = exceptions.map(|block| Entry {
            prefix: block.prefix(address(rule), element::class(rule)),
            slot: Some(0),
        });
        let all = Entry {
            prefix: all_ports(rule),
            slot: Some(slot),
        };
        exceptions.chain([all]).collect()
    }
}

fn address(rule: &abi::Rule) -> Ipv6 {
    if rule.is_any_address() {
        Ipv6::UNSPECIFIED
    } else {
        rule.listen
    }
}

/// The key of everything that the rule may take.
fn all_ports(rule: &abi::Rule) -> Prefix {
    let first = PortBlock { port: 0, bits: 0 };
    let prefix = first.prefix(address(rule), element::class(rule));
    Prefix {
        length: prefix.length - u16::BITS,
        ..prefix
    }
}
