//! A rule of one protocol as an element of RULES.

use portfwd_common::{
    abi::{self, PoolRange, Protocol},
    net::{Family, Ipv6},
};

use super::{
    PortRange, RuleProtocol, RuleSpec, Source, Track, ports::ListenScope, prefix::PortBlock,
    standing::Standing, targets::TargetScope,
};

/// The element of a rule, without what depends on other rules: its counters, its list of sources,
/// and whether it is stateless.
pub fn element(id: u32, protocol: Protocol, spec: &RuleSpec) -> abi::Rule {
    let (listen, target) = (spec.listen(), spec.target());
    let mut flags = abi::Rule::ACTIVE;
    let (mut ports, mut target_first) = (listen.ports, target.ports.first());
    if spec.protocol() == RuleProtocol::Dmz {
        flags |= abi::Rule::REST;
        ports = match protocol {
            Protocol::Tcp | Protocol::Udp => PortRange::ALL,
            Protocol::Echo => PortRange::ECHO,
        };
        target_first = ports.first();
    }
    if spec.family() == Family::V6 {
        flags |= abi::Rule::V6;
    }
    if listen.address.is_none() {
        flags |= abi::Rule::ANY_ADDRESS;
    }
    match spec.track() {
        Track::Full => {}
        Track::Light => flags |= abi::Rule::LIGHT,
    }
    if spec.keeps_mss() {
        flags |= abi::Rule::KEEPS_MSS;
    }
    let (mut source, mut source_ports) = (Ipv6::UNSPECIFIED, PoolRange::ALL);
    match spec.source() {
        Source::Client => {}
        Source::Masquerade => flags |= abi::Rule::MASQUERADE,
        Source::Snat(snat) => {
            flags |= abi::Rule::SNAT;
            source = snat.address.into();
            if let Some(ports) = snat.ports {
                (source_ports.first, source_ports.last) = (ports.first(), ports.last());
            }
        }
    }
    abi::Rule {
        listen: listen.address.map_or(Ipv6::UNSPECIFIED, Ipv6::from),
        target: target.address.into(),
        first: ports.first(),
        last: ports.last(),
        target_first,
        flags,
        counter_base: 0,
        id,
        protocol: u32::from(protocol.number()),
        source,
        source_ports,
        sources: 0,
        limits: spec.limits().lowered(spec.family()),
    }
}

/// Whether an element is this rule, wherever its counters and its list of sources are, how many
/// flows it takes, and however it stands.
pub fn is_same(element: &abi::Rule, rule: &abi::Rule) -> bool {
    let what = |rule: &abi::Rule| abi::Rule {
        flags: rule.flags
            & !(abi::Rule::STATELESS | abi::Rule::SHADED | abi::Rule::ACTIVE | abi::Rule::CLOSED),
        counter_base: 0,
        sources: 0,
        limits: abi::Limits::NONE,
        ..*rule
    };
    what(element) == what(rule)
}

/// The element of a rule that stands like this, but for what depends on other rules.
pub fn standing(rule: &abi::Rule, standing: Standing) -> abi::Rule {
    let said = rule.flags & !(abi::Rule::ACTIVE | abi::Rule::CLOSED);
    let flags = match standing {
        Standing::Free => 0,
        Standing::Linked => said | abi::Rule::ACTIVE,
        Standing::Draining | Standing::Retired => said | abi::Rule::ACTIVE | abi::Rule::CLOSED,
        Standing::Parked => said | abi::Rule::CLOSED,
    };
    abi::Rule { flags, ..*rule }
}

/// The family of its addresses.
pub fn family(rule: &abi::Rule) -> Family {
    if rule.flags & abi::Rule::V6 == 0 {
        Family::V4
    } else {
        Family::V6
    }
}

/// Its [`Protocol::class`].
pub fn class(rule: &abi::Rule) -> u16 {
    rule.protocol().class(family(rule))
}

/// Elements of COUNTERS that it takes.
pub fn ports(rule: &abi::Rule) -> u32 {
    rule.counters()
}

/// What it listens on.
pub fn listen_scope(rule: &abi::Rule) -> ListenScope {
    let address = (!rule.is_any_address()).then_some(rule.listen);
    ListenScope {
        address,
        first: rule.first,
        last: rule.last,
    }
}

/// Where it forwards to.
pub fn target_scope(rule: &abi::Rule) -> TargetScope {
    TargetScope {
        class: class(rule),
        address: rule.target,
        first: rule.target_first,
        last: rule.target_port(rule.last),
    }
}

/// Prefixes that it takes in LISTENS or TARGETS, whichever is more.
pub fn prefixes(rule: &abi::Rule) -> u32 {
    if rule.is_rest() {
        return 0;
    }
    let listens = PortBlock::cover(rule.first, rule.last).len();
    let targets = PortBlock::cover(rule.target_first, rule.target_port(rule.last)).len();
    listens.max(targets) as u32
}
