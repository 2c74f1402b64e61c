//! The WAN side: addresses that rules listen on, and the way to the clients.

use std::net::{IpAddr, Ipv4Addr};

use portfwd_common::abi::Role;

use super::{Check, Facts, Finding};
use crate::netlink::route::Route;

pub(super) const CHECKS: &[Check] = &[
    no_address,
    private_address,
    listen_addresses,
    way_to_clients,
];

fn family_word(ipv4: bool) -> &'static str {
    if ipv4 { "IPv4" } else { "IPv6" }
}

fn first_wan(facts: &Facts) -> Option<&str> {
    facts
        .sides_of(Role::Wan)
        .map(|side| side.name.as_str())
        .find(|name| facts.device(name).is_some())
}

/// A rule without address listens on those of the WAN interfaces: there must be some.
fn no_address(facts: &Facts) -> Vec<Finding> {
    let Some(wan) = first_wan(facts) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for ipv4 in [true, false] {
        let labels: Vec<_> = facts
            .rules
            .iter()
            .filter(|rule| rule.listen.address.is_none() && rule.target.address.is_ipv4() == ipv4)
            .map(|rule| rule.label.as_str())
            .collect();
        let has_address = facts
            .wan_addresses()
            .any(|address| address.is_ipv4() == ipv4);
        if labels.is_empty() || has_address {
            continue;
        }
        let family = family_word(ipv4);
        let cause = format!(
            "no WAN interface has an {family} address: rules without address listen nowhere ({})",
            labels.join(", ")
        );
        let show = if ipv4 { "ip -4" } else { "ip -6" };
        findings.push(
            Finding::error("wan-without-address", format!("{wan} ({family})"), cause)
                .fix(format!("{}{show} address show dev {wan}", facts.prefix)),
        );
    }
    findings
}

/// Behind another router the internet does not reach this one by itself.
fn private_address(facts: &Facts) -> Vec<Finding> {
    let ipv4: Vec<_> = facts
        .wan_addresses()
        .filter_map(|address| match address {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        })
        .collect();
    let Some(first) = ipv4.first() else {
        return Vec::new();
    };
    if !facts.forwards(true) || !ipv4.iter().all(|ip| ip.is_private() || is_shared(*ip)) {
        return Vec::new();
    }
    let finding = if is_shared(*first) {
        Finding::warning(
            "wan-address-shared",
            first,
            "the provider shares its own address among customers (RFC 6598): nobody in the internet can dial this one",
        )
    } else {
        Finding::warning(
            "wan-address-private",
            first,
            "another router is between this gateway and the internet: that one must forward the ports to this address too",
        )
    };
    vec![finding.fix(format!("{}ip -4 route show default", facts.prefix))]
}

/// 100.64.0.0/10, RFC 6598.
const fn is_shared(ip: Ipv4Addr) -> bool {
    let [a, b, _, _] = ip.octets();
    a == 100 && b & 0xc0 == 64
}

fn listen_addresses(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for rule in &facts.rules {
        let Some(address) = rule.listen.address else {
            continue;
        };
        if facts.addresses.iter().any(|own| own.ip == address) {
            continue;
        }
        let Some(wan) = first_wan(facts) else {
            continue;
        };
        let cause = format!(
            "rule {} listens on it, and no interface has it: packets only come if others route it here",
            rule.label
        );
        let length = if address.is_ipv4() { 32 } else { 128 };
        findings.push(
            Finding::warning("listen-address-missing", address, cause).fix(format!(
                "{}ip address add {address}/{length} dev {wan}",
                facts.prefix
            )),
        );
    }
    findings
}

/// Replies leave by the gateway's route to the client.
fn way_to_clients(facts: &Facts) -> Vec<Finding> {
    let Some(wan) = first_wan(facts) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for (destination, route) in &facts.internet {
        let ipv4 = destination.is_ipv4();
        if !facts.forwards(ipv4) {
            continue;
        }
        let family = family_word(ipv4);
        let ip = if ipv4 { "ip -4" } else { "ip -6" };
        let fix = format!("{}{ip} route replace default dev {wan}", facts.prefix);
        let finding = match route {
            Route::None(why) => Finding::error(
                "no-route-to-clients",
                format!("{family} default route"),
                format!(
                    "there is no way to clients in the internet ({why}): replies end at this gateway"
                ),
            ),
            Route::Out(hop)
                if facts
                    .side(hop.ifindex)
                    .is_none_or(|side| !side.role.is_wan()) =>
            {
                Finding::error(
                    "clients-not-behind-wan",
                    format!("{family} default route"),
                    format!(
                        "it leaves by {}, which is not attached as WAN: replies to the internet go there",
                        facts.interface_name(hop.ifindex)
                    ),
                )
            }
            Route::Out(_) | Route::Local => continue,
        };
        findings.push(finding.fix(fix));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::expect;

    fn renumber(facts: &mut Facts, address: &str) {
        let address = address.parse().unwrap();
        facts.addresses[0].ip = address;
        facts.instance.known_addresses.push(address);
    }

    #[test]
    fn every_fault_of_the_wan_is_named() {
        expect("wan-without-address", |facts| {
            facts.addresses.retain(|address| address.ip.is_ipv6());
        });
        expect("wan-without-address", |facts| {
            facts.addresses.retain(|address| address.ip.is_ipv4());
        });
        for (id, address) in [
            ("wan-address-private", "192.168.1.2"),
            ("wan-address-private", "10.0.0.2"),
            ("wan-address-private", "172.31.0.2"),
            ("wan-address-shared", "100.64.0.2"),
            ("wan-address-shared", "100.127.255.2"),
        ] {
            expect(id, |facts| renumber(facts, address));
        }
        expect("listen-address-missing", |facts| {
            facts.rules[0].listen.address = Some("203.0.113.99".parse().unwrap());
        });
        expect("no-route-to-clients", |facts| {
            facts.internet[0].1 = Route::None("no route to it".into());
        });
        expect("clients-not-behind-wan", |facts| {
            let Route::Out(hop) = &mut facts.internet[1].1 else {
                panic!()
            };
            hop.ifindex = 3;
        });
    }

    #[test]
    fn public_addresses_next_to_private_ones_are_enough() {
        for address in ["100.63.0.1", "100.128.0.1", "172.32.0.1", "192.169.0.1"] {
            assert!(
                !is_shared(address.parse().unwrap())
                    && !address.parse::<Ipv4Addr>().unwrap().is_private()
            );
        }
    }
}
