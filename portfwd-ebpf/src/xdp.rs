//! XDP: frames as the driver has them.

use core::mem;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{xdp_action, xdp_md},
    helpers::generated::bpf_xdp_get_buff_len,
    programs::XdpContext,
};
use bytemuck::Pod;
use portfwd_common::{
    abi::LinkLayer,
    datapath::{
        Arrival, Flows, Hook, Input, PassReason, Progress, Verdict, fast, fast_light, slow,
    },
    net::{Delta, PacketBuf, packet::SumChange},
};

use crate::{
    maps::{
        FlowMaps, LIGHT_XDP_INDEX, Maps, SlowPath, XDP_SLOW, count_verdict, redirect, slow_index,
    },
    report::report,
    steps::{self, begin},
    time::now,
};

/// A frame in the driver's memory, from some offset on.
#[derive(Clone, Copy)]
pub struct XdpPacket {
    base: usize,
    end: usize,
}

/// The hook's context, which gives the frame out.
pub struct XdpInput(pub *mut xdp_md);

/// Puts a frame before the hot path.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let (input, maps) = (XdpInput(ctx.ctx), Maps::new(ctx.as_ptr()));
    let progress = fast(input.frame(), &input.arrival(), &mut FlowMaps, &maps, now());
    go_on(ctx, progress)
}

/// Puts a frame before the hot path of rules with light tracking.
#[inline(always)]
pub fn run_light(ctx: &XdpContext) -> u32 {
    let (input, maps) = (XdpInput(ctx.ctx), Maps::new(ctx.as_ptr()));
    let progress = fast_light(input.frame(), &input.arrival(), &mut FlowMaps, &maps, now());
    go_on(ctx, progress)
}

/// Carries out what a hot path has come to.
#[inline(always)]
fn go_on(ctx: &XdpContext, progress: Progress) -> u32 {
    match progress {
        Progress::Done(verdict) => carry_out(verdict),
        Progress::Light => {
            // SAFETY: a tail call with the context of the running program.
            unsafe { XDP_SLOW.tail_call(ctx, LIGHT_XDP_INDEX) };
            // As below.
            carry_out(Verdict::Pass(PassReason::NotForUs))
        }
        Progress::Slow(family) => {
            // SAFETY: a tail call with the context of the running program.
            unsafe { XDP_SLOW.tail_call(ctx, slow_index(family)) };
            // Only if the slot is empty: the loader fills it before it attaches anything.
            carry_out(Verdict::Pass(PassReason::NotForUs))
        }
    }
}

/// Puts a frame before the slow path of its family.
#[inline(always)]
pub fn run_slow<A: SlowPath>(ctx: &XdpContext) -> u32
where
    FlowMaps: Flows<A>,
{
    begin::<A>();
    // SAFETY: the context of the running program, seen as what it is.
    let verdict = slow::<A, _>(unsafe { &mut *ctx.ctx.cast::<steps::xdp_md>() });
    report(ctx, &verdict);
    carry_out(verdict)
}

impl Input for XdpInput {
    type Packet = XdpPacket;

    #[inline(always)]
    fn frame(&self) -> XdpPacket {
        // Volatile: LLVM would otherwise have the caller of a step load them, and widen what is a pointer by then in the step ("R6
        // invalid mem access 'scalar'", kernel 6.18, LLVM 22).
        // SAFETY: the context of the running program; the kernel rewrites these loads.
        let (data, data_end) = unsafe {
            (
                (&raw const (*self.0).data).read_volatile(),
                (&raw const (*self.0).data_end).read_volatile(),
            )
        };
        XdpPacket {
            base: data as usize,
            end: data_end as usize,
        }
    }

    #[inline(always)]
    fn frame_len(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { bpf_xdp_get_buff_len(self.0) as u32 }
    }

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        // SAFETY: as above.
        let ifindex = unsafe { (*self.0).ingress_ifindex };
        Arrival {
            hook: Hook::Xdp,
            link: LinkLayer::Ethernet,
            ifindex,
            segment_size: 0,
        }
    }
}

#[inline(always)]
fn carry_out(verdict: Verdict) -> u32 {
    count_verdict(Hook::Xdp, &verdict);
    match verdict {
        Verdict::Pass(_) => xdp_action::XDP_PASS,
        // The core has XDP tell nobody.
        Verdict::Drop(_) | Verdict::Refuse(_) => xdp_action::XDP_DROP,
        // The core offers XDP no other way than that of a frame.
        Verdict::Forward(departure) => redirect(departure.slot),
    }
}

/// A pointer moved on by a variable. The addition is opaque to LLVM, which would otherwise fold it into the offsets of later
/// accesses and check one expression while it uses another ("invalid access to packet, off=… r=0", kernel 6.18, LLVM 22).
#[inline(always)]
pub fn advance(base: usize, bytes: usize) -> usize {
    let mut moved = base;
    // SAFETY: an addition of two registers.
    unsafe {
        core::arch::asm!("{0} += {1}", inout(reg) moved, in(reg) bytes, options(pure, nomem, nostack));
    }
    moved
}

/// Reads packet memory between `base` and `end`.
#[inline(always)]
pub fn read<T: Pod>(base: usize, end: usize, at: usize) -> Option<T> {
    let start = base + at;
    if start + mem::size_of::<T>() > end {
        return None;
    }
    let mut value = T::zeroed();
    // SAFETY: the comparison above.
    unsafe { copy_words(start as *const T, &raw mut value) };
    Some(value)
}

/// Writes packet memory between `base` and `end`.
#[inline(always)]
pub fn write<T: Pod>(base: usize, end: usize, at: usize, value: T) -> Option<()> {
    let start = base + at;
    if start + mem::size_of::<T>() > end {
        return None;
    }
    // SAFETY: the comparison above.
    unsafe { copy_words(&raw const value, start as *mut T) };
    Some(())
}

/// Copies what is in a packet or is to be, in the words of 32 bits that headers are made of (the drawings of RFC 791, 768, 9293)
/// and a rest. The instructions load and store at any address: the verifier demands alignment where a machine does
/// (`check_pkt_ptr_alignment`). But LLVM takes a type's alignment for the machine's, and would make two loads, a shift and an OR
/// of a word that is only known to be 2-aligned.
///
/// # Safety
/// All of `T` must be readable at `from` and writable at `to`.
#[inline(always)]
unsafe fn copy_words<T: Pod>(from: *const T, to: *mut T) {
    const WORD: usize = mem::size_of::<u32>();
    let (mut at, size) = (0, mem::size_of::<T>());
    // SAFETY: `at` and what is copied lie in `T`.
    unsafe {
        while at + WORD <= size {
            to.byte_add(at)
                .cast::<u32>()
                .write(from.byte_add(at).cast::<u32>().read());
            at += WORD;
        }
        if at + 2 <= size {
            to.byte_add(at)
                .cast::<u16>()
                .write(from.byte_add(at).cast::<u16>().read());
            at += 2;
        }
        if at < size {
            to.byte_add(at)
                .cast::<u8>()
                .write(from.byte_add(at).cast::<u8>().read());
        }
    }
}

impl PacketBuf for XdpPacket {
    #[inline(always)]
    fn remaining(self) -> u32 {
        (self.end - self.base) as u32
    }

    #[inline(always)]
    fn read<T: Pod>(self, at: usize) -> Option<T> {
        read(self.base, self.end, at)
    }

    #[inline(always)]
    fn write<T: Pod>(self, at: usize, value: T) -> Option<()> {
        write(self.base, self.end, at, value)
    }

    #[inline(always)]
    fn after(self, bytes: usize) -> Self {
        Self {
            base: advance(self.base, bytes),
            ..self
        }
    }

    #[inline(always)]
    fn update_sum(self, change: SumChange) -> Option<()> {
        change.apply_to_bytes(self)
    }

    /// No hook before the stack has one.
    #[inline(always)]
    fn update_whole_sum(self, _: Delta) {}
}
