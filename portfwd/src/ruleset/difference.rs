//! From the rules that are to those that ought to be, by the fewest edits.

use std::collections::{HashMap, HashSet};

use super::{Edit, FlowPolicy, RuleSpec, Ruleset};

/// Edits that make a ruleset say what a list says, each with the index of the rule of the list that
/// it is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// The edits.
    pub edits: Vec<Edit>,
    /// The index of each edit's rule in the list; `None` for a rule that goes.
    pub indices: Vec<Option<usize>>,
    /// The rules of the list that are there already, by their numbers: changed or not.
    pub met: HashMap<u32, usize>,
}

/// Compares. Rules of the same name are the same rule; among those without a partner by name, rules
/// of the same protocol and listen are. `stays` says which rules are left alone, unless they are
/// on the list as they are; `flows` is what becomes of flows of rules that change or go, if their own rules do not say.
pub fn difference(
    ruleset: &Ruleset,
    list: &[RuleSpec],
    flows: Option<FlowPolicy>,
    stays: impl Fn(u32) -> bool,
) -> Difference {
    let mut difference = Difference::default();
    let partners = partners(ruleset, list, &stays);
    for (index, (spec, partner)) in list.iter().zip(&partners).enumerate() {
        let edit = match partner {
            Some(id) => {
                difference.met.insert(*id, index);
                let flows = flows.or(spec.flows()).unwrap_or(FlowPolicy::Drain);
                Edit::Replace {
                    id: *id,
                    spec: spec.clone(),
                    flows,
                }
            }
            None => Edit::Add(spec.clone()),
        };
        if partner.and_then(|id| ruleset.rule(id)) != Some(spec) {
            difference.edits.push(edit);
            difference.indices.push(Some(index));
        }
    }
    for (id, spec) in ruleset.iter() {
        if !difference.met.contains_key(&id) && !stays(id) {
            let flows = flows.or(spec.flows()).unwrap_or(FlowPolicy::Drain);
            difference.edits.push(Edit::Remove { id, flows });
            difference.indices.push(None);
        }
    }
    difference
}

/// For each rule of the list the rule that it is.
fn partners(
    ruleset: &Ruleset,
    list: &[RuleSpec],
    stays: &impl Fn(u32) -> bool,
) -> Vec<Option<u32>> {
    let by_name = |spec: &RuleSpec| {
        let id = spec.name().and_then(|name| ruleset.find(name).ok())?;
        (!stays(id) || ruleset.rule(id) == Some(spec)).then_some(id)
    };
    let mut taken: HashSet<u32> = HashSet::new();
    // Of two rules of one name the second is a mistake, to be told when it is added.
    let first = |spec| by_name(spec).filter(|id| taken.insert(*id));
    let mut partners: Vec<Option<u32>> = list.iter().map(first).collect();
    // An equal rule before one that listens alike: of disabled rules there may be several.
    let mut equal: HashMap<&RuleSpec, Vec<u32>> = HashMap::new();
    let mut alike: HashMap<_, Vec<u32>> = HashMap::new();
    for (id, spec) in ruleset.iter().filter(|(id, _)| !taken.contains(id)) {
        equal.entry(spec).or_default().push(id);
        if !stays(id) {
            alike.entry(identity(spec)).or_default().push(id);
        }
    }
    let mut meet = |partner: &mut Option<u32>, found: Option<&mut Vec<u32>>| {
        let id = found.and_then(|ids| {
            ids.iter()
                .position(|id| !taken.contains(id))
                .map(|at| ids.remove(at))
        });
        if let Some(id) = id {
            taken.insert(id);
            *partner = Some(id);
        }
    };
    for (partner, spec) in partners.iter_mut().zip(list).filter(|(p, _)| p.is_none()) {
        meet(partner, equal.get_mut(spec));
    }
    for (partner, spec) in partners.iter_mut().zip(list).filter(|(p, _)| p.is_none()) {
        meet(partner, alike.get_mut(&identity(spec)));
    }
    partners
}

/// What makes two rules without common name one rule.
fn identity(spec: &RuleSpec) -> impl Eq + std::hash::Hash + use<> {
    (spec.protocol(), spec.listen(), spec.family())
}
