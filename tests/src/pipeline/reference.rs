//! Gateways that are none: what a forwarder is measured against.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use aya::maps::Array;
use aya::{Ebpf, EbpfLoader, Pod};

use super::{OBJECT, attach, attach_of};
use crate::address::SERVER;
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

/// Where the floor forwards to; the same structure as in the lab's kernel object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Target {
    address: [u8; 4],
    port: [u8; 2],
    next_hop: [u8; 6],
    source: [u8; 6],
    padding: u16,
    egress: u32,
}

// SAFETY: repr(C) integers without padding: 4 + 2 + 6 + 6 + 2 + 4 bytes.
unsafe impl Pod for Target {}
const _: () = assert!(size_of::<Target>() == 24);

/// Parse, one flow lookup, rewrite, redirect, with room for `flows` flows: what comes in at the gateway's WAN interface goes
/// to `port` of the server. The first packet of a flow is spent on its entry. It ends with what is returned.
pub fn floor(lab: &Lab, port: u16, flows: u32) -> Result<Ebpf> {
    let mut object = EbpfLoader::new()
        .map_max_entries("FLOOR", flows)
        .load(OBJECT)
        .context("load the lab's object")?;
    let address: Ipv4Addr = SERVER.v4;
    let target = Target {
        address: address.octets(),
        port: port.to_be_bytes(),
        next_hop: lab.server_end().mac()?,
        source: lab.lan_end().mac()?,
        padding: 0,
        egress: lab.lan_end().index()?,
    };
    let mut targets: Array<_, Target> =
        object.map_mut("TARGET").context("no target")?.try_into()?;
    targets.set(0, target, 0)?;
    attach_of(&mut object, lab.wan_end(), "lab_floor")?;
    Ok(object)
}
