//! Which driver an interface has. Netlink does not tell; ethtool's old system call does, for the thread's network namespace.

use std::{io, mem, os::fd::AsRawFd, os::unix::net::UnixDatagram};

use anyhow::{Context, Result};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo` of the kernel.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    /// Versions, the place on the bus, and what there is to dump.
    rest: [u8; 160],
}

/// A socket to ask by.
pub struct Drivers(UnixDatagram);

impl Drivers {
    /// Opens a socket.
    pub fn open() -> Result<Self> {
        // Any socket of the namespace will do.
        let socket = UnixDatagram::unbound().context("cannot open a socket")?;
        Ok(Self(socket))
    }

    /// The name of an interface's driver, such as `virtio_net`; `None` if it has gone or does not tell.
    pub fn name(&self, interface: &str) -> Option<String> {
        self.info(interface).ok()
    }

    fn info(&self, interface: &str) -> io::Result<String> {
        let mut info = DriverInfo {
            command: ETHTOOL_GDRVINFO,
            driver: [0; 32],
            rest: [0; 160],
        };
        // SAFETY: zeroes are a valid request: an empty name and a null pointer.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        let name = request.ifr_name.iter_mut().zip(interface.as_bytes());
        // The last byte stays zero.
        for (to, from) in name.take(libc::IFNAMSIZ - 1) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = (&raw mut info).cast();
        // SAFETY: the kernel reads the name and the command, and writes at most a DriverInfo to where the request points, which
        // outlives the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let name = info.driver.split(|byte| *byte == 0).next();
        Ok(String::from_utf8_lossy(name.unwrap_or_default()).into_owned())
    }
}
