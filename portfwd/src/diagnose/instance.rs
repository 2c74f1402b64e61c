//! The daemon, and whether what it attached is still there.

use std::time::Duration;

use portfwd_common::abi::{LinkLayer, Role};

use super::{Check, Facts, Finding, Side};
use crate::bpf::mode::{Hook, Mode, TcMethod};

pub(super) const CHECKS: &[Check] = &[
    other_versions,
    unreadable,
    started,
    links,
    stale_interfaces,
    stale_addresses,
    table,
];

/// Percent of the connection table above which it is nearly full.
const NEARLY_FULL: u64 = 80;
/// For this long a full table is news.
const LATELY: Duration = Duration::from_secs(300);

fn other_versions(facts: &Facts) -> Vec<Finding> {
    let versions = &facts.instance.other_versions;
    if versions.is_empty() {
        return Vec::new();
    }
    let finding = Finding::error(
        "pins-of-another-version",
        versions.join(", "),
        "another version of portfwd is attached, with tables that this one cannot read",
    );
    vec![finding.fix(format!("{} detach --keep-rules", facts.command))]
}

fn unreadable(facts: &Facts) -> Vec<Finding> {
    let Some(why) = &facts.instance.unreadable else {
        return Vec::new();
    };
    let finding = Finding::error("unreadable", "daemon and tables", why);
    vec![finding.fix(format!("sudo {} status", facts.command))]
}

fn started(facts: &Facts) -> Vec<Finding> {
    let instance = &facts.instance;
    if instance.daemon || !instance.other_versions.is_empty() || instance.unreadable.is_some() {
        return Vec::new();
    }
    let finding = if instance.pinned {
        Finding::warning(
            "daemon-not-running",
            "daemon",
            "what it attached goes on forwarding, but rules cannot be changed and nothing follows the network",
        )
    } else {
        Finding::error(
            "not-started",
            "daemon",
            "it does not run and nothing is attached: no packet is forwarded",
        )
    };
    vec![finding.fix(run_command(facts))]
}

/// The command that starts the daemon as it was started, as far as that is known.
pub(super) fn run_command(facts: &Facts) -> String {
    run_command_with(facts, |_| None)
}

/// The same, with another mode for interfaces of which `mode` gives one.
pub(super) fn run_command_with(
    facts: &Facts,
    mode: impl Fn(&Side) -> Option<&'static str>,
) -> String {
    let options = |role: Role, option: &str, unknown: &str| {
        let words: Vec<_> = facts
            .sides_of(role)
            .map(|side| match mode(side) {
                Some(mode) => format!(" {option} {}={mode}", side.name),
                None => format!(" {option} {}", side.name),
            })
            .collect();
        if words.is_empty() {
            format!(" {option} {unknown}")
        } else {
            words.concat()
        }
    };
    format!(
        "{} run{}{}",
        facts.command,
        options(Role::Wan, "--wan", "eth0"),
        options(Role::Lan, "--lan", "eth1")
    )
}

/// A link that should be attached and is not, or that carries a program which is not portfwd's.
fn links(facts: &Facts) -> Vec<Finding> {
    if !facts.instance.pinned {
        return Vec::new();
    }
    facts
        .sides
        .iter()
        .filter_map(|side| link_of(facts, side))
        .collect()
}

fn link_of(facts: &Facts, side: &Side) -> Option<Finding> {
    let device = facts.device(&side.name)?;
    let mode = mode_of(side.mode.as_deref()?)?;
    for hook in hooks(mode, side.role, device.link.layer) {
        let link = facts
            .instance
            .links
            .iter()
            .find(|link| link.interface == side.name && link.hook == hook);
        let is_attached = link.is_some_and(|link| link.ifindex == Some(device.link.ifindex));
        let what = format!("{} ({})", side.name, hook.word());
        if !is_attached {
            return Some(
                Finding::error(
                    "detached",
                    what,
                    "portfwd's program is no longer attached there: somebody detached it, and packets go past it",
                )
                .fix(run_command(facts)),
            );
        }
        if link.is_some_and(|link| !link.own_program) {
            return Some(
                Finding::error(
                    "program-replaced",
                    what,
                    "the program in portfwd's link is not the one that portfwd pinned",
                )
                .fix(run_command(facts)),
            );
        }
    }
    None
}

fn mode_of(word: &str) -> Option<Mode> {
    [Mode::Xdp, Mode::XdpGeneric, Mode::Tc]
        .into_iter()
        .find(|mode| mode.word() == word)
}

/// The hooks on which an interface has a link; filters of kernels before 6.6 are none.
fn hooks(mode: Mode, role: Role, layer: LinkLayer) -> Vec<Hook> {
    mode.hooks(role, layer)
        .into_iter()
        .filter(|hook| *hook == Hook::Xdp || TcMethod::of_kernel() == TcMethod::Tcx)
        .collect()
}

/// The datapath would send with what an interface had before.
fn stale_interfaces(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for side in &facts.sides {
        let Some(device) = facts.device(&side.name) else {
            continue;
        };
        let link = &device.link;
        let known = facts
            .instance
            .known_interfaces
            .iter()
            .find(|known| known.ifindex == link.ifindex);
        let stale = known.and_then(|known| {
            if bytemuck::cast::<_, [u8; 6]>(known.mac) != link.mac {
                Some("MAC address")
            } else {
                (known.mtu != link.mtu).then_some("MTU")
            }
        });
        if let Some(what) = stale {
            findings.push(
                Finding::error(
                    "interface-stale",
                    &side.name,
                    format!("its {what} has changed, and the datapath goes by the old one"),
                )
                .fix(run_command(facts)),
            );
        }
    }
    findings
}

fn stale_addresses(facts: &Facts) -> Vec<Finding> {
    if !facts.instance.pinned || facts.instance.unreadable.is_some() {
        return Vec::new();
    }
    let missing: Vec<_> = facts
        .wan_addresses()
        .filter(|address| !facts.instance.known_addresses.contains(address))
        .map(|address| address.to_string())
        .collect();
    if missing.is_empty() {
        return Vec::new();
    }
    let finding = Finding::error(
        "address-unknown",
        missing.join(", "),
        "the WAN has this address, and the datapath does not know it: rules without address do not listen on it",
    );
    vec![finding.fix(run_command(facts))]
}

fn table(facts: &Facts) -> Vec<Finding> {
    let (entries, capacity) = facts.instance.table;
    let larger = capacity.saturating_mul(4).max(1_000);
    let fix = format!(
        "{0} detach --keep-rules && {1} --max-flows {larger}",
        facts.command,
        run_command(facts)
    );
    if facts.instance.last_full.is_some_and(|ago| ago < LATELY) {
        let cause = "it was full within the last five minutes: new connections are refused, or go without entry";
        return vec![Finding::error("table-full", "connection table", cause).fix(fix)];
    }
    if capacity > 0 && entries * 100 >= capacity * NEARLY_FULL {
        let cause = format!(
            "{entries} of {capacity} connections are in it: when it is full, new ones are refused"
        );
        return vec![Finding::warning("table-nearly-full", "connection table", cause).fix(fix)];
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{expect, healthy};

    #[test]
    fn every_fault_of_the_instance_is_named() {
        expect("pins-of-another-version", |facts| {
            facts.instance.other_versions.push("v0".into());
        });
        expect("unreadable", |facts| {
            facts.instance.unreadable = Some("permission denied".into());
        });
        expect("daemon-not-running", |facts| facts.instance.daemon = false);
        expect("not-started", |facts| {
            facts.instance = super::super::facts::InstanceFacts::default();
        });
        expect("detached", |facts| facts.instance.links[0].ifindex = None);
        expect("detached", |facts| drop(facts.instance.links.remove(0)));
        expect("program-replaced", |facts| {
            facts.instance.links[0].own_program = false;
        });
        expect("interface-stale", |facts| {
            facts.instance.known_interfaces[0].mtu = 1400;
        });
        expect("interface-stale", |facts| {
            facts.instance.known_interfaces[1].mac = [7; 3];
        });
        expect("address-unknown", |facts| {
            facts.instance.known_addresses.clear();
        });
        expect("table-nearly-full", |facts| {
            facts.instance.table = (90, 100);
        });
        expect("table-full", |facts| {
            facts.instance.last_full = Some(Duration::from_secs(9));
        });
    }

    #[test]
    fn the_command_that_starts_the_daemon_names_its_interfaces() {
        assert_eq!(run_command(&healthy()), "portfwd run --wan wan0 --lan lan0");
        assert_eq!(
            run_command(&Facts {
                command: "portfwd".into(),
                ..Facts::default()
            }),
            "portfwd run --wan eth0 --lan eth1"
        );
    }
}
