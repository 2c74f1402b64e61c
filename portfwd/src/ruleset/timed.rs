//! Rules that end, and rules that open and close by the clock.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use jiff::Timestamp;

use super::{
    Changed, Edit, Engine, FlowPolicy, Rejected, Rule, RuleSpec, Schedule, Site,
    lease::{Expires, Lease, Now},
    movement::{Opening, Staying},
};
use crate::{failure::Result, state::State};

/// What the time has brought about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ticked {
    /// Rules whose lease has ended.
    pub ended: Vec<Rule>,
    /// Rules that have opened or closed.
    pub turned: Vec<(u32, Opening)>,
}

/// Lengths of time that begin with a transaction, by the end that was computed for them.
#[derive(Debug, Default)]
pub(super) struct Leases(HashMap<Timestamp, Lease>);

impl Leases {
    pub(super) fn of(edits: &[Edit], now: Now) -> Result<Self> {
        let mut leases = HashMap::new();
        for expires in edits.iter().filter_map(|edit| edit.spec()?.expires()) {
            if let Some(lease) = expires.lease(now)? {
                leases.insert(expires.end(now), lease);
            }
        }
        Ok(Self(leases))
    }

    /// Edits in which every length of time is a point in time.
    pub(super) fn settle(&self, edits: Vec<Edit>, now: Now) -> Vec<Edit> {
        let settle = |edit: Edit| {
            let length = match edit.spec().and_then(RuleSpec::expires) {
                Some(Expires::In(length)) => length,
                Some(Expires::At(_)) | None => return edit,
            };
            edit.with_spec(|spec| spec.ending(Expires::In(length).end(now)))
        };
        edits.into_iter().map(settle).collect()
    }

    /// What to remember of every rule that a transaction is about.
    pub(super) fn timing(&self, changed: &Changed) -> Vec<(u32, Option<Lease>)> {
        let lease = |rule: &Rule| match rule.spec.expires() {
            Some(Expires::At(end)) => self.0.get(&end).cloned(),
            Some(Expires::In(_)) | None => None,
        };
        let is_new =
            |(before, after): &&(Rule, Rule)| before.spec.expires() != after.spec.expires();
        let replaced = changed
            .replaced
            .iter()
            .filter(is_new)
            .map(|(_, after)| after);
        let removed = changed.removed.iter().map(|rule| (rule.id, None));
        changed
            .added
            .iter()
            .chain(replaced)
            .map(|rule| (rule.id, lease(rule)))
            .chain(removed)
            .collect()
    }
}

/// Leases of an earlier start of the machine have the end that was computed for them.
pub(super) fn leases_of_this_boot(state: &State) -> Result<BTreeMap<u32, Lease>> {
    let mut leases = BTreeMap::new();
    for (id, lease) in state.leases()? {
        if lease.is_of_this_boot()? {
            leases.insert(id, lease);
        }
    }
    Ok(leases)
}

impl Engine {
    /// Opens, closes and ends rules whose time has come; what has changed.
    pub fn tick(&mut self, site: Site<'_>) -> Result<Ticked, Rejected> {
        let (ended, staying) = self.due(site.now);
        if ended.is_empty() && staying.is_empty() {
            return Ok(Ticked::default());
        }
        let remove = |id: u32| Edit::Remove {
            id,
            flows: self.policy(id, None, FlowPolicy::Kill),
        };
        let edits = ended.into_iter().map(remove).collect();
        let plan = self.plan(edits, site.now)?;
        let none = Leases::default();
        let changed = self.carry_out(plan, &staying, &none, site, |_, _| Ok(()))?;
        let turned = staying.iter().map(|rule| (rule.id, rule.opening)).collect();
        Ok(Ticked {
            ended: changed.removed,
            turned,
        })
    }

    /// Rules whose lease has ended, and rules that are open or closed when they should not be.
    fn due(&self, now: Now) -> (Vec<u32>, Vec<Staying>) {
        let (mut ended, mut staying) = (Vec::new(), Vec::new());
        let mut openings = HashMap::new();
        for (id, spec) in self.ruleset.timed() {
            if self.left(id, spec, now).is_some_and(|left| left.is_zero()) {
                ended.push(id);
                continue;
            }
            let Some(schedule) = spec.schedule() else {
                continue;
            };
            let opening = *openings
                .entry((schedule, spec.is_enabled()))
                .or_insert_with(|| spec.opening(now.wall));
            if opening != self.lowering.opening(id) {
                let flows = self.policy(id, None, FlowPolicy::Drain);
                staying.push(Staying { id, opening, flows });
            }
        }
        (ended, staying)
    }

    /// Time until a rule is to be opened, closed or ended, unless somebody sets the clock; `None` if
    /// no rule has a lease or a schedule.
    pub fn next_due(&self, now: Now) -> Option<Duration> {
        let mut changes: HashMap<&Schedule, Option<Timestamp>> = HashMap::new();
        let until = |end: Timestamp| Duration::try_from(end - now.wall).unwrap_or(Duration::ZERO);
        self.ruleset
            .timed()
            .flat_map(|(id, spec)| {
                let change = spec.schedule().and_then(|schedule| {
                    let next = || schedule.next_change(now.wall);
                    *changes.entry(schedule).or_insert_with(next)
                });
                [self.left(id, spec, now), change.map(until)]
            })
            .flatten()
            .min()
    }

    /// What is left of a rule's lease.
    fn left(&self, id: u32, spec: &RuleSpec, now: Now) -> Option<Duration> {
        let end = spec.expires()?.end(now);
        let by_wall = || Duration::try_from(end - now.wall).unwrap_or(Duration::ZERO);
        let lease = self.leases.get(&id);
        Some(lease.map_or_else(by_wall, |lease| lease.left(now)))
    }
}
