//! What goes over the socket and what `--json` prints: the same types, so the names are stable in
//! both.

use std::{collections::BTreeMap, fmt};

use portfwd_common::abi::{PortCounters, Traffic as Counted};
use serde::{Deserialize, Serialize};

use crate::{
    failure::Failure,
    ruleset::{FlowPolicy, RuleProtocol, RuleWords},
};

/// Packets and bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// IP packets.
    pub packets: u64,
    /// Bytes of the IP packets.
    pub bytes: u64,
}

/// A rule in `rules`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleReport {
    /// Its number.
    pub id: u32,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// `tcp`, `udp`, `both`, `icmp` or `dmz`.
    pub proto: RuleProtocol,
    /// `PORT`, `FIRST-LAST`, or either behind an address.
    pub listen: String,
    /// `ADDR:PORT` or `ADDR:FIRST-LAST`, IPv6 addresses in brackets.
    pub target: String,
    /// The name that the target is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostReport>,
    /// What the target sees instead of clients, if anything: `masquerade`, or `snat` and its address.
    pub source: Option<String>,
    /// Whether a SYN's maximum segment size is lowered to what fits, unless the gateway wants all left.
    pub mss_clamp: bool,
    /// How closely its flows are followed: `full` or `light`.
    pub track: String,
    /// Live flows.
    pub flows: u64,
    /// Live flows of what the rule said before it was replaced.
    pub draining: u64,
    /// Whether it may be found at all.
    pub enabled: bool,
    /// Whether packets find it: it is enabled and its schedule says so.
    pub open: bool,
    /// What it says to people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// When it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
    /// When packets find it, if not always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// From clients to the target.
    pub to_target: Traffic,
    /// From the target to clients.
    pub to_client: Traffic,
    /// Prefixes that may use it, if not everybody may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Vec<String>>,
    /// Prefixes that may not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_from: Option<Vec<String>>,
    /// How many flows it takes, if not any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsReport>,
    /// What a rule for everything else leaves to the gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<String>,
}

/// The limits of a rule in `rules`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsReport {
    /// New flows in a time: `200/s`, and behind `:` how many at once.
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
    /// Addresses whose first so many bits are the same are one source; 0 if nothing is limited by source.
    pub source_prefix: u32,
    /// Packets that one of the limits has refused since the rule was added.
    pub refused: u64,
}

/// The name that a target is, in `rules`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// The name.
    pub name: String,
    /// Why it could not be followed the last time; the rule stands as it is.
    pub error: Option<String>,
}

/// A flow in `flows`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowReport {
    /// `tcp` or `udp`.
    pub proto: RuleProtocol,
    /// The client's endpoint.
    pub client: String,
    /// The endpoint that the client dialled.
    pub listen: String,
    /// The endpoint that serves it.
    pub target: String,
    /// The endpoint that the target takes for the client: the client's own, or one of the gateway's.
    pub source: String,
    /// What the flow is doing.
    pub state: String,
    /// Seconds since its first packet.
    pub age_s: f64,
    /// Seconds since its last packet.
    pub idle_s: f64,
    /// From the client to the target.
    pub to_target: Traffic,
    /// From the target to the client.
    pub to_client: Traffic,
    /// Id of its rule.
    pub rule: u32,
}

/// The counters of a listen port in `counters`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// Id of the rule.
    pub rule: u32,
    /// `tcp` or `udp`.
    pub proto: RuleProtocol,
    /// Listen port; 0 for all of a rule for everything else, and for echo.
    pub port: u16,
    /// From clients to the target.
    pub to_target: Traffic,
    /// From the target to clients.
    pub to_client: Traffic,
}

/// Answer to `counters`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountersReport {
    /// Listen ports that have seen a packet.
    pub ports: Vec<PortReport>,
    /// Packets refused, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Packets left to the kernel, by reason.
    pub passes: BTreeMap<String, u64>,
    /// What else happened to packets that were forwarded.
    pub events: BTreeMap<String, u64>,
}

/// An attached interface in `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceReport {
    /// Kernel name.
    pub name: String,
    /// `wan` or `lan`.
    pub role: String,
    /// `xdp`, `xdp-generic` or `tc`, as attached.
    pub mode: String,
    /// Why this mode.
    pub reason: String,
}

/// A table of flows in `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableReport {
    /// Connections in it.
    pub entries: u64,
    /// Connections that fit.
    pub capacity: u64,
}

/// The daemon in `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonReport {
    /// Process id, as in the caller's namespace.
    pub pid: u32,
    /// Seconds since it was ready.
    pub uptime_s: u64,
}

/// Answer to `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Of the program that answers.
    pub version: String,
    /// Name of the instance.
    pub instance: String,
    /// Attached interfaces, WAN first.
    pub interfaces: Vec<InterfaceReport>,
    /// The connection table.
    pub flows: TableReport,
    /// The table of flows that have not proven themselves.
    pub half_open: TableReport,
    /// `None` if no daemon runs.
    pub daemon: Option<DaemonReport>,
}

/// A rule that was added or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleLine {
    /// Its number.
    pub id: u32,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// `tcp`, `udp`, `both`, `icmp` or `dmz`.
    pub proto: RuleProtocol,
    /// What it listens on.
    pub listen: String,
    /// Where it forwards to.
    pub target: String,
    /// The name that the target is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// What the target sees instead of clients, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Everything else that it says, as in a file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, serde_json::Value>,
}

/// Body of `POST /v1/apply`: the rules that are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    /// All of them.
    pub rules: Vec<RuleWords>,
    /// What becomes of flows of rules that change or go; what the rules say, else `drain`, if not
    /// said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowPolicy>,
    /// Rules that were added by hand stay.
    #[serde(default)]
    pub keep_others: bool,
    /// Nothing is changed.
    #[serde(default)]
    pub dry_run: bool,
    /// Seconds within which `POST /v1/confirm` must come, or all is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_s: Option<u32>,
}

/// Answer to `POST /v1/apply` and `POST /v1/rollback`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Rules that are new.
    pub added: Vec<RuleLine>,
    /// Rules that say something else.
    pub replaced: Vec<ReplacedLine>,
    /// Rules that are gone.
    pub removed: Vec<RuleLine>,
    /// Rules that are as they were.
    pub unchanged: usize,
    /// Rules that make no sense: if there are any, nothing was changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedRule>,
    /// What the operator should know, a line each.
    pub warnings: Vec<String>,
    /// Seconds within which it must be confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_s: Option<u32>,
}

/// A rule before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplacedLine {
    /// What it said.
    pub before: RuleLine,
    /// What it says.
    pub after: RuleLine,
}

/// A rule of a request that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedRule {
    /// Its index in the request, from 0.
    pub index: usize,
    /// The key that it is about; empty if none.
    pub key: String,
    /// What is wrong.
    #[serde(flatten)]
    pub failure: Failure,
}

/// Answer to `PUT /v1/rules/{id or name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    /// What the rule said before.
    pub before: RuleLine,
    /// What it says.
    #[serde(flatten)]
    pub rule: RuleLine,
    /// What the operator should know about it, a line each.
    pub warnings: Vec<String>,
}

/// Answer to `POST /v1/rules`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// The rule.
    #[serde(flatten)]
    pub rule: RuleLine,
    /// What the operator should know about it, a line each.
    pub warnings: Vec<String>,
}

/// Body of `DELETE /v1/rules`: several rules, all or none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveRequest {
    /// Ids or names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
    /// All rules that bear one of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// What becomes of their flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowPolicy>,
}

impl RemoveRequest {
    /// One rule.
    pub fn of(rule: String) -> Self {
        Self {
            rules: vec![rule],
            tags: Vec::new(),
            flows: None,
        }
    }
}

impl fmt::Display for RuleLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> ", self.proto, self.listen)?;
        if let Some(host) = &self.host {
            write!(f, "{host} at ")?;
        }
        f.write_str(&self.target)?;
        if let Some(source) = &self.source {
            write!(f, ", {source}")?;
        }
        if let Some(name) = &self.name {
            write!(f, " ({name})")?;
        }
        for (key, value) in &self.options {
            write!(f, ", {key} {value}")?;
        }
        Ok(())
    }
}

impl Traffic {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, more: Self) {
        self.packets += more.packets;
        self.bytes += more.bytes;
    }

    /// Nothing passed.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

impl From<Counted> for Traffic {
    fn from(counted: Counted) -> Self {
        Self {
            packets: counted.packets,
            bytes: counted.bytes,
        }
    }
}

/// Both directions of a port's counters: to the target, to the client.
pub fn directions(counters: PortCounters) -> (Traffic, Traffic) {
    (counters.to_target.into(), counters.to_client.into())
}
