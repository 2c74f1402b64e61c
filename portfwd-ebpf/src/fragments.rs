//! TC: fragments that wait for each other, and packets that are cut into fragments.
//!
//! A socket buffer cannot be kept, nor made of nothing. So the bytes of a fragment that has to wait go into a map, and when their
//! turn comes they take the place of those of the buffer that released them, of which a clone goes on in.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{
        bpf_clone_redirect, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use portfwd_common::{
    abi::{
        LinkLayer,
        fragment::{Datagram, HELD_BYTES, HeldKey},
    },
    datapath::{
        DropReason, Event, Flows, Fragments as _, Input as _, Tables as _, Verdict, Way,
        cutting::{CUT_BYTES, Cut, MAX_PIECES},
        fragment,
        fragments::{is_due, is_forgotten},
    },
    net::{PacketBuf as _, headers::IPV4_LEN},
};

use crate::{
    maps::{
        CUT_INDEX, Cutting, FlowMaps, Maps, SlowPath, TC_SLOW, count_reason, count_verdict,
        cutting, held, hold, holding, release, slow_index,
    },
    report::report,
    tc::{TcInput, TcPacket, fail, leave, note_first_fragment, steps_context, vanish, workspace},
    time::now,
};

/// Bounds of what is read from and written to a buffer at a time, for the verifier.
const OFFSET_MASK: u32 = 0x3fff;
const LEN_MASK: u32 = 0x1fff;

/// A length that lies between 1 and `MAX`, in a way that the verifier of Linux 6.1 understands. It learns no lower bound from "is
/// not 0", and forgets a bound of a value that was compared after it went to the stack: "invalid access to map value, value_size=2008
/// off=8 size=0". So the bounds are made, once more, in the register that goes to the helper.
#[inline(always)]
pub fn bounded<const MAX: u32>(len: u32) -> u32 {
    let mut bounded = u64::from(len);
    // SAFETY: one register is read and written, and the jumps stay in here.
    unsafe {
        core::arch::asm!(
            "if {0} > 0 goto +1",
            "{0} = 1",
            "if {0} <= {1} goto +1",
            "{0} = {1}",
            inout(reg) bounded,
            const MAX,
            options(pure, nomem, nostack),
        );
    }
    bounded as u32
}

/// Puts a fragment before the core.
#[inline(always)]
pub fn run<A: SlowPath>(ctx: &TcContext) -> i32
where
    FlowMaps: Flows<A>,
{
    let skb = ctx.skb.skb;
    let arrival = TcInput(skb).arrival();
    let maps = Maps::new(ctx.as_ptr());
    if workspace::<A>(skb).is_none() {
        return vanish(arrival.hook);
    }
    // SAFETY: the context of the running program.
    let Some(verdict) = fragment::<A, _>(unsafe { &mut *steps_context(ctx) }) else {
        return go_on::<A>(ctx);
    };
    report(ctx, &verdict);
    count_verdict(arrival.hook, &verdict);
    let departure = match verdict {
        Verdict::Pass(_) => return TC_ACT_UNSPEC,
        // Who is refused is told by the slow path, in which a first fragment goes on.
        Verdict::Drop(_) | Verdict::Refuse(_) => return TC_ACT_SHOT,
        Verdict::Forward(departure) => departure,
    };
    let Some(work) = A::workspace() else {
        return TC_ACT_SHOT;
    };
    match departure.way {
        Way::Hold => keep(skb, arrival.link, work.piece.len, &work.piece.held, &maps),
        Way::Again => again(skb, arrival.link, &work.piece.held, &maps),
        Way::Frame | Way::Raw | Way::NewHeader | Way::Resolve | Way::Stack | Way::Cut => {
            leave(ctx, arrival.link, &departure, &maps)
        }
    }
}

/// Has the slow path go on with a first fragment, whose key and subject are in the workspace.
#[inline(always)]
fn go_on<A: SlowPath>(ctx: &TcContext) -> i32 {
    // SAFETY: the context of the running program, and a tail call with it.
    unsafe {
        note_first_fragment(ctx.skb.skb);
        TC_SLOW.tail_call(ctx, slow_index(A::FAMILY));
    }
    fail()
}

/// The interface by which a packet came in.
#[inline(always)]
pub fn ifindex(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context of the running program; the kernel rewrites the load.
    unsafe { (*skb).ifindex }
}

/// Has a clone of the buffer come in again.
#[inline(always)]
fn send_in(skb: *mut __sk_buff) -> Option<()> {
    // SAFETY: the context of the running program.
    let result = unsafe { bpf_clone_redirect(skb, ifindex(skb), u64::from(BPF_F_INGRESS)) };
    (result == 0).then_some(())
}

/// Has the buffer itself come in again.
#[inline(always)]
fn go_in(skb: *mut __sk_buff) -> i32 {
    // SAFETY: a helper with integer arguments.
    unsafe { bpf_redirect(ifindex(skb), u64::from(BPF_F_INGRESS)) as i32 }
}

/// Keeps a fragment's bytes and ends the buffer.
#[inline(always)]
fn keep(skb: *mut __sk_buff, link: LinkLayer, len: u32, key: &HeldKey, maps: &Maps) -> i32 {
    let Some(config) = maps.config() else {
        return TC_ACT_SHOT;
    };
    let now = now();
    if FlowMaps
        .held_since(key)
        .is_some_and(|since| !is_forgotten(since, config, now))
    {
        count_reason(DropReason::FragmentOverlap.index());
        return TC_ACT_SHOT;
    }
    let Some(holding) = holding() else {
        return fail();
    };
    // SAFETY: the element is this CPU's own, and nothing else runs on it meanwhile.
    let fragment = unsafe { &mut *holding };
    if len == 0 || len > HELD_BYTES as u32 {
        return fail();
    }
    fragment.since = now;
    fragment.len = len;
    // SAFETY: the context of the running program, and no more bytes than there is room for.
    let read = unsafe {
        bpf_skb_load_bytes(
            skb.cast(),
            link.header_len() as u32,
            fragment.bytes.as_mut_ptr().cast(),
            bounded::<{ HELD_BYTES as u32 }>(len),
        )
    };
    if read != 0 || hold(key, fragment).is_err() {
        return fail();
    }
    maps.note(Event::FragmentHeld);
    // The fragment in front of it may have come by on another CPU since the core looked.
    let is_due = FlowMaps
        .datagram(&key.datagram)
        .is_some_and(|datagram: &mut Datagram| {
            !is_forgotten(datagram.last_seen, config, now) && is_due(datagram, key.offset)
        });
    if is_due && release(key).is_ok() {
        maps.note(Event::FragmentReleased);
        return go_in(skb);
    }
    TC_ACT_SHOT
}

/// Has a fragment come in again, and behind it the one that is held for it.
#[inline(always)]
fn again(skb: *mut __sk_buff, link: LinkLayer, key: &HeldKey, maps: &Maps) -> i32 {
    let Some(held) = held(key) else {
        // Another CPU has taken it.
        return go_in(skb);
    };
    if send_in(skb).is_none() {
        return fail();
    }
    // SAFETY: elements of an LRU map stay in memory for the run of a program. If the table is full the element may become
    // another fragment meanwhile; then a fragment is lost or garbled, which the receiver's checksum tells.
    let (len, bytes) = unsafe { ((*held).len, (&raw const (*held).bytes)) };
    if len == 0 || len > HELD_BYTES as u32 {
        return fail();
    }
    let at = link.header_len() as u32;
    let len = bounded::<{ HELD_BYTES as u32 }>(len);
    // SAFETY: the context of the running program, and bytes of a map's element.
    let written = unsafe {
        bpf_skb_change_tail(skb, at + len, 0) == 0
            && bpf_skb_store_bytes(skb, at, bytes.cast(), len, u64::from(BPF_F_RECOMPUTE_CSUM)) == 0
    };
    if !written {
        return fail();
    }
    if release(key).is_err() {
        return TC_ACT_SHOT;
    }
    maps.note(Event::FragmentReleased);
    go_in(skb)
}

/// Cuts a packet into fragments, which come in again one after the other. A run makes one of them and calls the program again for
/// the next: a loop over them would cost the verifier half a million instructions.
#[inline(always)]
pub fn cut(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let arrival = TcInput(skb).arrival();
    // SAFETY: the context of the running program; the kernel rewrites these loads.
    let (mtu, number) = unsafe { ((*skb).cb[1] as u16, (*skb).cb[2]) };
    match slice(skb, arrival.link.header_len() as u32, mtu, number) {
        Some(Progress::More) => {
            // SAFETY: the context of the running program, and a tail call with it.
            unsafe {
                (*skb).cb[2] = number + 1;
                TC_SLOW.tail_call(ctx, CUT_INDEX);
            }
            fail()
        }
        Some(Progress::Done) => {
            count_reason(Event::Fragmented.index());
            TC_ACT_SHOT
        }
        None => {
            count_verdict(
                arrival.hook,
                &Verdict::Drop(DropReason::FragmentationNeeded),
            );
            TC_ACT_SHOT
        }
    }
}

/// Whether there are fragments left to be made.
enum Progress {
    More,
    Done,
}

/// Makes the fragment with a number, and has it come in. `None` if that is not possible.
#[inline(always)]
fn slice(skb: *mut __sk_buff, at: u32, mtu: u16, number: u32) -> Option<Progress> {
    // SAFETY: the element is this CPU's own, and nothing else runs on it from one fragment to the next.
    let memory = unsafe { &mut *cutting()? };
    let body = at + IPV4_LEN as u32;
    if number == 0 {
        memory.cut = Cut::of(TcPacket::new(skb).after(at as usize), mtu)?;
        read_payload(skb, body, memory)?;
    }
    let Some(slice) = memory.cut.slice(number) else {
        return Some(Progress::Done);
    };
    if number >= MAX_PIECES || slice.len == 0 || slice.len > LEN_MASK {
        return None;
    }
    let (from, len) = (slice.at & OFFSET_MASK, bounded::<LEN_MASK>(slice.len));
    // SAFETY: the context of the running program; offset and length lie in the memory, which is as large as both masks.
    let written = unsafe {
        bpf_skb_change_tail(skb, body + len, 0) == 0
            && bpf_skb_store_bytes(
                skb,
                body,
                memory.bytes.as_ptr().add(from as usize).cast(),
                len,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            ) == 0
    };
    if !written {
        return None;
    }
    slice.write_header(TcPacket::new(skb).after(at as usize))?;
    send_in(skb)?;
    Some(Progress::More)
}

/// Copies what a packet carries.
#[inline(always)]
fn read_payload(skb: *mut __sk_buff, body: u32, memory: &mut Cutting) -> Option<()> {
    let payload = memory.cut.payload;
    if payload == 0 || payload > CUT_BYTES as u32 {
        return None;
    }
    // SAFETY: the context of the running program, and no more bytes than there is room for.
    let read = unsafe {
        let room = memory.bytes.as_mut_ptr().cast();
        bpf_skb_load_bytes(
            skb.cast(),
            body,
            room,
            bounded::<{ CUT_BYTES as u32 }>(payload),
        )
    };
    // The kernel does not make a buffer end before a sum that it has yet to finish; a fragment cannot have such a sum.
    // SAFETY: the context of the running program.
    (read == 0 && unsafe { bpf_skb_change_tail(skb, body + 4, 0) } == 0).then_some(())
}
