//! The floor: what no forwarder by a connection table can do without. Parse, one lookup, rewrite by precomputed deltas,
//! redirect. TCP and UDP over IPv4; no rule, counter, state, lifetime or route, so it is no forwarder.
//!
//! Beside it two trials: the floor with one more of what portfwd does, to see what that costs.

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, DevMap, HashMap},
    helpers::generated::bpf_jiffies64,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use portfwd_common::{
    abi::FlowKey,
    net::{Ipv4, be::Ports, headers::MacWords},
};

use crate::packet::{Change, Packet, Way};

/// Entries, unless the benchmark asks for another number.
const FLOWS: usize = 262_144;

/// What becomes of the packets of a flow, as large as an entry of the connection table.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    change: Change,
    /// Written by [`lab_marked_floor`] only.
    packets: u64,
    bytes: u64,
    last_seen: u32,
    rest: [u32; 3],
}

/// A side of the forward: what is dialled there, and how its packets get there. Written by the benchmark.
#[repr(C)]
#[derive(Clone, Copy)]
struct Side {
    address: Ipv4,
    /// In wire order.
    port: u16,
    next_hop: MacWords,
    source: MacWords,
    padding: u16,
    egress: u32,
}

const _: () = assert!(size_of::<Entry>() == 64 && size_of::<Side>() == 24);

#[btf_map]
static FLOOR: HashMap<FlowKey<Ipv4>, Entry, FLOWS> = HashMap::new();
/// The target, and the gateway as its clients know it.
#[btf_map]
static SIDES: Array<Side, 2> = Array::new();
/// The interfaces by which they are reached, in the same order, for [`lab_mapped_floor`].
#[btf_map]
static LANES: DevMap<2> = DevMap::new();

/// Forwards.
#[xdp]
pub fn lab_floor(ctx: XdpContext) -> u32 {
    forward(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    let (packet, key) = Packet::read(ctx)?;
    match look_up(&key) {
        Some(change) => packet.translate(ctx, change),
        None => begin(&key),
    }
}

/// A trial: the floor, which counts packets and bytes in its entry and writes the time there, so that every packet leaves a dirty
/// line of the table behind.
#[xdp]
pub fn lab_marked_floor(ctx: XdpContext) -> u32 {
    forward_marked(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn forward_marked(ctx: &XdpContext) -> Option<u32> {
    let (packet, key) = Packet::read(ctx)?;
    let Some(entry) = FLOOR.get_ptr_mut(key) else {
        return begin(&key);
    };
    // SAFETY: entries are never removed while the program runs, and any bits are valid; a helper without arguments.
    let change = unsafe {
        (*entry).packets += 1;
        (*entry).bytes += u64::from(packet.length());
        (*entry).last_seen = bpf_jiffies64() as u32;
        &(*entry).change
    };
    packet.translate(ctx, change)
}

/// A trial: the floor, by a map of interfaces.
#[xdp]
pub fn lab_mapped_floor(ctx: XdpContext) -> u32 {
    forward_mapped(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn forward_mapped(ctx: &XdpContext) -> Option<u32> {
    let (packet, key) = Packet::read(ctx)?;
    let Some(change) = look_up(&key) else {
        return begin(&key);
    };
    packet.rewrite(ctx, change)?;
    // The trial has one rule, whose target's port is no client's.
    let is_answer = SIDES.get(0)?.port == key.ports.words()[0];
    match LANES.redirect(u32::from(is_answer), u64::from(xdp_action::XDP_DROP)) {
        Ok(action) | Err(action) => Some(action),
    }
}

/// What becomes of the packets of a flow that has begun.
#[inline(always)]
pub fn look_up(key: &FlowKey<Ipv4>) -> Option<&'static Change> {
    // SAFETY: entries are never removed while the program runs.
    FLOOR.get_ptr(key).map(|entry| unsafe { &(*entry).change })
}

/// The first packet of a flow is spent on its entry.
#[inline(never)]
pub fn begin(key: &FlowKey<Ipv4>) -> Option<u32> {
    let (target, gateway) = (SIDES.get(0)?, SIDES.get(1)?);
    let [source_port, destination_port] = key.ports.words();
    let is_answer = key.src == target.address && source_port == target.port;
    let (to, side) = if is_answer {
        let ports = Ports::from_words([gateway.port, destination_port]);
        (between(key, [gateway.address, key.dst], ports), gateway)
    } else {
        let ports = Ports::from_words([source_port, target.port]);
        (between(key, [key.src, target.address], ports), target)
    };
    let ([a, b, c], [d, e, f]) = (side.next_hop, side.source);
    let word = |first, second| Ipv4::from_words([first, second]).raw();
    let change = Change {
        rewrite: key.rewrite_to(&to),
        way: Way {
            macs: [word(a, b), word(c, d), word(e, f)],
            egress: side.egress,
        },
    };
    let entry = Entry {
        change,
        packets: 0,
        bytes: 0,
        last_seen: 0,
        rest: [0; 3],
    };
    // A table that is full shows as frames that do not arrive.
    let _ = FLOOR.insert(key, entry, 0);
    Some(xdp_action::XDP_DROP)
}

#[inline(always)]
fn between(key: &FlowKey<Ipv4>, [src, dst]: [Ipv4; 2], ports: Ports) -> FlowKey<Ipv4> {
    FlowKey {
        src,
        dst,
        ports,
        protocol: key.protocol,
    }
}
