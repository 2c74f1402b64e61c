//! Why a rule is refused. Each says what is wrong in one line, and what to do in another.

use std::net::IpAddr;

use thiserror::Error;

use super::{
    NotLight, PortRange, RuleLabel, RuleProtocol,
    limits::LimitRefusal,
    networks::{Edge, Network},
    sources::SourceRefusal,
};
use crate::failure::{Failure, Kind};

/// Why a rule is not added, or nothing removed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// PROTO is no protocol.
    #[error("{text:?} is not a protocol")]
    UnknownProtocol {
        /// As given.
        text: String,
    },
    /// Not a policy for flows.
    #[error("{text:?} does not say what becomes of flows")]
    UnknownFlowPolicy {
        /// As given.
        text: String,
    },
    /// Not a way to follow flows.
    #[error("{text:?} does not say how flows are followed")]
    UnknownTrack {
        /// As given.
        text: String,
    },
    /// What a rule with light tracking cannot do.
    #[error("--track light {}", .what.because())]
    NotLight {
        /// What.
        what: NotLight,
    },
    /// Not a family of addresses.
    #[error("{text:?} is not a family of addresses")]
    UnknownFamily {
        /// As given.
        text: String,
    },
    /// A family is said of a TARGET that is an address.
    #[error("TARGET {text} is an address: only a name has a family to choose")]
    FamilyOfAddress {
        /// TARGET as given.
        text: String,
    },
    /// TARGET is a name, and where it leads is not known yet.
    #[error("TARGET {host} is a name that has not been resolved")]
    Unresolved {
        /// The name.
        host: String,
    },
    /// Neither a port nor a range.
    #[error("{text:?} is not a port or a range of ports")]
    IllegalPorts {
        /// As given.
        text: String,
    },
    /// Ports that the protocol does not have.
    #[error("{ports} is no port of {protocol}")]
    PortsOfProtocol {
        /// The protocol.
        protocol: RuleProtocol,
        /// The ports.
        ports: PortRange,
    },
    /// `--except` of a rule that takes certain ports.
    #[error("--except is for dmz rules: {protocol} forwards nothing but what LISTEN says")]
    ExceptionsOfProtocol {
        /// The protocol.
        protocol: RuleProtocol,
    },
    /// Not an exception.
    #[error("--except {text:?} is not understood")]
    IllegalException {
        /// As given.
        text: String,
    },
    /// More exceptions than a rule may have.
    #[error("more than {max} exceptions")]
    TooManyExceptions {
        /// The most.
        max: usize,
    },
    /// LISTEN is not understood.
    #[error("LISTEN {text:?} is not understood")]
    IllegalListen {
        /// As given.
        text: String,
    },
    /// LISTEN is an address alone.
    #[error("LISTEN {address} has no port")]
    ListenWithoutPort {
        /// As given.
        address: IpAddr,
    },
    /// TARGET is not understood.
    #[error("TARGET {text:?} is not an address with or without ports")]
    IllegalTarget {
        /// As given.
        text: String,
    },
    /// Listens and targets are not 1:1.
    #[error("LISTEN has {} and TARGET has {}", ports(*.listen), ports(*.target))]
    UnequalLength {
        /// Listen ports.
        listen: PortRange,
        /// Target ports.
        target: PortRange,
    },
    /// IPv4 to IPv6 or back.
    #[error("LISTEN {listen} and TARGET {target} are of different address families")]
    FamilyMismatch {
        /// Listen address.
        listen: IpAddr,
        /// Target address.
        target: IpAddr,
    },
    /// The target is an address that the rule listens on.
    #[error("TARGET {address} is an address this rule listens on")]
    TargetIsListen {
        /// Target address.
        address: IpAddr,
    },
    /// The target is an address that no machine of its network can have.
    #[error("TARGET {address} is the {edge} of {network}, a network of this gateway")]
    TargetIsEdge {
        /// Target address.
        address: IpAddr,
        /// What it is.
        edge: Edge,
        /// Its network.
        network: Network,
    },
    /// `--masquerade` and `--snat` together.
    #[error("--masquerade and --snat exclude each other")]
    TwoSources,
    /// What stands for clients is not understood.
    #[error("--snat {text:?} is not an address with or without ports")]
    IllegalSource {
        /// As given.
        text: String,
    },
    /// What stands for clients is of another family than the target.
    #[error("--snat {snat} and TARGET {target} are of different address families")]
    SourceFamily {
        /// What was to stand for clients.
        snat: IpAddr,
        /// Target address.
        target: IpAddr,
    },
    /// The target would take itself for the client.
    #[error("--snat {address} is the target itself")]
    SourceIsTarget {
        /// The address.
        address: IpAddr,
    },
    /// An address that no router forwards.
    #[error(
        "{side} {address} is not an address that packets are forwarded to (unspecified, loopback, link-local, multicast or reserved)"
    )]
    NotUnicast {
        /// LISTEN or TARGET.
        side: &'static str,
        /// The address.
        address: IpAddr,
    },
    /// Its lists of sources.
    #[error(transparent)]
    Sources(#[from] SourceRefusal),
    /// How many flows it takes.
    #[error(transparent)]
    Limits(#[from] LimitRefusal),
    /// Not a name.
    #[error("{name:?} is not a legal name")]
    IllegalName {
        /// As given.
        name: String,
    },
    /// Not a tag.
    #[error("{text:?} is not a legal tag")]
    IllegalTag {
        /// As given.
        text: String,
    },
    /// Not a comment.
    #[error("the comment is longer than {max} characters, or not one line")]
    IllegalComment {
        /// The longest.
        max: usize,
    },
    /// Not a time.
    #[error("{text:?} is neither a length of time nor a point in time")]
    IllegalExpires {
        /// As given.
        text: String,
    },
    /// A length of time where a point in time is needed.
    #[error("{text:?} is a length of time, which would begin anew whenever the file is applied")]
    RelativeExpires {
        /// As given.
        text: String,
    },
    /// A lease that has ended before it began.
    #[error("the rule has expired at {end}")]
    Expired {
        /// Its end.
        end: String,
    },
    /// Not a schedule.
    #[error("schedule {text:?} is not understood")]
    IllegalSchedule {
        /// As given.
        text: String,
    },
    /// No time zone of that name.
    #[error("no time zone is called {text:?}")]
    UnknownTimeZone {
        /// As given.
        text: String,
    },
    /// The name belongs to another rule.
    #[error("the name {name} belongs to rule {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// The rule that has it.
        id: u32,
    },
    /// Another rule has exactly this listen.
    #[error("rule {rule} listens on {listen} already")]
    Duplicate {
        /// The other rule.
        rule: RuleLabel,
        /// The listen, with protocol.
        listen: String,
    },
    /// A range overlaps another range of equal precedence.
    #[error("{listen} overlaps rule {rule}, which listens on {other}")]
    Overlap {
        /// The other rule.
        rule: RuleLabel,
        /// The listen, with protocol.
        listen: String,
        /// The other rule's listen, with protocol.
        other: String,
    },
    /// Nothing has that id or name.
    #[error("no rule has the id or name {selector:?}")]
    NoSuchRule {
        /// As given.
        selector: String,
    },
    /// Nothing bears that tag.
    #[error("no rule bears the tag {tag:?}")]
    NoSuchTag {
        /// As given.
        tag: String,
    },
    /// Ids are never given twice.
    #[error("no rule ids are left")]
    NoIdsLeft,
    /// RULES is full.
    #[error("the rule table is full: {capacity} rules, a rule for both protocols counting twice")]
    TooManyRules {
        /// Slots.
        capacity: u32,
    },
    /// LISTENS or TARGETS is full.
    #[error(
        "the tables of listens and targets are full: {capacity} prefixes, up to 30 for a range"
    )]
    TooManyPrefixes {
        /// Elements.
        capacity: u32,
    },
    /// SOURCES is full.
    #[error("the table of sources is full: {capacity} prefixes in the lists of all rules")]
    TooManySources {
        /// Elements.
        capacity: u32,
    },
    /// COUNTERS has no block of that length.
    #[error("no room for {count} more counted ports in a table of {capacity}")]
    TooManyPorts {
        /// Asked for.
        count: u32,
        /// Elements.
        capacity: u32,
    },
}

fn ports(range: PortRange) -> String {
    match range.count() {
        1 => "1 port".to_owned(),
        n => format!("{n} ports"),
    }
}

impl Refusal {
    /// What kind of failure it is.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::UnknownProtocol { .. }
            | Self::UnknownFlowPolicy { .. }
            | Self::UnknownTrack { .. }
            | Self::NotLight { .. }
            | Self::UnknownFamily { .. }
            | Self::FamilyOfAddress { .. }
            | Self::Unresolved { .. }
            | Self::IllegalPorts { .. }
            | Self::PortsOfProtocol { .. }
            | Self::ExceptionsOfProtocol { .. }
            | Self::IllegalException { .. }
            | Self::TooManyExceptions { .. }
            | Self::IllegalListen { .. }
            | Self::ListenWithoutPort { .. }
            | Self::IllegalTarget { .. }
            | Self::UnequalLength { .. }
            | Self::FamilyMismatch { .. }
            | Self::TargetIsListen { .. }
            | Self::TargetIsEdge { .. }
            | Self::NotUnicast { .. }
            | Self::TwoSources
            | Self::IllegalSource { .. }
            | Self::SourceFamily { .. }
            | Self::SourceIsTarget { .. }
            | Self::Sources(_)
            | Self::Limits(_)
            | Self::IllegalName { .. }
            | Self::IllegalTag { .. }
            | Self::IllegalComment { .. }
            | Self::IllegalExpires { .. }
            | Self::RelativeExpires { .. }
            | Self::Expired { .. }
            | Self::IllegalSchedule { .. }
            | Self::UnknownTimeZone { .. } => Kind::Usage,
            Self::NameTaken { .. } | Self::Duplicate { .. } | Self::Overlap { .. } => {
                Kind::Conflict
            }
            Self::NoSuchRule { .. } | Self::NoSuchTag { .. } => Kind::NotFound,
            Self::NoIdsLeft
            | Self::TooManyRules { .. }
            | Self::TooManyPrefixes { .. }
            | Self::TooManySources { .. }
            | Self::TooManyPorts { .. } => Kind::Failed,
        }
    }

    /// The number of the rule that is in the way.
    pub fn other_rule(&self) -> Option<u32> {
        if let Self::NameTaken { id, .. } = self {
            return Some(*id);
        }
        let (Self::Duplicate { rule, .. } | Self::Overlap { rule, .. }) = self else {
            return None;
        };
        Some(rule.id)
    }

    /// The same, of a rule that has no number yet but a place.
    pub fn among(&self, place: impl std::fmt::Display) -> String {
        if let Self::NameTaken { name, .. } = self {
            return format!("the rule at {place} is called {name} too");
        }
        if let Self::Duplicate { listen, .. } = self {
            return format!("the rule at {place} listens on {listen} too");
        }
        let Self::Overlap { listen, other, .. } = self else {
            return self.to_string();
        };
        format!("{listen} overlaps the rule at {place}, which listens on {other}")
    }

    /// The key of a file, and option of the command line, that it is about; empty if none.
    pub fn key(&self) -> &'static str {
        match self {
            Self::UnknownProtocol { .. } => "proto",
            Self::UnknownFlowPolicy { .. } => "flows",
            Self::UnknownTrack { .. } | Self::NotLight { .. } => "track",
            Self::UnknownFamily { .. } | Self::FamilyOfAddress { .. } => "family",
            Self::IllegalListen { .. }
            | Self::ListenWithoutPort { .. }
            | Self::NotUnicast { side: "LISTEN", .. }
            | Self::Duplicate { .. }
            | Self::Overlap { .. } => "listen",
            Self::IllegalTarget { .. }
            | Self::Unresolved { .. }
            | Self::TargetIsListen { .. }
            | Self::TargetIsEdge { .. }
            | Self::UnequalLength { .. }
            | Self::FamilyMismatch { .. }
            | Self::NotUnicast { side: "TARGET", .. } => "target",
            Self::NotUnicast { .. } => "snat",
            Self::TwoSources
            | Self::IllegalSource { .. }
            | Self::SourceFamily { .. }
            | Self::SourceIsTarget { .. } => "snat",
            Self::IllegalName { .. } | Self::NameTaken { .. } => "name",
            Self::Sources(refusal) => refusal.key(),
            Self::Limits(refusal) => refusal.key(),
            Self::ExceptionsOfProtocol { .. }
            | Self::IllegalException { .. }
            | Self::TooManyExceptions { .. } => "except",
            Self::IllegalTag { .. } => "tags",
            Self::IllegalComment { .. } => "comment",
            Self::IllegalExpires { .. } | Self::RelativeExpires { .. } | Self::Expired { .. } => {
                "expires"
            }
            Self::IllegalSchedule { .. } | Self::UnknownTimeZone { .. } => "schedule",
            Self::IllegalPorts { .. }
            | Self::PortsOfProtocol { .. }
            | Self::NoSuchRule { .. }
            | Self::NoSuchTag { .. }
            | Self::NoIdsLeft
            | Self::TooManySources { .. }
            | Self::TooManyRules { .. }
            | Self::TooManyPrefixes { .. }
            | Self::TooManyPorts { .. } => "",
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::UnknownProtocol { .. } => "tcp, udp, both, icmp or dmz".into(),
            Self::UnknownFlowPolicy { .. } => "keep, drain (TCP goes on, UDP follows at once) or kill".into(),
            Self::UnknownTrack { .. } => "full or light".into(),
            Self::NotLight { .. } => "leave one of them out".into(),
            Self::UnknownFamily { .. } => "ipv4 or ipv6".into(),
            Self::FamilyOfAddress { .. } => "leave the family out".into(),
            Self::Unresolved { host } => format!("the daemon resolves it: `getent ahosts {host}` asks the same resolver"),
            Self::PortsOfProtocol { protocol: RuleProtocol::Icmp, .. } => "icmp forwards echo alone: `portfwd add icmp echo 10.0.0.2`".into(),
            Self::PortsOfProtocol { protocol: RuleProtocol::Dmz, .. } => "dmz forwards what is nobody else's, ports kept: `portfwd add dmz rest 10.0.0.2`".into(),
            Self::PortsOfProtocol { .. } => "PORT or FIRST-LAST, from 1 to 65535; `echo` is for icmp, `rest` for dmz".into(),
            Self::ExceptionsOfProtocol { .. } => "leave it out".into(),
            Self::IllegalException { .. } => "tcp/PORT, udp/FIRST-LAST, both/PORT or icmp, for example tcp/22".into(),
            Self::TooManyExceptions { .. } => "write neighbouring ports as a range, for example udp/500-4500".into(),
            Self::IllegalPorts { .. } => "PORT or FIRST-LAST, from 1 to 65535, for example 80 or 1000-1999".into(),
            Self::IllegalListen { .. } => "PORT, FIRST-LAST, ADDR:PORT, ADDR:FIRST-LAST or [V6]:PORT, for example 203.0.113.5:80".into(),
            Self::ListenWithoutPort { address: IpAddr::V4(v4) } => format!("write {v4}:PORT or {v4}:FIRST-LAST"),
            Self::ListenWithoutPort { address: IpAddr::V6(v6) } => format!("write [{v6}]:PORT or [{v6}]:FIRST-LAST"),
            Self::IllegalTarget { .. } => "ADDR, ADDR:PORT, ADDR:FIRST-LAST, [V6]:PORT or a name in place of ADDR, for example 10.0.0.2:80".into(),
            Self::UnequalLength { .. } => "ranges are forwarded 1:1; leave the target's port out to keep the ports".into(),
            Self::FamilyMismatch { .. } => "give both sides addresses of one family, or LISTEN none".into(),
            Self::TargetIsListen { .. } => "name the machine that serves it; the gateway's own services need no rule".into(),
            Self::TargetIsEdge { .. } => "name the address of one machine: `ip neighbour` lists those that the gateway knows".into(),
            Self::TwoSources => "--masquerade for the gateway's own address towards the target, --snat for a certain one".into(),
            Self::IllegalSource { .. } => "ADDR, ADDR:FIRST-LAST or [V6]:FIRST-LAST, for example 10.0.0.1:20000-29999".into(),
            Self::SourceFamily { .. } => "give --snat an address of the target's family".into(),
            Self::SourceIsTarget { .. } => "--masquerade chooses the gateway's own address towards the target".into(),
            Self::NotUnicast { side: "--snat", .. } => "name an address that the target answers to by way of this gateway".into(),
            Self::NotUnicast { side: "LISTEN", .. } => "leave the address out to listen on every address of the WAN interfaces".into(),
            Self::NotUnicast { .. } => "name an address of the machine that serves it, as other machines reach it".into(),
            Self::Sources(refusal) => refusal.hint(),
            Self::Limits(refusal) => refusal.hint(),
            Self::IllegalName { .. } => "a-z, 0-9 and . _ -, at most 64, not a number".into(),
            Self::IllegalTag { .. } => "a-z, 0-9 and . _ -, at most 64".into(),
            Self::IllegalComment { .. } => "say it shorter".into(),
            Self::IllegalExpires { .. } => "for example 90s, 2h, 7d, 2030-12-31T23:59:59Z or 2030-12-31T23:59:59+01:00".into(),
            Self::RelativeExpires { .. } => "write a point in time, for example 2030-12-31T23:59:59+01:00".into(),
            Self::Expired { .. } => "name a later end, or leave the rule out".into(),
            Self::IllegalSchedule { .. } => "DAYS HH:MM-HH:MM, several with ; between, then a time zone: mon-fri 08:00-18:00; sat 10:00-14:00 Europe/Berlin".into(),
            Self::UnknownTimeZone { .. } => "a name of the IANA database, for example Europe/Berlin or UTC".into(),
            Self::NameTaken { id, .. } => format!("choose another, or `portfwd remove {id}`"),
            Self::Duplicate { rule, .. } | Self::Overlap { rule, .. } => format!("`portfwd remove {}` frees it", rule.id),
            Self::NoSuchRule { .. } | Self::NoSuchTag { .. } => "`portfwd rules` lists them".into(),
            Self::NoIdsLeft => "`portfwd save` the rules, move the state file away, and apply them again".into(),
            Self::TooManyRules { .. } | Self::TooManyPrefixes { .. } => "`portfwd remove` rules that are not needed, or use ranges; places of removed rules come free a little after their flows have ended".into(),
            Self::TooManySources { .. } => "put prefixes that lie together into one, or `portfwd remove` rules with long lists".into(),
            Self::TooManyPorts { .. } => "start the daemon with a larger --max-ports, after `portfwd detach --keep-rules`".into(),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.kind(), &refusal).hint(refusal.hint())
    }
}
