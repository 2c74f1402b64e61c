//! The own addresses of the WAN interfaces while the WAN is out.
//!
//! A line that drops takes its address with it (PPP deletes the interface), and most come back with the same one minutes
//! later. So as long as no WAN interface has an address of a family, the last ones of that family stand: flows to them live
//! on, and a packet of theirs finds no route meanwhile. With the first address of that family the last ones are history,
//! and flows to any that did not come back end.

use std::{collections::BTreeMap, net::IpAddr};

use crate::netlink::address::Address;

/// The addresses that rules without listen address stand for, with the interface of each. `all` are the addresses there are,
/// `is_wan` tells the WAN interfaces, and `before` is what was valid before.
pub(super) fn own_addresses(
    all: &[Address],
    is_wan: impl Fn(u32) -> bool,
    before: &[(IpAddr, u32)],
) -> Vec<(IpAddr, u32)> {
    // An address on two interfaces is one address.
    let mut own: BTreeMap<IpAddr, u32> = all
        .iter()
        .filter(|address| is_wan(address.ifindex))
        .map(|address| (address.ip, address.ifindex))
        .collect();
    let has = |v4: bool| own.keys().any(|ip| ip.is_ipv4() == v4);
    let (has_v4, has_v6) = (has(true), has(false));
    let moved = |ip: &IpAddr| all.iter().any(|address| address.ip == *ip);
    let last = before.iter().filter(|(ip, _)| {
        let is_out = if ip.is_ipv4() { !has_v4 } else { !has_v6 };
        is_out && !moved(ip)
    });
    own.extend(last.copied());
    own.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAN: u32 = 2;
    const LAN: u32 = 3;

    fn own(all: &[(u32, &str)], before: &[&str]) -> Vec<String> {
        let all: Vec<_> = all
            .iter()
            .map(|(ifindex, ip)| Address {
                ifindex: *ifindex,
                ip: ip.parse().unwrap(),
                prefix: 24,
                deprecated: false,
            })
            .collect();
        let before: Vec<_> = before.iter().map(|ip| (ip.parse().unwrap(), WAN)).collect();
        own_addresses(&all, |ifindex| ifindex == WAN, &before)
            .into_iter()
            .map(|(ip, _)| ip.to_string())
            .collect()
    }

    #[test]
    fn the_last_addresses_stand_until_there_is_another_of_their_family() {
        for (all, before, expected) in [
            (
                vec![(WAN, "192.0.2.1"), (LAN, "10.0.0.1")],
                vec![],
                vec!["192.0.2.1"],
            ),
            // Out: both families, then one of them.
            (
                vec![(LAN, "10.0.0.1")],
                vec!["192.0.2.1", "2001:db8::1"],
                vec!["192.0.2.1", "2001:db8::1"],
            ),
            (
                vec![(WAN, "192.0.2.1")],
                vec!["192.0.2.1", "2001:db8::1"],
                vec!["192.0.2.1", "2001:db8::1"],
            ),
            // Back with another one.
            (
                vec![(WAN, "192.0.2.9")],
                vec!["192.0.2.1"],
                vec!["192.0.2.9"],
            ),
            // One of two went: it is no outage.
            (
                vec![(WAN, "192.0.2.2")],
                vec!["192.0.2.1", "192.0.2.2"],
                vec!["192.0.2.2"],
            ),
            // It belongs to the LAN now.
            (vec![(LAN, "192.0.2.1")], vec!["192.0.2.1"], vec![]),
        ] {
            assert_eq!(own(&all, &before), expected, "{all:?} {before:?}");
        }
    }
}
