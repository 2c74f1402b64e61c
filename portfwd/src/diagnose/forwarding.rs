//! The kernel's own settings for routers.

use portfwd_common::abi::Role;

use super::{Check, Facts, Finding};
use crate::netlink::route::Route;

pub(super) const CHECKS: &[Check] = &[forwarding, router_advertisements, reverse_path];

/// A family's names.
struct Names {
    is_ipv4: bool,
    word: &'static str,
    /// The setting that turns forwarding on for all interfaces.
    switch: &'static str,
    off: &'static str,
    off_for_interface: &'static str,
}

const FAMILIES: [Names; 2] = [
    Names {
        is_ipv4: true,
        word: "ipv4",
        switch: "net/ipv4/ip_forward",
        off: "ipv4-forwarding-off",
        off_for_interface: "ipv4-forwarding-off-for-interface",
    },
    Names {
        is_ipv4: false,
        word: "ipv6",
        switch: "net/ipv6/conf/all/forwarding",
        off: "ipv6-forwarding-off",
        off_for_interface: "ipv6-forwarding-off-for-interface",
    },
];

/// A setting as `sysctl` takes it: with dots, unless an interface's name has some itself.
fn name(key: &str) -> String {
    if key.contains('.') {
        key.to_owned()
    } else {
        key.replace('/', ".")
    }
}

fn set(facts: &Facts, key: &str, value: &str) -> String {
    format!("{}sysctl -w {}={value}", facts.prefix, name(key))
}

/// The kernel's forwarding table answers the datapath only for interfaces that forward.
fn forwarding(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in &FAMILIES {
        // Without rules yet, IPv4 is what they will be.
        let is_first = family.is_ipv4 && facts.rules.is_empty();
        if !is_first && !facts.forwards(family.is_ipv4) {
            continue;
        }
        if facts.sysctl(family.switch) == Some("0") {
            findings.push(
                Finding::error(
                    family.off,
                    name(family.switch),
                    "it is 0: the kernel gives no route to portfwd and forwards nothing itself",
                )
                .fix(set(facts, family.switch, "1")),
            );
            continue;
        }
        for side in &facts.sides {
            let key = format!("net/{}/conf/{}/forwarding", family.word, side.name);
            if facts.sysctl(&key) == Some("0") {
                let cause = format!(
                    "it is 0: nothing that comes in by {} is forwarded",
                    side.name
                );
                findings.push(
                    Finding::error(family.off_for_interface, name(&key), cause)
                        .fix(set(facts, &key, "1")),
                );
            }
        }
    }
    findings
}

/// A router ignores router advertisements unless told otherwise: its IPv6 address and route end some time.
fn router_advertisements(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for side in facts.sides_of(Role::Wan) {
        let key = format!("net/ipv6/conf/{}/accept_ra", side.name);
        let by_router = facts.internet.iter().any(|(destination, route)| {
            let Route::Out(hop) = route else { return false };
            destination.is_ipv6()
                && hop.advertised
                && facts.interface_name(hop.ifindex) == side.name
        });
        if by_router && facts.sysctl(&key) == Some("1") && facts.forwards(false) {
            let cause = "the IPv6 route of this interface comes from router advertisements, which a router ignores from now on";
            findings.push(
                Finding::warning("router-advertisements-ignored", name(&key), cause)
                    .fix(set(facts, &key, "2")),
            );
        }
    }
    findings
}

/// Strict filtering takes packets for spoofed that come in by another interface than the way back to their source: of several
/// WANs, all but one.
fn reverse_path(facts: &Facts) -> Vec<Finding> {
    let way_back = facts
        .internet
        .iter()
        .find_map(|(destination, route)| match route {
            Route::Out(hop) if destination.is_ipv4() => Some(facts.interface_name(hop.ifindex)),
            Route::Out(_) | Route::Local | Route::None(_) => None,
        });
    let Some(way_back) = way_back else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for side in facts
        .sides_of(Role::Wan)
        .filter(|side| side.name != way_back)
    {
        let key = format!("net/ipv4/conf/{}/rp_filter", side.name);
        // The kernel goes by the larger of the two.
        let value = [
            facts.sysctl("net/ipv4/conf/all/rp_filter"),
            facts.sysctl(&key),
        ];
        if value.into_iter().flatten().max() == Some("1") {
            findings.push(
                Finding::warning(
                    "reverse-path-strict",
                    name(&key),
                    format!("it is strict, and the way back to the internet is {way_back}: what the stack must forward of {} is dropped", side.name),
                )
                .fix(set(facts, &key, "2")),
            );
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{device, expect, fixes};

    fn set_to(facts: &mut Facts, key: &str, value: &str) {
        facts.sysctls.insert(key.into(), value.into());
    }

    #[test]
    fn every_setting_that_is_wrong_is_named() {
        for (id, key, value) in [
            ("ipv4-forwarding-off", "net/ipv4/ip_forward", "0"),
            ("ipv6-forwarding-off", "net/ipv6/conf/all/forwarding", "0"),
            (
                "ipv4-forwarding-off-for-interface",
                "net/ipv4/conf/wan0/forwarding",
                "0",
            ),
            (
                "ipv6-forwarding-off-for-interface",
                "net/ipv6/conf/lan0/forwarding",
                "0",
            ),
        ] {
            expect(id, |facts| set_to(facts, key, value));
        }
        expect("router-advertisements-ignored", |facts| {
            set_to(facts, "net/ipv6/conf/wan0/accept_ra", "1");
            for (_, route) in &mut facts.internet {
                let Route::Out(hop) = route else {
                    panic!("{route:?}")
                };
                hop.advertised = true;
            }
        });
    }

    #[test]
    fn a_second_wan_with_a_strict_filter_is_named() {
        let second = |facts: &mut Facts| {
            facts.devices.push(device(9, "wan1.7", None));
            facts.sides.push(crate::diagnose::Side {
                name: "wan1.7".into(),
                role: Role::Wan,
                mode: None,
                programs_before: Vec::new(),
            });
            set_to(facts, "net/ipv4/conf/wan1.7/rp_filter", "1");
        };
        expect("reverse-path-strict", second);
        assert_eq!(
            fixes(second),
            ["sysctl -w net/ipv4/conf/wan1.7/rp_filter=2"]
        );
    }
}
