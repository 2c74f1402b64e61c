//! What the kernel says over netlink about interfaces, addresses and changes of either.
//!
//! Requests wait for their answer: they take microseconds, and are made when something has changed. All sockets belong to the
//! network namespace of the thread that opens them; `/sys/class/net` may be that of another one and is never read.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the enums of netlink grow with the kernel; what is not asked for is skipped"
)]

pub mod address;
pub mod conntrack;
pub mod device;
pub mod driver;
pub mod ethtool;
pub mod event;
pub mod generic;
pub mod link;
pub mod neighbour;
pub mod route;

use std::{fmt::Debug, io};

use anyhow::{Context, Result, anyhow};
use log::debug;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator, parse_string,
};
use netlink_sys::{Socket, SocketAddr};

/// Netlink's kernel side.
const KERNEL: u32 = 0;
/// A dump that met a change begins anew, up to this often in a row.
const DUMP_ATTEMPTS: u32 = 16;
/// Messages in a datagram are aligned to this, bytes.
const ALIGNMENT: usize = 4;

/// A netlink socket for requests and their answers.
pub struct Requester {
    socket: Socket,
    sequence: u32,
}

/// What the answer to a dump was.
enum Dump<M> {
    Consistent(Vec<M>),
    Interrupted,
}

impl Requester {
    /// Opens a socket of `protocol` (`netlink_sys::protocols`).
    pub fn open(protocol: isize) -> Result<Self> {
        let opening = "cannot open a netlink socket";
        let mut socket = Socket::new(protocol).context(opening)?;
        socket.bind_auto().context(opening)?;
        socket
            .connect(&SocketAddr::new(KERNEL, 0))
            .context(opening)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for all objects of a kind.
    pub fn dump<M>(&mut self, message: M) -> Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone + Debug,
    {
        for _ in 0..DUMP_ATTEMPTS {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            match self.receive_dump()? {
                Dump::Consistent(answer) => return Ok(answer),
                Dump::Interrupted => {}
            }
        }
        Err(anyhow!("the kernel's tables change too fast to be listed"))
    }

    /// Asks for one object, or for something to be done; an error of the kernel is an [`io::Error`] in the chain.
    pub fn request<M>(&mut self, message: M, flags: u16) -> Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        let mut answer = Vec::new();
        loop {
            for message in self.receive()? {
                match message?.payload {
                    NetlinkPayload::InnerMessage(inner) => answer.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answer),
                    NetlinkPayload::Error(error) => return Err(error.to_io().into()),
                    _ => {}
                }
            }
        }
    }

    /// Asks for something to be done that may be refused; `None` if it is done, else what the kernel says about it, which may be
    /// nothing.
    pub fn refusal<M>(&mut self, message: M) -> Result<Option<String>>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.socket.set_ext_ack(true)?;
        self.send(message, NLM_F_REQUEST | NLM_F_ACK)?;
        loop {
            for message in self.receive::<M>()? {
                let NetlinkMessage {
                    header, payload, ..
                } = message?;
                match payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(None),
                    NetlinkPayload::Error(error) => {
                        return Ok(Some(words(header.flags, &error.header)));
                    }
                    _ => {}
                }
            }
        }
    }

    fn send<M: NetlinkSerializable>(&mut self, message: M, flags: u16) -> Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket
            .send(&bytes, 0)
            .context("cannot send a netlink request")?;
        Ok(())
    }

    fn receive_dump<M: NetlinkDeserializable + Debug>(&mut self) -> Result<Dump<M>> {
        let (mut answer, mut interrupted) = (Vec::new(), false);
        loop {
            for message in self.receive()? {
                let message = match message {
                    Ok(message) => message,
                    // One object that the packet library does not understand does not hide the others.
                    Err(error) => {
                        debug!("netlink: {error:#}");
                        continue;
                    }
                };
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => answer.push(inner),
                    NetlinkPayload::Done(_) if interrupted => return Ok(Dump::Interrupted),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code).into());
                    }
                    NetlinkPayload::Done(_) => return Ok(Dump::Consistent(answer)),
                    NetlinkPayload::Error(error) => return Err(error.to_io().into()),
                    _ => {}
                }
            }
        }
    }

    /// The messages of one datagram that answer the last request.
    fn receive<M: NetlinkDeserializable + Debug>(
        &mut self,
    ) -> Result<Vec<Result<NetlinkMessage<M>>>> {
        let (datagram, _) = self
            .socket
            .recv_from_full()
            .context("cannot receive from netlink")?;
        Ok(messages(&datagram)
            .filter(|bytes| sequence_number(bytes) == Some(self.sequence))
            .map(|bytes| {
                NetlinkMessage::deserialize(bytes)
                    .context("the kernel sent a message that is not understood")
            })
            .collect())
    }
}

/// The messages of a datagram, each with its header.
fn messages(datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let message = rest.get(..length).filter(|message| message.len() >= 16)?;
        rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or_default();
        Some(message)
    })
}

/// What the kernel says about a refusal: it follows the refused message, of which there may be the header alone.
fn words(flags: u16, payload: &[u8]) -> String {
    const HAS_ATTRIBUTES: u16 = 0x200;
    const IS_HEADER_ALONE: u16 = 0x100;
    const HEADER: usize = 16;
    const MESSAGE: u16 = 1;
    let refused = match payload
        .first_chunk()
        .map(|bytes| u32::from_ne_bytes(*bytes))
    {
        Some(length) if flags & IS_HEADER_ALONE == 0 => length as usize,
        Some(_) | None => HEADER,
    };
    let attributes = payload
        .get(refused.next_multiple_of(ALIGNMENT)..)
        .filter(|_| flags & HAS_ATTRIBUTES != 0)
        .unwrap_or_default();
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == MESSAGE)
        .and_then(|attribute| parse_string(attribute.value()).ok())
        .unwrap_or_default()
}

fn sequence_number(message: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(message.get(8..12)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_follow_the_refused_message() {
        let refused = [&20_u32.to_ne_bytes()[..], &[0; 16]].concat();
        let said = [&[8, 0, 1, 0][..], b"why\0"].concat();
        let payload = |refused: &[u8]| [refused, &said].concat();
        for (flags, payload, expected) in [
            (0x200, payload(&refused), "why"),
            (0x300, payload(&refused[..16]), "why"),
            (0, payload(&refused), ""),
            (0x200, refused.clone(), ""),
            (0x200, Vec::new(), ""),
        ] {
            assert_eq!(words(flags, &payload), expected, "{flags:x} {payload:?}");
        }
    }

    #[test]
    fn a_datagram_is_cut_into_its_messages() {
        let message = |length: u32, fill: u8| {
            let mut bytes = vec![fill; length as usize];
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            bytes
        };
        let (first, second) = (message(18, 1), message(16, 2));
        let mut datagram = first.clone();
        datagram.extend([0, 0]);
        datagram.extend(&second);
        assert_eq!(
            messages(&datagram).collect::<Vec<_>>(),
            [&first[..], &second[..]]
        );
        // Cut short: nothing is made up.
        assert_eq!(messages(&datagram[..30]).count(), 1);
        assert_eq!(messages(&message(8, 3)).count(), 0);
    }
}
