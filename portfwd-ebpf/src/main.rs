//! The kernel object: entry points that put a hook's packet before the core and carry its verdict out. Nothing is decided here.
//!
//! Every hook's program is the hot path; what that does not finish it hands, by a tail call, to the slow path of its family.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    missing_docs,
    reason = "the entry points' macros make an undocumented copy of each"
)]

mod atomic;
mod fib;
mod fragments;
mod maps;
mod pools;
mod refusals;
mod report;
mod sockets;
mod steps;
mod tc;
mod time;
mod usages;
mod ways;
mod xdp;

use aya_ebpf::{
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use portfwd_common::{
    abi::LinkLayer,
    datapath::Hook,
    net::{Ipv4, Ipv6},
};

/// XDP ingress, native or generic.
#[xdp(frags)]
pub fn portfwd_xdp(ctx: XdpContext) -> u32 {
    xdp::run(&ctx)
}

/// TC ingress alone on an interface with Ethernet header.
#[classifier]
pub fn portfwd_tc(ctx: TcContext) -> i32 {
    tc::run(&ctx, Hook::Tc, LinkLayer::Ethernet)
}

/// TC ingress of an interface without link header.
#[classifier]
pub fn portfwd_tc_raw(ctx: TcContext) -> i32 {
    tc::run(&ctx, Hook::Tc, LinkLayer::Raw)
}

/// TC ingress behind XDP on the same interface.
#[classifier]
pub fn portfwd_tc_slow(ctx: TcContext) -> i32 {
    tc::run(&ctx, Hook::TcSlow, LinkLayer::Ethernet)
}

/// TC egress of a WAN interface with Ethernet header.
#[classifier]
pub fn portfwd_tc_out(ctx: TcContext) -> i32 {
    tc::run_own(&ctx, LinkLayer::Ethernet)
}

/// TC egress of a WAN interface without link header.
#[classifier]
pub fn portfwd_out_raw(ctx: TcContext) -> i32 {
    tc::run_own(&ctx, LinkLayer::Raw)
}

/// The hot path behind XDP where there are rules with light tracking.
#[xdp(frags)]
pub fn portfwd_xdp_lt(ctx: XdpContext) -> u32 {
    xdp::run_light(&ctx)
}

/// The hot path behind every TC program on ingress where there are rules with light tracking.
#[classifier]
pub fn portfwd_tc_lt(ctx: TcContext) -> i32 {
    tc::run_light(&ctx)
}

/// The slow path behind XDP, IPv4.
#[xdp(frags)]
pub fn portfwd_xdp4(ctx: XdpContext) -> u32 {
    xdp::run_slow::<Ipv4>(&ctx)
}

/// The slow path behind XDP, IPv6.
#[xdp(frags)]
pub fn portfwd_xdp6(ctx: XdpContext) -> u32 {
    xdp::run_slow::<Ipv6>(&ctx)
}

/// The slow path behind every TC program, IPv4.
#[classifier]
pub fn portfwd_tc4(ctx: TcContext) -> i32 {
    tc::run_slow::<Ipv4>(&ctx)
}

/// The slow path behind every TC program, IPv6.
#[classifier]
pub fn portfwd_tc6(ctx: TcContext) -> i32 {
    tc::run_slow::<Ipv6>(&ctx)
}

/// Fragments behind the slow path of every TC program, IPv4.
#[classifier]
pub fn portfwd_frag4(ctx: TcContext) -> i32 {
    fragments::run::<Ipv4>(&ctx)
}

/// Fragments behind the slow path of every TC program, IPv6.
#[classifier]
pub fn portfwd_frag6(ctx: TcContext) -> i32 {
    fragments::run::<Ipv6>(&ctx)
}

/// Cuts an IPv4 packet into fragments, for every TC program.
#[classifier]
pub fn portfwd_cut(ctx: TcContext) -> i32 {
    fragments::cut(&ctx)
}

/// Puts an ICMP error in the place of a packet that is refused, for every TC program.
#[classifier]
pub fn portfwd_refuse(ctx: TcContext) -> i32 {
    refusals::run(&ctx)
}

/// Reads both clocks into CLOCK; only ever test-run.
#[classifier]
pub fn portfwd_clock(_ctx: TcContext) -> i32 {
    time::read_clocks()
}

/// Carries out what user space has put into POOL_TASK; only ever test-run.
#[classifier]
pub fn portfwd_pool(_ctx: TcContext) -> i32 {
    pools::carry_out()
}

/// Carries out what user space has put into USAGE_TASK; only ever test-run.
#[classifier]
pub fn portfwd_usage(_ctx: TcContext) -> i32 {
    usages::carry_out()
}

/// Never reached: the build refuses an object in which a call to it survives. It must not be `unreachable_unchecked`, with
/// which the optimiser may drop every bounds check.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that look up routes are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
