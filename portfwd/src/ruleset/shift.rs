//! What a change does to one slot of RULES.

use portfwd_common::abi;

use super::{edits::Edits, placed::Placed, standing::Standing};

/// What a change does to one slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shift {
    pub(super) slot: u16,
    pub(super) rule: abi::Rule,
    pub(super) before: Standing,
    pub(super) after: Standing,
    /// Whom it let in before; `rule` says whom it lets in afterwards.
    pub(super) guard: Guard,
}

/// What of an element may change while flows of its go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guard {
    /// The list of sources.
    pub(super) sources: u32,
    /// How many flows.
    pub(super) limits: abi::Limits,
}

impl Guard {
    pub(super) const fn of(rule: &abi::Rule) -> Self {
        Self {
            sources: rule.sources,
            limits: rule.limits,
        }
    }

    /// The element with this guard.
    pub(super) const fn put(self, rule: abi::Rule) -> abi::Rule {
        let Self { sources, limits } = self;
        abi::Rule {
            sources,
            limits,
            ..rule
        }
    }
}

impl Shift {
    /// `None` if nothing would change.
    pub(super) fn of(slot: u16, placed: &Placed, after: Standing) -> Option<Self> {
        (placed.standing != after).then_some(Self {
            slot,
            rule: placed.rule,
            before: placed.standing,
            after,
            guard: Guard::of(&placed.rule),
        })
    }

    pub(super) fn reversed(&self) -> Self {
        Self {
            before: self.after,
            after: self.before,
            rule: self.guard.put(self.rule),
            guard: Guard::of(&self.rule),
            ..*self
        }
    }

    /// Edits for slots that are to be shifted.
    pub(super) fn edits(shifts: &[Self]) -> Edits {
        let changes_rests =
            |shift: &Self| shift.rule.is_rest() && shift.before.listens() != shift.after.listens();
        if shifts.iter().any(changes_rests) {
            Edits::with_rests()
        } else {
            Edits::default()
        }
    }
}
