//! Interfaces of the lab: veth pairs, their offloads, what they count.

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::address::DualStack;
use crate::deadline::{PATIENCE, wait_until};
use crate::namespace::{Namespace, ip_batch};
use crate::process::{run, run_for_text};

/// One end of a veth pair: a namespace and the interface's name in it.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// Where the interface lives.
    pub namespace: &'a Namespace,
    /// Its name there.
    pub interface: &'a str,
}

/// Joins two ends by a veth pair; both are still down.
pub fn connect(a: End<'_>, b: End<'_>) -> Result<()> {
    ip_batch(
        &[],
        &format!(
            "link add {} netns {} type veth peer name {} netns {}\n",
            a.interface,
            a.namespace.name(),
            b.interface,
            b.namespace.name(),
        ),
    )
}

impl End<'_> {
    /// Makes the end send nothing but whole frames with finished checksums.
    ///
    /// By default a veth passes on what the stack left for hardware to do: an L4 checksum over the
    /// pseudo-header alone, segments of up to 64 KiB, and VLAN tags beside the frame. XDP can deal
    /// with none of these.
    /// GRO stays on: it gives the end the NAPI that it needs to receive what XDP redirects to it.
    pub fn turn_transmit_offloads_off(self) -> Result<()> {
        run(self.namespace.command("ethtool")?.args([
            "-K",
            self.interface,
            "tx",
            "off",
            "tso",
            "off",
            "gso",
            "off",
            "txvlan",
            "off",
            "gro",
            "on",
        ]))?;
        Ok(())
    }

    /// Turns GRO on, and with it the NAPI that XDP redirects need at the receiving end.
    pub fn turn_gro_on(self) -> Result<()> {
        run(self
            .namespace
            .command("ethtool")?
            .args(["-K", self.interface, "gro", "on"]))?;
        Ok(())
    }

    /// Tells this end who is at an address, the other end, so that it never has to ask. What waits for the answer leaves at once.
    pub fn introduce(self, far: End<'_>, address: DualStack) -> Result<()> {
        let mac = far.mac()?.map(|byte| format!("{byte:02x}")).join(":");
        let interface = self.interface;
        self.namespace.ip(&format!(
            "neigh replace {} lladdr {mac} dev {interface} nud permanent\n\
             neigh replace {} lladdr {mac} dev {interface} nud permanent\n",
            address.v4, address.v6
        ))
    }

    /// Waits until the kernel lets packets out: it looks at carriers once a second, and discards until it has.
    pub fn wait_until_up(self) -> Result<()> {
        wait_until("the carrier", PATIENCE, || {
            let links = self
                .namespace
                .ip_json(&["link", "show", "dev", self.interface])?;
            Ok(links[0]["operstate"] == "UP")
        })
        .with_context(|| format!("{} is not up", self.interface))
    }

    /// Makes the sending socket wait when the veth's ring is full, where the kernel can (6.16),
    /// instead of dropping: a queueing discipline is what the veth pushes back on.
    pub fn queue_instead_of_dropping(self) -> Result<()> {
        run(self.namespace.command("tc")?.args([
            "qdisc",
            "replace",
            "dev",
            self.interface,
            "root",
            "pfifo",
            "limit",
            "10000",
        ]))?;
        Ok(())
    }

    /// Waits until nothing is left in the end's queueing discipline.
    pub fn wait_until_queue_is_empty(self) -> Result<()> {
        wait_until("the queue to empty", PATIENCE, || {
            let text = run_for_text(self.namespace.command("tc")?.args([
                "-j",
                "-s",
                "qdisc",
                "show",
                "dev",
                self.interface,
                "root",
            ]))?;
            let disciplines: Value = serde_json::from_str(&text)?;
            let queued = disciplines[0]["qlen"]
                .as_u64()
                .context("tc shows no qlen")?;
            Ok(queued == 0)
        })
    }

    /// Frames that the end could not hand to its peer since it was made.
    pub fn dropped_on_transmit(self) -> Result<u64> {
        self.link_number("/stats64/tx/dropped")
    }

    /// Frames that the end has handed to its peer.
    pub fn transmitted(self) -> Result<u64> {
        self.link_number("/stats64/tx/packets")
    }

    /// Waits until the end's host has learnt that packets to `destination` must not be larger than
    /// `mtu` bytes.
    pub fn wait_for_path_mtu(self, destination: IpAddr, mtu: u64) -> Result<()> {
        let destination = destination.to_string();
        let mut learnt = None;
        wait_until("the path MTU to be learnt", PATIENCE, || {
            let routes = self
                .namespace
                .ip_json(&["route", "get", destination.as_str()])?;
            learnt = routes[0].pointer("/metrics/0/mtu").and_then(Value::as_u64);
            Ok(learnt == Some(mtu))
        })
        .with_context(|| format!("the path MTU to {destination} is {learnt:?}, not {mtu}"))
    }

    /// Whether an offload is on, as `ethtool --show-features` names it.
    pub fn has_offload(self, name: &str) -> Result<bool> {
        let features = run_for_text(
            self.namespace
                .command("ethtool")?
                .args(["--show-features", self.interface]),
        )?;
        let value = features
            .lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "))
            .with_context(|| format!("{} does not know {name}", self.interface))?;
        Ok(value.starts_with("on"))
    }

    /// Turns an offload on or off, by the name that [`Self::has_offload`] takes.
    pub fn set_offload(self, name: &str, on: bool) -> Result<()> {
        let word = if on { "on" } else { "off" };
        run(self
            .namespace
            .command("ethtool")?
            .args(["-K", self.interface, name, word]))?;
        Ok(())
    }

    /// The largest packet that it sends, bytes.
    pub fn mtu(self) -> Result<u64> {
        self.link_number("/mtu")
    }

    fn link_number(self, pointer: &str) -> Result<u64> {
        let links = self
            .namespace
            .ip_json(&["-s", "link", "show", "dev", self.interface])?;
        links[0]
            .pointer(pointer)
            .and_then(Value::as_u64)
            .with_context(|| format!("ip does not show {pointer} of {}", self.interface))
    }
}
