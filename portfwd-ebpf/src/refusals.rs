//! TC: the ICMP error that tells the sender of a packet why it was dropped takes the packet's place.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{
        bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use bytemuck::{Pod, bytes_of};
use portfwd_common::{
    abi::LinkLayer,
    datapath::{
        Event, Flows, Input as _, Views,
        refusal::{QUOTED_BYTES, Quotation, error_headers, quoted_len, turn_round},
    },
    net::{Ipv4, Ipv6, PacketBuf as _, headers::ICMP_LEN},
};

use crate::{
    fragments::{bounded, ifindex},
    maps::{FlowMaps, Maps, SlowPath, count_reason, quoting},
    tc::{TcInput, TcPacket, workspace},
};

/// Tells the sender of a packet that the slow path has refused and counted, by the interface by which it came.
#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let link = TcInput(skb).arrival().link;
    let network = Views::of(TcPacket::new(skb), link).network;
    let put = match network.read::<[u8; 2]>(0) {
        Some([0x40..=0x4f, _]) => put_error::<Ipv4>(skb, link),
        Some(_) => put_error::<Ipv6>(skb, link),
        None => None,
    };
    match put {
        Some(()) => {
            count_reason(Event::ErrorSent.index());
            // SAFETY: a helper with integer arguments.
            unsafe { bpf_redirect(ifindex(skb), 0) as i32 }
        }
        None => TC_ACT_SHOT,
    }
}

/// Puts the error in the packet's place. `None` if that is not possible; then the packet may be garbled.
#[inline(always)]
fn put_error<A: SlowPath>(skb: *mut __sk_buff, link: LinkLayer) -> Option<()>
where
    FlowMaps: Flows<A>,
{
    let work = workspace::<A>(skb)?;
    let at = link.header_len() as u32;
    let quoted = bounded::<{ QUOTED_BYTES as u32 }>(quoted_len(work));
    // SAFETY: the element is this CPU's own, and nothing else runs on it meanwhile.
    let quotation = unsafe { &mut *quoting()? };
    clear(quotation);
    // SAFETY: the context of the running program, and no more bytes than there is room for.
    let read = unsafe { bpf_skb_load_bytes(skb.cast(), at, (&raw mut *quotation).cast(), quoted) };
    if read != 0 {
        return None;
    }
    let headers = error_headers(work, quotation, quoted, &Maps::new(skb.cast()));
    resize(
        skb,
        at,
        work.unfolded.header_len(),
        A::HEADER_LEN as u32 + ICMP_LEN as u32 + quoted,
    )?;
    let body = at + A::HEADER_LEN as u32;
    store(skb, at, &headers.ip)?;
    store(skb, body, &headers.icmp)?;
    // SAFETY: the context of the running program, and initialised memory of that length.
    let written = unsafe {
        bpf_skb_store_bytes(
            skb,
            body + ICMP_LEN as u32,
            (&raw const *quotation).cast(),
            quoted,
            u64::from(BPF_F_RECOMPUTE_CSUM),
        )
    };
    if written != 0 {
        return None;
    }
    match link {
        LinkLayer::Ethernet => turn_round(TcPacket::new(skb)),
        LinkLayer::Raw => Some(()),
    }
}

/// Forgets what was quoted last. By words: `memset` is a loop over bytes, and the verifier would go through it.
#[inline(always)]
fn clear(quotation: &mut Quotation) {
    let words: *mut u64 = (&raw mut *quotation).cast();
    for word in 0..QUOTED_BYTES / size_of::<u64>() {
        // SAFETY: the word is in the quotation, which is a map's element and so aligned to eight bytes.
        unsafe { words.add(word).write_volatile(0) };
    }
}

/// Makes a buffer hold an IP packet of `len` bytes behind the `at` bytes of its link header, whatever it says. All in front of
/// the old transport header is taken off at the front, and more than that: a sum that the kernel has yet to finish
/// (`CHECKSUM_PARTIAL`) would be written into the quotation on the way out, and is forgotten only when the place where it begins is
/// no longer in the buffer (`skb_postpull_rcsum`). Growing and trimming make the buffer linear and the sender's only one
/// (`__bpf_skb_change_tail`).
#[inline(always)]
fn resize(skb: *mut __sk_buff, at: u32, header_len: u32, len: u32) -> Option<()> {
    /// Bytes taken off behind the link header and all others.
    const BEYOND: u32 = 4;
    let front = at + header_len + BEYOND;
    // SAFETY: the context of the running program, and integers.
    let resized = unsafe {
        bpf_skb_change_tail(skb, at + front + len, 0) == 0
            && bpf_skb_adjust_room(skb, -(front as i32), BPF_ADJ_ROOM_MAC, 0) == 0
    };
    resized.then_some(())
}

/// Writes to a buffer, and to the sum over all of it, if there is one.
#[inline(always)]
fn store<T: Pod>(skb: *mut __sk_buff, at: u32, value: &T) -> Option<()> {
    let bytes = bytes_of(value);
    // SAFETY: the context of the running program, and initialised memory of that length.
    let result = unsafe {
        bpf_skb_store_bytes(
            skb,
            at,
            bytes.as_ptr().cast(),
            bytes.len() as u32,
            u64::from(BPF_F_RECOMPUTE_CSUM),
        )
    };
    (result == 0).then_some(())
}
