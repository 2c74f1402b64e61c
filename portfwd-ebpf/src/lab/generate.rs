//! The generator: writes every header of a recycled frame anew, for the next flow in turn, and sends it, or puts it before a
//! program on trial. It knows of frames in several buffers, as the programs of portfwd do: the kernel has no program array call
//! others.

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, PerCpuArray, ProgramArray},
    helpers::generated::bpf_redirect,
    macros::{btf_map, xdp},
    programs::XdpContext,
};

/// Words of the longest headers: Ethernet, IPv6, TCP.
const MOST_WORDS: usize = 37;

/// What the generator sends; written by the benchmark.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Plan {
    /// Headers of the first flow's frames, as on the wire. The sums are those of the client's port and the low half of its
    /// address being 0.
    template: [u16; MOST_WORDS],
    /// Order of the flows: each frame is this many flows after the one before it. Odd, for a power of two of flows.
    stride: u16,
    /// Index of the interface that frames leave by; 0 if the program in TRIAL takes them.
    egress: u32,
    /// Flows less one; flows are a power of two.
    mask: u32,
    /// Number of the first flow.
    first: u32,
}

const _: () = assert!(size_of::<Plan>() == 88);

#[btf_map]
static PLAN: Array<Plan, 1> = Array::new();
#[btf_map]
static TRIAL: ProgramArray<1> = ProgramArray::new();
#[btf_map]
static SENT: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Where the headers have what differs between flows, in words from the start of the frame.
trait Layout {
    /// Words of all headers.
    const WORDS: usize;
    /// Low half of the client's address.
    const ADDRESS: usize;
    /// The client's port.
    const PORT: usize;
    /// Header sum of IPv4.
    const NETWORK_SUM: Option<usize>;
    /// Header sum of the transport.
    const TRANSPORT_SUM: usize;
}

/// First word of the IP header.
const NETWORK: usize = 7;
/// First word of the transport header.
const V4_TRANSPORT: usize = NETWORK + 10;
const V6_TRANSPORT: usize = NETWORK + 20;

macro_rules! generators {
    ($($(#[$doc:meta])+ $program:ident, $layout:ident, $words:expr, $address:expr, $port:expr, $network_sum:expr, $sum:expr;)+) => {
        $(
            struct $layout;

            impl Layout for $layout {
                const WORDS: usize = $words;
                const ADDRESS: usize = $address;
                const PORT: usize = $port;
                const NETWORK_SUM: Option<usize> = $network_sum;
                const TRANSPORT_SUM: usize = $sum;
            }

            $(#[$doc])+
            #[xdp(frags)]
            pub fn $program(ctx: XdpContext) -> u32 {
                generate::<$layout>(&ctx).unwrap_or(xdp_action::XDP_ABORTED)
            }
        )+
    };
}

generators! {
    /// UDP over IPv4 from clients.
    lab_udp4, Udp4, V4_TRANSPORT + 4, NETWORK + 7, V4_TRANSPORT, Some(NETWORK + 5), V4_TRANSPORT + 3;
    /// TCP over IPv4 from clients.
    lab_tcp4, Tcp4, V4_TRANSPORT + 10, NETWORK + 7, V4_TRANSPORT, Some(NETWORK + 5), V4_TRANSPORT + 8;
    /// UDP over IPv6 from clients.
    lab_udp6, Udp6, V6_TRANSPORT + 4, NETWORK + 11, V6_TRANSPORT, None, V6_TRANSPORT + 3;
    /// TCP over IPv6 from clients.
    lab_tcp6, Tcp6, V6_TRANSPORT + 10, NETWORK + 11, V6_TRANSPORT, None, V6_TRANSPORT + 8;
    /// UDP over IPv4 to clients.
    lab_udp4_back, Udp4Back, V4_TRANSPORT + 4, NETWORK + 9, V4_TRANSPORT + 1, Some(NETWORK + 5), V4_TRANSPORT + 3;
    /// TCP over IPv4 to clients.
    lab_tcp4_back, Tcp4Back, V4_TRANSPORT + 10, NETWORK + 9, V4_TRANSPORT + 1, Some(NETWORK + 5), V4_TRANSPORT + 8;
    /// UDP over IPv6 to clients.
    lab_udp6_back, Udp6Back, V6_TRANSPORT + 4, NETWORK + 19, V6_TRANSPORT + 1, None, V6_TRANSPORT + 3;
    /// TCP over IPv6 to clients.
    lab_tcp6_back, Tcp6Back, V6_TRANSPORT + 10, NETWORK + 19, V6_TRANSPORT + 1, None, V6_TRANSPORT + 8;
}

#[inline(always)]
fn generate<L: Layout>(ctx: &XdpContext) -> Option<u32> {
    let plan = PLAN.get(0)?;
    let sent = SENT.get_ptr_mut(0)?;
    // SAFETY: the element is this CPU's own.
    let number = unsafe {
        *sent = (*sent).wrapping_add(1);
        *sent
    };
    let turn = (number as u32).wrapping_mul(u32::from(plan.stride)) & plan.mask;
    let flow = plan.first.wrapping_add(turn);
    // 32,768 ports, then the next address.
    let port = (1024 + (flow & 0x7fff) as u16).to_be();
    let address = (2 + (flow >> 15) as u16).to_be();
    let data = ctx.data();
    if data + 2 * L::WORDS > ctx.data_end() {
        return None;
    }
    let words = data as *mut u16;
    for word in 0..L::WORDS {
        // SAFETY: the comparison above; frames are 2-aligned.
        unsafe { *words.add(word) = plan.template[word] };
    }
    // SAFETY: as above; every constant is less than the number of words.
    unsafe {
        *words.add(L::ADDRESS) = address;
        *words.add(L::PORT) = port;
        if let Some(at) = L::NETWORK_SUM {
            *words.add(at) = add(plan.template[at], address, 0);
        }
        *words.add(L::TRANSPORT_SUM) = add(plan.template[L::TRANSPORT_SUM], address, port);
    }
    if plan.egress == 0 {
        // SAFETY: a tail call with the context of the running program. It comes back if there is no program.
        unsafe { TRIAL.tail_call(ctx, 0) };
        return None;
    }
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
