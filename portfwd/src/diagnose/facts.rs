//! What the checks judge: everything that was read, before anything is concluded.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use portfwd_common::abi::{Interface, Role};

use super::nft::Firewall;
use crate::{
    bpf::inspect::PinnedLink,
    control::protocol::Traffic,
    netlink::{address::Address, device::Device, neighbour::Neighbour, route::Route},
    ruleset::{Listen, RuleProtocol, Target},
};

/// A gateway as it was found.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The command line that reaches the instance: `portfwd`, `portfwd -n lab`.
    pub command: String,
    /// How a command of another tool is put into the instance's namespace: nothing, or `ip netns exec lab `.
    pub prefix: String,
    /// The machine.
    pub machine: Machine,
    /// The daemon and what is pinned.
    pub instance: InstanceFacts,
    /// The interfaces that portfwd is, was or is to be attached to.
    pub sides: Vec<Side>,
    /// Every interface.
    pub devices: Vec<Device>,
    /// Addresses that the world can dial.
    pub addresses: Vec<Address>,
    /// Kernel settings, by their names with dots.
    pub sysctls: BTreeMap<String, String>,
    /// The rules that packets find, now or at other times.
    pub rules: Vec<RuleFacts>,
    /// Rules that packets do not find now, and why not.
    pub closed: Vec<(RuleFacts, String)>,
    /// Whether a rule comes or goes by the time of day.
    pub is_timed: bool,
    /// Routes to the rules' targets, by address.
    pub routes: BTreeMap<IpAddr, Route>,
    /// Routes to somewhere in the internet.
    pub internet: Vec<(IpAddr, Route)>,
    /// Machines on the links.
    pub neighbours: Vec<Neighbour>,
    /// Own services that a rule takes packets from: rule, and what is to be said.
    pub shadowed: Vec<(u32, String)>,
    /// nftables; `None` if there is no `nft` to ask.
    pub firewall: Option<Firewall>,
}

/// The machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its kernel's release.
    pub kernel: String,
    /// Major and minor of that.
    pub version: (u32, u32),
    /// Whether the kernel describes its types.
    pub btf: bool,
    /// Whether the BPF file system is in its place.
    pub bpffs: bool,
    /// Capabilities that the caller lacks.
    pub missing_capabilities: Vec<&'static str>,
    /// The time of day.
    pub now: SystemTime,
    /// Whether somebody keeps the clock right.
    pub clock_is_kept: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            kernel: String::new(),
            version: (0, 0),
            btf: true,
            bpffs: true,
            missing_capabilities: Vec::new(),
            now: SystemTime::now(),
            clock_is_kept: true,
        }
    }
}

/// The daemon and what is pinned.
#[derive(Clone, Debug, Default)]
pub struct InstanceFacts {
    /// Whether the daemon runs.
    pub daemon: bool,
    /// What kept the daemon or its remains from being read.
    pub unreadable: Option<String>,
    /// Whether anything of this version is pinned.
    pub pinned: bool,
    /// Layouts of other versions that are pinned.
    pub other_versions: Vec<String>,
    /// Pinned links.
    pub links: Vec<PinnedLink>,
    /// What the datapath knows of the interfaces.
    pub known_interfaces: Vec<Interface>,
    /// Own addresses of the WAN interfaces, as the datapath knows them.
    pub known_addresses: Vec<IpAddr>,
    /// Connections in the table and those that fit.
    pub table: (u64, u64),
    /// How long ago the table was last found full.
    pub last_full: Option<Duration>,
}

/// An interface that portfwd is, was or is to be attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// Its name.
    pub name: String,
    /// Which side of the gateway it is.
    pub role: Role,
    /// `xdp`, `xdp-generic` or `tc`, as attached; `None` if it is only to be.
    pub mode: Option<String>,
    /// Numbers and names of other owners' TC programs that see its packets first.
    pub programs_before: Vec<String>,
}

/// A rule, and what it has done.
#[derive(Clone, Debug)]
pub struct RuleFacts {
    /// Its number.
    pub id: u32,
    /// `3 (web)`.
    pub label: String,
    /// Its protocols.
    pub protocol: RuleProtocol,
    /// What the world dials.
    pub listen: Listen,
    /// Who serves it.
    pub target: Target,
    /// The name that the target is, and why it could not be followed the last time.
    pub unresolved: Option<(String, String)>,
    /// From clients to the target.
    pub to_target: Traffic,
    /// From the target to clients.
    pub to_client: Traffic,
}

impl Facts {
    /// Sides of a role, among them those that are both.
    pub fn sides_of(&self, role: Role) -> impl Iterator<Item = &Side> {
        self.sides
            .iter()
            .filter(move |side| side.role == role || side.role == Role::Both)
    }

    /// The side of an interface, by index.
    pub fn side(&self, ifindex: u32) -> Option<&Side> {
        let device = self.device_at(ifindex)?;
        self.sides.iter().find(|side| side.name == device.link.name)
    }

    /// An interface, by name.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.link.name == name)
    }

    /// An interface, by index.
    pub fn device_at(&self, ifindex: u32) -> Option<&Device> {
        self.devices
            .iter()
            .find(|device| device.link.ifindex == ifindex)
    }

    /// The name of an interface, or its number if it has gone.
    pub fn interface_name(&self, ifindex: u32) -> String {
        self.device_at(ifindex)
            .map_or_else(|| format!("interface {ifindex}"), |of| of.link.name.clone())
    }

    /// Addresses of the WAN interfaces.
    pub fn wan_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses
            .iter()
            .filter(|address| {
                self.side(address.ifindex)
                    .is_some_and(|side| side.role.is_wan())
            })
            .map(|address| address.ip)
    }

    /// A kernel setting; `None` if the kernel has none of that name.
    pub fn sysctl(&self, name: &str) -> Option<&str> {
        self.sysctls.get(name).map(String::as_str)
    }

    /// Whether any rule is of the family.
    pub fn forwards(&self, ipv4: bool) -> bool {
        self.rules
            .iter()
            .any(|rule| rule.target.address.is_ipv4() == ipv4)
    }
}
