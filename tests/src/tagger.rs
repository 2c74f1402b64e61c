//! VLAN tags beside the frame, as a VLAN's own device leaves them for the card to put in. A kernel without VLAN devices can do that, too.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::foreign_xdp::{bpf_command, load};
use crate::link::End;
use crate::process::run;

/// The VLAN that the tags name.
pub const VLAN: u16 = 20;

// From linux/bpf.h.
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

/// `bpf_skb_vlan_push(skb, htons(0x8100), VLAN); return TC_ACT_OK`, in the instruction format of BPF.
const PUSH: [u64; 5] = [
    u64::from_le_bytes([0xb7, 2, 0, 0, 0x81, 0, 0, 0]),
    u64::from_le_bytes([0xb7, 3, 0, 0, VLAN as u8, 0, 0, 0]),
    u64::from_le_bytes([0x85, 0, 0, 0, 18, 0, 0, 0]),
    u64::from_le_bytes([0xb7, 0, 0, 0, 0, 0, 0, 0]),
    u64::from_le_bytes([0x95, 0, 0, 0, 0, 0, 0, 0]),
];

/// The beginning of `union bpf_attr` that `BPF_OBJ_PIN` needs.
#[repr(C)]
struct ObjPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Everything that leaves an interface from now on gets a tag of [`VLAN`] beside the frame; the interface puts it into the frame if
/// that is not left to it (`txvlan`). It stays with the interface.
pub fn tag(end: End<'_>) -> Result<()> {
    let program = load(BPF_PROG_TYPE_SCHED_CLS, &PUSH).context("load a program that tags")?;
    let pin = Pin::new(
        PathBuf::from("/sys/fs/bpf").join(format!("{}-tagger", end.namespace.name())),
        &program,
    )?;
    let interface = end.interface;
    run(end
        .namespace
        .command("tc")?
        .args(["qdisc", "add", "dev", interface, "clsact"]))?;
    run(end
        .namespace
        .command("tc")?
        .args(["filter", "add", "dev", interface, "egress", "bpf"])
        .args(["direct-action", "object-pinned"])
        .arg(&pin.0))?;
    Ok(())
}

/// A pinned program, removed on drop.
struct Pin(PathBuf);

impl Pin {
    fn new(path: PathBuf, program: &OwnedFd) -> Result<Self> {
        pin(&path, program).with_context(|| format!("pin to {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

fn pin(path: &Path, program: &OwnedFd) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    bpf_command(
        BPF_OBJ_PIN,
        &ObjPin {
            pathname: path.as_ptr() as u64,
            bpf_fd: program.as_raw_fd().cast_unsigned(),
            file_flags: 0,
        },
    )
    .map(drop)
}
