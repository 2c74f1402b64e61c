//! A whole configuration at once: what `portfwd apply` asks for, and taking it back.

use std::collections::BTreeSet;

use tokio::task::JoinSet;

use super::{
    gateway::{Gateway, Shared},
    protocol::{Applied, ApplyRequest, RefusedRule, ReplacedLine, RuleLine},
};
use crate::{
    failure::{Failure, Kind, Result},
    resolve::resolve,
    ruleset::{
        Changed, Edit, Engine, FlowPolicy, Refusal, Rejected, Rule, RuleSpec, RuleWords,
        difference::{Difference, difference},
        lease::{Expires, Now},
    },
    state::Pending,
};

/// Rules of a request as they are to be, and what is said of those that are left out.
struct Desired {
    /// Their indices in the request.
    indices: Vec<usize>,
    rules: Vec<RuleSpec>,
    /// A line for each rule that has expired.
    warnings: Vec<String>,
}

/// A request compared with what is.
pub struct Comparison {
    desired: Desired,
    difference: Difference,
}

impl Desired {
    /// Reads the rules of a request; what makes no sense is in the error.
    fn of(request: &ApplyRequest, now: Now) -> Result<Self, Vec<RefusedRule>> {
        let mut refused = Vec::new();
        let mut desired = Self {
            indices: Vec::new(),
            rules: Vec::new(),
            warnings: Vec::new(),
        };
        for (index, words) in request.rules.iter().enumerate() {
            // A name that nobody has resolved is none of this machine's: only on paper.
            let spec = match RuleSpec::on_paper(words) {
                Ok(spec) => spec,
                Err(refusal) => {
                    refused.push(RefusedRule::of(index, refusal));
                    continue;
                }
            };
            match spec.expires() {
                Some(Expires::In(_)) => {
                    let text = words.expires.clone().unwrap_or_default();
                    refused.push(RefusedRule::of(index, Refusal::RelativeExpires { text }));
                }
                Some(Expires::At(end)) if end <= now.wall => desired.warnings.push(format!(
                    "rule {} {} expired at {end} and is left out",
                    words.proto, words.listen
                )),
                Some(Expires::At(_)) | None => {
                    desired.indices.push(index);
                    desired.rules.push(spec);
                }
            }
        }
        if refused.is_empty() {
            Ok(desired)
        } else {
            Err(refused)
        }
    }
}

impl Comparison {
    /// Compares; `file_rules` are those that the configuration brought before. What makes no sense is
    /// in the error.
    pub fn of(
        request: &ApplyRequest,
        engine: &Engine,
        file_rules: &BTreeSet<u32>,
        now: Now,
    ) -> Result<Self, Vec<RefusedRule>> {
        let desired = Desired::of(request, now)?;
        let stays = |id: u32| request.keep_others && !file_rules.contains(&id);
        let difference = difference(engine.ruleset(), &desired.rules, request.flows, stays);
        Ok(Self {
            desired,
            difference,
        })
    }

    /// What it takes.
    pub fn edits(&self) -> Vec<Edit> {
        self.difference.edits.clone()
    }

    /// What has come of it, with rejections by the indices of the request.
    pub fn outcome(&self, done: Result<Changed, Rejected>, before: usize) -> Result<Applied> {
        match done {
            Ok(changed) => {
                let touched = changed.replaced.len() + changed.removed.len();
                Ok(Applied {
                    unchanged: before.saturating_sub(touched),
                    warnings: self.desired.warnings.clone(),
                    ..Applied::from(&changed)
                })
            }
            Err(Rejected::Failed(failure)) => Err(failure),
            Err(Rejected::Refused(refused)) => {
                let refused = refused.into_iter().map(|(edit, refusal)| {
                    let listed = self.difference.indices.get(edit).copied().flatten();
                    let index = listed.and_then(|listed| self.desired.indices.get(listed));
                    RefusedRule::of(index.copied().unwrap_or_default(), refusal)
                });
                Ok(Applied {
                    refused: refused.collect(),
                    ..Applied::default()
                })
            }
        }
    }

    /// The rules that the configuration has brought, once it holds.
    fn file_rules(&self, changed: &Changed) -> BTreeSet<u32> {
        let added = changed.added.iter().map(|rule| rule.id);
        self.difference.met.keys().copied().chain(added).collect()
    }
}

/// Finds addresses for the names in rules that are to be applied; rules for whose names there are none
/// are given back.
pub async fn resolve_names(
    gateway: &Shared,
    request: ApplyRequest,
) -> (ApplyRequest, Vec<RefusedRule>) {
    let mut request = request;
    gateway.lock().recall_names(&mut request.rules);
    let is_open =
        |words: &RuleWords| matches!(RuleSpec::parse(words), Err(Refusal::Unresolved { .. }));
    let open = request
        .rules
        .iter()
        .enumerate()
        .filter(|(_, words)| is_open(words));
    let open: Vec<_> = open.map(|(index, words)| (index, words.clone())).collect();
    let mut lookups = JoinSet::new();
    for (index, words) in open {
        lookups.spawn(async move { (index, resolve(words).await) });
    }
    let mut refused = Vec::new();
    for (index, resolved) in lookups.join_all().await {
        match (resolved, request.rules.get_mut(index)) {
            (Ok(words), Some(rule)) => *rule = words,
            (Err(failure), Some(_)) => refused.push(RefusedRule {
                index,
                key: "target".to_owned(),
                failure,
            }),
            (_, None) => {}
        }
    }
    refused.sort_by_key(|refused| refused.index);
    (request, refused)
}

impl Gateway {
    /// `apply`: the rules of the request hold, all of them, or nothing has changed.
    pub fn apply(&mut self, request: &ApplyRequest) -> Result<Applied> {
        let now = Now::read()?;
        let compared = Comparison::of(request, &self.engine, &self.file_rules, now);
        let comparison = match compared {
            Ok(comparison) => comparison,
            Err(refused) => {
                return Ok(Applied {
                    refused,
                    ..Applied::default()
                });
            }
        };
        let before = self.engine.ruleset().len();
        if request.dry_run {
            let tried = self.engine.try_change(comparison.edits(), now);
            return comparison.outcome(tried, before);
        }
        self.refuse_while_pending()?;
        let pending = self.pending_for(request, now)?;
        for spec in &comparison.desired.rules {
            self.check_source(spec)?;
        }
        let mut file_rules = BTreeSet::new();
        let (engine, site) = self.at_work()?;
        let done = engine.change_with(comparison.edits(), site, |transaction, changed| {
            file_rules = comparison.file_rules(changed);
            transaction.set_file_rules(&file_rules)?;
            transaction.set_pending(pending.as_ref())
        });
        let done_well = done.is_ok();
        let applied = comparison.outcome(done, before)?;
        if done_well {
            self.file_rules = file_rules;
            self.pending = pending;
            log::info!(
                "configuration applied: {} added, {} replaced, {} removed, {} as they were",
                applied.added.len(),
                applied.replaced.len(),
                applied.removed.len(),
                applied.unchanged
            );
        }
        Ok(Applied {
            confirm_s: request.confirm_s.filter(|_| done_well),
            ..applied
        })
    }

    /// `confirm`: what was applied stays.
    pub fn confirm(&mut self) -> Result<()> {
        if self.pending.is_none() {
            return Err(nothing_pending());
        }
        let (_, site) = self.at_work()?;
        let transaction = site.state.begin()?;
        transaction.set_pending(None)?;
        transaction.commit()?;
        self.pending = None;
        log::info!("the configuration is confirmed");
        Ok(())
    }

    /// `rollback`: the rules are what they were before.
    pub fn rollback(&mut self) -> Result<Applied> {
        let Some(pending) = self.pending.clone() else {
            return Err(nothing_pending());
        };
        let now = Now::read()?;
        let edits = rollback(&self.engine, &pending, now)?;
        let before = self.engine.ruleset().len();
        let (engine, site) = self.at_work()?;
        let changed = engine.change_with(edits, site, |transaction, _| {
            transaction.set_file_rules(&pending.file_rules)?;
            transaction.set_pending(None)
        })?;
        self.file_rules = pending.file_rules;
        self.pending = None;
        log::warn!("the configuration is taken back: the rules are what they were before");
        Ok(Applied {
            unchanged: before.saturating_sub(changed.replaced.len() + changed.removed.len()),
            ..Applied::from(&changed)
        })
    }

    /// Takes back what nobody has confirmed in time.
    pub(super) fn take_back_if_due(&mut self) -> Result<()> {
        let now = Now::read()?;
        let is_due = match &self.pending {
            Some(pending) => pending.left(now)?.is_zero(),
            None => false,
        };
        if is_due {
            log::warn!("nobody has confirmed the configuration in time");
            self.rollback()?;
        }
        Ok(())
    }

    /// A change in between would be lost with the rollback, or hinder it.
    pub(super) fn refuse_while_pending(&self) -> Result<()> {
        match self.pending {
            None => Ok(()),
            Some(_) => Err(
                Failure::new(Kind::Conflict, "a configuration waits to be confirmed")
                    .hint("`portfwd confirm` keeps it, `portfwd rollback` takes it back"),
            ),
        }
    }

    fn pending_for(&self, request: &ApplyRequest, now: Now) -> Result<Option<Pending>> {
        let Some(seconds) = request.confirm_s else {
            return Ok(None);
        };
        let wait = Expires::In(jiff::SignedDuration::from_secs(seconds.into()));
        let Some(lease) = wait.lease(now)? else {
            return Ok(None);
        };
        let rules = self.engine.ruleset().iter();
        Ok(Some(Pending {
            lease,
            deadline: wait.end(now),
            rules: rules.map(|(id, spec)| (id, spec.words())).collect(),
            file_rules: self.file_rules.clone(),
        }))
    }
}

/// Edits that bring back what was before; rules that have expired since stay away.
fn rollback(engine: &Engine, pending: &Pending, now: Now) -> Result<Vec<Edit>> {
    let flows = FlowPolicy::Drain;
    let mut edits = Vec::new();
    for (id, words) in &pending.rules {
        let spec = RuleSpec::parse(words)?;
        let has_expired = |expires: Expires| expires.end(now) <= now.wall;
        match engine.ruleset().rule(*id) {
            Some(_) => edits.push(Edit::Replace {
                id: *id,
                spec,
                flows,
            }),
            None if spec.expires().is_some_and(has_expired) => {}
            None => edits.push(Edit::Restore(Rule { id: *id, spec })),
        }
    }
    let is_new = |id: &u32| !pending.rules.contains_key(id);
    let new = engine.ruleset().iter().map(|(id, _)| id).filter(is_new);
    edits.extend(new.map(|id| Edit::Remove { id, flows }));
    Ok(edits)
}

fn nothing_pending() -> Failure {
    Failure::new(Kind::NotFound, "no configuration waits to be confirmed")
        .hint("`portfwd apply --confirm 60s` makes one that does")
}

impl Pending {
    /// Time until it is taken back.
    pub(super) fn left(&self, now: Now) -> Result<std::time::Duration> {
        if self.lease.is_of_this_boot()? {
            return Ok(self.lease.left(now));
        }
        let left = self.deadline - now.wall;
        Ok(std::time::Duration::try_from(left).unwrap_or_default())
    }
}

impl RefusedRule {
    /// Of a refusal.
    pub fn of(index: usize, refusal: Refusal) -> Self {
        Self {
            index,
            key: refusal.key().to_owned(),
            failure: refusal.into(),
        }
    }
}

impl From<&Changed> for Applied {
    fn from(changed: &Changed) -> Self {
        let replaced = |(before, after): &(Rule, Rule)| ReplacedLine {
            before: RuleLine::of(before),
            after: RuleLine::of(after),
        };
        Self {
            added: changed.added.iter().map(RuleLine::of).collect(),
            replaced: changed.replaced.iter().map(replaced).collect(),
            removed: changed.removed.iter().map(RuleLine::of).collect(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
