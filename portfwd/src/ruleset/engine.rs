//! Changes of the ruleset, carried out whole or not at all: checked, written to the maps, committed
//! to the state file.

use std::net::IpAddr;

use portfwd_common::abi;

use super::{
    Refusal, Rule, RuleMaps, RuleSpec, Ruleset,
    lower::{Lowering, TakenOut, Write},
};
use crate::{
    failure::{Failure, Kind, Result},
    state::State,
};

/// The ruleset, and what the maps hold on its behalf.
#[derive(Debug)]
pub struct Engine {
    ruleset: Ruleset,
    lowering: Lowering,
    wan: Vec<IpAddr>,
    next_id: u32,
}

impl Engine {
    /// Makes the maps hold the rules of the state file. Rules that they hold already keep their
    /// slots and counters, so their flows go on; what else they hold is removed. `wan` are the own
    /// addresses of the WAN interfaces.
    pub fn adopt(state: &State, maps: &mut dyn RuleMaps, wan: Vec<IpAddr>) -> Result<Self> {
        let rules = state.rules()?;
        let kernel = maps.rules()?;
        let specs = rules.iter().map(|rule| (rule.id, &rule.spec));
        let (lowering, writes) =
            Lowering::adopt(specs, &kernel, maps.max_ports(), state.slot_cursor()?, &wan)?;
        for write in &writes {
            maps.write(write)?;
        }
        let transaction = state.begin()?;
        transaction.set_slot_cursor(lowering.cursor())?;
        transaction.commit()?;
        let mut ruleset = Ruleset::default();
        for Rule { id, spec } in rules {
            ruleset.insert(id, spec);
        }
        Ok(Self {
            ruleset,
            lowering,
            wan,
            next_id: state.next_id()?,
        })
    }

    /// The rules.
    pub fn ruleset(&self) -> &Ruleset {
        &self.ruleset
    }

    /// Everything in RULES, by slot.
    pub fn placed(&self) -> impl Iterator<Item = (u16, abi::Rule)> {
        self.lowering.rules()
    }

    /// The own addresses of the WAN interfaces.
    pub fn wan_addresses(&self) -> &[IpAddr] {
        &self.wan
    }

    /// Adds a rule: it holds for the next packet, and is on disk, when this returns its id.
    pub fn add(&mut self, spec: RuleSpec, maps: &mut dyn RuleMaps, state: &State) -> Result<u32> {
        self.ruleset.check(&spec, &self.wan)?;
        let id = self.next_id;
        let next_id = id
            .checked_add(1)
            .ok_or_else(|| Failure::new(Kind::Failed, "no rule ids are left"))?;
        let rule = Rule { id, spec };
        let writes = self.lowering.add(id, &rule.spec)?;
        let done = state.begin().and_then(|transaction| {
            transaction.insert_rule(&rule, self.lowering.cursor())?;
            carry_out(&writes, maps)?;
            transaction.commit()
        });
        if let Err(failure) = done {
            undo(&self.lowering.undo_add(id), maps);
            return Err(failure);
        }
        self.ruleset.insert(id, rule.spec);
        self.next_id = next_id;
        Ok(id)
    }

    /// Removes rules by id or name, all or none: the next packet finds none of them. Naming one
    /// twice removes it once.
    pub fn remove(
        &mut self,
        selectors: &[String],
        maps: &mut dyn RuleMaps,
        state: &State,
    ) -> Result<Vec<Rule>> {
        let mut ids = selectors
            .iter()
            .map(|selector| self.ruleset.find(selector))
            .collect::<Result<Vec<u32>, Refusal>>()?;
        let mut seen = std::collections::BTreeSet::new();
        ids.retain(|id| seen.insert(*id));
        let mut taken: Vec<TakenOut> = Vec::new();
        let done = state.begin().and_then(|transaction| {
            for id in &ids {
                transaction.remove_rule(*id)?;
                taken.push(self.lowering.take_out(*id));
                carry_out(taken.last().map_or(&[], |taken| &taken.writes), maps)?;
            }
            transaction.commit()
        });
        if let Err(failure) = done {
            for taken in taken.iter().rev() {
                undo(&self.lowering.put_back(taken), maps);
            }
            return Err(failure);
        }
        taken.iter().for_each(|taken| self.lowering.finish(taken));
        Ok(ids
            .into_iter()
            .filter_map(|id| {
                Some(Rule {
                    id,
                    spec: self.ruleset.remove(id)?,
                })
            })
            .collect())
    }

    /// The own addresses of the WAN interfaces are these now.
    pub fn set_wan_addresses(
        &mut self,
        addresses: Vec<IpAddr>,
        maps: &mut dyn RuleMaps,
    ) -> Result<()> {
        let writes = self.lowering.set_wan_addresses(&addresses);
        if let Err(failure) = carry_out(&writes, maps) {
            undo(&self.lowering.set_wan_addresses(&self.wan), maps);
            return Err(failure);
        }
        self.wan = addresses;
        Ok(())
    }
}

fn carry_out(writes: &[Write], maps: &mut dyn RuleMaps) -> Result<()> {
    for write in writes {
        maps.write(write)?;
    }
    Ok(())
}

/// Writes that undo others, some of which may not have happened: every one is tried.
fn undo(writes: &[Write], maps: &mut dyn RuleMaps) {
    for write in writes {
        if let Err(error) = maps.write(write) {
            log::warn!("undoing a change that failed: {error:#}");
        }
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
