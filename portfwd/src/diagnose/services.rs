//! Ports that others use too: services of the gateway, and connections that it opens itself.

use super::{Check, Facts, Finding, facts::RuleFacts};
use crate::ruleset::RuleProtocol;

pub(super) const CHECKS: &[Check] = &[services, own_connections];

fn services(facts: &Facts) -> Vec<Finding> {
    facts
        .shadowed
        .iter()
        .map(|(rule, cause)| {
            let label = facts.rules.iter().find(|of| of.id == *rule);
            let label = label.map_or_else(|| rule.to_string(), |of| of.label.clone());
            Finding::warning("local-service", format!("rule {label}"), cause)
                .fix(format!("{} remove {rule}", facts.command))
        })
        .collect()
}

/// Answers to a connection that the gateway opened itself from a listen port would be forwarded.
fn own_connections(facts: &Facts) -> Vec<Finding> {
    let Some((first, last)) = facts
        .sysctl("net/ipv4/ip_local_port_range")
        .and_then(|range| {
            let mut ports = range
                .split_whitespace()
                .filter_map(|word| word.parse::<u16>().ok());
            Some((ports.next()?, ports.next()?))
        })
    else {
        return Vec::new();
    };
    let reserved = ranges(
        facts
            .sysctl("net/ipv4/ip_local_reserved_ports")
            .unwrap_or_default(),
    );
    let mut missing: Vec<(u16, u16)> = Vec::new();
    let mut labels = Vec::new();
    // Answers go before a rule for everything else.
    let takes_answers = |rule: &&RuleFacts| rule.protocol != RuleProtocol::Dmz;
    for rule in facts.rules.iter().filter(takes_answers) {
        let (from, to) = (
            rule.listen.ports.first().max(first),
            rule.listen.ports.last().min(last),
        );
        let is_reserved = reserved.iter().any(|(a, b)| *a <= from && to <= *b);
        if from <= to && !is_reserved {
            missing.push((from, to));
            labels.push(rule.label.as_str());
        }
    }
    if missing.is_empty() {
        return Vec::new();
    }
    let word = |(a, b): &(u16, u16)| {
        if a == b {
            a.to_string()
        } else {
            format!("{a}-{b}")
        }
    };
    let mut words: Vec<_> = reserved.iter().chain(&missing).map(word).collect();
    words.dedup();
    let cause = format!(
        "the gateway opens connections from ports {first}-{last} itself, and answers to those from a listen port would be forwarded"
    );
    let finding = Finding::warning(
        "own-connections",
        format!("rule {}", labels.join(", ")),
        cause,
    );
    vec![finding.fix(format!(
        "{}sysctl -w net.ipv4.ip_local_reserved_ports={}",
        facts.prefix,
        words.join(",")
    ))]
}

/// Reads `22,8080-8090`.
fn ranges(text: &str) -> Vec<(u16, u16)> {
    text.trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some((first.parse().ok()?, last.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{expect, fixes},
        ruleset::PortRange,
    };

    #[test]
    fn a_service_and_an_ephemeral_port_are_named() {
        expect("local-service", |facts| {
            facts.shadowed.push((1, "nginx listens".into()));
        });
        let ephemeral = |facts: &mut Facts| {
            facts.rules[0].listen.ports = PortRange::new(30_000, 40_000).unwrap();
        };
        expect("own-connections", ephemeral);
        assert_eq!(
            fixes(ephemeral),
            ["sysctl -w net.ipv4.ip_local_reserved_ports=32768-40000"]
        );
        assert!(
            fixes(|facts| {
                ephemeral(facts);
                facts.sysctls.insert(
                    "net/ipv4/ip_local_reserved_ports".into(),
                    "22,32768-40000\n".into(),
                );
            })
            .is_empty()
        );
    }
}
