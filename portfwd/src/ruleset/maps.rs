//! The maps that rules are lowered to: the kernel's, or a model of them in tests.

use anyhow::Result;
use portfwd_common::abi;

use super::{lower::Write, prefix::Entry};
use crate::bpf::Tables;

/// Where [`Write`]s go.
pub trait RuleMaps {
    /// The elements of RULES that anybody has, by slot.
    fn rules(&self) -> Result<Vec<(u16, abi::Rule)>>;
    /// Elements of COUNTERS.
    fn max_ports(&self) -> u32;
    /// Carries one write out.
    fn write(&mut self, write: &Write) -> Result<()>;
}

impl RuleMaps for Tables {
    fn rules(&self) -> Result<Vec<(u16, abi::Rule)>> {
        Self::rules(self)
    }

    fn max_ports(&self) -> u32 {
        Self::max_ports(self)
    }

    fn write(&mut self, write: &Write) -> Result<()> {
        match write {
            Write::ClearCounters { first, count } => self.clear_counters(*first, *count),
            Write::Rule { slot, rule } => self.write_rule(*slot, rule),
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
            Write::Ports { first_index, words } => self.write_ports(*first_index, words),
            Write::BumpGeneration => self.bump_generation(),
        }
    }
}
