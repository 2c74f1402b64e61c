//! A rule in words: as the command line, the control socket and the state file carry it.

use serde::{Deserialize, Serialize};

/// What the operator says of a rule. [`super::RuleSpec::parse`] reads it, [`super::RuleSpec::words`] gives it back.
///
/// An option that is not said is not written either. Words that this version does not know are refused: a rule without an
/// option that somebody relied on would be another rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleWords {
    /// `tcp`, `udp` or `both`.
    pub proto: String,
    /// LISTEN of `portfwd add`.
    pub listen: String,
    /// TARGET of `portfwd add`.
    pub target: String,
    /// Name, if it is to have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What becomes of its flows when it changes or goes: `keep`, `drain` or `kill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<String>,
}

impl RuleWords {
    /// A rule without options.
    pub fn new(proto: &str, listen: &str, target: &str) -> Self {
        Self {
            proto: proto.to_owned(),
            listen: listen.to_owned(),
            target: target.to_owned(),
            ..Self::default()
        }
    }

    /// The same rule with a name.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self {
            name: Some(name.to_owned()),
            ..self
        }
    }

    /// `PROTO LISTEN TARGET [NAME]` in one line, for tests.
    ///
    /// # Panics
    /// If there are fewer words.
    #[cfg(test)]
    pub fn line(line: &str) -> Self {
        let mut words = line.split(' ');
        let mut next = || words.next().expect("PROTO LISTEN TARGET");
        let rule = Self::new(next(), next(), next());
        match words.next() {
            Some(name) => rule.named(name),
            None => rule,
        }
    }
}
