//! A healthy gateway, for tests to break.

use portfwd_common::abi::{Interface, LinkLayer, Role};

use super::{Facts, NAMES, Side, diagnose, facts::RuleFacts};
use crate::{
    bpf::{inspect::PinnedLink, mode::Hook},
    control::protocol::Traffic,
    netlink::{
        address::Address,
        device::{Device, State},
        link::Link,
        route::{Hop, Route},
    },
    ruleset::{RuleProtocol, Target},
};

/// An Ethernet interface that is up.
pub(super) fn device(ifindex: u32, name: &str, kind: Option<&str>) -> Device {
    Device {
        link: Link {
            ifindex,
            name: name.to_owned(),
            layer: LinkLayer::Ethernet,
            kind: kind.map(str::to_owned),
            mac: [2, 0, 0, 0, 0, ifindex as u8],
            mtu: 1500,
            xdp: None,
        },
        state: State::Up,
        controller: None,
        lower: None,
        xdp_features: Some(0),
        offloads: Vec::new(),
    }
}

/// The links of `wan0` and `lan0` in these modes.
pub(super) fn links(wan: &str, lan: &str) -> Vec<PinnedLink> {
    let link = |interface: &str, ifindex, hook| PinnedLink {
        interface: interface.to_owned(),
        hook,
        ifindex: Some(ifindex),
        own_program: true,
    };
    let mut links = vec![
        link("wan0", 2, Hook::Egress),
        link("wan0", 2, Hook::Ingress),
        link("lan0", 3, Hook::Ingress),
    ];
    for (interface, ifindex, mode) in [("wan0", 2, wan), ("lan0", 3, lan)] {
        if mode != "tc" {
            links.push(link(interface, ifindex, Hook::Xdp));
        }
    }
    links
}

/// A gateway with a WAN, a LAN, and a rule of either family.
pub(super) fn healthy() -> Facts {
    let side = |name: &str, role| Side {
        name: name.to_owned(),
        role,
        mode: Some("tc".to_owned()),
        programs_before: Vec::new(),
    };
    let address = |ifindex, ip: &str| Address {
        ifindex,
        ip: ip.parse().unwrap(),
        prefix: 24,
        deprecated: false,
    };
    let devices = vec![device(2, "wan0", None), device(3, "lan0", None)];
    let mut facts = Facts {
        command: "portfwd".to_owned(),
        sides: vec![side("wan0", Role::Wan), side("lan0", Role::Lan)],
        addresses: vec![
            address(2, "203.0.113.1"),
            address(2, "2001:db8:1::1"),
            address(3, "10.2.0.1"),
            address(3, "2001:db8:2::1"),
        ],
        rules: vec![rule(1, "10.2.0.2:80"), rule(2, "[2001:db8:2::2]:80")],
        ..Facts::default()
    };
    let out = |ifindex| {
        Route::Out(Hop {
            ifindex,
            gateway: None,
            mtu: None,
            advertised: false,
        })
    };
    facts.routes = facts
        .rules
        .iter()
        .map(|rule| (rule.target.address, out(3)))
        .collect();
    facts.internet = vec![
        ("192.0.2.1".parse().unwrap(), out(2)),
        ("2001:db8:9::1".parse().unwrap(), out(2)),
    ];
    for key in [
        "net/ipv4/ip_forward",
        "net/ipv6/conf/all/forwarding",
        "net/ipv4/conf/wan0/forwarding",
        "net/ipv4/conf/lan0/forwarding",
    ] {
        facts.sysctls.insert(key.into(), "1".into());
    }
    facts.sysctls.insert(
        "net/ipv4/ip_local_port_range".into(),
        "32768\t60999\n".into(),
    );
    facts.machine.kernel = "Linux 6.18.0".to_owned();
    facts.machine.version = (6, 18);
    let instance = &mut facts.instance;
    instance.daemon = true;
    instance.pinned = true;
    instance.links = links("tc", "tc");
    instance.table = (5, 1000);
    instance.known_addresses = facts.addresses.iter().map(|address| address.ip).collect();
    instance.known_interfaces = devices
        .iter()
        .map(|device| Interface {
            ifindex: device.link.ifindex,
            mtu: device.link.mtu,
            mac: bytemuck::cast(device.link.mac),
            ..Interface::default()
        })
        .collect();
    facts.devices = devices;
    facts
}

fn rule(id: u32, target: &str) -> RuleFacts {
    let listen: crate::ruleset::Listen = "8080".parse().unwrap();
    let traffic = Traffic {
        packets: 10,
        bytes: 600,
    };
    RuleFacts {
        id,
        label: id.to_string(),
        protocol: RuleProtocol::Tcp,
        listen,
        target: Target::parse(target, listen.ports).unwrap(),
        unresolved: None,
        to_target: traffic,
        to_client: traffic,
    }
}

/// The commands of what is found wrong with a gateway after a change.
pub(super) fn fixes(change: impl FnOnce(&mut Facts)) -> Vec<String> {
    let mut facts = healthy();
    change(&mut facts);
    let diagnosis = diagnose(&facts);
    diagnosis
        .findings
        .into_iter()
        .map(|finding| finding.fix)
        .collect()
}

/// Fails unless the change is found, by this name and no other.
#[track_caller]
pub(super) fn expect(id: &str, change: impl FnOnce(&mut Facts)) {
    let mut facts = healthy();
    change(&mut facts);
    let findings = diagnose(&facts).findings;
    let mut ids: Vec<_> = findings.iter().map(|finding| finding.id).collect();
    ids.dedup();
    assert_eq!(ids, [id], "{findings:#?}");
    for finding in findings {
        assert!(
            NAMES.contains(&(finding.id, finding.severity)),
            "{finding:?} is not in the list"
        );
        assert!(
            !finding.fix.is_empty() && !finding.subject.is_empty(),
            "{finding:?}"
        );
        assert!(
            !finding.cause.contains('\n') && !finding.fix.contains('\n'),
            "{finding:?}"
        );
    }
}

/// A name that is listed and never given would be a promise that nothing keeps.
#[test]
fn every_name_is_tested() {
    let tests = [
        include_str!("machine.rs"),
        include_str!("instance.rs"),
        include_str!("interfaces.rs"),
        include_str!("forwarding.rs"),
        include_str!("wan.rs"),
        include_str!("targets.rs"),
        include_str!("services.rs"),
        include_str!("firewall_tests.rs"),
    ];
    for (name, _) in NAMES {
        let quoted = format!("\"{name}\"");
        let is_tested = tests.iter().any(|text| {
            let (_, tests) = text.split_once("\nmod tests {").unwrap_or(("", text));
            tests.contains(&quoted)
        });
        assert!(is_tested, "{name}");
    }
}

#[test]
fn nothing_is_found_wrong_with_a_healthy_gateway() {
    assert_eq!(diagnose(&healthy()).findings, []);
}
