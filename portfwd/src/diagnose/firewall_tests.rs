//! Rulesets in which something is wrong.

use serde_json::{Value, json};

use super::*;
use crate::diagnose::sample::{expect, fixes};

/// A base chain and its one rule, of handle 7.
fn chain(family: &str, hook: &str, policy: &str, expressions: Value) -> Firewall {
    Firewall::parse(&json!({"nftables": [
        {"chain": {"family": family, "table": "t", "name": "c", "handle": 1, "type": "filter",
            "hook": hook, "prio": 0, "policy": policy, "dev": "lan0"}},
        {"rule": {"family": family, "table": "t", "chain": "c", "handle": 7, "expr": expressions}},
    ]}))
}

fn port(port: u16) -> Value {
    json!({"match": {"op": "==", "right": port,
        "left": {"payload": {"protocol": "tcp", "field": "dport"}}}})
}

#[test]
fn every_fault_of_the_firewall_is_named() {
    let narrow = |facts: &mut Facts| {
        for route in facts.routes.values_mut() {
            let Route::Out(hop) = route else { panic!() };
            hop.mtu = Some(1400);
        }
    };
    expect("firewall-drops-forwarded", |facts| {
        facts.firewall = Some(chain(
            "netdev",
            "egress",
            "drop",
            json!([{"counter": null}]),
        ));
    });
    expect("firewall-drops-forwarded", |facts| {
        facts.firewall = Some(chain(
            "netdev",
            "egress",
            "accept",
            json!([port(80), {"drop": null}]),
        ));
    });
    expect("firewall-bypassed", |facts| {
        facts.firewall = Some(chain(
            "ip",
            "forward",
            "accept",
            json!([port(80), {"drop": null}]),
        ));
    });
    expect("firewall-bypassed", |facts| {
        facts.firewall = Some(chain(
            "ip",
            "input",
            "accept",
            json!([port(8080), {"drop": null}]),
        ));
    });
    expect("firewall-drops-large", |facts| {
        narrow(facts);
        facts.firewall = Some(chain("inet", "forward", "drop", json!([{"counter": null}])));
    });
    expect("translation-shadowed", |facts| {
        facts.firewall = Some(chain(
            "ip",
            "prerouting",
            "accept",
            json!([port(8080), {"dnat": {"addr": "10.2.0.9"}}]),
        ));
    });
    expect("masquerade-on-listen-port", |facts| {
        facts.firewall = Some(chain(
            "ip",
            "postrouting",
            "accept",
            json!([{"masquerade": {"port": {"range": [8000, 9000]}}}]),
        ));
    });
    expect("flowtable-in-hardware", |facts| {
        facts.firewall = Some(Firewall::parse(&json!({"nftables": [
            {"flowtable": {"family": "inet", "table": "t", "name": "f", "flags": ["offload"], "dev": ["lan0"]}},
        ]})));
    });
}

#[test]
fn a_usual_firewall_is_no_fault() {
    let established = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}},
        "right": ["established", "related"]}});
    for firewall in [
        chain(
            "inet",
            "forward",
            "drop",
            json!([established, {"accept": null}]),
        ),
        chain(
            "inet",
            "input",
            "drop",
            json!([established, {"accept": null}]),
        ),
        chain("ip", "postrouting", "accept", json!([{"masquerade": null}])),
        chain(
            "ip",
            "prerouting",
            "accept",
            json!([port(22), {"dnat": {"addr": "10.2.0.9"}}]),
        ),
        chain("ip", "forward", "accept", json!([port(25), {"drop": null}])),
        chain(
            "netdev",
            "egress",
            "accept",
            json!([port(25), {"drop": null}]),
        ),
    ] {
        let fixes = fixes(|facts| facts.firewall = Some(firewall.clone()));
        assert!(fixes.is_empty(), "{firewall:?}: {fixes:?}");
    }
}

#[test]
fn the_command_takes_the_rule_away_or_opens_the_chain() {
    for (policy, expressions, command) in [
        (
            "accept",
            json!([{"drop": null}]),
            "nft delete rule netdev t c handle 7",
        ),
        (
            "drop",
            json!([{"counter": null}]),
            "nft insert rule netdev t c ip daddr 10.2.0.2 accept",
        ),
    ] {
        let found = fixes(|facts| {
            facts.rules.truncate(1);
            facts.internet.truncate(1);
            facts.firewall = Some(chain("netdev", "egress", policy, expressions.clone()));
        });
        assert_eq!(found, [command]);
    }
}
