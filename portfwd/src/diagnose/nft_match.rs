//! Whether a match of nftables is true of a packet: yes, no, or not known.

use std::net::IpAddr;

use portfwd_common::abi::Protocol;
use serde_json::Value;

use super::nft::Probe;

/// Whether a match is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    /// It is.
    Yes,
    /// It is not.
    No,
    /// It depends on what is not known of the packet, or the match is not understood.
    Unknown,
}

/// What a packet has in the place that a match looks at.
enum Seen<'a> {
    Word(&'a str),
    Number(u64),
    Address(IpAddr),
    /// The packet has no such place: a TCP port of a UDP packet.
    Absent,
    NotKnown,
}

impl Truth {
    /// Both.
    pub(super) const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Yes, Self::Yes) => Self::Yes,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
        }
    }

    const fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Yes, _) | (_, Self::Yes) => Self::Yes,
            (Self::No, Self::No) => Self::No,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
        }
    }

    const fn not(self) -> Self {
        match self {
            Self::Yes => Self::No,
            Self::No => Self::Yes,
            Self::Unknown => Self::Unknown,
        }
    }

    const fn of(is: bool) -> Self {
        if is { Self::Yes } else { Self::No }
    }
}

/// Whether a rule goes on behind one of its expressions.
pub(super) fn truth_of(expression: &Value, probe: &Probe<'_>) -> Truth {
    // A limit lets some through; what comes from iptables is not shown.
    if expression.get("limit").is_some() || expression.get("xt").is_some() {
        return Truth::Unknown;
    }
    let Some(comparison) = expression.get("match") else {
        return Truth::Yes;
    };
    let seen = seen(&comparison["left"], probe);
    let equal = matches(&comparison["right"], &seen);
    match (comparison["op"].as_str(), seen) {
        (_, Seen::Absent) => Truth::No,
        (Some("==" | "in"), _) => equal,
        (Some("!="), _) => equal.not(),
        (_, _) => Truth::Unknown,
    }
}

/// The verdict that a verdict map has for a packet: `None` if that is not known, `Some(None)` if it has none.
pub(super) fn mapped<'a>(map: &'a Value, probe: &Probe<'_>) -> Option<Option<&'a Value>> {
    let seen = seen(&map["key"], probe);
    let elements = map["data"]["set"].as_array()?;
    for element in elements {
        match matches(&element[0], &seen) {
            Truth::Yes => return Some(Some(&element[1])),
            Truth::No => {}
            Truth::Unknown => return None,
        }
    }
    Some(None)
}

fn seen<'a>(left: &Value, probe: &Probe<'a>) -> Seen<'a> {
    let word = |word: Option<&'a str>| word.map_or(Seen::NotKnown, Seen::Word);
    let family = if probe.destination.is_ipv4() {
        "ip"
    } else {
        "ip6"
    };
    let protocol = match probe.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Echo if probe.destination.is_ipv4() => "icmp",
        Protocol::Echo => "ipv6-icmp",
    };
    if let Some(key) = left["meta"]["key"].as_str() {
        return match key {
            "iifname" | "iif" => word(probe.ingress),
            "oifname" | "oif" => word(probe.egress),
            "l4proto" => Seen::Word(protocol),
            "nfproto" => Seen::Word(if family == "ip" { "ipv4" } else { "ipv6" }),
            "protocol" => Seen::Word(family),
            _ => Seen::NotKnown,
        };
    }
    if let Some(key) = left["ct"]["key"].as_str() {
        // portfwd's packets are new to connection tracking, and it has translated nothing about them.
        return match key {
            "state" => Seen::Word("new"),
            "status" => Seen::Word("none"),
            _ => Seen::NotKnown,
        };
    }
    let (layer, field) = (&left["payload"]["protocol"], &left["payload"]["field"]);
    match (layer.as_str(), field.as_str()) {
        (Some("ip" | "ip6"), _) if layer != family => Seen::Absent,
        (Some("ip" | "ip6"), Some("daddr")) => Seen::Address(probe.destination),
        (Some("ip"), Some("protocol")) | (Some("ip6"), Some("nexthdr")) => Seen::Word(protocol),
        (Some("tcp" | "udp"), _) if layer != protocol => Seen::Absent,
        (Some("tcp" | "udp" | "th"), Some("dport")) => Seen::Number(probe.port.into()),
        (Some("icmp" | "icmpv6" | "sctp" | "dccp" | "esp" | "ah" | "arp"), _) => Seen::Absent,
        (_, _) => Seen::NotKnown,
    }
}

/// Whether what was seen is, or is among, the right side of a match.
fn matches(right: &Value, seen: &Seen<'_>) -> Truth {
    if let Some(elements) = right.get("set").or(right.is_array().then_some(right)) {
        let elements = elements.as_array().map_or(&[][..], Vec::as_slice);
        return elements
            .iter()
            .map(|element| matches(element, seen))
            .fold(Truth::No, Truth::or);
    }
    match seen {
        Seen::Absent => Truth::No,
        Seen::NotKnown => Truth::Unknown,
        Seen::Word(word) => match right.as_str() {
            Some(name) if name.starts_with('@') => Truth::Unknown,
            Some(name) => Truth::of(match name.strip_suffix('*') {
                Some(stem) => word.starts_with(stem),
                None => *word == name,
            }),
            None => Truth::Unknown,
        },
        Seen::Number(number) => match (right.as_u64(), right.get("range")) {
            (Some(value), _) => Truth::of(value == *number),
            (None, Some(range)) => match (range[0].as_u64(), range[1].as_u64()) {
                (Some(first), Some(last)) => Truth::of((first..=last).contains(number)),
                (_, _) => Truth::Unknown,
            },
            (None, None) => Truth::Unknown,
        },
        Seen::Address(address) => contains(right, *address),
    }
}

fn contains(right: &Value, address: IpAddr) -> Truth {
    let parse = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
    if let Some(single) = parse(right) {
        return Truth::of(single == address);
    }
    if let Some(prefix) = right.get("prefix") {
        return match (parse(&prefix["addr"]), prefix["len"].as_u64()) {
            (Some(network), Some(length)) => Truth::of(in_prefix(address, network, length)),
            (_, _) => Truth::Unknown,
        };
    }
    match (parse(&right["range"][0]), parse(&right["range"][1])) {
        (Some(first), Some(last)) => Truth::of((first..=last).contains(&address)),
        (_, _) => Truth::Unknown,
    }
}

fn in_prefix(address: IpAddr, network: IpAddr, length: u64) -> bool {
    let (bits, width) = match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(n)) => (u128::from(a.to_bits() ^ n.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(n)) => (a.to_bits() ^ n.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    length == 0 || (length <= width && bits >> (width - length) == 0)
}
