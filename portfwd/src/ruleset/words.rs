//! A rule in words: as the command line, the control socket and the state file carry it.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator says of a rule. [`super::RuleSpec::parse`] reads it, [`super::RuleSpec::words`] gives it back.
///
/// An option that is not said is not written either. Words that this version does not know are refused: a rule without an
/// option that somebody relied on would be another rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleWords {
    /// `tcp`, `udp`, `both`, `icmp` or `dmz`.
    pub proto: String,
    /// LISTEN of `portfwd add`.
    pub listen: String,
    /// TARGET of `portfwd add`.
    pub target: String,
    /// `--masquerade`: the gateway's own address stands for clients.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub masquerade: bool,
    /// ADDR or ADDR:FIRST-LAST of `--snat`, which stand for clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snat: Option<String>,
    /// Whether a SYN's maximum segment size is lowered to what fits; `true` if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mss_clamp: Option<bool>,
    /// How closely its flows are followed: `full`, if not said, or `light`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<String>,
    /// Name, if it is to have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What becomes of its flows when it changes or goes: `keep`, `drain` or `kill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<String>,
    /// Whether packets find it; `true` if not said. A rule that is not enabled is in no other rule's way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Words by which rules are found together: a-z, 0-9 and . _ -
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// When it ends: a point in time, or, if not in a file, a length of time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
    /// Days and hours at which packets find it: `mon-fri 08:00-18:00 Europe/Berlin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// Which addresses of a TARGET that is a name are taken: `ipv4` or `ipv6`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// The address that a TARGET that is a name has led to last. Not the operator's: the daemon resolves the name and
    /// notes this, so that the rule stands when no resolver answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub resolved: Option<IpAddr>,
    /// Prefixes of `--from`; everybody may use the rule if there is neither this nor `not_from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Vec<String>>,
    /// Prefixes of `--not-from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_from: Option<Vec<String>>,
    /// New flows in a time: `200/s`, `20/min`, `5/h`; behind `:` how many at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<String>,
    /// The same of each source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_per_source: Option<String>,
    /// Flows at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_flows: Option<u32>,
    /// The same of each source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_flows_per_source: Option<u32>,
    /// Addresses whose first so many bits are the same are one source; 32 for IPv4 and 64 for IPv6 if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_prefix: Option<u8>,
    /// What a `dmz` rule leaves to the gateway: `tcp/22`, `udp/500-4500`, `both/53`, `icmp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<String>,
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

    /// The same as a file has it: without what the daemon has noted.
    #[must_use]
    pub fn of_file(self) -> Self {
        Self {
            resolved: None,
            ..self
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
