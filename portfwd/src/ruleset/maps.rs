//! The maps that rules are lowered to: the kernel's, or a model of them in tests.

use anyhow::Result;
use portfwd_common::abi::{self, Admission};

use super::{
    prefix::{Entry, Prefix},
    sources::{SourceEntry, SourcePrefix},
    write::{Lighting, Remembering, Write},
};
use crate::{bpf::Tables, netlink::conntrack};

/// Where [`Write`]s go.
pub trait RuleMaps {
    /// The elements of RULES that anybody has, by slot.
    fn rules(&self) -> Result<Vec<(u16, abi::Rule)>>;
    /// Everything in SOURCES.
    fn sources(&self) -> Result<Vec<(SourcePrefix, Admission)>>;
    /// The keys of RESTS.
    fn rests(&self) -> Result<Vec<Prefix>>;
    /// Elements of COUNTERS.
    fn max_ports(&self) -> u32;
    /// Carries one write out.
    fn write(&mut self, write: &Write) -> Result<()>;
}

impl RuleMaps for Tables {
    fn rules(&self) -> Result<Vec<(u16, abi::Rule)>> {
        Self::rules(self)
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

    fn write(&mut self, write: &Write) -> Result<()> {
        match write {
            Write::ClearCounters { first, count } => self.clear_counters(*first, *count),
            Write::Rule { slot, rule } => {
                self.write_rule(*slot, rule)?;
                // Before the write that makes the rule visible, what is to stand for its clients must be there.
                if rule.is_active() && rule.is_snat() {
                    self.make_pools()?;
                }
                Ok(())
            }
            Write::Listen(Entry {
                prefix,
                slot: Some(slot),
            }) => self.insert_listen(prefix.length, prefix.key, *slot),
            Write::Listen(Entry { prefix, slot: None }) => {
                self.remove_listen(prefix.length, prefix.key).map(drop)
            }
            Write::Target(Entry {
                prefix,
                slot: Some(slot),
            }) => self.insert_target(prefix.length, prefix.key, *slot),
            Write::Target(Entry { prefix, slot: None }) => {
                self.remove_target(prefix.length, prefix.key).map(drop)
            }
            Write::Rest(Entry {
                prefix,
                slot: Some(slot),
            }) => self.insert_rest(prefix.length, prefix.key, *slot),
            Write::Rest(Entry { prefix, slot: None }) => {
                self.remove_rest(prefix.length, prefix.key).map(drop)
            }
            Write::Remember(Remembering::On) => begin_to_remember(self),
            Write::Remember(Remembering::Off) => self.set_rests(false).map(drop),
            Write::Light(lighting) => self.set_lights(*lighting == Lighting::On),
            Write::Source(SourceEntry {
                prefix,
                admission: Some(admission),
            }) => self.insert_source(*prefix, *admission),
            Write::Source(SourceEntry {
                prefix,
                admission: None,
            }) => self.remove_source(*prefix).map(drop),
            Write::Ports { first_index, words } => self.write_ports(*first_index, words),
            Write::BumpGeneration => self.bump_generation(),
        }
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
