//! The kernel's forwarding table.

use core::{ffi::c_void, mem};

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
        BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
        bpf_fib_lookup as FibLookup,
    },
    btf_maps::PerCpuArray,
    helpers::generated::bpf_fib_lookup,
    macros::btf_map,
};
use portfwd_common::{
    abi::{FlowKey, Protocol},
    datapath::Route,
    net::{Address, Family},
};

/// The question and its answer: they would take an eighth of the stack.
#[btf_map]
static QUERY: PerCpuArray<FibLookup, 1> = PerCpuArray::new();

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Asks for the next hop of a translated packet.
#[inline(always)]
pub fn route<A: Address>(ctx: *mut c_void, key: &FlowKey<A>, ingress: u32) -> Route {
    let Some(params) = QUERY.get_ptr_mut(0) else {
        return Route::Stack;
    };
    // SAFETY: the element is this CPU's own, and nothing else runs on it meanwhile.
    let params = unsafe { &mut *params };
    // SAFETY: the structure is integers and unions of integers, for which zero is valid.
    *params = unsafe { mem::zeroed() };
    let [sport, dport] = key.ports.words();
    params.l4_protocol = if key.protocol == u32::from(Protocol::Echo.number()) {
        A::ICMP
    } else {
        key.protocol as u8
    };
    params.sport = sport;
    params.dport = dport;
    params.ifindex = ingress;
    // Not 0: only then the helper reports the route's MTU. The packet's size is compared with it here, because an entry is
    // for packets of all sizes.
    params.__bindgen_anon_1.tot_len = 1;
    let (src, dst) = (key.src.widen().raw(), key.dst.widen().raw());
    match A::FAMILY {
        Family::V4 => {
            params.family = AF_INET;
            params.__bindgen_anon_3.ipv4_src = src[0];
            params.__bindgen_anon_4.ipv4_dst = dst[0];
        }
        Family::V6 => {
            params.family = AF_INET6;
            params.__bindgen_anon_3.ipv6_src = src;
            params.__bindgen_anon_4.ipv6_dst = dst;
        }
    }
    // SAFETY: `ctx` is the context of the running program, the structure is initialised and its size is right.
    let result =
        unsafe { bpf_fib_lookup(ctx, &raw mut *params, mem::size_of::<FibLookup>() as i32, 0) };
    match u32::try_from(result) {
        Ok(BPF_FIB_LKUP_RET_SUCCESS) => {
            // SAFETY: on success the helper has written the MTU into the union.
            let mtu = unsafe { params.__bindgen_anon_1.mtu_result };
            let d = params.dmac;
            let next_hop = [
                u16::from_ne_bytes([d[0], d[1]]),
                u16::from_ne_bytes([d[2], d[3]]),
                u16::from_ne_bytes([d[4], d[5]]),
            ];
            Route::Via {
                ifindex: params.ifindex,
                next_hop,
                mtu: u32::from(mtu),
            }
        }
        Ok(BPF_FIB_LKUP_RET_NO_NEIGH) => Route::Unresolved {
            ifindex: params.ifindex,
        },
        Ok(
            BPF_FIB_LKUP_RET_NOT_FWDED
            | BPF_FIB_LKUP_RET_BLACKHOLE
            | BPF_FIB_LKUP_RET_UNREACHABLE
            | BPF_FIB_LKUP_RET_PROHIBIT,
        ) => Route::Refused,
        Ok(_) | Err(_) => Route::Stack,
    }
}
