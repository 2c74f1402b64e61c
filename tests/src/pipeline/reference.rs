//! Gateways that are none: what a forwarder is measured against.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use aya::maps::{Array, xdp::DevMap};
use aya::{Ebpf, EbpfLoader, Pod};
use portfwd::bpf::cpus::possible_cpus;
use portfwd_common::abi::FlowKey;
use portfwd_common::net::{Delta, Ipv4, be::Ports};

use super::{OBJECT, PORT, attach, attach_of};
use crate::address::{GATEWAY_WAN, SERVER};
use crate::lab::Lab;

/// Redirects all that comes in at the gateway's WAN interface to its LAN interface, and the other way round, unread. It ends
/// with what is returned.
pub fn redirect(lab: &Lab) -> Result<[Ebpf; 2]> {
    let one_way = |from, to: crate::link::End<'_>| -> Result<Ebpf> {
        let mut object = attach(from, "lab_redirect")?;
        let mut egress: Array<_, u32> =
            object.map_mut("EGRESS").context("no egress")?.try_into()?;
        egress.set(0, to.index()?, 0)?;
        Ok(object)
    };
    Ok([
        one_way(lab.wan_end(), lab.lan_end())?,
        one_way(lab.lan_end(), lab.wan_end())?,
    ])
}

/// A side of the floor's forward; the same structure as in the lab's kernel object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Side {
    address: [u8; 4],
    port: [u8; 2],
    next_hop: [u8; 6],
    source: [u8; 6],
    padding: u16,
    egress: u32,
}

// SAFETY: repr(C) integers without padding: 4 + 2 + 6 + 6 + 2 + 4 bytes.
unsafe impl Pod for Side {}
const _: () = assert!(size_of::<Side>() == 24);

impl Side {
    /// `port` of the server.
    fn server(lab: &Lab, port: u16) -> Result<Self> {
        Ok(Self {
            address: SERVER.v4.octets(),
            port: port.to_be_bytes(),
            next_hop: lab.server_end().mac()?,
            source: lab.lan_end().mac()?,
            padding: 0,
            egress: lab.lan_end().index()?,
        })
    }

    /// [`PORT`] of the gateway, where the client is.
    fn gateway(lab: &Lab) -> Result<Self> {
        Ok(Self {
            address: GATEWAY_WAN.v4.octets(),
            port: PORT.to_be_bytes(),
            next_hop: lab.client_end().mac()?,
            source: lab.wan_end().mac()?,
            padding: 0,
            egress: lab.wan_end().index()?,
        })
    }
}

/// A rule of the trial without flow entries; the same structure as in the lab's kernel object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rule {
    listen: [u8; 4],
    target: [u8; 4],
    port: [u8; 2],
    address_delta: Delta,
    port_delta: Delta,
    padding: u16,
    next_hop: [u8; 6],
    source: [u8; 6],
    egress: u32,
}

// SAFETY: repr(C) integers without padding: 4 + 4 + 2 + 2 + 2 + 2 + 6 + 6 + 4 bytes; a delta is a transparent one.
unsafe impl Pod for Rule {}
const _: () = assert!(size_of::<Rule>() == 32);

/// Parse, one flow lookup, rewrite, redirect, with room for `flows` flows: what comes in at the gateway's WAN interface goes
/// to `port` of the server, and what that answers back. The first packet of a flow is spent on its entry, in each direction. It
/// ends with what is returned.
pub fn floor(lab: &Lab, port: u16, flows: u32) -> Result<Ebpf> {
    by_flow(lab, port, with_room(flows)?, "lab_floor")
}

/// The same, which counts packets and bytes in its entry, and writes the time there.
pub fn marked_floor(lab: &Lab, port: u16, flows: u32) -> Result<Ebpf> {
    by_flow(lab, port, with_room(flows)?, "lab_marked_floor")
}

/// The same as the floor, by a map of interfaces.
pub fn mapped_floor(lab: &Lab, port: u16, flows: u32) -> Result<Ebpf> {
    let mut object = with_room(flows)?;
    let mut lanes: DevMap<_> = object.map_mut("LANES").context("no lanes")?.try_into()?;
    for (slot, end) in (0..).zip([lab.lan_end(), lab.wan_end()]) {
        let index = end.index()?;
        // The kernel looks the index up where the thread is.
        end.namespace.run(|| lanes.set(slot, index, None, 0))??;
    }
    by_flow(lab, port, object, "lab_mapped_floor")
}

fn with_room(flows: u32) -> Result<Ebpf> {
    EbpfLoader::new()
        .map_max_entries("FLOOR", 2 * flows)
        .load(OBJECT)
        .context("load the lab's object")
}

/// The same with a cache of flows in front of the lookup.
pub fn cached_floor(lab: &Lab, port: u16, flows: u32) -> Result<Ebpf> {
    /// As many as the program has.
    const LINES: u32 = 8_192;

    let object = EbpfLoader::new()
        .map_max_entries("FLOOR", 2 * flows)
        .map_max_entries("LINE", LINES * possible_cpus()?)
        .load(OBJECT)
        .context("load the lab's object")?;
    by_flow(lab, port, object, "lab_cached_floor")
}

/// Has a program that knows flows forward to `port` of the server, and back.
fn by_flow(lab: &Lab, port: u16, mut object: Ebpf, program: &str) -> Result<Ebpf> {
    let mut sides: Array<_, Side> = object.map_mut("SIDES").context("no sides")?.try_into()?;
    for (slot, side) in (0..).zip([Side::server(lab, port)?, Side::gateway(lab)?]) {
        sides.set(slot, side, 0)?;
    }
    for end in [lab.wan_end(), lab.lan_end()] {
        attach_of(&mut object, end, program)?;
    }
    Ok(object)
}

/// Two lookups, by port and by rule, and the rule's counters, but no entry of the flow: what comes in at the gateway's WAN
/// interface for [`PORT`] of its address goes to `port` of the server. It ends with what is returned.
pub fn by_rule(lab: &Lab, port: u16) -> Result<Ebpf> {
    /// As many as the program has.
    const SLOTS: u32 = 256;
    const SLOT: u32 = 1;

    let mut object = EbpfLoader::new()
        .map_max_entries("RULE_COUNTERS", SLOTS * possible_cpus()?)
        .load(OBJECT)
        .context("load the lab's object")?;
    let target = Side::server(lab, port)?;
    let rewrite = {
        // Any client's: what is the client's stays.
        let to = |address: Ipv4Addr, port| FlowKey {
            dst: Ipv4::from(address),
            ports: Ports::new(0, port),
            ..FlowKey::default()
        };
        to(GATEWAY_WAN.v4, PORT).rewrite_to(&to(SERVER.v4, port))
    };
    let rule = Rule {
        listen: GATEWAY_WAN.v4.octets(),
        target: target.address,
        port: target.port,
        address_delta: rewrite.address_delta,
        port_delta: rewrite.port_delta,
        padding: 0,
        next_hop: target.next_hop,
        source: target.source,
        egress: target.egress,
    };
    let mut rules: Array<_, Rule> = object
        .map_mut("LISTEN_RULES")
        .context("no rules")?
        .try_into()?;
    rules.set(SLOT, rule, 0)?;
    let mut ports: Array<_, u32> = object
        .map_mut("LISTEN_PORTS")
        .context("no ports")?
        .try_into()?;
    ports.set(u32::from(PORT), SLOT, 0)?;
    attach_of(&mut object, lab.wan_end(), "lab_by_rule")?;
    Ok(object)
}
