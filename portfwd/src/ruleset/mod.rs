//! The rules: what the operator wrote, validated as a whole, and lowered to the datapath's maps.
//!
//! [`Ruleset`] knows ids, names and conflicts. [`lower`] is pure: it turns a change of the ruleset
//! into writes to maps. [`Engine`] carries a change out: check, write to the kernel, commit to the
//! state file; or nothing of it.

mod adopt;
mod allocate;
pub mod difference;
mod edits;
mod element;
mod endpoints;
mod engine;
mod exceptions;
mod host;
pub mod lease;
pub mod limits;
mod lists;
pub mod lower;
mod maps;
#[cfg(test)]
pub(crate) mod model;
pub mod movement;
mod networks;
mod placed;
mod ports;
mod prefix;
mod refusal;
mod rests;
mod schedule;
mod shift;
mod source;
pub mod sources;
mod spec;
mod standing;
mod targets;
mod timed;
mod track;
mod transaction;
mod words;
pub mod write;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use portfwd_common::{abi::Protocol, net::Family};

pub use self::{
    endpoints::{Listen, PortRange, RuleProtocol, Target},
    engine::{Engine, Site},
    host::{Host, RuleFamily},
    maps::RuleMaps,
    networks::Network,
    refusal::Refusal,
    schedule::Schedule,
    source::{SnatSource, Source},
    spec::RuleSpec,
    standing::FlowPolicy,
    timed::Ticked,
    track::{NotLight, Track},
    transaction::{Changed, Edit, Rejected},
    words::RuleWords,
};

/// A rule of the ruleset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its number, never given twice.
    pub id: u32,
    /// What the operator wrote.
    pub spec: RuleSpec,
}

/// How a message names a rule: `3 (web)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleLabel {
    /// Its number.
    pub id: u32,
    /// Its name, if it has one.
    pub name: Option<String>,
}

/// Rules that can be in each other's way: the same protocol, family and listen address, and either both for certain ports or both for
/// everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Scope {
    protocol: Protocol,
    family: Family,
    address: Option<IpAddr>,
    is_rest: bool,
}

/// All rules by id, with what finds conflicts without looking at every one.
#[derive(Debug, Default)]
pub struct Ruleset {
    rules: BTreeMap<u32, RuleSpec>,
    names: HashMap<String, u32>,
    exact: HashMap<(Scope, u16), u32>,
    /// By scope and first port: last port and rule. Ranges of a scope never overlap.
    ranges: HashMap<Scope, BTreeMap<u16, (u16, u32)>>,
    /// Rules with a lease or a schedule.
    timed: BTreeSet<u32>,
}

impl RuleSpec {
    fn scopes(&self) -> impl Iterator<Item = Scope> + use<> {
        let (family, address) = (self.family(), self.listen().address);
        let is_rest = self.protocol() == RuleProtocol::Dmz;
        // A rule that is not enabled is in nobody's way.
        let protocols: &[_] = if self.is_enabled() {
            self.protocol().protocols()
        } else {
            &[]
        };
        protocols.iter().map(move |protocol| Scope {
            protocol: *protocol,
            family,
            address,
            is_rest,
        })
    }
}

impl Ruleset {
    /// The rules by id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &RuleSpec)> {
        self.rules.iter().map(|(id, spec)| (*id, spec))
    }

    /// The rule of an id.
    pub fn rule(&self, id: u32) -> Option<&RuleSpec> {
        self.rules.get(&id)
    }

    /// Rules with a lease or a schedule.
    pub fn timed(&self) -> impl Iterator<Item = (u32, &RuleSpec)> {
        let timed = self.timed.iter();
        timed.filter_map(|id| Some((*id, self.rules.get(id)?)))
    }

    /// Rules that bear a tag.
    pub fn tagged(&self, tag: &str) -> impl Iterator<Item = u32> {
        let bears = move |spec: &RuleSpec| spec.tags().iter().any(|own| own == tag);
        self.iter()
            .filter(move |(_, spec)| bears(spec))
            .map(|(id, _)| id)
    }

    /// How many rules.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The id that an id or a name stands for. A name is never all digits, so the two cannot be
    /// mistaken for each other.
    pub fn find(&self, selector: &str) -> Result<u32, Refusal> {
        let id = match selector.parse() {
            Ok(id) => self.rules.contains_key(&id).then_some(id),
            Err(_) => self.names.get(selector).copied(),
        };
        id.ok_or_else(|| Refusal::NoSuchRule {
            selector: selector.to_owned(),
        })
    }

    /// Whether the rule fits in. `wan` are the own addresses of the WAN interfaces.
    pub fn check(&self, spec: &RuleSpec, wan: &[IpAddr]) -> Result<(), Refusal> {
        if let Some(name) = spec.name()
            && let Some(id) = self.names.get(name)
        {
            return Err(Refusal::NameTaken {
                name: name.to_owned(),
                id: *id,
            });
        }
        let target = spec.target().address;
        if spec.is_enabled() && spec.listen().address.is_none() && wan.contains(&target) {
            return Err(Refusal::TargetIsListen { address: target });
        }
        for scope in spec.scopes() {
            if let Some(other) = self.conflict(scope, spec.listen().ports) {
                return Err(self.refuse(spec, scope, other));
            }
        }
        Ok(())
    }

    /// A rule of equal precedence that has one of the ports: an exact port of exact ports, a range
    /// of ranges.
    fn conflict(&self, scope: Scope, ports: PortRange) -> Option<u32> {
        if ports.is_exact() {
            return self.exact.get(&(scope, ports.first())).copied();
        }
        let (_, (last, id)) = self
            .ranges
            .get(&scope)?
            .range(..=ports.last())
            .next_back()?;
        (*last >= ports.first()).then_some(*id)
    }

    fn refuse(&self, spec: &RuleSpec, scope: Scope, other: u32) -> Refusal {
        let protocol = if scope.is_rest {
            spec.protocol()
        } else {
            RuleProtocol::from(scope.protocol)
        };
        let listen = format!("{protocol} {}", spec.listen());
        let rule = self.label(other);
        match self.rules.get(&other).map(RuleSpec::listen) {
            Some(taken) if taken != spec.listen() => Refusal::Overlap {
                rule,
                listen,
                other: format!("{protocol} {taken}"),
            },
            Some(_) | None => Refusal::Duplicate { rule, listen },
        }
    }

    /// How messages name a rule.
    pub fn label(&self, id: u32) -> RuleLabel {
        RuleLabel {
            id,
            name: self
                .rules
                .get(&id)
                .and_then(RuleSpec::name)
                .map(str::to_owned),
        }
    }

    /// Adds a rule that was checked, under an id that is not in use.
    pub fn insert(&mut self, id: u32, spec: RuleSpec) {
        let ports = spec.listen().ports;
        for scope in spec.scopes() {
            if ports.is_exact() {
                self.exact.insert((scope, ports.first()), id);
            } else {
                self.ranges
                    .entry(scope)
                    .or_default()
                    .insert(ports.first(), (ports.last(), id));
            }
        }
        if let Some(name) = spec.name() {
            self.names.insert(name.to_owned(), id);
        }
        if spec.is_timed() {
            self.timed.insert(id);
        }
        self.rules.insert(id, spec);
    }

    /// Takes a rule out.
    pub fn remove(&mut self, id: u32) -> Option<RuleSpec> {
        let spec = self.rules.remove(&id)?;
        self.timed.remove(&id);
        let ports = spec.listen().ports;
        for scope in spec.scopes() {
            if ports.is_exact() {
                self.exact.remove(&(scope, ports.first()));
            } else if let Some(ranges) = self.ranges.get_mut(&scope) {
                ranges.remove(&ports.first());
                if ranges.is_empty() {
                    self.ranges.remove(&scope);
                }
            }
        }
        if let Some(name) = spec.name() {
            self.names.remove(name);
        }
        Some(spec)
    }

    #[cfg(test)]
    fn ids(&self) -> Vec<u32> {
        self.rules.keys().copied().collect()
    }
}

impl fmt::Display for RuleLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{} ({name})", self.id),
            None => write!(f, "{}", self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(words: &str) -> RuleSpec {
        RuleSpec::parse(&RuleWords::line(words)).unwrap()
    }

    fn ruleset(rules: &[&str]) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for (id, words) in (1..).zip(rules) {
            let spec = spec(words);
            ruleset.check(&spec, &[]).unwrap();
            ruleset.insert(id, spec);
        }
        ruleset
    }

    const RULES: [&str; 6] = [
        "tcp 80 10.0.0.2 web",
        "both 1000-1999 10.0.0.3",
        "tcp 203.0.113.5:80 10.0.0.4",
        "udp 203.0.113.5:100-200 10.0.0.4",
        "tcp 443 2001:db8::2",
        "tcp 5000 10.0.0.2:80",
    ];

    #[test]
    fn rules_that_fit_in_are_taken() {
        let ruleset = ruleset(&RULES);
        for words in [
            "udp 80 10.0.0.2",
            "tcp 80 2001:db8::2",
            "tcp 1500 10.0.0.2",
            "both 2000-2999 10.0.0.2",
            "tcp 203.0.113.6:80 10.0.0.2",
            "tcp 203.0.113.5:1000-1999 10.0.0.2",
            "udp 203.0.113.5:150 10.0.0.2",
            "tcp 203.0.113.5:100-200 10.0.0.2",
            "tcp 443 10.0.0.2",
            "tcp 70-90 10.0.0.2",
            "dmz rest 10.0.0.9",
            "dmz 203.0.113.5:rest 10.0.0.9",
        ] {
            assert_eq!(ruleset.check(&spec(words), &[]), Ok(()), "{words}");
        }
    }

    #[test]
    fn rules_that_take_what_another_has_are_refused() {
        let ruleset = ruleset(&RULES);
        for (words, message) in [
            ("tcp 81 10.0.0.2 web", "the name web belongs to rule 1"),
            ("tcp 80 10.0.0.9", "rule 1 (web) listens on tcp 80 already"),
            ("both 80 10.0.0.9", "rule 1 (web) listens on tcp 80 already"),
            (
                "udp 1000-1999 10.0.0.9",
                "rule 2 listens on udp 1000-1999 already",
            ),
            (
                "udp 1999-2000 10.0.0.9",
                "udp 1999-2000 overlaps rule 2, which listens on udp 1000-1999",
            ),
            (
                "tcp 1-1000 10.0.0.9",
                "tcp 1-1000 overlaps rule 2, which listens on tcp 1000-1999",
            ),
            (
                "tcp 1-65535 10.0.0.9",
                "tcp 1-65535 overlaps rule 2, which listens on tcp 1000-1999",
            ),
            (
                "tcp 1200-1300 10.0.0.9",
                "tcp 1200-1300 overlaps rule 2, which listens on tcp 1000-1999",
            ),
            (
                "both 203.0.113.5:200-201 10.0.0.9",
                "udp 203.0.113.5:200-201 overlaps rule 4, which listens on udp 203.0.113.5:100-200",
            ),
            ("tcp 443 2001:db8::9", "rule 5 listens on tcp 443 already"),
            (
                "tcp 9 198.51.100.1",
                "TARGET 198.51.100.1 is an address this rule listens on",
            ),
        ] {
            let refusal = ruleset
                .check(&spec(words), &["198.51.100.1".parse().unwrap()])
                .unwrap_err();
            assert_eq!(refusal.to_string(), message);
        }
        // Another address of the gateway is no listen address of this rule.
        assert_eq!(
            ruleset.check(
                &spec("tcp 203.0.113.9:9 198.51.100.1"),
                &["198.51.100.1".parse().unwrap()]
            ),
            Ok(())
        );
    }

    #[test]
    fn a_family_and_an_address_have_one_rule_for_everything_else() {
        let rules = ["dmz rest 10.0.0.2 console", "dmz 203.0.113.5:rest 10.0.0.3"];
        let ruleset = ruleset(&rules);
        for words in [
            "dmz rest 2001:db8::2",
            "dmz 203.0.113.6:rest 10.0.0.2",
            "both 1-65535 10.0.0.4",
            "icmp echo 10.0.0.4",
        ] {
            assert_eq!(ruleset.check(&spec(words), &[]), Ok(()), "{words}");
        }
        for (words, message) in [
            (
                "dmz rest 10.0.0.9",
                "rule 1 (console) listens on dmz rest already",
            ),
            (
                "dmz 203.0.113.5:rest 10.0.0.9",
                "rule 2 listens on dmz 203.0.113.5:rest already",
            ),
        ] {
            let refusal = ruleset.check(&spec(words), &[]).unwrap_err();
            assert_eq!(refusal.to_string(), message);
        }
    }

    #[test]
    fn what_is_removed_leaves_room() {
        let mut ruleset = ruleset(&RULES);
        for id in ruleset.ids() {
            let spec = ruleset.remove(id).unwrap();
            assert_eq!(ruleset.check(&spec, &[]), Ok(()));
        }
        assert!(
            ruleset.is_empty()
                && ruleset.names.is_empty()
                && ruleset.exact.is_empty()
                && ruleset.ranges.is_empty()
        );
        assert_eq!(ruleset.remove(1), None);
    }

    #[test]
    fn ids_and_names_find_rules() {
        let ruleset = ruleset(&RULES);
        assert_eq!(ruleset.find("1"), Ok(1));
        assert_eq!(ruleset.find("web"), Ok(1));
        for selector in ["0", "7", "nothing", "", "99999999999", "-1"] {
            assert_eq!(
                ruleset.find(selector),
                Err(Refusal::NoSuchRule {
                    selector: selector.into()
                })
            );
        }
    }
}
