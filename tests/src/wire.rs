//! Frames put on an interface and taken from it as they are, past the host's own stack.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::link::End;

/// A packet socket bound to one interface.
pub struct Wire {
    socket: OwnedFd,
    own: [u8; 6],
    other: [u8; 6],
}

/// Receive buffer, in bytes.
const BUFFER: libc::c_int = 16 << 20;

impl Wire {
    /// A socket that sends from `end` to the interface that it is wired to.
    pub fn between(end: End<'_>, other: End<'_>) -> Result<Self> {
        let index = end.index()?;
        let socket = end
            .namespace
            .run(|| packet_socket(index))?
            .with_context(|| format!("open a packet socket on {}", end.interface))?;
        Ok(Self {
            socket,
            own: end.mac()?,
            other: other.mac()?,
        })
    }

    /// Sends an IP packet.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        self.send_behind(&[], packet)
    }

    /// Sends an IP packet in a frame of a VLAN.
    pub fn send_tagged(&self, vlan: u16, packet: &[u8]) -> Result<()> {
        self.send_in_tags(&[(0x8100, vlan)], packet)
    }

    /// Sends an IP packet behind tags, outermost first: what each of them is (0x8100, 0x88a8), and what it says.
    pub fn send_in_tags(&self, tags: &[(u16, u16)], packet: &[u8]) -> Result<()> {
        let bytes = tags
            .iter()
            .flat_map(|(protocol, control)| [protocol.to_be_bytes(), control.to_be_bytes()]);
        self.send_behind(&bytes.flatten().collect::<Vec<_>>(), packet)
    }

    fn send_behind(&self, tag: &[u8], packet: &[u8]) -> Result<()> {
        let ethertype: [u8; 2] = match packet.first().map(|byte| byte >> 4) {
            Some(6) => [0x86, 0xdd],
            _ => [0x08, 0x00],
        };
        let frame = [&self.other[..], &self.own, tag, &ethertype, packet].concat();
        // SAFETY: the buffer outlives the call and is as long as it is said to be.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        if usize::try_from(sent) != Ok(frame.len()) {
            return Err(io::Error::last_os_error()).context("send a frame");
        }
        Ok(())
    }

    /// The IP packets that came in, until one that `ends` accepts, which is not among them.
    pub fn receive_until(
        &self,
        patience: Duration,
        ends: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + patience;
        let mut packets = Vec::new();
        loop {
            match self.receive()? {
                Some(packet) if ends(&packet) => return Ok(packets),
                Some(packet) => packets.push(packet),
                None if Instant::now() > deadline => {
                    bail!("the last packet did not come; {} others did", packets.len())
                }
                None => {}
            }
        }
    }

    /// The next IP packet that came in, if one does within a moment.
    fn receive(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; 1 << 16];
        // SAFETY: zeroes are a valid address of this kind.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: both buffers outlive the call and are as long as they are said to be.
        let length = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
                (&raw mut from).cast(),
                &raw mut from_len,
            )
        };
        let Ok(length) = usize::try_from(length) else {
            let error = io::Error::last_os_error();
            let is_nothing = matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            );
            return if is_nothing {
                Ok(None)
            } else {
                Err(error).context("receive a frame")
            };
        };
        frame.truncate(length);
        let is_ip = matches!(frame.get(12..14), Some([0x08, 0x00] | [0x86, 0xdd]));
        // What the host itself sends passes by here, too.
        if from.sll_pkttype == libc::PACKET_OUTGOING || !is_ip {
            return Ok(None);
        }
        Ok(Some(unpadded(frame.split_off(14))))
    }
}

/// The packet without what the link put behind it.
fn unpadded(mut packet: Vec<u8>) -> Vec<u8> {
    let field = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
    let length = match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= 20 => field(2),
        Some(6) if packet.len() >= 40 => 40 + field(4),
        _ => packet.len(),
    };
    packet.truncate(length);
    packet
}

pub(crate) fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: a system call with integer arguments.
    let descriptor = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(protocol),
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address outlives the call and is as long as it is said to be.
    let bound = unsafe {
        libc::bind(
            descriptor,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    let wait = libc::timeval {
        tv_sec: 0,
        tv_usec: 100_000,
    };
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER)?;
    Ok(socket)
}

/// Sets an option of a socket, at a level of the kernel's (`SOL_SOCKET`, `SOL_PACKET`).
pub(crate) fn set<T>(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the value outlives the call and is as long as it is said to be.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
