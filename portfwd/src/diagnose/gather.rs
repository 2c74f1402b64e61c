//! Reading everything that the checks judge. Nothing is changed by it.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process::{Command, Stdio},
    time::SystemTime,
};

use caps::{CapSet, Capability};
use log::debug;
use nix::sys::utsname::uname;
use portfwd_common::abi::Role;
use serde_json::Value;

use super::{
    Facts, RuleFacts, Side,
    facts::{InstanceFacts, Machine},
    nft::Firewall,
};
use crate::{
    bpf::{Pins, Tables, bpffs, inspect},
    control::{
        listeners::shadowed_by,
        protocol::{InterfaceReport, RuleReport, StatusReport},
    },
    failure::Result,
    instance::Instance,
    netlink::{
        address::addresses,
        device::{Device, devices},
        neighbour::neighbours,
        route::Routes,
    },
    ruleset::{Listen, RuleSpec, RuleWords, Target},
};

/// What the daemon, or what it left, says.
#[derive(Clone, Debug, Default)]
pub struct Sides {
    /// `status`; `None` if there is nothing.
    pub status: Option<StatusReport>,
    /// `rules`.
    pub rules: Vec<RuleReport>,
    /// Why neither could be read.
    pub unreadable: Option<String>,
    /// Interfaces that portfwd is to be attached to.
    pub wanted: Vec<(Role, String)>,
}

/// Somewhere in the internet: networks for documentation, to which no router has a route of its own.
const INTERNET: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x3fff, 0xfff, 0, 0, 0, 0, 0, 1)),
];

/// Settings of every interface, by family.
const OF_INTERFACES: [(&str, &[&str]); 2] = [
    ("ipv4", &["forwarding", "rp_filter"]),
    ("ipv6", &["forwarding", "accept_ra"]),
];
/// Settings of the machine or the namespace.
const SETTINGS: [&str; 5] = [
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/core/bpf_jit_enable",
];

/// Capabilities that portfwd needs, each with one that stands for it too.
const CAPABILITIES: [(Capability, &str, Capability); 3] = [
    (Capability::CAP_BPF, "CAP_BPF", Capability::CAP_SYS_ADMIN),
    (
        Capability::CAP_PERFMON,
        "CAP_PERFMON",
        Capability::CAP_SYS_ADMIN,
    ),
    (
        Capability::CAP_NET_ADMIN,
        "CAP_NET_ADMIN",
        Capability::CAP_NET_ADMIN,
    ),
];

/// Reads a gateway. The thread must be in the instance's network namespace.
pub fn gather(instance: &Instance, answers: Sides) -> Result<Facts> {
    let devices = devices()?;
    let addresses = addresses()?;
    let mut routes = Routes::open()?;
    let enabled = answers.rules.iter().filter(|report| report.enabled);
    let rules: Vec<_> = enabled.filter_map(rule).collect();
    let mut to_targets = BTreeMap::new();
    for rule in &rules {
        if let Entry::Vacant(unasked) = to_targets.entry(rule.target.address) {
            unasked.insert(routes.to(rule.target.address)?);
        }
    }
    let internet = INTERNET.map(|ip| routes.to(ip).map(|route| (ip, route)));
    let mut facts = Facts {
        command: instance.command(),
        prefix: instance.prefix(),
        machine: machine(),
        instance: instance_facts(instance, &answers),
        sides: Vec::new(),
        sysctls: sysctls(&devices),
        devices,
        addresses,
        rules,
        closed: answers.rules.iter().filter_map(closed).collect(),
        is_timed: answers
            .rules
            .iter()
            .any(|report| report.schedule.is_some() || report.expires.is_some()),
        routes: to_targets,
        internet: internet.into_iter().collect::<anyhow::Result<_>>()?,
        neighbours: neighbours()?,
        shadowed: Vec::new(),
        firewall: firewall(),
    };
    facts.sides = sides(instance, &answers);
    let wan: Vec<_> = facts.wan_addresses().collect();
    facts.shadowed = answers
        .rules
        .iter()
        .flat_map(|rule| shadowed(rule, &wan))
        .collect();
    Ok(facts)
}

/// `None` for a rule whose target is not an address.
fn rule(report: &RuleReport) -> Option<RuleFacts> {
    let listen: Listen = report.listen.parse().ok()?;
    let target = Target::parse(&report.target, listen.ports).ok()?;
    let label = match &report.name {
        Some(name) => format!("{} ({name})", report.id),
        None => report.id.to_string(),
    };
    Some(RuleFacts {
        id: report.id,
        label,
        protocol: report.proto,
        listen,
        target,
        unresolved: report
            .host
            .as_ref()
            .and_then(|host| Some((host.name.clone(), host.error.clone()?))),
        to_target: report.to_target,
        to_client: report.to_client,
    })
}

/// A rule that packets do not find now.
fn closed(report: &RuleReport) -> Option<(RuleFacts, String)> {
    let why = match (report.enabled, report.open, &report.schedule) {
        (true, true, _) => return None,
        (false, _, _) => "it is not enabled".to_owned(),
        (true, false, Some(schedule)) => format!("its schedule keeps it closed now ({schedule})"),
        (true, false, None) => "it is closed now".to_owned(),
    };
    Some((rule(report)?, why))
}

fn shadowed(report: &RuleReport, wan: &[IpAddr]) -> Vec<(u32, String)> {
    let words = RuleWords::new(report.proto.word(), &report.listen, &report.target);
    let Ok(spec) = RuleSpec::parse(&words) else {
        return Vec::new();
    };
    let lines = shadowed_by(&spec, wan).unwrap_or_else(|error| {
        debug!("own services: {error:#}");
        Vec::new()
    });
    lines.into_iter().map(|line| (report.id, line)).collect()
}

fn machine() -> Machine {
    let kernel = uname().map_or_else(
        |_| "unknown kernel".to_owned(),
        |name| format!("Linux {}", name.release().to_string_lossy()),
    );
    let mut numbers = kernel
        .trim_start_matches("Linux ")
        .split(['.', '-'])
        .map_while(|word| word.parse().ok());
    let version = match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor),
        // What cannot be told is not judged.
        (_, _) => (u32::MAX, 0),
    };
    Machine {
        kernel,
        version,
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        bpffs: bpffs::is_mounted().unwrap_or(false),
        missing_capabilities: missing_capabilities(),
        now: SystemTime::now(),
        clock_is_kept: clock_is_kept(),
    }
}

/// Whether the kernel has been told by somebody how far its clock is off.
fn clock_is_kept() -> bool {
    // SAFETY: the structure is integers, for which zero is valid; no modes: the call only reads.
    let state = unsafe {
        let mut clock: libc::timex = mem::zeroed();
        libc::adjtimex(&raw mut clock)
    };
    state != libc::TIME_ERROR
}

fn missing_capabilities() -> Vec<&'static str> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(true);
    CAPABILITIES
        .iter()
        .filter(|(capability, _, or)| !has(*capability) && !has(*or))
        .map(|(_, name, _)| *name)
        .collect()
}

fn instance_facts(instance: &Instance, answers: &Sides) -> InstanceFacts {
    let pins = Pins::new(&instance.pins());
    let status = answers.status.as_ref();
    let mut facts = InstanceFacts {
        daemon: status.is_some_and(|status| status.daemon.is_some()),
        unreadable: answers.unreadable.clone(),
        pinned: pins.exist(),
        other_versions: pins.other_versions().unwrap_or_default(),
        table: status.map_or((0, 0), |status| {
            (status.flows.entries, status.flows.capacity)
        }),
        ..InstanceFacts::default()
    };
    if facts.pinned
        && let Err(error) = read_pins(instance, &pins, &mut facts)
    {
        facts.unreadable.get_or_insert(format!("{error:#}"));
    }
    facts
}

fn read_pins(instance: &Instance, pins: &Pins, facts: &mut InstanceFacts) -> anyhow::Result<()> {
    facts.links = inspect::pinned_links(pins)?;
    let tables = Tables::open_pinned(&instance.pins())?;
    facts.known_interfaces = tables.interfaces()?;
    facts.known_addresses = tables.addresses()?.into_iter().map(|(ip, _)| ip).collect();
    facts.last_full = tables.full_ago()?;
    Ok(())
}

/// The interfaces as they are attached; those that are asked about, if none is.
fn sides(instance: &Instance, answers: &Sides) -> Vec<Side> {
    let own = inspect::own_programs(&Pins::new(&instance.pins())).unwrap_or_default();
    let attached = answers
        .status
        .as_ref()
        .map_or(&[][..], |status| &status.interfaces);
    let mut sides: Vec<_> = attached
        .iter()
        .map(|report: &InterfaceReport| Side {
            name: report.name.clone(),
            role: match report.role.as_str() {
                "wan" => Role::Wan,
                "wan+lan" => Role::Both,
                _ => Role::Lan,
            },
            mode: Some(report.mode.clone()),
            programs_before: inspect::tc_programs_before(&report.name, &own),
        })
        .collect();
    for (role, name) in &answers.wanted {
        if !sides.iter().any(|side| side.name == *name) {
            sides.push(Side {
                name: name.clone(),
                role: *role,
                mode: None,
                programs_before: Vec::new(),
            });
        }
    }
    sides
}

fn sysctls(devices: &[Device]) -> BTreeMap<String, String> {
    let of_interfaces = devices
        .iter()
        .map(|device| device.link.name.as_str())
        .chain(["all"])
        .flat_map(|name| {
            OF_INTERFACES.iter().flat_map(move |(family, settings)| {
                settings
                    .iter()
                    .map(move |setting| format!("net/{family}/conf/{name}/{setting}"))
            })
        });
    SETTINGS
        .iter()
        .map(|key| (*key).to_owned())
        .chain(of_interfaces)
        .filter_map(|key| {
            let value = fs::read_to_string(Path::new("/proc/sys").join(&key)).ok()?;
            Some((key, value.trim().to_owned()))
        })
        .collect()
}

/// nftables' rules as `nft` prints them; `None` without `nft`, or without leave to ask.
fn firewall() -> Option<Firewall> {
    let json: Value = serde_json::from_slice(&nft(&["-j", "list", "ruleset"])?).ok()?;
    let mut firewall = Firewall::parse(&json);
    if firewall.lacks_devices() {
        firewall.read_devices(&String::from_utf8(nft(&["list", "chains", "netdev"])?).ok()?);
    }
    Some(firewall)
}

fn nft(arguments: &[&str]) -> Option<Vec<u8>> {
    let output = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output.status.success().then_some(output.stdout)
}
