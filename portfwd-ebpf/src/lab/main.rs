//! Programs of the test lab: a packet generator, a sink and the barest redirect, against which the datapath is measured.
#![no_std]
#![no_main]
#![expect(
    missing_docs,
    reason = "the entry points' macros make an undocumented copy of each"
)]

use core::mem;

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, PerCpuArray},
    helpers::generated::bpf_redirect,
    macros::{btf_map, xdp},
    programs::XdpContext,
};

/// Bytes of a generated frame's headers: Ethernet, IPv4, UDP.
const HEADERS: usize = 42;
/// The same as words.
const WORDS: usize = HEADERS / 2;
/// Words of IPv4 source address (low half), IPv4 header sum, UDP source port and UDP header sum.
const SOURCE_LOW: usize = 14;
const IP_SUM: usize = 12;
const SOURCE_PORT: usize = 17;
const UDP_SUM: usize = 20;

/// What the generator sends; written by the benchmark.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Plan {
    /// Headers of the first flow's frames, as on the wire. Both sums are those of source port and low half of the source
    /// address being 0.
    template: [u16; WORDS],
    /// Order of the flows: each frame is this many flows after the one before it. Odd, for a power of two of flows.
    stride: u16,
    /// Index of the interface that frames leave by.
    egress: u32,
    /// Flows less one; flows are a power of two.
    mask: u32,
}

#[btf_map]
static PLAN: Array<Plan, 1> = Array::new();
#[btf_map]
static SENT: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map]
static RECEIVED: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map]
static EGRESS: Array<u32, 1> = Array::new();

/// Writes every header of a recycled frame anew and sends it.
#[xdp]
pub fn lab_generate(ctx: XdpContext) -> u32 {
    generate(&ctx).unwrap_or(xdp_action::XDP_ABORTED)
}

#[inline(always)]
fn generate(ctx: &XdpContext) -> Option<u32> {
    let plan = PLAN.get(0)?;
    let sent = SENT.get_ptr_mut(0)?;
    // SAFETY: the element is this CPU's own.
    let number = unsafe {
        *sent = (*sent).wrapping_add(1);
        *sent
    };
    let flow = (number as u32).wrapping_mul(u32::from(plan.stride)) & plan.mask;
    // 32,768 source ports, then the next address.
    let port = (1024 + (flow & 0x7fff) as u16).to_be();
    let address = (2 + (flow >> 15) as u16).to_be();
    let data = ctx.data();
    if data + HEADERS > ctx.data_end() {
        return None;
    }
    // SAFETY: the comparison above; frames are 2-aligned.
    let words = unsafe { &mut *(data as *mut [u16; WORDS]) };
    *words = plan.template;
    words[SOURCE_LOW] = address;
    words[SOURCE_PORT] = port;
    words[IP_SUM] = add(words[IP_SUM], address, 0);
    words[UDP_SUM] = add(words[UDP_SUM], address, port);
    // SAFETY: a helper with integer arguments.
    Some(unsafe { bpf_redirect(plan.egress, 0) as u32 })
}

/// A header sum after two words, 0 before, have come in (RFC 1624 equation 3).
#[inline(always)]
fn add(header_sum: u16, one: u16, other: u16) -> u16 {
    let sum = u32::from(!header_sum) + u32::from(one) + u32::from(other);
    let sum = (sum >> 16) + (sum & 0xffff);
    !((sum >> 16) + (sum & 0xffff)) as u16
}

/// Counts and drops IPv4; the rest, ARP above all, passes.
#[xdp]
pub fn lab_sink(ctx: XdpContext) -> u32 {
    let data = ctx.data();
    // SAFETY: the comparison beside it; frames are 2-aligned.
    if data + 14 > ctx.data_end() || unsafe { *((data + 12) as *const u16) } != 0x0800_u16.to_be() {
        return xdp_action::XDP_PASS;
    }
    if let Some(received) = RECEIVED.get_ptr_mut(0) {
        // SAFETY: the element is this CPU's own.
        unsafe { *received = (*received).wrapping_add(1) };
    }
    xdp_action::XDP_DROP
}

/// Sends every frame on, unread: what a redirect costs.
#[xdp]
pub fn lab_redirect(_ctx: XdpContext) -> u32 {
    match EGRESS.get(0) {
        // SAFETY: a helper with integer arguments.
        Some(egress) => unsafe { bpf_redirect(*egress, 0) as u32 },
        None => xdp_action::XDP_ABORTED,
    }
}

/// Passes: an XDP program on a veth end makes the other end able to redirect to it.
#[xdp]
pub fn lab_pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

const _: () = assert!(mem::size_of::<Plan>() == 52);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
