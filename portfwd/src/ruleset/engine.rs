//! Changes of the ruleset, carried out whole or not at all: checked, written to the maps, committed
//! to the state file.

use std::{collections::BTreeSet, net::IpAddr};

use portfwd_common::abi;

use super::{
    Changed, Edit, FlowPolicy, Refusal, Rejected, Rule, RuleMaps, RuleSpec, Ruleset,
    lower::{self, Coming, Lowering, Opening, Write},
    transaction::Plan,
};
use crate::{
    failure::{Failure, Kind, Result},
    state::{State, Transaction},
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
        let specs = rules.iter().map(|rule| Coming {
            id: rule.id,
            spec: &rule.spec,
            opening: Opening::Open,
        });
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
        let changed = self.change(vec![Edit::Add(spec)], maps, state)?;
        let ids: Vec<_> = changed.added.iter().map(|rule| rule.id).collect();
        ids.first()
            .copied()
            .ok_or_else(|| Failure::new(Kind::Failed, "the rule was not added"))
    }

    /// The ids that ids and names stand for; one that is named twice is there once.
    pub fn find(&self, selectors: &[String]) -> Result<Vec<u32>, Refusal> {
        let ids = selectors.iter().map(|selector| self.ruleset.find(selector));
        let mut ids = ids.collect::<Result<Vec<u32>, Refusal>>()?;
        let mut seen = BTreeSet::new();
        ids.retain(|id| seen.insert(*id));
        Ok(ids)
    }

    /// Carries edits out as one: the next packet follows all of them, and they are on disk, when
    /// this returns; or everything is as it was. A packet that comes meanwhile finds what held
    /// before or what holds after, and rules that are not edited all the time.
    pub fn change(
        &mut self,
        edits: Vec<Edit>,
        maps: &mut dyn RuleMaps,
        state: &State,
    ) -> Result<Changed, Rejected> {
        self.change_with(edits, maps, state, |_| Ok(()))
    }

    /// The same; `record` puts more into the transaction of the state file.
    pub fn change_with(
        &mut self,
        edits: Vec<Edit>,
        maps: &mut dyn RuleMaps,
        state: &State,
        record: impl FnOnce(&Transaction) -> Result<()>,
    ) -> Result<Changed, Rejected> {
        let plan = self.plan(edits)?;
        let change = match self.lower(&plan) {
            Ok(change) => change,
            Err(refusal) => {
                plan.unmake(&mut self.ruleset);
                return Err(Rejected::Failed(refusal.into()));
            }
        };
        let next_id = plan
            .changed
            .added
            .iter()
            .map(|rule| rule.id.saturating_add(1))
            .fold(self.next_id, u32::max);
        let done = state.begin().and_then(|transaction| {
            transaction.store_rules(plan.changed.arrivals())?;
            transaction.remove_rules(plan.changed.removed.iter().map(|rule| rule.id))?;
            transaction.set_next_id(next_id)?;
            transaction.set_slot_cursor(self.lowering.cursor())?;
            record(&transaction)?;
            carry_out(&change.writes, maps)?;
            transaction.commit()
        });
        if let Err(failure) = done {
            undo(&self.lowering.undo(&change), maps);
            plan.unmake(&mut self.ruleset);
            return Err(Rejected::Failed(failure));
        }
        self.lowering.finish(&change);
        self.next_id = next_id;
        Ok(plan.changed)
    }

    /// What [`Self::change`] would do, and whether it would; nothing is changed.
    pub fn try_change(&mut self, edits: Vec<Edit>) -> Result<Changed, Rejected> {
        let plan = self.plan(edits)?;
        let change = self.lower(&plan);
        if let Ok(change) = &change {
            // Only memory has changed: there is nothing to write.
            self.lowering.undo(change);
        }
        let changed = plan.changed.clone();
        plan.unmake(&mut self.ruleset);
        match change {
            Ok(_) => Ok(changed),
            Err(refusal) => Err(Rejected::Failed(refusal.into())),
        }
    }

    fn plan(&mut self, edits: Vec<Edit>) -> Result<Plan, Rejected> {
        let wan = &self.wan;
        let check = |ruleset: &Ruleset, spec: &RuleSpec| ruleset.check(spec, wan);
        Plan::make(&mut self.ruleset, edits, self.next_id, check).map_err(Rejected::Refused)
    }

    fn lower(&mut self, plan: &Plan) -> Result<lower::Change, Refusal> {
        let ruleset = &self.ruleset;
        let coming = plan.coming.iter().filter_map(|id| {
            Some(Coming {
                id: *id,
                spec: ruleset.rule(*id)?,
                opening: Opening::Open,
            })
        });
        let coming: Vec<_> = coming.collect();
        self.lowering.change(&plan.going, &coming)
    }

    /// Removes rules by id or name, all or none: the next packet finds none of them. Naming one
    /// twice removes it once. `flows` is what becomes of their flows, unless a rule says otherwise.
    pub fn remove(
        &mut self,
        selectors: &[String],
        flows: Option<FlowPolicy>,
        maps: &mut dyn RuleMaps,
        state: &State,
    ) -> Result<Vec<Rule>> {
        let remove = |id: u32| Edit::Remove {
            id,
            flows: self.policy(id, flows, FlowPolicy::Kill),
        };
        let edits = self.find(selectors)?.into_iter().map(remove).collect();
        Ok(self.change(edits, maps, state)?.removed)
    }

    /// What becomes of the flows of a rule that goes: what the command says, else what the rule
    /// says, else the default.
    pub fn policy(&self, id: u32, command: Option<FlowPolicy>, default: FlowPolicy) -> FlowPolicy {
        let of_rule = || self.ruleset.rule(id).and_then(RuleSpec::flows);
        command.or_else(of_rule).unwrap_or(default)
    }

    /// Slots of rules that are gone or closed while flows of theirs may go on.
    pub fn draining(&self) -> impl Iterator<Item = u16> {
        self.lowering.draining()
    }

    /// Frees what rules that are gone have left, where no flow names their slots any more.
    pub fn release(
        &mut self,
        is_in_use: impl Fn(u16) -> bool,
        maps: &mut dyn RuleMaps,
    ) -> Result<()> {
        let change = self.lowering.release(is_in_use);
        if let Err(failure) = carry_out(&change.writes, maps) {
            undo(&self.lowering.undo(&change), maps);
            return Err(failure);
        }
        self.lowering.finish(&change);
        Ok(())
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
