//! The floor: what no forwarder by a connection table can do without. Parse, one lookup, rewrite by precomputed deltas,
//! redirect. TCP and UDP over IPv4; no rule, counter, state, lifetime or route, so it is no forwarder.

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, HashMap},
    helpers::generated::bpf_redirect,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use portfwd_common::{
    abi::{FlowKey, Rewrite},
    net::{Ipv4, be::Ports, headers::MacWords},
};

/// Entries, unless the benchmark asks for another number.
const FLOWS: usize = 262_144;

/// What becomes of the packets of a flow, as large as an entry of the connection table.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    rewrite: Rewrite<Ipv4>,
    macs: [u32; 3],
    egress: u32,
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

/// The start of a frame of IPv4 without options.
#[repr(C)]
#[derive(Clone, Copy)]
struct Frame {
    macs: [u16; 6],
    ethertype: u16,
    version: u16,
    length: u16,
    identification: u16,
    fragment: u16,
    hop: u16,
    header_sum: u16,
}

/// Offsets of what is in words of 32 bits: only 2-aligned, but loaded and stored as if aligned, for the reason at `copy_words` in
/// the datapath's `xdp.rs`.
const SRC: usize = size_of::<Frame>();
const DST: usize = SRC + 4;
const PORTS: usize = DST + 4;
const END: usize = PORTS + 4;

#[btf_map]
static FLOOR: HashMap<FlowKey<Ipv4>, Entry, FLOWS> = HashMap::new();
#[btf_map]
static TARGET: Array<Target, 1> = Array::new();

const IPV4: u16 = 0x0800_u16.to_be();
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Offsets of the header sums behind the IP header.
const TCP_SUM: usize = 34 + 16;
const UDP_SUM: usize = 34 + 6;

/// Forwards.
#[xdp]
pub fn lab_floor(ctx: XdpContext) -> u32 {
    forward(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    let data = ctx.data();
    if data + END > ctx.data_end() {
        return None;
    }
    let frame = data as *mut Frame;
    let (src, dst, ports) = (
        (data + SRC) as *mut Ipv4,
        (data + DST) as *mut Ipv4,
        (data + PORTS) as *mut Ports,
    );
    // SAFETY: the comparison above; frames are 2-aligned, and so is the structure.
    let Frame {
        ethertype,
        version,
        fragment,
        hop,
        ..
    } = unsafe { *frame };
    let [ttl, protocol] = hop.to_ne_bytes();
    let whole = fragment & 0x3fff_u16.to_be() == 0;
    if ethertype != IPV4 || version.to_ne_bytes()[0] != 0x45 || !whole || ttl <= 1 {
        return None;
    }
    // SAFETY: as above.
    let key = &unsafe {
        FlowKey {
            src: *src,
            dst: *dst,
            ports: *ports,
            protocol: u32::from(protocol),
        }
    };
    let entry = match FLOOR.get_ptr(key) {
        // SAFETY: entries are never removed while the program runs.
        Some(entry) => unsafe { &*entry },
        None => return begin(key),
    };
    let rewrite = &entry.rewrite;
    let sum_at = match protocol {
        TCP => TCP_SUM,
        UDP => UDP_SUM,
        _ => return None,
    };
    if data + sum_at + 2 > ctx.data_end() {
        return None;
    }
    let sum = (data + sum_at) as *mut u16;
    // SAFETY: the comparisons above, and that the frame is 2-aligned.
    unsafe {
        let delta = rewrite.address_delta.sum().plus(rewrite.port_delta.word());
        *sum = if protocol == UDP {
            delta.apply_udp(*sum)
        } else {
            delta.apply(*sum)
        };
        let ([a, b, c], macs) = (entry.macs, frame as *mut u32);
        *macs = a;
        *macs.add(1) = b;
        *macs.add(2) = c;
        // One less in the high byte of the word that holds hop limit and protocol (RFC 1141).
        (*frame).hop = u16::from_ne_bytes([ttl - 1, protocol]);
        (*frame).header_sum = rewrite
            .address_delta
            .sum()
            .replace(hop, u16::from_ne_bytes([ttl - 1, protocol]))
            .apply((*frame).header_sum);
        *src = rewrite.src;
        *dst = rewrite.dst;
        *ports = rewrite.ports;
        // A helper with integer arguments.
        Some(bpf_redirect(entry.egress, 0) as u32)
    }
}

/// The first packet of a flow is spent on its entry.
#[inline(never)]
fn begin(key: &FlowKey<Ipv4>) -> Option<u32> {
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
    let entry = Entry {
        rewrite: key.rewrite_to(&to),
        macs: [word(a, b), word(c, d), word(e, f)],
        egress: target.egress,
        rest: [0; 8],
    };
    // A table that is full shows as frames that do not arrive.
    let _ = FLOOR.insert(key, entry, 0);
    Some(xdp_action::XDP_DROP)
}
