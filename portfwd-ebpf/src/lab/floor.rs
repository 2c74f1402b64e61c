//! The floor: what no forwarder by a connection table can do without. Parse, one lookup, rewrite by precomputed deltas,
//! redirect. TCP and UDP over IPv4; no rule, counter, state, lifetime or route, so it is no forwarder.

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, HashMap},
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
    rest: [u32; 8],
}

/// Where flows are forwarded to; written by the benchmark.
#[repr(C)]
#[derive(Clone, Copy)]
struct Target {
    address: Ipv4,
    /// In wire order.
    port: u16,
    next_hop: MacWords,
    source: MacWords,
    padding: u16,
    egress: u32,
}

const _: () = assert!(size_of::<Entry>() == 64 && size_of::<Target>() == 24);

#[btf_map]
static FLOOR: HashMap<FlowKey<Ipv4>, Entry, FLOWS> = HashMap::new();
#[btf_map]
static TARGET: Array<Target, 1> = Array::new();

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

/// What becomes of the packets of a flow that has begun.
#[inline(always)]
pub fn look_up(key: &FlowKey<Ipv4>) -> Option<&'static Change> {
    // SAFETY: entries are never removed while the program runs.
    FLOOR.get_ptr(key).map(|entry| unsafe { &(*entry).change })
}

/// The first packet of a flow is spent on its entry.
#[inline(never)]
pub fn begin(key: &FlowKey<Ipv4>) -> Option<u32> {
    let target = TARGET.get(0)?;
    let [source_port, _] = key.ports.words();
    let to = FlowKey {
        src: key.src,
        dst: target.address,
        ports: Ports::from_words([source_port, target.port]),
        protocol: key.protocol,
    };
    let ([a, b, c], [d, e, f]) = (target.next_hop, target.source);
    let word = |first, second| Ipv4::from_words([first, second]).raw();
    let change = Change {
        rewrite: key.rewrite_to(&to),
        way: Way {
            macs: [word(a, b), word(c, d), word(e, f)],
            egress: target.egress,
        },
    };
    let entry = Entry {
        change,
        rest: [0; 8],
    };
    // A table that is full shows as frames that do not arrive.
    let _ = FLOOR.insert(key, entry, 0);
    Some(xdp_action::XDP_DROP)
}
