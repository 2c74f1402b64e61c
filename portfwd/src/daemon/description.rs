//! An interface as the datapath knows it.

use std::net::IpAddr;

use portfwd_common::{
    abi::{self, LinkLayer, Role, Transmission},
    net::{Ipv4, Ipv6},
};

use crate::netlink::{address::Address, link::Link};

/// The element of INTERFACES for a link.
pub(super) fn interface(
    link: &Link,
    role: Role,
    takes: Transmission,
    addresses: &[Address],
) -> abi::Interface {
    let mut flags = 0;
    flags |= match role {
        Role::Wan => abi::Interface::ROLE_WAN,
        Role::Lan => 0,
        Role::Both => abi::Interface::ROLE_WAN | abi::Interface::ROLE_BOTH,
    };
    if link.layer == LinkLayer::Raw {
        flags |= abi::Interface::RAW;
    }
    flags |= takes.flags();
    let mut own: Vec<_> = addresses
        .iter()
        .filter(|address| address.ifindex == link.ifindex)
        .collect();
    own.sort_by_key(|address| address.deprecated);
    let ipv4 = own.iter().find_map(|address| match address.ip {
        IpAddr::V4(ip) => Some((Ipv4::from(ip), address.prefix)),
        IpAddr::V6(_) => None,
    });
    let ipv6 = own.iter().find_map(|address| match address.ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some((Ipv6::from(ip), address.prefix)),
    });
    let (ipv4, ipv4_prefix) = ipv4.unwrap_or_default();
    let (ipv6, ipv6_prefix) = ipv6.unwrap_or_default();
    abi::Interface {
        ifindex: link.ifindex,
        mtu: link.mtu,
        mac: bytemuck::cast(link.mac),
        flags,
        ipv4,
        ipv6,
        ipv4_prefix,
        ipv6_prefix,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_described_with_its_preferred_addresses() {
        let link = Link {
            ifindex: 7,
            name: "wan0".into(),
            layer: LinkLayer::Ethernet,
            kind: None,
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1492,
            xdp: None,
        };
        let address = |ifindex, ip: &str, deprecated| Address {
            ifindex,
            ip: ip.parse().unwrap(),
            prefix: 24,
            deprecated,
        };
        let addresses = [
            address(6, "192.0.2.9", false),
            address(7, "2001:db8::1", true),
            address(7, "192.0.2.1", false),
            address(7, "192.0.2.2", false),
            address(7, "2001:db8::2", false),
        ];
        let described = interface(&link, Role::Wan, Transmission::Whole, &addresses);
        assert_eq!(
            described.address::<Ipv4>(),
            Some(Ipv4::from(
                "192.0.2.1".parse::<std::net::Ipv4Addr>().unwrap()
            ))
        );
        assert_eq!(
            described.address::<Ipv6>(),
            Some(Ipv6::from(
                "2001:db8::2".parse::<std::net::Ipv6Addr>().unwrap()
            ))
        );
        assert_eq!(
            (described.role(), described.link(), described.transmission()),
            (Role::Wan, LinkLayer::Ethernet, Transmission::Whole)
        );
        assert_eq!(bytemuck::bytes_of(&described.mac), [2, 0, 0, 0, 0, 9]);
        let lan = interface(&link, Role::Lan, Transmission::Nothing, &[]);
        assert_eq!(
            (lan.role(), lan.transmission(), lan.address::<Ipv4>()),
            (Role::Lan, Transmission::Nothing, None)
        );
    }
}
