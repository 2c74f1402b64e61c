//! A lab with portfwd in its gateway: where every test of this suite begins.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Result;
use aya::util::KernelVersion;
use portfwd::bpf::Pins;
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::process::run;
use portfwd_tests::{Family, Lab, LabOptions, snmp};

/// The port that the client dials, unless a test needs others.
pub const LISTEN: u16 = 8080;
/// The port that the server serves.
pub const TARGET: u16 = 80;

/// A lab and the daemon in its gateway. The daemon goes first.
pub struct Scene {
    /// portfwd, between `wan0` and `lan0`.
    pub daemon: Daemon,
    /// Client, gateway and server.
    pub lab: Lab,
}

impl Scene {
    /// The usual lab for `mode`, with portfwd on both interfaces in this mode and no rules.
    pub fn new(mode: Mode) -> Result<Self> {
        Self::with(LabOptions::for_mode(mode), DaemonOptions::new(mode))
    }

    /// Any lab, any daemon, no rules.
    pub fn with(lab: LabOptions, daemon: DaemonOptions) -> Result<Self> {
        let lab = lab.build()?;
        let daemon = daemon.start(&lab.gateway)?;
        Ok(Self { daemon, lab })
    }

    /// [`Self::new`] with the rules of [`Self::forward`].
    pub fn forwarding(mode: Mode, proto: &str) -> Result<Self> {
        let scene = Self::new(mode)?;
        scene.forward(proto)?;
        Ok(scene)
    }

    /// Adds two rules, named [`rule_name`]: `LISTEN` of the gateway to `TARGET` of the server.
    pub fn forward(&self, proto: &str) -> Result<()> {
        for family in Family::BOTH {
            let target = self.lab.server_address().endpoint(family, TARGET);
            self.daemon.add(
                rule_name(family),
                proto,
                &LISTEN.to_string(),
                &target.to_string(),
            )?;
        }
        Ok(())
    }

    /// Gives an interface of the gateway another name. Before Linux 6.2 only one that is down can have another
    /// ("net: allow live renaming when an interface is up").
    pub fn rename(&self, interface: &str, name: &str) -> Result<()> {
        let rename = format!("link set {interface} name {name}\n");
        let lines = if KernelVersion::current()? >= KernelVersion::new(6, 2, 0) {
            rename
        } else {
            format!("link set {interface} down\n{rename}link set {name} up\n")
        };
        self.lab.gateway.ip(&lines)
    }

    /// Has somebody take the program off an interface's TC ingress: its link, or, before Linux 6.6, its filter.
    pub fn take_off(&self, interface: &str) -> Result<()> {
        let links = Pins::new(&self.daemon.pins()).links();
        let link = links.join(format!("{interface}-ingress"));
        if link.exists() {
            let mut bpftool = Command::new("bpftool");
            return run(bpftool.args(["link", "detach", "pinned"]).arg(link)).map(drop);
        }
        let mut tc = self.lab.gateway.command("tc")?;
        run(tc.args(["filter", "del", "dev", interface, "ingress"])).map(drop)
    }

    /// Fails when portfwd dropped anything, or a kernel met a malformed packet.
    pub fn expect_no_errors(&self) -> Result<()> {
        let drops = self.daemon.drops()?;
        anyhow::ensure!(drops.is_empty(), "portfwd dropped packets: {drops:?}");
        snmp::expect_no_malformed(&[&self.lab.client, &self.lab.gateway, &self.lab.server])
    }
}

/// The name of the rule of a family.
pub fn rule_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "over-ipv4",
        Family::V6 => "over-ipv6",
    }
}

/// What the client dials.
pub fn listen(family: Family) -> SocketAddr {
    GATEWAY_WAN.endpoint(family, LISTEN)
}
