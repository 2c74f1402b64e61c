//! What the kernel's connection tracking knows: connections of the gateway itself, and those that it translates.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlaBuffer, NlasIterator,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use portfwd_common::abi::Protocol;

use super::Requester;

/// A direction of a connection, as its packets carry it before the gateway translates them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// From where.
    pub source: SocketAddr,
    /// To where.
    pub destination: SocketAddr,
}

/// Messages of the connection tracking (`NFNL_SUBSYS_CTNETLINK`); there is no packet library that reads them.
#[derive(Clone, Debug)]
enum Message {
    /// Asks for all connections.
    Question,
    /// A connection: both its directions, as far as they are TCP or UDP.
    Answer(Vec<Tuple>),
}

/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_GET`.
const GET: u16 = 1 << 8 | 1;
/// `struct nfgenmsg`: family, version, resource.
const HEADER: usize = 4;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_ADDRESSES: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;

/// Both directions of every TCP and UDP connection that the kernel tracks, of either family. An empty list where it tracks none.
pub fn tuples() -> Result<Vec<Tuple>> {
    let mut requester = Requester::open(NETLINK_NETFILTER)?;
    let answer = requester
        .dump(Message::Question)
        .context("cannot list the connections that the kernel tracks")?;
    let tuples = answer.into_iter().flat_map(|message| match message {
        Message::Question => Vec::new(),
        Message::Answer(tuples) => tuples,
    });
    Ok(tuples.collect())
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        GET
    }

    fn buffer_len(&self) -> usize {
        HEADER
    }

    /// All zeroes: either family, version 0.
    fn serialize(&self, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut tuples = Vec::new();
        for attribute in NlasIterator::new(payload.get(HEADER..).unwrap_or_default()) {
            let attribute = attribute?;
            if matches!(attribute.kind(), TUPLE_ORIGINAL | TUPLE_REPLY) {
                tuples.extend(tuple(attribute.value())?);
            }
        }
        Ok(Self::Answer(tuples))
    }
}

/// A direction; `None` for a protocol without ports.
fn tuple(bytes: &[u8]) -> Result<Option<Tuple>, DecodeError> {
    let (mut addresses, mut protocol, mut ports) = (Vec::new(), None, [None; 2]);
    for part in NlasIterator::new(bytes) {
        let part = part?;
        match part.kind() {
            // The source comes before the destination, whatever the family.
            TUPLE_ADDRESSES => {
                for address in NlasIterator::new(part.value()) {
                    addresses.extend(ip(&address?));
                }
            }
            TUPLE_PROTOCOL => {
                for field in NlasIterator::new(part.value()) {
                    let field = field?;
                    match field.kind() {
                        PROTOCOL_NUMBER => protocol = field.value().first().copied(),
                        SOURCE_PORT => ports[0] = port(field.value()),
                        DESTINATION_PORT => ports[1] = port(field.value()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let protocol = protocol.and_then(Protocol::with_ports);
    let (Some(protocol), &[source, destination], [Some(from), Some(to)]) =
        (protocol, addresses.as_slice(), ports)
    else {
        return Ok(None);
    };
    Ok(Some(Tuple {
        protocol,
        source: SocketAddr::new(source, from),
        destination: SocketAddr::new(destination, to),
    }))
}

fn ip(attribute: &NlaBuffer<&[u8]>) -> Option<IpAddr> {
    let bytes = attribute.value();
    let v4 = || <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
    let v6 = || <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into());
    v4().or_else(|_| v6()).ok()
}

fn port(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attribute, padded; nested ones are marked as such.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (value.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
        attribute(kind | 1 << 15, &parts.concat())
    }

    fn direction(kind: u16, addresses: [&[u8]; 2], protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let [source, destination] = addresses;
        let base = if source.len() == 4 { 1 } else { 3 };
        nested(
            kind,
            &[
                nested(
                    TUPLE_ADDRESSES,
                    &[attribute(base, source), attribute(base + 1, destination)],
                ),
                nested(
                    TUPLE_PROTOCOL,
                    &[
                        attribute(PROTOCOL_NUMBER, &[protocol]),
                        attribute(SOURCE_PORT, &ports[0].to_be_bytes()),
                        attribute(DESTINATION_PORT, &ports[1].to_be_bytes()),
                    ],
                ),
            ],
        )
    }

    fn read(attributes: &[Vec<u8>]) -> Vec<Tuple> {
        let mut payload = vec![2, 0, 0, 0];
        payload.extend(attributes.concat());
        match Message::deserialize(&NetlinkHeader::default(), &payload).unwrap() {
            Message::Answer(tuples) => tuples,
            Message::Question => panic!("a question"),
        }
    }

    #[test]
    fn both_directions_of_a_masqueraded_connection_are_read() {
        let (lan, wan, server) = ([10, 0, 0, 2], [203, 0, 113, 1], [198, 51, 100, 7]);
        let tuples = read(&[
            direction(TUPLE_ORIGINAL, [&lan, &server], 17, [5000, 53]),
            direction(TUPLE_REPLY, [&server, &wan], 17, [53, 5001]),
            // Status, which nobody asks for.
            attribute(3, &[0, 0, 1, 0x8e]),
        ]);
        let words: Vec<_> = tuples
            .iter()
            .map(|t| format!("{:?} {} {}", t.protocol, t.source, t.destination))
            .collect();
        assert_eq!(
            words,
            [
                "Udp 10.0.0.2:5000 198.51.100.7:53",
                "Udp 198.51.100.7:53 203.0.113.1:5001"
            ]
        );
    }

    #[test]
    fn what_has_no_ports_is_skipped_and_what_is_cut_short_is_refused() {
        let (one, other) = ([0x20; 16], [0x21; 16]);
        assert_eq!(
            read(&[direction(TUPLE_ORIGINAL, [&one, &other], 58, [1, 1])]),
            []
        );
        assert_eq!(
            read(&[direction(TUPLE_ORIGINAL, [&one, &other], 6, [1, 2])]).len(),
            1
        );
        let mut payload = vec![2, 0, 0, 0];
        payload.extend(&direction(TUPLE_ORIGINAL, [&one, &other], 6, [1, 2])[..30]);
        Message::deserialize(&NetlinkHeader::default(), &payload).unwrap_err();
        assert_eq!(read(&[]), []);
    }
}
