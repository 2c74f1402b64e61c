//! Frames sent from a ring that is shared with the kernel (`PACKET_TX_RING`): the kernel copies their link header and leaves the rest
//! where it is, so that whoever gets the buffer has the IP header out of direct reach (`tpacket_fill_skb`), as cards leave it that
//! split headers from data.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{NonNull, null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use crate::link::End;
use crate::wire::{packet_socket, set};

/// Bytes of the ring, and of a frame's place in it.
const RING: usize = 1 << 16;
const PLACE: usize = 1 << 12;
/// Where a frame begins in its place, `TPACKET2_HDRLEN` less the address.
const FRAME: usize = 32;

/// A ring that is sent from.
pub struct Ring {
    socket: OwnedFd,
    memory: NonNull<u8>,
    next: usize,
    own: [u8; 6],
    other: [u8; 6],
}

impl Ring {
    /// A ring of `end`, whose frames go to the interface that it is wired to.
    ///
    /// # Errors
    /// If the kernel gives no such ring.
    pub fn between(end: End<'_>, other: End<'_>) -> Result<Self> {
        let index = end.index()?;
        let socket = end
            .namespace
            .run(|| packet_socket(index))?
            .with_context(|| format!("open a packet socket on {}", end.interface))?;
        let version = libc::tpacket_versions::TPACKET_V2 as libc::c_int;
        set(&socket, libc::SOL_PACKET, libc::PACKET_VERSION, &version)
            .context("choose the ring's version")?;
        let request = libc::tpacket_req {
            tp_block_size: RING as u32,
            tp_block_nr: 1,
            tp_frame_size: PLACE as u32,
            tp_frame_nr: (RING / PLACE) as u32,
        };
        set(&socket, libc::SOL_PACKET, libc::PACKET_TX_RING, &request).context("make the ring")?;
        // SAFETY: a new mapping of the ring's size, wherever the kernel puts it.
        let memory = unsafe {
            libc::mmap(
                null_mut(),
                RING,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                socket.as_raw_fd(),
                0,
            )
        };
        ensure!(
            memory != libc::MAP_FAILED,
            "map the ring: {}",
            io::Error::last_os_error()
        );
        Ok(Self {
            socket,
            memory: NonNull::new(memory.cast()).context("the ring is nowhere")?,
            next: 0,
            own: end.mac()?,
            other: other.mac()?,
        })
    }

    /// Sends an IP packet, and returns when it has left.
    ///
    /// # Errors
    /// If it is larger than its place, or the kernel refuses it.
    pub fn send(&mut self, packet: &[u8]) -> Result<()> {
        let ethertype: [u8; 2] = match packet.first().map(|byte| byte >> 4) {
            Some(6) => [0x86, 0xdd],
            _ => [0x08, 0x00],
        };
        let frame = [&self.other[..], &self.own, &ethertype, packet].concat();
        ensure!(frame.len() <= PLACE - FRAME, "{} bytes", frame.len());
        // SAFETY: within the mapping, of which this place is ours until its status says otherwise.
        unsafe {
            let place = self.memory.add(self.next * PLACE);
            place
                .add(FRAME)
                .copy_from_nonoverlapping(NonNull::from(&frame[..]).cast(), frame.len());
            let header: NonNull<libc::tpacket2_hdr> = place.cast();
            (*header.as_ptr()).tp_len = u32::try_from(frame.len())?;
            AtomicU32::from_ptr(&raw mut (*header.as_ptr()).tp_status)
                .store(libc::TP_STATUS_SEND_REQUEST, Ordering::Release);
        }
        self.next = (self.next + 1) % (RING / PLACE);
        // SAFETY: without a buffer the kernel takes what the ring has.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), null(), 0, 0) };
        ensure!(
            usize::try_from(sent) == Ok(frame.len()),
            "send from the ring: {sent}, {}",
            io::Error::last_os_error()
        );
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping that `between` made, which nobody else has.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), RING) };
    }
}
