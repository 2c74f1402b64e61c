//! Changes of the ruleset, carried out whole or not at all: checked, written to the maps, committed
//! to the state file.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use jiff::Timestamp;
use portfwd_common::abi;

use super::{
    Changed, Edit, FlowPolicy, Network, Refusal, Rejected, Rule, RuleMaps, RuleSpec, Ruleset,
    adopt::Held,
    lease::{Expires, Lease, Now},
    lower::{self, Lowering},
    movement::{Coming, Relisted, Staying},
    networks,
    timed::{Leases, leases_of_this_boot},
    transaction::Plan,
    write::Writes,
};
use crate::{
    failure::{Failure, Kind, Result},
    state::{State, Transaction},
};

/// The ruleset, and what the maps hold on its behalf.
#[derive(Debug)]
pub struct Engine {
    pub(super) ruleset: Ruleset,
    pub(super) lowering: Lowering,
    wan: Vec<IpAddr>,
    networks: Vec<Network>,
    next_id: u32,
    /// Lengths of time that run, by rule.
    pub(super) leases: BTreeMap<u32, Lease>,
    /// What undoes a change, where undoing has failed, too: nothing else is written before it.
    owed: Option<Writes>,
}

/// Where a change is carried out, and when.
pub struct Site<'a> {
    /// The maps.
    pub maps: &'a mut dyn RuleMaps,
    /// The state file.
    pub state: &'a State,
    /// What the clocks say.
    pub now: Now,
}

impl Engine {
    /// Makes the maps hold the rules of the state file. Rules that they hold already keep their
    /// slots and counters, so their flows go on; what else they hold is removed. `wan` are the own
    /// addresses of the WAN interfaces.
    pub fn adopt(site: Site<'_>, wan: Vec<IpAddr>) -> Result<Self> {
        let Site { maps, state, now } = site;
        let rules = state.rules()?;
        let held = Held::by(maps)?;
        let specs = rules.iter().map(|rule| Coming {
            id: rule.id,
            spec: &rule.spec,
            opening: rule.spec.opening(now.wall),
        });
        let max_ports = maps.max_ports();
        let (mut lowering, writes) =
            Lowering::adopt(specs, &held, max_ports, state.slot_cursor()?, &wan)?;
        // Rules that have closed while no daemon ran.
        let is_late = |rule: &&Rule| lowering.opening(rule.id) != rule.spec.opening(now.wall);
        let late = rules.iter().filter(is_late).map(|rule| Staying {
            id: rule.id,
            opening: rule.spec.opening(now.wall),
            flows: rule.spec.flows().unwrap_or(FlowPolicy::Drain),
        });
        let late: Vec<_> = late.collect();
        let late = lowering.change(&[], &late, &[], &[])?;
        carry_out(&writes, maps)?;
        carry_out(&late.writes, maps)?;
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
            networks: Vec::new(),
            next_id: state.next_id()?,
            leases: leases_of_this_boot(state)?,
            owed: None,
        })
    }

    /// Rules that are in no map, to try changes on.
    pub fn on_paper(
        state: Option<&State>,
        now: Now,
        max_ports: u32,
        wan: Vec<IpAddr>,
    ) -> Result<Self> {
        let rules = state.map_or(Ok(Vec::new()), State::rules)?;
        let specs = rules.iter().map(|rule| Coming {
            id: rule.id,
            spec: &rule.spec,
            opening: rule.spec.opening(now.wall),
        });
        let (lowering, _) = Lowering::adopt(specs, &Held::default(), max_ports, 0, &wan)?;
        let mut ruleset = Ruleset::default();
        for Rule { id, spec } in rules {
            ruleset.insert(id, spec);
        }
        Ok(Self {
            ruleset,
            lowering,
            wan,
            networks: Vec::new(),
            next_id: state.map_or(Ok(1), State::next_id)?,
            leases: BTreeMap::new(),
            owed: None,
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

    /// The gateway has addresses in these networks now. Rules that are there stay, also those whose target is no machine's address
    /// any more: a network may be there for a moment only.
    pub fn set_networks(&mut self, networks: Vec<Network>) {
        self.networks = networks;
    }

    /// Adds a rule: it holds for the next packet, and is on disk, when this returns it.
    pub fn add(&mut self, spec: RuleSpec, site: Site<'_>) -> Result<Rule> {
        let changed = self.change(vec![Edit::Add(spec)], site)?;
        let added = changed.added.into_iter().next();
        added.ok_or_else(|| Failure::new(Kind::Failed, "the rule was not added"))
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
    pub fn change(&mut self, edits: Vec<Edit>, site: Site<'_>) -> Result<Changed, Rejected> {
        self.change_with(edits, site, |_, _| Ok(()))
    }

    /// The same; `record` puts more into the transaction of the state file.
    pub fn change_with(
        &mut self,
        edits: Vec<Edit>,
        site: Site<'_>,
        record: impl FnOnce(&Transaction, &Changed) -> Result<()>,
    ) -> Result<Changed, Rejected> {
        let leases = Leases::of(&edits, site.now).map_err(Rejected::Failed)?;
        let edits = leases.settle(edits, site.now);
        let plan = self.plan(edits, site.now)?;
        let staying = self.staying(&plan.changed, site.now.wall);
        self.carry_out(plan, &staying, &leases, site, record)
    }

    pub(super) fn carry_out(
        &mut self,
        plan: Plan,
        staying: &[Staying],
        leases: &Leases,
        site: Site<'_>,
        record: impl FnOnce(&Transaction, &Changed) -> Result<()>,
    ) -> Result<Changed, Rejected> {
        let Site { maps, state, now } = site;
        if let Err(failure) = self.settle(maps) {
            plan.unmake(&mut self.ruleset);
            return Err(Rejected::Failed(failure));
        }
        let change = match self.lower(&plan, staying, now.wall) {
            Ok(change) => change,
            Err(refusal) => {
                plan.unmake(&mut self.ruleset);
                return Err(Rejected::Failed(refusal.into()));
            }
        };
        let next_id = plan.changed.next_id(self.next_id);
        let timing = leases.timing(&plan.changed);
        let done = state.begin().and_then(|transaction| {
            transaction.store_rules(plan.changed.arrivals())?;
            transaction.remove_rules(plan.changed.removed.iter().map(|rule| rule.id))?;
            transaction.set_leases(&timing)?;
            transaction.set_next_id(next_id)?;
            transaction.set_slot_cursor(self.lowering.cursor())?;
            record(&transaction, &plan.changed)?;
            carry_out(&change.writes, maps)?;
            transaction.commit()
        });
        if let Err(failure) = done {
            let undoing = self.lowering.undo(&change);
            self.undo(undoing, maps);
            plan.unmake(&mut self.ruleset);
            return Err(Rejected::Failed(failure));
        }
        self.lowering.finish(&change);
        self.next_id = next_id;
        for (id, lease) in timing {
            match lease {
                Some(lease) => drop(self.leases.insert(id, lease)),
                None => drop(self.leases.remove(&id)),
            }
        }
        Ok(plan.changed)
    }

    /// What [`Self::change`] would do, and whether it would; nothing is changed.
    pub fn try_change(&mut self, edits: Vec<Edit>, now: Now) -> Result<Changed, Rejected> {
        let edits = Leases::default().settle(edits, now);
        let plan = self.plan(edits, now)?;
        let staying = self.staying(&plan.changed, now.wall);
        let change = self.lower(&plan, &staying, now.wall);
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

    pub(super) fn plan(&mut self, edits: Vec<Edit>, now: Now) -> Result<Plan, Rejected> {
        let (wan, networks) = (&self.wan, &self.networks);
        let check = |ruleset: &Ruleset, spec: &RuleSpec| {
            ruleset.check(spec, wan)?;
            networks::check(spec.target().address, networks)?;
            match spec.expires() {
                Some(Expires::At(end)) if end <= now.wall => Err(Refusal::Expired {
                    end: end.to_string(),
                }),
                Some(Expires::At(_) | Expires::In(_)) | None => Ok(()),
            }
        };
        Plan::make(&mut self.ruleset, edits, self.next_id, check).map_err(Rejected::Refused)
    }

    fn lower(
        &mut self,
        plan: &Plan,
        staying: &[Staying],
        wall: Timestamp,
    ) -> Result<lower::Change, Refusal> {
        let ruleset = &self.ruleset;
        let coming = plan.coming.iter().filter_map(|id| {
            let spec = ruleset.rule(*id)?;
            Some(Coming {
                id: *id,
                spec,
                opening: spec.opening(wall),
            })
        });
        let coming: Vec<_> = coming.collect();
        let relisted = plan.staying.iter().filter_map(|id| {
            let spec = ruleset.rule(*id)?;
            Some(Relisted { id: *id, spec })
        });
        let relisted: Vec<_> = relisted.collect();
        self.lowering
            .change(&plan.going, staying, &coming, &relisted)
    }

    /// Rules that forward as before, but are opened or closed by what they say now.
    fn staying(&self, changed: &Changed, wall: Timestamp) -> Vec<Staying> {
        let stays = |(before, after): &&(Rule, Rule)| before.spec.forwards_like(&after.spec);
        let stay = |(_, after): &(Rule, Rule)| Staying {
            id: after.id,
            opening: after.spec.opening(wall),
            flows: after.spec.flows().unwrap_or(FlowPolicy::Drain),
        };
        changed.replaced.iter().filter(stays).map(stay).collect()
    }

    /// Removes rules by id, name or tag, all or none: the next packet finds none of them. Naming one
    /// twice removes it once. `flows` is what becomes of their flows, unless a rule says otherwise.
    pub fn remove(
        &mut self,
        selectors: &[String],
        tags: &[String],
        flows: Option<FlowPolicy>,
        site: Site<'_>,
    ) -> Result<Vec<Rule>> {
        let remove = |id: u32| Edit::Remove {
            id,
            flows: self.policy(id, flows, FlowPolicy::Kill),
        };
        let mut ids = self.find(selectors)?;
        for tag in tags {
            let tagged: Vec<_> = self.ruleset.tagged(tag).collect();
            if tagged.is_empty() {
                return Err(Refusal::NoSuchTag { tag: tag.clone() }.into());
            }
            ids.extend(tagged);
        }
        ids.sort_unstable();
        ids.dedup();
        let edits = ids.into_iter().map(remove).collect();
        Ok(self.change(edits, site)?.removed)
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
        self.settle(maps)?;
        let change = self.lowering.release(is_in_use);
        if let Err(failure) = carry_out(&change.writes, maps) {
            let undoing = self.lowering.undo(&change);
            self.undo(undoing, maps);
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
        self.settle(maps)?;
        let writes = self.lowering.set_wan_addresses(&addresses);
        if let Err(failure) = carry_out(&writes, maps) {
            let undoing = self.lowering.set_wan_addresses(&self.wan);
            self.undo(undoing, maps);
            return Err(failure);
        }
        self.wan = addresses;
        Ok(())
    }

    /// Undoes a change of which some steps may not have happened. Stops at a step that fails, so that packets do not go over to a
    /// bank that is half written.
    fn undo(&mut self, writes: Writes, maps: &mut dyn RuleMaps) {
        if let Err(error) = carry_out(&writes, maps) {
            log::warn!(
                "a change that failed could not be undone and will be before the next: {error:#}"
            );
            self.owed = Some(writes);
        }
    }

    /// Finishes undoing.
    fn settle(&mut self, maps: &mut dyn RuleMaps) -> Result<()> {
        if let Some(writes) = &self.owed {
            carry_out(writes, maps)?;
        }
        self.owed = None;
        Ok(())
    }
}

fn carry_out(writes: &Writes, maps: &mut dyn RuleMaps) -> Result<()> {
    let bank = maps.bank()?;
    for step in writes.steps(bank) {
        maps.carry_out(step)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
