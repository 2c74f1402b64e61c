//! TC: socket buffers, whose sums may be unfinished and whose headers may be out of direct reach.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{
        bpf_csum_update, bpf_get_prandom_u32, bpf_l4_csum_replace, bpf_redirect,
        bpf_redirect_neigh, bpf_skb_change_head, bpf_skb_pull_data, bpf_skb_vlan_pop,
    },
    programs::TcContext,
};
use bytemuck::Pod;
use portfwd_common::{
    abi::{Config, LinkLayer},
    datapath::{
        Arrival, Beginning, Departure, DropReason, Event, Flows, Hook, Input, PassReason, Progress,
        Tables as _, Verdict, Way, Workspace, fast, fast_light, remember, slow,
    },
    net::{
        Be16, Delta, PacketBuf,
        headers::{ETHERNET_LEN, Ethernet, MacWords},
        packet::{SumChange, SumKind},
    },
};

use crate::{
    maps::{
        CUT_INDEX, FlowMaps, LIGHT_INDEX, Maps, REFUSE_INDEX, SlowPath, TC_SLOW, count_reason,
        count_verdict, fragment_index, slow_index,
    },
    report::report,
    steps::{self, begin},
    time::now,
    xdp::{advance, read, write},
};

/// A socket buffer's linear part, from some offset on.
#[derive(Clone, Copy)]
pub struct TcPacket {
    skb: *mut __sk_buff,
    base: usize,
    end: usize,
    /// Offset of `base` in the buffer, which the kernel's helpers count by.
    at: u32,
}

/// Puts a received packet before the core.
#[inline(always)]
pub fn run(ctx: &TcContext, hook: Hook, link: LinkLayer) -> i32 {
    let skb = ctx.skb.skb;
    // A tag that the driver or the kernel took off the frame is not seen in its bytes.
    if has_tag(skb) && !drop_priority_tag(skb) {
        count_verdict(hook, &Verdict::Pass(PassReason::NotIp));
        return TC_ACT_UNSPEC;
    }
    carry(ctx, hook, link)
}

#[inline(always)]
fn has_tag(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context of the running program; the kernel rewrites the load.
    unsafe { (*skb).vlan_present != 0 }
}

/// Takes off a tag of VLAN 0, which says a priority and that the frame belongs to no VLAN. The kernel does the same after TC, so a
/// packet that is passed loses nothing that it would have kept. False if the frame is of a VLAN, be it by a second tag.
#[cold]
#[inline(always)]
fn drop_priority_tag(skb: *mut __sk_buff) -> bool {
    const VLAN: u32 = 0xfff;
    // SAFETY: the context of the running program; the kernel rewrites the load, and the helper takes nothing else.
    let dropped = unsafe { (*skb).vlan_tci & VLAN == 0 && bpf_skb_vlan_pop(skb) == 0 };
    // The helper puts a second tag of the frame in the first one's place.
    dropped && !has_tag(skb)
}

/// Puts a packet that leaves before the core, if the gateway itself sends it: what was forwarded or redirected has been seen
/// where it came in. Whoever sends it, its answer may have to be told from what a rule for everything else takes.
#[inline(always)]
pub fn run_own(ctx: &TcContext, link: LinkLayer) -> i32 {
    let skb = ctx.skb.skb;
    let maps = Maps::new(skb.cast());
    if maps.config().is_some_and(Config::has_rests) {
        let raw = match link {
            LinkLayer::Ethernet => 0,
            LinkLayer::Raw => RAW,
        };
        remember_answer(skb, raw);
    }
    // SAFETY: as above.
    if unsafe { (*skb).ingress_ifindex } != 0 {
        return TC_ACT_UNSPEC;
    }
    carry(ctx, Hook::TcOut, link)
}

/// A function of its own, whose stack the hot path does not share. It takes and returns integers: one without a scalar result may
/// leave a stack address in the result register ("cannot return stack pointer to the caller", kernel 6.18, LLVM 22).
#[inline(never)]
fn remember_answer(skb: *mut __sk_buff, raw: u32) -> u32 {
    let link = if raw == RAW {
        LinkLayer::Raw
    } else {
        LinkLayer::Ethernet
    };
    reach_headers(skb, link);
    let (arrival, maps) = (arrival(skb, Hook::TcOut, link), Maps::new(skb.cast()));
    remember(TcPacket::new(skb), &arrival, &mut FlowMaps, &maps, now());
    raw
}

#[inline(always)]
fn carry(ctx: &TcContext, hook: Hook, link: LinkLayer) -> i32 {
    let skb = ctx.skb.skb;
    reach_headers(skb, link);
    let arrival = arrival(skb, hook, link);
    let maps = Maps::new(skb.cast());
    let progress = fast(TcPacket::new(skb), &arrival, &mut FlowMaps, &maps, now());
    go_on(ctx, hook, link, progress, &maps)
}

/// Puts a packet before the hot path of rules with light tracking, for whichever hook on ingress handed it on, with its headers within
/// reach. Each link layer by itself: the verifier would look at all that comes after for either.
#[inline(always)]
pub fn run_light(ctx: &TcContext) -> i32 {
    // SAFETY: the context of the running program; the kernel rewrites the load.
    let word = unsafe { (*ctx.skb.skb).cb[0] };
    let hook = match noted(word) {
        (Hook::TcSlow, _) => Hook::TcSlow,
        (Hook::Xdp | Hook::Tc | Hook::TcOut, _) => Hook::Tc,
    };
    match noted(word) {
        (_, LinkLayer::Ethernet) => carry_light(ctx, hook, LinkLayer::Ethernet),
        (_, LinkLayer::Raw) => carry_light(ctx, hook, LinkLayer::Raw),
    }
}

#[inline(always)]
fn carry_light(ctx: &TcContext, hook: Hook, link: LinkLayer) -> i32 {
    let skb = ctx.skb.skb;
    let (arrival, maps) = (arrival(skb, hook, link), Maps::new(skb.cast()));
    let progress = fast_light(TcPacket::new(skb), &arrival, &mut FlowMaps, &maps, now());
    go_on(ctx, hook, link, progress, &maps)
}

/// Carries out what a hot path has come to.
#[inline(always)]
fn go_on(ctx: &TcContext, hook: Hook, link: LinkLayer, progress: Progress, maps: &Maps) -> i32 {
    let skb = ctx.skb.skb;
    match progress {
        Progress::Done(verdict) => carry_out(ctx, hook, link, verdict, maps),
        Progress::Light => {
            // SAFETY: the context of the running program; the field is TC's own scratch space and lasts over a tail call.
            unsafe { (*skb).cb[0] = note(hook, link) };
            // SAFETY: a tail call with the context of the running program.
            unsafe { TC_SLOW.tail_call(ctx, LIGHT_INDEX) };
            // As below.
            carry_out(ctx, hook, link, Verdict::Pass(PassReason::NotForUs), maps)
        }
        Progress::Slow(family) => {
            // SAFETY: the context of the running program; the field is TC's own scratch space and lasts over a tail call.
            unsafe { (*skb).cb[0] = note(hook, link) };
            // SAFETY: a tail call with the context of the running program.
            unsafe { TC_SLOW.tail_call(ctx, slow_index(family)) };
            // Only if the slot is empty: the loader fills it before it attaches anything.
            carry_out(ctx, hook, link, Verdict::Pass(PassReason::NotForUs), maps)
        }
    }
}

/// Puts a packet before the slow path of its family, for whichever hook handed it on.
#[inline(always)]
pub fn run_slow<A: SlowPath>(ctx: &TcContext) -> i32
where
    FlowMaps: Flows<A>,
{
    let skb = ctx.skb.skb;
    let input = TcInput(skb);
    let arrival = input.arrival();
    match input.beginning() {
        Beginning::Packet => {
            begin::<A>();
            give_ticket::<A>(skb);
        }
        Beginning::FirstFragment => {
            if workspace::<A>(skb).is_none() {
                return vanish(arrival.hook);
            }
        }
    }
    // SAFETY: the context of the running program.
    let verdict = slow::<A, _>(unsafe { &mut *steps_context(ctx) });
    if verdict.is_for_fragments(arrival.hook) {
        // SAFETY: a tail call with the context of the running program.
        unsafe { TC_SLOW.tail_call(ctx, fragment_index(A::FAMILY)) };
    }
    report(ctx, &verdict);
    let maps = Maps::new(ctx.as_ptr());
    carry_out(ctx, arrival.hook, arrival.link, verdict, &maps)
}

/// Marks packet and workspace as belonging together.
#[inline(always)]
fn give_ticket<A: SlowPath>(skb: *mut __sk_buff) {
    let Some(work) = A::workspace() else {
        return;
    };
    // SAFETY: the helper takes nothing.
    work.ticket = unsafe { bpf_get_prandom_u32() };
    // SAFETY: the context of the running program; the field is TC's own scratch space and lasts over a tail call.
    unsafe { (*skb).cb[3] = work.ticket };
}

/// What the slow path has left for a program behind it, if that is of the same object.
#[inline(always)]
pub fn workspace<A: SlowPath>(skb: *mut __sk_buff) -> Option<&'static mut Workspace<A>> {
    // SAFETY: the context of the running program; the kernel rewrites the load.
    let ticket = unsafe { (*skb).cb[3] };
    A::workspace().filter(|work| work.ticket == ticket)
}

/// Ends a packet of which another object's programs know more.
#[inline(always)]
pub fn vanish(hook: Hook) -> i32 {
    count_verdict(hook, &Verdict::Drop(DropReason::Vanished));
    TC_ACT_SHOT
}

/// The hook's context, as steps take it.
#[inline(always)]
pub fn steps_context(ctx: &TcContext) -> *mut steps::__sk_buff {
    ctx.skb.skb.cast()
}

/// The context of a slow path, in which the hot path has noted hook and link layer.
pub struct TcInput(pub *mut __sk_buff);

impl Input for TcInput {
    type Packet = TcPacket;

    #[inline(always)]
    fn frame(&self) -> TcPacket {
        TcPacket::new(self.0)
    }

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        // SAFETY: the context of the running program; the kernel rewrites the load.
        let (hook, link) = noted(unsafe { (*self.0).cb[0] });
        arrival(self.0, hook, link)
    }

    #[inline(always)]
    fn frame_len(&self) -> u32 {
        // SAFETY: the context of the running program; the kernel rewrites the load.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    fn beginning(&self) -> Beginning {
        // SAFETY: the context of the running program; the kernel rewrites the load.
        if unsafe { (*self.0).cb[0] } & FIRST_FRAGMENT == 0 {
            Beginning::Packet
        } else {
            Beginning::FirstFragment
        }
    }

    #[inline(always)]
    fn reach_options(&self) {
        pull_headers(self.0, ETHERNET_LEN + LONG);
    }
}

const RAW: u32 = 0x100;
const FIRST_FRAGMENT: u32 = 0x200;

/// Tells the slow path, behind a tail call, that it has a first fragment before it.
///
/// # Safety
///
/// `skb` must be the context of the running program, in which hook and link layer are noted.
#[inline(always)]
pub unsafe fn note_first_fragment(skb: *mut __sk_buff) {
    // SAFETY: the caller's.
    unsafe { (*skb).cb[0] |= FIRST_FRAGMENT };
}

/// Hook and link layer in a word, for the program behind the tail call.
#[inline(always)]
const fn note(hook: Hook, link: LinkLayer) -> u32 {
    let raw = match link {
        LinkLayer::Ethernet => 0,
        LinkLayer::Raw => RAW,
    };
    raw | match hook {
        Hook::Xdp | Hook::Tc => 0,
        Hook::TcSlow => 1,
        Hook::TcOut => 2,
    }
}

/// Inverse of [`note`].
#[inline(always)]
const fn noted(word: u32) -> (Hook, LinkLayer) {
    let link = if word & RAW != 0 {
        LinkLayer::Raw
    } else {
        LinkLayer::Ethernet
    };
    let hook = match word & 0xff {
        0 => Hook::Tc,
        1 => Hook::TcSlow,
        _ => Hook::TcOut,
    };
    (hook, link)
}

#[inline(always)]
fn arrival(skb: *mut __sk_buff, hook: Hook, link: LinkLayer) -> Arrival {
    // SAFETY: the context of the running program; the kernel rewrites these loads.
    let (ifindex, segment_size) = unsafe { ((*skb).ifindex, (*skb).gso_size) };
    Arrival {
        hook,
        link,
        ifindex,
        segment_size,
    }
}

#[inline(always)]
fn carry_out(ctx: &TcContext, hook: Hook, link: LinkLayer, verdict: Verdict, maps: &Maps) -> i32 {
    count_verdict(hook, &verdict);
    match verdict {
        Verdict::Pass(_) => TC_ACT_UNSPEC,
        Verdict::Drop(_) => TC_ACT_SHOT,
        Verdict::Refuse(_) => refuse(ctx),
        Verdict::Forward(departure) => leave(ctx, link, &departure, maps),
    }
}

/// Sends a translated packet on.
#[inline(always)]
pub fn leave(ctx: &TcContext, link: LinkLayer, departure: &Departure, maps: &Maps) -> i32 {
    let skb = ctx.skb.skb;
    let ifindex = departure.ifindex;
    match departure.way {
        // SAFETY: a helper with integer arguments.
        Way::Frame | Way::Raw => unsafe { bpf_redirect(ifindex, 0) as i32 },
        Way::NewHeader => match put_header(skb, departure.next_hop, departure.source) {
            // SAFETY: as above.
            Some(()) => unsafe { bpf_redirect(ifindex, 0) as i32 },
            None => fail(),
        },
        Way::Resolve => {
            maps.note(Event::Resolved);
            // The helper takes a link header off before the kernel puts its own on.
            if link == LinkLayer::Raw && put_header(skb, [0; 3], [0; 3]).is_none() {
                return fail();
            }
            // SAFETY: without parameters the helper finds the next hop by the packet's addresses.
            unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
        }
        Way::Stack => {
            maps.note(Event::Stack);
            TC_ACT_UNSPEC
        }
        Way::Cut => {
            // SAFETY: the context of the running program; the field is TC's own scratch space and lasts over a tail call.
            unsafe {
                (*skb).cb[1] = u32::from(departure.mtu);
                (*skb).cb[2] = 0;
            }
            // SAFETY: a tail call with the context of the running program.
            unsafe { TC_SLOW.tail_call(ctx, CUT_INDEX) };
            fail()
        }
        // Only the program for fragments, which sees to them before, comes to these.
        Way::Hold | Way::Again => fail(),
    }
}

/// Has the sender of a packet told that it is refused.
#[inline(always)]
pub fn refuse(ctx: &TcContext) -> i32 {
    // SAFETY: a tail call with the context of the running program.
    unsafe { TC_SLOW.tail_call(ctx, REFUSE_INDEX) };
    TC_ACT_SHOT
}

/// A translated packet that a helper refused half way.
#[inline(always)]
pub fn fail() -> i32 {
    count_reason(DropReason::RewriteFailed.index());
    TC_ACT_SHOT
}

/// Puts an Ethernet header before a packet that came without.
#[inline(always)]
fn put_header(skb: *mut __sk_buff, dst: MacWords, src: MacWords) -> Option<()> {
    // SAFETY: the context of the running program; the kernel rewrites the load.
    let protocol = unsafe { (*skb).protocol };
    // SAFETY: the context of the running program.
    if unsafe { bpf_skb_change_head(skb, ETHERNET_LEN as u32, 0) } != 0 {
        return None;
    }
    TcPacket::new(skb).write(
        0,
        Ethernet {
            dst,
            src,
            ethertype: Be16::from_word(protocol as u16),
        },
    )
}

/// Headers of a plain packet: IPv4 without options, or IPv6, and TCP.
const PLAIN_V4: usize = 40;
const PLAIN_V6: usize = 60;
/// The same with IPv4 options, or an ICMP error up to the sum of the TCP header it quotes.
const LONG: usize = 60 + 8 + 60 + 20;

/// Brings the headers into the linear part, if they are not there (paged data: GRO, header split).
#[inline(always)]
fn reach_headers(skb: *mut __sk_buff, link: LinkLayer) {
    let packet = TcPacket::new(skb);
    let linear = packet.end.wrapping_sub(packet.base);
    // SAFETY: the context of the running program; the kernel rewrites the load.
    let len = unsafe { (*skb).len } as usize;
    if linear >= len {
        return;
    }
    let link_len = link.header_len();
    let plain = match packet
        .read::<[u16; 5]>(link_len)
        .map(|words| words.map(u16::to_ne_bytes))
    {
        // Version, IHL and protocol of IPv4; version and next header of IPv6.
        Some([[0x45, _], _, _, _, [_, 6 | 17]]) => PLAIN_V4,
        Some([[0x60..=0x6f, _], _, _, [6 | 17, _], _]) => PLAIN_V6,
        Some(_) | None => LONG,
    };
    pull_headers(skb, link_len + plain);
}

/// Brings so many bytes into the linear part, or all if there are fewer. If that fails the packet reads as cut short, and is passed.
#[inline(always)]
fn pull_headers(skb: *mut __sk_buff, wanted: usize) {
    let packet = TcPacket::new(skb);
    // SAFETY: the context of the running program; the kernel rewrites the load.
    let len = unsafe { (*skb).len } as usize;
    let pull = if wanted < len { wanted } else { len };
    if packet.end.wrapping_sub(packet.base) < pull {
        // SAFETY: the context of the running program.
        let _ = unsafe { bpf_skb_pull_data(skb, pull as u32) };
    }
}

impl TcPacket {
    /// All of a buffer.
    #[inline(always)]
    pub fn new(skb: *mut __sk_buff) -> Self {
        // Volatile for the reason in `XdpInput::frame`.
        // SAFETY: the context of the running program; the kernel rewrites these loads.
        let (data, data_end) = unsafe {
            (
                (&raw const (*skb).data).read_volatile(),
                (&raw const (*skb).data_end).read_volatile(),
            )
        };
        Self {
            skb,
            base: data as usize,
            end: data_end as usize,
            at: 0,
        }
    }

    #[inline(always)]
    fn replace(self, at: u32, delta: Delta, flags: u32) -> Option<()> {
        if delta == Delta::ZERO {
            return Some(());
        }
        // SAFETY: the context of the running program. From 0 to a delta with a size of 0: the delta is added as it is.
        let result = unsafe {
            bpf_l4_csum_replace(self.skb, at, 0, u64::from(delta.word()), u64::from(flags))
        };
        (result == 0).then_some(())
    }
}

impl PacketBuf for TcPacket {
    #[inline(always)]
    fn remaining(self) -> u32 {
        // SAFETY: the context of the running program; the kernel rewrites the load.
        unsafe { (*self.skb).len }.wrapping_sub(self.at)
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
            at: self.at + bytes as u32,
            ..self
        }
    }

    /// The kernel knows whether the sum is full, unfinished (only the pseudo-header's words are in it) or known for the whole
    /// packet, and the helper does right by each.
    #[inline(always)]
    fn update_sum(self, change: SumChange) -> Option<()> {
        let at = self.at + change.kind.offset() as u32;
        let (zero, whole) = match change.kind {
            // The helper leaves a datagram without header sum alone, and with it the sum over the whole packet.
            SumKind::Udp if self.read(SumKind::Udp.offset()) == Some(0_u16) => {
                (BPF_F_MARK_MANGLED_0, change.packet.and(change.body))
            }
            SumKind::Udp => (BPF_F_MARK_MANGLED_0, change.packet),
            SumKind::Tcp | SumKind::Icmp => (0, change.packet),
        };
        self.replace(at, change.pseudo, BPF_F_PSEUDO_HDR | zero)?;
        self.replace(at, change.body, zero)?;
        self.update_whole_sum(whole);
        Some(())
    }

    #[inline(always)]
    fn update_whole_sum(self, change: Delta) {
        if change != Delta::ZERO {
            // Refused unless the sum over the whole packet is known; then there is nothing to do.
            // SAFETY: the context of the running program.
            let _ = unsafe { bpf_csum_update(self.skb, change.word()) };
        }
    }
}
