//! What a change of the ruleset does with a rule: it goes, stays, comes, or lets others in.

use super::{FlowPolicy, RuleSpec};

/// A rule that a change takes away.
#[derive(Clone, Copy, Debug)]
pub struct Going {
    /// Its number.
    pub id: u32,
    /// What becomes of its flows.
    pub flows: FlowPolicy,
}

/// A rule that a change opens or closes.
#[derive(Clone, Copy, Debug)]
pub struct Staying {
    /// Its number.
    pub id: u32,
    /// Whether packets find it from here on.
    pub opening: Opening,
    /// What becomes of its flows if it closes.
    pub flows: FlowPolicy,
}

/// A rule that a change brings.
#[derive(Clone, Copy, Debug)]
pub struct Coming<'a> {
    /// Its number.
    pub id: u32,
    /// What it says.
    pub spec: &'a RuleSpec,
    /// Whether packets find it from the start.
    pub opening: Opening,
}

/// A rule that keeps its places, but may let other sources in, or more or fewer flows.
#[derive(Clone, Copy, Debug)]
pub struct Relisted<'a> {
    /// Its number.
    pub id: u32,
    /// What it says from here on.
    pub spec: &'a RuleSpec,
}

/// Whether packets find a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// They do.
    Open,
    /// It only keeps its place.
    Closed,
}
