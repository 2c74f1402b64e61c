//! `portfwd doctor`: what is wrong with a gateway, each with its cause and the one command that mends it.
//!
//! [`gather`] reads; every check is a function from the [`Facts`] to findings and touches nothing. A check reports what it is
//! sure of: what it cannot tell it does not mention.
//!
//! ```text
//! machine     kernel, BPF file system, capabilities, clock
//! instance    daemon, pins, links, connection table
//! interfaces  state, mode, MTU, offloads, what lies above and below
//! forwarding  the kernel's own settings for routers
//! firewall    nftables (read by nft): what drops, and what never sees the packets
//! wan         addresses that rules listen on, the way to the clients
//! targets     the way to every target and back
//! services    ports that others use too
//! ```

mod facts;
mod firewall;
mod forwarding;
mod gather;
mod instance;
mod interfaces;
mod machine;
mod nft;
mod nft_match;
#[cfg(test)]
mod sample;
mod services;
mod targets;
mod wan;

use std::fmt;

use serde::Serialize;

pub use self::{
    facts::{Facts, RuleFacts, Side},
    gather::{Sides, gather},
    nft::{Firewall, Judgement, Probe},
};

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name, the same in every version.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: an interface, a rule, a setting.
    pub subject: String,
    /// What is wrong, in one line.
    pub cause: String,
    /// The command that mends it.
    pub fix: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something that was asked for does not work.
    Error,
    /// It works, but something about it surprises or will fail later.
    Warning,
}

/// Answer to `doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// Findings of severity error.
    pub errors: usize,
    /// The others.
    pub warnings: usize,
    /// Errors first.
    pub findings: Vec<Finding>,
}

/// Every finding there can be, with its severity. The names never change their sense.
pub const NAMES: [(&str, Severity); 57] = [
    ("kernel-too-old", Severity::Error),
    ("kernel-without-btf", Severity::Warning),
    ("bpffs-not-mounted", Severity::Error),
    ("capability-missing", Severity::Error),
    ("jit-off", Severity::Warning),
    ("clock-wrong", Severity::Warning),
    ("clock-unsynchronised", Severity::Warning),
    ("not-started", Severity::Error),
    ("daemon-not-running", Severity::Warning),
    ("unreadable", Severity::Error),
    ("pins-of-another-version", Severity::Error),
    ("detached", Severity::Error),
    ("program-replaced", Severity::Error),
    ("interface-stale", Severity::Error),
    ("address-unknown", Severity::Error),
    ("table-full", Severity::Error),
    ("table-nearly-full", Severity::Warning),
    ("interface-gone", Severity::Error),
    ("interface-down", Severity::Error),
    ("interface-no-carrier", Severity::Error),
    ("port-of-a-bridge", Severity::Error),
    ("lan-mtu-smaller", Severity::Warning),
    ("xdp-on-virtual-device", Severity::Warning),
    ("xdp-generic", Severity::Warning),
    ("xdp-headroom", Severity::Warning),
    ("receive-offload", Severity::Error),
    ("vlan-tags-hidden", Severity::Error),
    ("vlan-not-attached", Severity::Warning),
    ("foreign-xdp", Severity::Warning),
    ("foreign-tc", Severity::Warning),
    ("ipv4-forwarding-off", Severity::Error),
    ("ipv6-forwarding-off", Severity::Error),
    ("ipv4-forwarding-off-for-interface", Severity::Error),
    ("ipv6-forwarding-off-for-interface", Severity::Error),
    ("router-advertisements-ignored", Severity::Warning),
    ("reverse-path-strict", Severity::Warning),
    ("wan-without-address", Severity::Error),
    ("wan-address-private", Severity::Warning),
    ("wan-address-shared", Severity::Warning),
    ("listen-address-missing", Severity::Warning),
    ("no-route-to-clients", Severity::Error),
    ("clients-not-behind-wan", Severity::Error),
    ("target-unreachable", Severity::Error),
    ("target-is-gateway", Severity::Error),
    ("target-behind-wan", Severity::Error),
    ("target-not-attached", Severity::Error),
    ("target-silent", Severity::Error),
    ("no-replies", Severity::Warning),
    ("target-name-unresolved", Severity::Warning),
    ("local-service", Severity::Warning),
    ("own-connections", Severity::Warning),
    ("firewall-drops-forwarded", Severity::Error),
    ("firewall-drops-large", Severity::Error),
    ("firewall-bypassed", Severity::Warning),
    ("translation-shadowed", Severity::Warning),
    ("masquerade-on-listen-port", Severity::Warning),
    ("flowtable-in-hardware", Severity::Warning),
];

/// A check.
type Check = fn(&Facts) -> Vec<Finding>;

/// All of them, in the order in which an operator would look.
const CHECKS: [&[Check]; 8] = [
    machine::CHECKS,
    instance::CHECKS,
    interfaces::CHECKS,
    forwarding::CHECKS,
    wan::CHECKS,
    targets::CHECKS,
    services::CHECKS,
    firewall::CHECKS,
];

/// Judges the facts.
pub fn diagnose(facts: &Facts) -> Diagnosis {
    let mut findings: Vec<_> = CHECKS
        .iter()
        .copied()
        .flatten()
        .flat_map(|check| check(facts))
        .collect();
    findings.sort_by_key(|finding| finding.severity);
    let errors = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .count();
    Diagnosis {
        errors,
        warnings: findings.len() - errors,
        findings,
    }
}

impl Finding {
    /// Something that was asked for does not work.
    fn error(id: &'static str, subject: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self::new(Severity::Error, id, subject, cause)
    }

    /// It works, but something about it surprises.
    fn warning(id: &'static str, subject: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self::new(Severity::Warning, id, subject, cause)
    }

    fn new(
        severity: Severity,
        id: &'static str,
        subject: impl fmt::Display,
        cause: impl fmt::Display,
    ) -> Self {
        Self {
            id,
            severity,
            subject: subject.to_string(),
            cause: cause.to_string(),
            fix: String::new(),
        }
    }

    /// The command that mends it.
    fn fix(self, command: impl fmt::Display) -> Self {
        Self {
            fix: command.to_string(),
            ..self
        }
    }
}

impl Severity {
    /// The word in front of a finding.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}
