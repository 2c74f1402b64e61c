//! The maps that rules are lowered to: the kernel's, or a model of them in tests.

use anyhow::Result;
use portfwd_common::abi::{self, Admission, Bank};

use super::{
    prefix::{Entry, Prefix},
    sources::{SourceEntry, SourcePrefix},
    write::{Lighting, Remembering, RuleWrite, Step, Write},
};
use crate::{
    bpf::{EndpointTrie, Tables},
    netlink::conntrack,
};

/// Where the steps of a change go.
pub trait RuleMaps {
    /// The bank of the rule tables that packets look at.
    fn bank(&self) -> Result<Bank>;
    /// The elements of RULES that anybody has in a bank, by slot.
    fn rules_in(&self, bank: Bank) -> Result<Vec<(u16, abi::Rule)>>;
    /// Everything in SOURCES.
    fn sources(&self) -> Result<Vec<(SourcePrefix, Admission)>>;
    /// The keys of RESTS in either bank.
    fn rests(&self) -> Result<Vec<Prefix>>;
    /// Elements of COUNTERS.
    fn max_ports(&self) -> u32;
    /// Carries one step out.
    fn carry_out(&mut self, step: Step<'_>) -> Result<()>;
}

impl RuleMaps for Tables {
    fn bank(&self) -> Result<Bank> {
        Ok(self.config()?.bank())
    }

    fn rules_in(&self, bank: Bank) -> Result<Vec<(u16, abi::Rule)>> {
        Self::rules_in(self, bank)
    }

    fn sources(&self) -> Result<Vec<(SourcePrefix, Admission)>> {
        Self::sources(self)
    }

    fn rests(&self) -> Result<Vec<Prefix>> {
        let rests = Self::rests(self)?.into_iter();
        let prefix = |(length, key)| Prefix { length, key };
        Ok(rests.map(prefix).collect())
    }

    fn max_ports(&self) -> u32 {
        Self::max_ports(self)
    }

    fn carry_out(&mut self, step: Step<'_>) -> Result<()> {
        match step {
            Step::Once(write) => write_once(self, write),
            Step::In(bank, write) => write_in(self, bank, write),
            Step::Turn { to, asks_flows } => self.turn(to, asks_flows),
        }
    }
}

fn write_in(tables: &mut Tables, bank: Bank, write: &RuleWrite) -> Result<()> {
    match write {
        RuleWrite::Rule { slot, rule } => {
            tables.write_rule(bank, *slot, rule)?;
            // Before packets find the rule, what is to stand for its clients must be there.
            if rule.is_active() && rule.is_snat() {
                tables.make_pools_for(&[(*slot, *rule)])?;
            }
            Ok(())
        }
        RuleWrite::Listen(entry) => write_entry(tables, EndpointTrie::Listens, bank, entry),
        RuleWrite::Target(entry) => write_entry(tables, EndpointTrie::Targets, bank, entry),
        RuleWrite::Rest(entry) => write_entry(tables, EndpointTrie::Rests, bank, entry),
        RuleWrite::Ports { first_index, words } => tables.write_ports(bank, *first_index, words),
    }
}

fn write_entry(
    tables: &mut Tables,
    trie: EndpointTrie,
    bank: Bank,
    Entry { prefix, slot }: &Entry,
) -> Result<()> {
    tables.write_endpoint(trie, bank, prefix.length, prefix.key, *slot)
}

fn write_once(tables: &mut Tables, write: &Write) -> Result<()> {
    match write {
        Write::ClearCounters { first, count } => tables.clear_counters(*first, *count),
        Write::Remember(Remembering::On) => begin_to_remember(tables),
        Write::Remember(Remembering::Off) => tables.set_rests(false).map(drop),
        Write::Light(lighting) => tables.set_lights(*lighting == Lighting::On),
        Write::Source(SourceEntry {
            prefix,
            admission: Some(admission),
        }) => tables.insert_source(*prefix, *admission),
        Write::Source(SourceEntry {
            prefix,
            admission: None,
        }) => tables.remove_source(*prefix).map(drop),
    }
}

/// Has the datapath remember what leaves, and then takes over what is under way: in this order nothing falls between.
fn begin_to_remember(tables: &mut Tables) -> Result<()> {
    if !tables.set_rests(true)? {
        return Ok(());
    }
    match conntrack::tuples() {
        Ok(tuples) => tables.await_answers(&tuples),
        Err(error) => {
            log::warn!(
                "answers to what this gateway, and machines behind its masquerade, have sent before are not known, and a new dmz rule may take some: {error:#}"
            );
            Ok(())
        }
    }
}
