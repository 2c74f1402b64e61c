//! A trial: the floor with a cache of flows in front of its table. It has no more in it than the floor, so it is the least that
//! such a cache costs, and the most that it can win.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, xdp_action},
    btf_maps::Array,
    helpers::generated::bpf_get_smp_processor_id,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use portfwd_common::{
    abi::{FlowKey, counters::element},
    net::Ipv4,
};

use crate::{
    floor,
    packet::{Change, Packet},
};

/// Lines of a CPU: 2 to the power of this.
const LINES_LOG2: u32 = 13;
/// Lines of a CPU.
const LINES: u32 = 1 << LINES_LOG2;

/// A flow that is remembered, in a cache line of its own. One of zeros is none: no transport has the number 0.
#[repr(C)]
#[derive(Clone, Copy)]
struct Line {
    key: FlowKey<Ipv4>,
    change: Change,
    rest: [u32; 4],
}

const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    /// Puts another flow in the place of the one that is remembered.
    #[inline(always)]
    fn remember(&mut self, key: &FlowKey<Ipv4>, change: &Change) {
        const WORDS: usize = size_of::<Change>() / size_of::<u32>();

        self.key = *key;
        // By words: the whole would be a call to memmove.
        let (from, to) = (&raw const *change, &raw mut self.change);
        for word in 0..WORDS {
            // SAFETY: both are that long and 4-aligned, and any bits are valid.
            unsafe { *to.cast::<u32>().add(word) = *from.cast::<u32>().add(word) };
        }
    }
}

/// A block of [`LINES`] for each CPU; the benchmark settles how many. What is mapped begins with a page, so that a line is one of
/// the processor's.
#[btf_map]
static LINE: Array<Line, { LINES as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Forwards.
#[xdp]
pub fn lab_cached_floor(ctx: XdpContext) -> u32 {
    forward(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    let (packet, key) = Packet::read(ctx)?;
    // SAFETY: the helper takes nothing.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let line = LINE.get_ptr_mut(element(place(&key), cpu, LINES))?;
    // SAFETY: the element is this CPU's own, and nothing else runs on it meanwhile.
    let line = unsafe { &mut *line };
    if line.key != key {
        match floor::look_up(&key) {
            Some(change) => line.remember(&key, change),
            None => return floor::begin(&key),
        }
    }
    packet.translate(ctx, &line.change)
}

/// Where a CPU has the line of a flow. One multiplication would spread the generator's clients, whose ports follow each other,
/// better than clients of the world; after two they meet as often as those.
#[inline(always)]
fn place(key: &FlowKey<Ipv4>) -> u32 {
    let [source, destination] = key.ports.words();
    let ports = u32::from(source) | u32::from(destination) << 16;
    let word = (key.src.raw() ^ key.dst.raw() ^ ports ^ key.protocol).wrapping_mul(0x9e37_79b1);
    (word ^ word >> 15).wrapping_mul(0x85eb_ca6b) >> (u32::BITS - LINES_LOG2)
}
