//! Interfaces without link header.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;

/// A tun interface of the thread's network namespace, there as long as this value is.
pub struct Tunnel {
    _file: File,
}

impl Tunnel {
    /// Makes an interface with this kernel index, which `ip tuntap` cannot choose.
    pub fn new(name: &str, ifindex: u32) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .context("open /dev/net/tun")?;
        // SAFETY: the request reads one integer, which lives through the call.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFINDEX as _, &raw const ifindex) };
        checked(result).with_context(|| format!("choose index {ifindex} for {name}"))?;
        // SAFETY: the structure is integers, arrays and unions of them, for which zero is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
        // SAFETY: the request reads and writes one ifreq, which lives through the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) };
        checked(result).with_context(|| format!("make {name}"))?;
        Ok(Self { _file: file })
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
