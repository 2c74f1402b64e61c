//! Judgements of rulesets in the JSON of nftables 1.0.6.

use serde_json::json;

use super::*;

const PROBE: Probe<'_> = Probe {
    ingress: Some("wan0"),
    egress: Some("lan0"),
    destination: IpAddr::V4(std::net::Ipv4Addr::new(10, 2, 0, 2)),
    protocol: Protocol::Tcp,
    port: 80,
};

/// A chain of the forward hook with `policy` and the expressions of its rules; handles count from 1.
fn forward(policy: &str, rules: &[Value]) -> Firewall {
    let mut objects = vec![json!({"chain": {
        "family": "inet", "table": "filter", "name": "forward", "handle": 1,
        "type": "filter", "hook": "forward", "prio": 0, "policy": policy}})];
    objects.push(json!({"chain": {"family": "inet", "table": "filter", "name": "called"}}));
    for (handle, expressions) in (1..).zip(rules) {
        let chain = if handle >= 100 { "called" } else { "forward" };
        objects.push(
            json!({"rule": {"family": "inet", "table": "filter", "chain": chain,
            "handle": handle, "expr": expressions}}),
        );
    }
    Firewall::parse(&json!({"nftables": objects}))
}

fn is(left: Value, right: Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn field(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn dropped_by(firewall: &Firewall) -> Option<Option<u64>> {
    match firewall.judge("forward", &PROBE) {
        Judgement::Drops(place) => Some(place.handle),
        Judgement::Passes => None,
    }
}

#[test]
fn a_packet_is_dropped_by_a_rule_that_matches_and_by_nothing_else() {
    let drop = json!({"drop": null});
    for (matches, dropped) in [
        (vec![], true),
        (vec![is(meta("iifname"), json!("wan0"))], true),
        (vec![is(meta("iifname"), json!("wan*"))], true),
        (vec![is(meta("iifname"), json!("lan0"))], false),
        (vec![is(field("ip", "daddr"), json!("10.2.0.2"))], true),
        (
            vec![is(
                field("ip", "daddr"),
                json!({"prefix": {"addr": "10.2.0.0", "len": 16}}),
            )],
            true,
        ),
        (
            vec![is(
                field("ip", "daddr"),
                json!({"prefix": {"addr": "10.3.0.0", "len": 16}}),
            )],
            false,
        ),
        (vec![is(field("ip6", "daddr"), json!("2001:db8::2"))], false),
        (
            vec![is(
                field("tcp", "dport"),
                json!({"set": [22, {"range": [80, 90]}]}),
            )],
            true,
        ),
        (
            vec![is(field("tcp", "dport"), json!({"range": [81, 90]}))],
            false,
        ),
        (vec![is(field("udp", "dport"), json!(80))], false),
        (
            vec![is(meta("l4proto"), json!({"set": ["udp", "tcp"]}))],
            true,
        ),
        (
            vec![is(
                json!({"ct": {"key": "state"}}),
                json!(["established", "related"]),
            )],
            false,
        ),
        (
            vec![is(json!({"ct": {"key": "state"}}), json!("new"))],
            true,
        ),
        (
            vec![json!({"match": {"op": "!=", "left": field("tcp", "dport"), "right": 80}})],
            false,
        ),
        (
            vec![json!({"match": {"op": "!=", "left": field("udp", "dport"), "right": 80}})],
            false,
        ),
        // What cannot be known does not drop.
        (vec![is(field("ip", "saddr"), json!("192.0.2.1"))], false),
        (vec![is(field("ip", "daddr"), json!("@blocked"))], false),
        (
            vec![json!({"limit": {"rate": 10, "per": "second", "inv": true}})],
            false,
        ),
        (vec![json!({"xt": null})], false),
    ] {
        let mut expressions = matches.clone();
        expressions.extend([json!({"counter": {"packets": 0, "bytes": 0}}), drop.clone()]);
        let found = dropped_by(&forward("accept", &[Value::Array(expressions)]));
        assert_eq!(found, dropped.then_some(Some(1)), "{matches:?}");
    }
}

#[test]
fn a_policy_drops_what_no_rule_accepts_or_might_accept() {
    let established = is(
        json!({"ct": {"key": "state"}}),
        json!({"set": ["established", "related"]}),
    );
    let (accept, drop) = (json!({"accept": null}), json!({"drop": null}));
    for (rules, expected) in [
        (vec![], Some(None)),
        (vec![json!([established, accept])], Some(None)),
        (
            vec![json!([is(meta("iifname"), json!("wan0")), accept])],
            None,
        ),
        // A list that is not looked into might accept it.
        (
            vec![json!([is(field("ip", "saddr"), json!("@friends")), accept])],
            None,
        ),
        (
            vec![json!([is(field("ip", "saddr"), json!("@friends")), drop])],
            Some(None),
        ),
        (vec![json!([{"xt": null}, accept]), json!([drop])], None),
    ] {
        assert_eq!(dropped_by(&forward("drop", &rules)), expected, "{rules:?}");
    }
}

#[test]
fn verdict_maps_and_calls_are_followed() {
    let map = |elements: Value| json!([{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": elements}}}]);
    let (accept, drop) = (json!({"accept": null}), json!({"drop": null}));
    for (rules, expected) in [
        (
            vec![map(json!([["established", accept], ["new", drop]]))],
            Some(Some(1)),
        ),
        (
            vec![map(json!([["established", accept], ["invalid", drop]]))],
            None,
        ),
        (
            vec![json!([{"jump": {"target": "called"}}]), json!([drop])],
            Some(Some(2)),
        ),
        (
            vec![json!([{"jump": {"target": "nowhere"}}]), json!([drop])],
            None,
        ),
        (vec![json!([{"return": null}]), json!([drop])], None),
    ] {
        assert_eq!(
            dropped_by(&forward("accept", &rules)),
            expected,
            "{rules:?}"
        );
    }
}

#[test]
fn destination_nat_and_masquerading_are_found() {
    let chain = |name: &str, hook: &str| {
        json!({"chain": {"family": "ip", "table": "nat", "name": name, "handle": 1,
            "type": "nat", "hook": hook, "prio": -100, "policy": "accept"}})
    };
    let rule = |chain: &str, expressions: Value| json!({"rule": {"family": "ip", "table": "nat", "chain": chain, "handle": 7, "expr": expressions}});
    let firewall = Firewall::parse(&json!({"nftables": [
        chain("pre", "prerouting"),
        chain("post", "postrouting"),
        rule("pre", json!([is(field("tcp", "dport"), json!(80)), {"dnat": {"addr": "10.9.0.9"}}])),
        rule("post", json!([is(meta("oifname"), json!("wan0")), {"masquerade": {"port": {"range": [1024, 2000]}}}])),
        {"flowtable": {"family": "inet", "table": "t", "name": "f", "flags": "offload", "dev": ["wan0", "lan0"]}},
    ]}));
    let place = firewall.destination_nat(&PROBE).unwrap();
    assert_eq!(
        (place.chain.as_str(), place.handle),
        ("ip nat pre", Some(7))
    );
    let other = Probe { port: 81, ..PROBE };
    assert_eq!(firewall.destination_nat(&other), None);
    assert_eq!(firewall.masquerades("wan0")[0].1, Some((1024, 2000)));
    assert!(firewall.masquerades("lan0").is_empty());
    assert_eq!(firewall.offloaded[0].1, ["wan0", "lan0"]);
}

#[test]
fn devices_that_the_json_leaves_out_are_read_from_the_text() {
    let chain = |name: &str| {
        json!({"chain": {"family": "netdev", "table": "t", "name": name, "handle": 1,
            "type": "filter", "hook": "egress", "prio": 0, "policy": "drop"}})
    };
    let mut firewall = Firewall::parse(&json!({"nftables": [chain("c"), chain("d")]}));
    assert!(firewall.lacks_devices());
    assert_eq!(firewall.judge_egress(&PROBE), Judgement::Passes);
    firewall.read_devices(
        "table netdev t {\n\tchain c {\n\t\ttype filter hook egress devices = { wan0, lan0 } priority filter; policy drop;\n\t}\n\
         \tchain d {\n\t\ttype filter hook egress device \"wan0\" priority filter; policy drop;\n\t}\n}\n",
    );
    assert!(!firewall.lacks_devices());
    let Judgement::Drops(place) = firewall.judge_egress(&PROBE) else {
        panic!("{firewall:?}")
    };
    assert_eq!(place.chain, "netdev t c");
}
