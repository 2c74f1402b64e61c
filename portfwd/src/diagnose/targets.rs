//! The way to every target, and back.

use std::collections::BTreeMap;

use portfwd_common::abi::Role;

use super::{Check, Facts, Finding, RuleFacts, instance::run_command};
use crate::netlink::{
    neighbour::Resolution,
    route::{Hop, Route},
};

pub(super) const CHECKS: &[Check] = &[ways, silent_targets, names];

/// Packets that went to a target of which none came back: fewer may still be on their way.
const TELLING: u64 = 3;

fn ways(facts: &Facts) -> Vec<Finding> {
    let mut by_target: BTreeMap<_, Vec<&RuleFacts>> = BTreeMap::new();
    for rule in &facts.rules {
        by_target.entry(rule.target.address).or_default().push(rule);
    }
    let mut findings = Vec::new();
    for (target, rules) in by_target {
        let Some(route) = facts.routes.get(&target) else {
            continue;
        };
        let labels: Vec<_> = rules.iter().map(|rule| rule.label.as_str()).collect();
        let subject = format!("{target} (rule {})", labels.join(", "));
        let remove = format!(
            "{} remove {}",
            facts.command,
            rules
                .iter()
                .map(|rule| rule.id.to_string())
                .collect::<Vec<_>>()
                .join(" ")
        );
        findings.extend(match route {
            Route::None(why) => {
                let lan = facts.sides_of(Role::Lan).next();
                let dev = lan.map_or("eth1", |side| side.name.as_str());
                Some(
                    Finding::error(
                        "target-unreachable",
                        subject,
                        format!("the gateway has no way to it: {why}"),
                    )
                    .fix(format!("{}ip route add {target} dev {dev}", facts.prefix)),
                )
            }
            Route::Local => Some(
                Finding::error(
                    "target-is-gateway",
                    subject,
                    "it is an address of the gateway itself, or the broadcast address of one of its networks: nothing is forwarded to it",
                )
                .fix(remove),
            ),
            Route::Out(hop) => way(facts, &rules[0].target.address, subject, hop),
        });
    }
    findings
}

fn way(facts: &Facts, target: &std::net::IpAddr, subject: String, hop: &Hop) -> Option<Finding> {
    let interface = facts.interface_name(hop.ifindex);
    let Some(side) = facts.side(hop.ifindex) else {
        if facts.sides.is_empty() {
            return None;
        }
        return Some(
            Finding::error(
                "target-not-attached",
                subject,
                format!("it is behind {interface}, which portfwd is not attached to: its answers leave untranslated"),
            )
            .fix(format!("{} --lan {interface}", run_command(facts))),
        );
    };
    if side.role == Role::Wan {
        let lan = facts.sides_of(Role::Lan).next();
        let dev = lan.map_or("eth1", |side| side.name.as_str());
        return Some(
            Finding::error(
                "target-behind-wan",
                subject,
                format!("the gateway's route to it leaves by the WAN ({interface})"),
            )
            .fix(format!(
                "{}ip route replace {target} dev {dev}",
                facts.prefix
            )),
        );
    }
    let next = hop.neighbour(*target);
    let is_silent = facts.neighbours.iter().any(|neighbour| {
        neighbour.ifindex == hop.ifindex
            && neighbour.ip == next
            && neighbour.state == Resolution::Failed
    });
    is_silent.then(|| {
        let who = if next == *target {
            "it".to_owned()
        } else {
            format!("the router {next} on the way to it")
        };
        Finding::error(
            "target-silent",
            subject,
            format!("{who} does not answer on {interface} (no MAC address): it is off, or has another address"),
        )
        .fix(format!("{}ping -c 3 {next}", facts.prefix))
    })
}

/// Packets go to a target and none come back.
fn silent_targets(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for rule in &facts.rules {
        if rule.to_target.packets < TELLING || rule.to_client.packets > 0 {
            continue;
        }
        let target = rule.target.address;
        let gateway = facts
            .routes
            .get(&target)
            .and_then(|route| own_address_towards(facts, route, target.is_ipv4()))
            .unwrap_or_else(|| "GATEWAY".to_owned());
        let cause = format!(
            "{} packets went to {target} and none came back: nothing serves the port there, or its answers take another way than by this gateway",
            rule.to_target.packets
        );
        findings.push(
            Finding::warning("no-replies", format!("rule {}", rule.label), cause).fix(format!(
                "ip route replace default via {gateway}  # on {target}"
            )),
        );
    }
    findings
}

/// A target that is a name, which could not be resolved the last time.
fn names(facts: &Facts) -> Vec<Finding> {
    let unresolved = facts.rules.iter().filter_map(|rule| {
        let (name, why) = rule.unresolved.as_ref()?;
        let cause = format!(
            "{why}; rule {} goes on to {}",
            rule.label, rule.target.address
        );
        let finding = Finding::warning("target-name-unresolved", name, cause);
        Some(finding.fix(format!("{}getent ahosts {name}", facts.prefix)))
    });
    unresolved.collect()
}

fn own_address_towards(facts: &Facts, route: &Route, ipv4: bool) -> Option<String> {
    let Route::Out(hop) = route else { return None };
    facts
        .addresses
        .iter()
        .find(|address| address.ifindex == hop.ifindex && address.ip.is_ipv4() == ipv4)
        .map(|address| address.ip.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{device, expect, fixes},
        netlink::neighbour::Neighbour,
    };

    fn reroute(facts: &mut Facts, route: Route) {
        facts.routes.insert("10.2.0.2".parse().unwrap(), route);
    }

    fn out(ifindex: u32) -> Route {
        Route::Out(Hop {
            ifindex,
            gateway: None,
            mtu: None,
            advertised: false,
        })
    }

    #[test]
    fn every_fault_of_a_target_is_named() {
        expect("target-unreachable", |facts| {
            reroute(facts, Route::None("no route to it".into()));
        });
        expect("target-is-gateway", |facts| reroute(facts, Route::Local));
        expect("target-behind-wan", |facts| reroute(facts, out(2)));
        expect("target-not-attached", |facts| {
            facts.devices.push(device(9, "lan1", None));
            reroute(facts, out(9));
        });
        expect("target-silent", |facts| {
            facts.neighbours.push(Neighbour {
                ifindex: 3,
                ip: "10.2.0.2".parse().unwrap(),
                state: Resolution::Failed,
                mac: None,
            });
        });
        expect("target-name-unresolved", |facts| {
            facts.rules[0].unresolved = Some(("server.lan".into(), "no answer".into()));
        });
        expect("no-replies", |facts| {
            facts.rules[0].to_client.packets = 0;
        });
    }

    #[test]
    fn the_target_is_told_its_gateway() {
        let fix = fixes(|facts| facts.rules[0].to_client.packets = 0);
        assert_eq!(
            fix,
            ["ip route replace default via 10.2.0.1  # on 10.2.0.2"]
        );
    }
}
