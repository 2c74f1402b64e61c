//! One run of a program on one frame, by `bpf(2)`: aya has no word for the flag that gives the frame a sum over all of it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use bytemuck::{Pod, Zeroable, bytes_of};

const BPF_PROG_TEST_RUN: libc::c_long = 10;
/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`, kernel 6.16.
const WHOLE_SUM: u32 = 1 << 2;
/// What a frame may grow by: a header before it, or a larger one that takes its place.
const ROOM: usize = 4_096;
/// Fewer bytes the kernel does not take for a frame.
pub const SHORTEST: usize = 14;

/// The part of `union bpf_attr` that BPF_PROG_TEST_RUN reads.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Attribute {
    program: i32,
    verdict: u32,
    data_in_len: u32,
    data_out_len: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_in_len: u32,
    context_out_len: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    padding: u32,
}

/// `struct xdp_md`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue: u32,
    egress_ifindex: u32,
}

/// `struct __sk_buff`; what a test run may set has a name.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TcContext {
    head: [u32; 9],
    ingress_ifindex: u32,
    ifindex: u32,
    middle: [u32; 30],
    segments: u32,
    socket: [u32; 2],
    segment_size: u32,
    tail: [u32; 3],
}

const _: () = assert!(size_of::<TcContext>() == 192);

/// Packets that a frame stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    /// How many, 0 if it is a plain one.
    pub count: u32,
    /// Payload of each, bytes; 0 likewise.
    pub size: u32,
}

/// What the kernel knows of a frame's sums before the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// Nothing (`CHECKSUM_NONE`).
    Unknown,
    /// The sum over everything behind the link header (`CHECKSUM_COMPLETE`), which must be right afterwards too.
    Whole,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What the program returned.
    pub code: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

/// Runs an XDP program on a frame that came in by an interface of the thread's namespace.
pub fn xdp(program: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> io::Result<Run> {
    let context = XdpContext {
        data_end: frame.len() as u32,
        ingress_ifindex: ifindex,
        ..XdpContext::zeroed()
    };
    run(program, bytes_of(&context), frame, 0)
}

/// Runs a TC program on a frame that came in, or leaves, by an interface of the thread's namespace.
pub fn tc(
    program: BorrowedFd<'_>,
    ifindex: u32,
    frame: &[u8],
    segments: Segments,
    sums: Sums,
) -> io::Result<Run> {
    let context = TcContext {
        ifindex,
        segments: segments.count,
        segment_size: segments.size,
        ..TcContext::zeroed()
    };
    let flags = match sums {
        Sums::Unknown => 0,
        Sums::Whole => WHOLE_SUM,
    };
    run(program, bytes_of(&context), frame, flags)
}

fn run(program: BorrowedFd<'_>, context: &[u8], frame: &[u8], flags: u32) -> io::Result<Run> {
    let mut out = vec![0; frame.len() + ROOM];
    let mut attribute = Attribute {
        program: program.as_raw_fd(),
        data_in_len: frame.len() as u32,
        data_out_len: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        context_in_len: context.len() as u32,
        context_in: context.as_ptr() as u64,
        flags,
        ..Attribute::zeroed()
    };
    // SAFETY: every address is that of a buffer with the length beside it, and all of them live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            &raw mut attribute,
            size_of::<Attribute>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    out.truncate(attribute.data_out_len as usize);
    Ok(Run {
        code: attribute.verdict,
        frame: out,
    })
}
