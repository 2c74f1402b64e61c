//! Many changes of the ruleset as one: all of them, or none.

use std::collections::{HashMap, HashSet};

use super::{FlowPolicy, Refusal, Rule, RuleSpec, Ruleset, movement::Going};
use crate::failure::{Failure, Kind};

/// One change among those of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// A new rule, under an id of its own.
    Add(RuleSpec),
    /// A rule comes back under the id that it had.
    Restore(Rule),
    /// A rule says something else from here on.
    Replace {
        /// Its number, which stays.
        id: u32,
        /// What it says.
        spec: RuleSpec,
        /// What becomes of flows that it began before.
        flows: FlowPolicy,
    },
    /// A rule goes.
    Remove {
        /// Its number.
        id: u32,
        /// What becomes of its flows.
        flows: FlowPolicy,
    },
}

/// What a transaction has changed. Edits that come to nothing are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// New rules, in the order of their edits.
    pub added: Vec<Rule>,
    /// Rules before and after.
    pub replaced: Vec<(Rule, Rule)>,
    /// Rules that are gone.
    pub removed: Vec<Rule>,
}

/// Why a transaction did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Edits make no sense, each with its index: all that can be told at once.
    Refused(Vec<(usize, Refusal)>),
    /// The whole has no room, or could not be carried out and was undone.
    Failed(Failure),
}

/// A transaction that fits in: the ruleset says it already, maps and state file do not.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub changed: Changed,
    /// Rules that leave their places.
    pub going: Vec<Going>,
    /// Rules that need places.
    pub coming: Vec<u32>,
    /// Rules that keep their places and say something else.
    pub staying: Vec<u32>,
    /// What the ruleset said before of rules that it says no more.
    taken: Vec<Rule>,
}

/// A rule that an edit brings, before it is known whether it fits in.
struct Arrival {
    /// Of the edit.
    index: usize,
    /// `None` for a new rule.
    id: Option<u32>,
    spec: RuleSpec,
    /// What the rule said before, if it is there already.
    before: Option<RuleSpec>,
}

impl From<Rejected> for Failure {
    /// The first refusal, and how many more there are.
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::Failed(failure) => failure,
            Rejected::Refused(refused) => {
                let more = refused.len().saturating_sub(1);
                let first = refused.into_iter().next().map(|(_, refusal)| refusal);
                let failure = first.map_or_else(
                    || Self::new(Kind::Failed, "the change was refused"),
                    Self::from,
                );
                if more == 0 {
                    return failure;
                }
                Self {
                    error: format!("{}, and {more} more", failure.error),
                    ..failure
                }
            }
        }
    }
}

impl Edit {
    /// What it has a rule say.
    pub fn spec(&self) -> Option<&RuleSpec> {
        match self {
            Self::Add(spec) | Self::Restore(Rule { spec, .. }) | Self::Replace { spec, .. } => {
                Some(spec)
            }
            Self::Remove { .. } => None,
        }
    }

    /// The same edit of a rule that says something else.
    pub(super) fn with_spec(self, change: impl FnOnce(RuleSpec) -> RuleSpec) -> Self {
        match self {
            Self::Add(spec) => Self::Add(change(spec)),
            Self::Restore(Rule { id, spec }) => Self::Restore(Rule {
                id,
                spec: change(spec),
            }),
            Self::Replace { id, spec, flows } => Self::Replace {
                id,
                spec: change(spec),
                flows,
            },
            Self::Remove { id, flows } => Self::Remove { id, flows },
        }
    }
}

impl Changed {
    /// The id that the next rule gets.
    pub(super) fn next_id(&self, before: u32) -> u32 {
        let behind = self.added.iter().map(|rule| rule.id.saturating_add(1));
        behind.fold(before, u32::max)
    }

    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.replaced.is_empty() && self.removed.is_empty()
    }

    /// Rules that are new or say something else.
    pub fn arrivals(&self) -> impl Iterator<Item = &Rule> {
        let replaced = self.replaced.iter().map(|(_, after)| after);
        self.added.iter().chain(replaced)
    }
}

impl Plan {
    /// Brings edits into the ruleset, or leaves it as it is. `check` is what a rule has to pass
    /// among the others; `next_id` the first id for new rules.
    pub fn make(
        ruleset: &mut Ruleset,
        edits: Vec<Edit>,
        next_id: u32,
        check: impl Fn(&Ruleset, &RuleSpec) -> Result<(), Refusal>,
    ) -> Result<Self, Vec<(usize, Refusal)>> {
        let mut plan = Self::default();
        let edits = essential(ruleset, edits);
        let arrivals = plan.take_out(ruleset, edits);
        let refused = plan.admit(ruleset, arrivals, next_id, check);
        if refused.is_empty() {
            return Ok(plan);
        }
        plan.unmake(ruleset);
        Err(refused)
    }

    /// Leaves the ruleset as it was.
    pub fn unmake(self, ruleset: &mut Ruleset) {
        for rule in self.changed.arrivals() {
            ruleset.remove(rule.id);
        }
        for Rule { id, spec } in self.taken {
            ruleset.insert(id, spec);
        }
    }

    /// Takes out what goes and what changes, so that only what stays can be in the way of what
    /// comes.
    fn take_out(&mut self, ruleset: &mut Ruleset, edits: Vec<(usize, Edit)>) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        for (index, edit) in edits {
            let mut arrive = |id, spec, before| {
                arrivals.push(Arrival {
                    index,
                    id,
                    spec,
                    before,
                });
            };
            match edit {
                Edit::Add(spec) => arrive(None, spec, None),
                Edit::Restore(Rule { id, spec }) => arrive(Some(id), spec, None),
                Edit::Replace { id, spec, flows } => {
                    if let Some(before) = ruleset.remove(id) {
                        if !before.forwards_like(&spec) {
                            self.going.push(Going { id, flows });
                        }
                        let rule = before.clone();
                        self.taken.push(Rule { id, spec: rule });
                        arrive(Some(id), spec, Some(before));
                    }
                }
                Edit::Remove { id, flows } => {
                    if let Some(spec) = ruleset.remove(id) {
                        self.going.push(Going { id, flows });
                        let rule = Rule { id, spec };
                        self.taken.push(rule.clone());
                        self.changed.removed.push(rule);
                    }
                }
            }
        }
        arrivals
    }

    /// Lets arrivals in; gives back why some do not fit in, by the index of their edit.
    fn admit(
        &mut self,
        ruleset: &mut Ruleset,
        arrivals: Vec<Arrival>,
        next_id: u32,
        check: impl Fn(&Ruleset, &RuleSpec) -> Result<(), Refusal>,
    ) -> Vec<(usize, Refusal)> {
        let mut refused = Vec::new();
        let mut ids = next_id..u32::MAX;
        for arrival in arrivals {
            let fits = check(ruleset, &arrival.spec);
            let id = fits.and_then(|()| {
                let id = arrival.id.or_else(|| ids.next());
                id.ok_or(Refusal::NoIdsLeft)
            });
            match id {
                Ok(id) => self.enter(ruleset, id, arrival),
                Err(refusal) => refused.push((arrival.index, refusal)),
            }
        }
        refused
    }

    fn enter(&mut self, ruleset: &mut Ruleset, id: u32, arrival: Arrival) {
        let Arrival { spec, before, .. } = arrival;
        ruleset.insert(id, spec.clone());
        let stays = before
            .as_ref()
            .is_some_and(|before| before.forwards_like(&spec));
        if stays {
            self.staying.push(id);
        } else {
            self.coming.push(id);
        }
        let rule = Rule { id, spec };
        match before {
            Some(spec) => self.changed.replaced.push((Rule { id, spec }, rule)),
            None => self.changed.added.push(rule),
        }
    }
}

/// Edits that change anything, each with its index: a rule that is removed and added again as it
/// was stays as it is.
fn essential(ruleset: &Ruleset, edits: Vec<Edit>) -> Vec<(usize, Edit)> {
    let mut removed: HashMap<&RuleSpec, u32> = HashMap::new();
    for edit in &edits {
        if let Edit::Remove { id, .. } = edit
            && let Some(spec) = ruleset.rule(*id)
        {
            removed.insert(spec, *id);
        }
    }
    let mut returns = |edit: &Edit| match edit {
        Edit::Add(spec) | Edit::Restore(Rule { spec, .. }) => removed.remove(spec),
        Edit::Replace { .. } | Edit::Remove { .. } => None,
    };
    let stay: Vec<Option<u32>> = edits.iter().map(&mut returns).collect();
    let staying: HashSet<u32> = stay.iter().flatten().copied().collect();
    let changes = |(_, (edit, stays)): &(usize, (Edit, Option<u32>))| match edit {
        Edit::Add(_) | Edit::Restore(_) => stays.is_none(),
        Edit::Replace { id, spec, .. } => ruleset.rule(*id) != Some(spec),
        Edit::Remove { id, .. } => !staying.contains(id),
    };
    let edits = edits.into_iter().zip(stay).enumerate().filter(changes);
    edits.map(|(index, (edit, _))| (index, edit)).collect()
}
