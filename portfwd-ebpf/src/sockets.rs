//! The gateway's own sockets.

use core::{ffi::c_void, mem};

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
};
use portfwd_common::{
    abi::{FlowKey, Protocol},
    net::{Address, Family, be::Ports},
};

/// `BPF_F_CURRENT_NETNS`: the network namespace of the interface that the packet came in by.
const CURRENT_NETNS: u64 = u64::MAX;

/// `bpf_sock_tuple` of either family, which the kernel tells by its size.
#[repr(C)]
struct Tuple<A> {
    src: A,
    dst: A,
    ports: Ports,
}

/// Whether there is a socket for a packet that comes in: of TCP one of the connection, be it in TIME-WAIT, or one that listens; of
/// UDP one that is bound there.
#[inline(always)]
pub fn has_socket<A: Address>(ctx: *mut c_void, key: &FlowKey<A>, protocol: Protocol) -> bool {
    let (src, dst) = (key.src.widen().raw(), key.dst.widen().raw());
    match A::FAMILY {
        Family::V4 => look_up(
            ctx,
            Tuple {
                src: src[0],
                dst: dst[0],
                ports: key.ports,
            },
            protocol,
        ),
        Family::V6 => look_up(
            ctx,
            Tuple {
                src,
                dst,
                ports: key.ports,
            },
            protocol,
        ),
    }
}

#[inline(always)]
fn look_up<A>(ctx: *mut c_void, mut tuple: Tuple<A>, protocol: Protocol) -> bool {
    let (question, size) = (
        (&raw mut tuple).cast::<bpf_sock_tuple>(),
        mem::size_of::<Tuple<A>>() as u32,
    );
    // SAFETY: the context of the running program, and a tuple of the size that is told.
    let socket = unsafe {
        match protocol {
            Protocol::Tcp => bpf_skc_lookup_tcp(ctx, question, size, CURRENT_NETNS, 0),
            Protocol::Udp => bpf_sk_lookup_udp(ctx, question, size, CURRENT_NETNS, 0),
            Protocol::Echo => return false,
        }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the helper has given out the socket, and nobody else gives it back.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}
