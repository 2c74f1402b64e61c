//! Programs of the test lab: a packet generator, a sink, and what the datapath is measured against: the barest redirect, the
//! floor, and trials of what is not built.
#![no_std]
#![no_main]
#![expect(
    missing_docs,
    reason = "the entry points' macros make an undocumented copy of each"
)]

mod by_rule;
mod cached_floor;
mod floor;
mod generate;
mod packet;

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, PerCpuArray},
    helpers::generated::bpf_redirect,
    macros::{btf_map, xdp},
    programs::XdpContext,
};

#[btf_map]
static RECEIVED: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map]
static EGRESS: Array<u32, 1> = Array::new();

/// Counts and drops IPv4, and IPv6 but for its own housekeeping; the rest, ARP above all, passes.
#[xdp]
pub fn lab_sink(ctx: XdpContext) -> u32 {
    let data = ctx.data();
    if data + 21 > ctx.data_end() {
        return xdp_action::XDP_PASS;
    }
    // SAFETY: the comparison above; frames are 2-aligned.
    let (ethertype, next_header) =
        unsafe { (*((data + 12) as *const u16), *((data + 20) as *const u8)) };
    let is_traffic = match u16::from_be(ethertype) {
        0x0800 => true,
        // ICMPv6 finds neighbours.
        0x86dd => next_header != 58,
        _ => false,
    };
    if !is_traffic {
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

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
