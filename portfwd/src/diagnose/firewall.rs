//! The firewall. What portfwd forwards it takes and sends beside the chains of the IP families: they see only what goes up the
//! stack translated (too big for the LAN, TTL 1), and the chains of the device family see what TC sends.

use portfwd_common::abi::Role;

use super::{
    Check, Facts, Finding, RuleFacts,
    nft::{Firewall, Judgement, Place, Probe},
};
use crate::{netlink::route::Route, ruleset::RuleProtocol};

pub(super) const CHECKS: &[Check] = &[
    egress_drops,
    bypassed_drops,
    dropped_large_packets,
    shadowed_translations,
    masqueraded_ports,
    offloaded_flows,
];

/// Where a rule's packets come in and go out.
#[derive(Clone, Copy)]
struct Path<'a> {
    rule: &'a RuleFacts,
    wan: &'a str,
    lan: &'a str,
}

impl<'a> Path<'a> {
    /// The first packet as it was translated.
    fn translated(&self) -> Probe<'a> {
        Probe {
            ingress: Some(self.wan),
            egress: Some(self.lan),
            destination: self.rule.target.address,
            protocol: self.rule.protocol.protocols()[0],
            port: self.rule.target.ports.first(),
        }
    }
}

/// The firewall and the paths of all rules that have one.
fn paths(facts: &Facts) -> Option<(&Firewall, Vec<Path<'_>>)> {
    let firewall = facts.firewall.as_ref()?;
    let wan = facts.sides_of(Role::Wan).next()?.name.as_str();
    let paths = facts.rules.iter().filter_map(|rule| {
        let Some(Route::Out(hop)) = facts.routes.get(&rule.target.address) else {
            return None;
        };
        let lan = facts.device_at(hop.ifindex)?.link.name.as_str();
        Some(Path { rule, wan, lan })
    });
    Some((firewall, paths.collect()))
}

/// One finding per place, about all rules that meet it.
fn by_place<'a>(
    facts: &'a Facts,
    judge: impl Fn(&Firewall, &Path<'a>) -> Option<Place>,
    tell: impl Fn(&Place, &Path<'a>, String) -> Finding,
) -> Vec<Finding> {
    let Some((firewall, paths)) = paths(facts) else {
        return Vec::new();
    };
    let mut places: Vec<(Place, Vec<&Path<'a>>)> = Vec::new();
    for path in &paths {
        let Some(place) = judge(firewall, path) else {
            continue;
        };
        match places.iter_mut().find(|(other, _)| *other == place) {
            Some((_, met)) => met.push(path),
            None => places.push((place, vec![path])),
        }
    }
    places
        .iter()
        .map(|(place, met)| {
            let labels: Vec<_> = met.iter().map(|path| path.rule.label.as_str()).collect();
            tell(place, met[0], labels.join(", "))
        })
        .collect()
}

fn drops(judgement: Judgement) -> Option<Place> {
    match judgement {
        Judgement::Drops(place) => Some(place),
        Judgement::Passes => None,
    }
}

impl Place {
    fn subject(&self) -> String {
        match self.handle {
            Some(handle) => format!("{} handle {handle}", self.chain),
            None => format!("{} policy", self.chain),
        }
    }

    /// The command that takes it away, or lets packets to the target pass before it.
    fn open(&self, facts: &Facts, path: &Path<'_>) -> String {
        match self.handle {
            Some(handle) => format!(
                "{}nft delete rule {} handle {handle}",
                facts.prefix, self.chain
            ),
            None => {
                let target = path.rule.target.address;
                let family = if target.is_ipv4() { "ip" } else { "ip6" };
                format!(
                    "{}nft insert rule {} {family} daddr {target} accept",
                    facts.prefix, self.chain
                )
            }
        }
    }
}

/// TC sends by the device's own queue, before which chains of the device family stand.
fn egress_drops(facts: &Facts) -> Vec<Finding> {
    by_place(
        facts,
        |firewall, path| drops(firewall.judge_egress(&path.translated())),
        |place, path, labels| {
            Finding::error(
                "firewall-drops-forwarded",
                place.subject(),
                format!(
                    "it drops what portfwd sends out of {} (rule {labels})",
                    path.lan
                ),
            )
            .fix(place.open(facts, path))
        },
    )
}

/// A rule that names the target or the listen port, and never sees the packets: whoever wrote it believes them stopped.
fn bypassed_drops(facts: &Facts) -> Vec<Finding> {
    let listening = |path: &Path<'_>| {
        let address = path.rule.listen.address.or_else(|| {
            let of_family =
                |ip: &std::net::IpAddr| ip.is_ipv4() == path.rule.target.address.is_ipv4();
            facts.wan_addresses().find(of_family)
        })?;
        Some(address)
    };
    by_place(
        facts,
        |firewall, path| {
            let translated = path.translated();
            let forward = drops(firewall.judge("forward", &translated));
            let dialled = || {
                let probe = Probe {
                    destination: listening(path)?,
                    port: path.rule.listen.ports.first(),
                    egress: None,
                    ..translated
                };
                drops(firewall.judge("prerouting", &probe)).or_else(|| {
                    drops(firewall.judge("input", &probe)).filter(|place| place.specific)
                })
            };
            forward
                .filter(|place| place.specific)
                .or_else(|| dialled().filter(|place| place.specific))
        },
        |place, _, labels| {
            let handle = place.handle.unwrap_or_default();
            Finding::warning(
                "firewall-bypassed",
                place.subject(),
                format!("it would drop packets of rule {labels}, but forwarded packets do not pass this chain"),
            )
            .fix(format!(
                "{}nft delete rule {} handle {handle}",
                facts.prefix, place.chain
            ))
        },
    )
}

/// What is too big for the LAN goes up the stack, translated, and there through the chains.
fn dropped_large_packets(facts: &Facts) -> Vec<Finding> {
    by_place(
        facts,
        |firewall, path| {
            let mtu = |name: &str| facts.device(name).map(|device| device.link.mtu);
            let route = match facts.routes.get(&path.rule.target.address) {
                Some(Route::Out(hop)) => hop.mtu,
                Some(Route::Local | Route::None(_)) | None => None,
            };
            let narrow = route.or(mtu(path.lan))?;
            if narrow >= mtu(path.wan)? {
                return None;
            }
            ["prerouting", "forward", "postrouting"]
                .iter()
                .find_map(|hook| drops(firewall.judge(hook, &path.translated())))
                .filter(|place| !place.specific)
        },
        |place, path, labels| {
            Finding::error(
                "firewall-drops-large",
                place.subject(),
                format!("it drops packets of rule {labels} that are too large for {} and go through the stack: their senders never learn the MTU", path.lan),
            )
            .fix(place.open(facts, path))
        },
    )
}

fn shadowed_translations(facts: &Facts) -> Vec<Finding> {
    by_place(
        facts,
        |firewall, path| {
            let destination = path.rule.listen.address.or_else(|| {
                facts
                    .wan_addresses()
                    .find(|ip| ip.is_ipv4() == path.rule.target.address.is_ipv4())
            })?;
            path.rule.protocol.protocols().iter().find_map(|protocol| {
                firewall.destination_nat(&Probe {
                    destination,
                    protocol: *protocol,
                    port: path.rule.listen.ports.first(),
                    egress: None,
                    ..path.translated()
                })
            })
        },
        |place, _, labels| {
            let handle = place.handle.unwrap_or_default();
            Finding::warning(
                "translation-shadowed",
                place.subject(),
                format!("it translates the port that rule {labels} listens on, and never sees its packets: portfwd takes them first"),
            )
            .fix(format!(
                "{}nft delete rule {} handle {handle}",
                facts.prefix, place.chain
            ))
        },
    )
}

/// A LAN machine that is masqueraded behind a listen port gets no answers: they are forwarded.
fn masqueraded_ports(facts: &Facts) -> Vec<Finding> {
    let Some((firewall, paths)) = paths(facts) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for side in facts.sides_of(Role::Wan) {
        for (place, ports) in firewall.masquerades(&side.name) {
            // Without a range the kernel keeps the source port where it can, and few hosts begin from a listen port.
            let Some((first, last)) = ports else { continue };
            let meets = |path: &&Path<'_>| {
                let listen = path.rule.listen.ports;
                // Answers go before a rule for everything else.
                path.rule.protocol != RuleProtocol::Dmz
                    && first <= listen.last()
                    && listen.first() <= last
            };
            let labels: Vec<_> = paths
                .iter()
                .filter(meets)
                .map(|path| format!("{} {}", word(path.rule.protocol), path.rule.listen))
                .collect();
            if labels.is_empty() {
                continue;
            }
            findings.push(
                Finding::warning(
                    "masquerade-on-listen-port",
                    place.subject(),
                    format!(
                        "it may hide LAN machines behind ports {first}-{last}, which hold {}: their answers would be forwarded",
                        labels.join(", ")
                    ),
                )
                .fix(format!(
                    "{}nft replace rule {} handle {} oifname {} masquerade",
                    facts.prefix,
                    place.chain,
                    place.handle.unwrap_or_default(),
                    side.name
                )),
            );
        }
    }
    findings
}

const fn word(protocol: RuleProtocol) -> &'static str {
    protocol.word()
}

/// A flowtable in hardware takes packets before any program sees them.
fn offloaded_flows(facts: &Facts) -> Vec<Finding> {
    let Some(firewall) = &facts.firewall else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for (table, devices) in &firewall.offloaded {
        let ours = devices
            .iter()
            .find(|name| facts.sides.iter().any(|side| side.name == **name));
        if let Some(interface) = ours {
            findings.push(
                Finding::warning(
                    "flowtable-in-hardware",
                    table,
                    format!("the hardware of {interface} forwards its flows by itself: portfwd neither sees nor counts them"),
                )
                .fix(format!("{}nft delete flowtable {table}", facts.prefix)),
            );
        }
    }
    findings
}

#[cfg(test)]
#[path = "firewall_tests.rs"]
mod tests;
