//! The networks that the gateway has addresses in, two of whose addresses are no machine's.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use super::Refusal;

/// An IPv4 network on one of the gateway's links. IPv6 has no such addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its first address, the network's own.
    first: Ipv4Addr,
    /// Bits of its prefix, less than 31.
    prefix: u8,
}

/// What an address is that stands for a whole network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// All bits behind the prefix are 0: the network itself, and in old usage its broadcast address.
    Network,
    /// All are 1: the directed broadcast (RFC 1812 section 5.3.5.2).
    Broadcast,
}

impl Network {
    /// The network of an own address. `None` over IPv6, and for a prefix of 31 bits or more, which leaves room for machines
    /// alone (RFC 3021).
    pub fn of(own: IpAddr, prefix: u8) -> Option<Self> {
        let IpAddr::V4(own) = own else {
            return None;
        };
        (prefix < 31).then(|| Self {
            first: Ipv4Addr::from_bits(own.to_bits() & !host_bits(prefix)),
            prefix,
        })
    }

    /// What the address is in this network, if it is no machine's.
    fn edge(self, address: IpAddr) -> Option<Edge> {
        let IpAddr::V4(address) = address else {
            return None;
        };
        match address.to_bits().wrapping_sub(self.first.to_bits()) {
            0 => Some(Edge::Network),
            host if host == host_bits(self.prefix) => Some(Edge::Broadcast),
            _ => None,
        }
    }
}

/// The bits behind a prefix of less than 32 bits.
const fn host_bits(prefix: u8) -> u32 {
    u32::MAX >> prefix
}

/// Whether a target is an address that a machine can have in these networks.
pub fn check(target: IpAddr, networks: &[Network]) -> Result<(), Refusal> {
    for network in networks {
        if let Some(edge) = network.edge(target) {
            return Err(Refusal::TargetIsEdge {
                address: target,
                edge,
                network: *network,
            });
        }
    }
    Ok(())
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Network => "network address",
            Self::Broadcast => "broadcast address",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(target: &str, own: &[(&str, u8)]) -> Option<String> {
        let networks: Vec<_> = own
            .iter()
            .filter_map(|(own, prefix)| Network::of(own.parse().unwrap(), *prefix))
            .collect();
        let checked = check(target.parse().unwrap(), &networks);
        checked.err().map(|refusal| refusal.to_string())
    }

    #[test]
    fn no_rule_leads_to_the_first_or_the_last_address_of_an_own_network() {
        let lan = [("203.0.113.9", 32), ("10.2.7.1", 22), ("10.9.0.1", 24)];
        for (target, expected) in [
            (
                "10.2.4.0",
                Some(
                    "TARGET 10.2.4.0 is the network address of 10.2.4.0/22, a network of this gateway",
                ),
            ),
            (
                "10.2.7.255",
                Some(
                    "TARGET 10.2.7.255 is the broadcast address of 10.2.4.0/22, a network of this gateway",
                ),
            ),
            (
                "10.9.0.255",
                Some(
                    "TARGET 10.9.0.255 is the broadcast address of 10.9.0.0/24, a network of this gateway",
                ),
            ),
            // Machines may have these in the larger network.
            ("10.2.5.0", None),
            ("10.2.5.255", None),
            // And these in networks that are elsewhere.
            ("10.2.8.0", None),
            ("10.3.0.255", None),
            ("203.0.113.9", None),
            ("2001:db8:2::", None),
        ] {
            assert_eq!(refusal(target, &lan).as_deref(), expected, "{target}");
        }
    }

    #[test]
    fn both_addresses_of_a_point_to_point_link_are_machines() {
        for (prefix, expected) in [(30, true), (31, false), (32, false)] {
            let edge = refusal("10.2.0.0", &[("10.2.0.1", prefix)]);
            assert_eq!(edge.is_some(), expected, "/{prefix}");
        }
        assert!(refusal("255.255.255.255", &[("10.2.0.1", 0)]).is_some());
        assert_eq!(refusal("2001:db8::", &[("2001:db8::1", 16)]), None);
    }
}
