//! An XDP program of another owner, on an interface that portfwd is asked to use.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;

use crate::link::End;

/// A program that passes every packet, attached in native mode by a link; detached on drop.
pub struct ForeignXdp {
    _link: OwnedFd,
}

impl ForeignXdp {
    /// Attaches the program to an interface that has none.
    pub fn attach(end: End<'_>) -> Result<Self> {
        let link = end
            .namespace
            .run(|| -> io::Result<OwnedFd> {
                let program = load_pass()?;
                let ifindex = if_nametoindex(end.interface)?;
                link(&program, ifindex)
            })?
            .with_context(|| format!("attach a foreign XDP program to {}", end.interface))?;
        Ok(Self { _link: link })
    }
}

/// The id of the XDP program on an interface, if there is one.
pub fn attached_id(end: End<'_>) -> Result<Option<u64>> {
    let links = end
        .namespace
        .ip_json(&["link", "show", "dev", end.interface])?;
    Ok(links[0]
        .pointer("/xdp/prog/id")
        .and_then(serde_json::Value::as_u64))
}

// Commands, types and modes of the bpf system call, from linux/bpf.h and linux/if_link.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// `r0 = XDP_PASS; exit`, in the instruction format of BPF.
const PASS: [u64; 2] = [
    u64::from_le_bytes([0xb7, 0, 0, 0, 2, 0, 0, 0]),
    u64::from_le_bytes([0x95, 0, 0, 0, 0, 0, 0, 0]),
];

/// The beginning of `union bpf_attr` that `BPF_PROG_LOAD` needs.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

/// The beginning of `union bpf_attr` that `BPF_LINK_CREATE` needs.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

fn load_pass() -> io::Result<OwnedFd> {
    load(BPF_PROG_TYPE_XDP, &PASS)
}

/// Loads a program of a type, `enum bpf_prog_type` of the kernel.
pub(crate) fn load(prog_type: u32, instructions: &'static [u64]) -> io::Result<OwnedFd> {
    let license: &CStr = c"GPL";
    bpf(
        BPF_PROG_LOAD,
        &ProgLoad {
            prog_type,
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
        },
    )
}

fn link(program: &OwnedFd, ifindex: u32) -> io::Result<OwnedFd> {
    bpf(
        BPF_LINK_CREATE,
        &LinkCreate {
            prog_fd: program.as_raw_fd().cast_unsigned(),
            target_ifindex: ifindex,
            attach_type: BPF_XDP,
            flags: XDP_FLAGS_DRV_MODE,
        },
    )
}

/// Makes the bpf system call, for the commands that return a descriptor.
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let descriptor = bpf_command(command, attributes)?;
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Makes the bpf system call. `attributes` must be the beginning of the `union bpf_attr` of that command, and what it points to must
/// outlive the call.
pub(crate) fn bpf_command<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: `attributes` points to the beginning of a `union bpf_attr` of the size that is
    // given, the kernel takes the rest as zero and only reads; what it points to is alive.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
