//! The packets that are tried, and what has become of them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use etherparse::{
    Icmpv4Type, Icmpv6Type, InternetSlice, PacketBuilder, SlicedPacket, TcpOptionElement,
    TransportSlice,
};
use portfwd_common::abi::{LinkLayer, Protocol, rule::ECHO_PORT};

/// What a packet does in its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// It opens one.
    Opens,
    /// It accepts one.
    Accepts,
    /// It belongs to one.
    Belongs,
}

/// A packet. Of echo, the side that asks has its identifier in the place of the port, the other one [`ECHO_PORT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub protocol: Protocol,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub part: Part,
}

/// A packet as it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Departed {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Bytes of data that whoever sent it takes in a segment, if it says so.
    pub segment_size: Option<u16>,
    /// Destination of the frame, if it is one.
    pub mac: Option<[u8; 6]>,
}

const HOP_LIMIT: u8 = 64;
const WINDOW: u16 = 64_240;
/// A MAC address that nobody has: where the frames come from does not matter.
const ANY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
const PAYLOAD: &[u8] = b"portfwd explain";

impl Packet {
    /// The bytes, in a frame to `mac` where the link has frames.
    pub fn bytes(&self, layer: LinkLayer, mac: [u8; 6]) -> Result<Vec<u8>> {
        let (source, destination) = (self.source.ip(), self.destination.ip());
        let step = match (layer, source, destination) {
            (LinkLayer::Ethernet, IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ethernet2(ANY_MAC, mac).ipv4(
                    source.octets(),
                    destination.octets(),
                    HOP_LIMIT,
                )
            }
            (LinkLayer::Raw, IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), HOP_LIMIT)
            }
            (LinkLayer::Ethernet, source, destination) => PacketBuilder::ethernet2(ANY_MAC, mac)
                .ipv6(octets(source), octets(destination), HOP_LIMIT),
            (LinkLayer::Raw, source, destination) => {
                PacketBuilder::ipv6(octets(source), octets(destination), HOP_LIMIT)
            }
        };
        let (from, to) = (self.source.port(), self.destination.port());
        let mut bytes = Vec::new();
        // As a host behind Ethernet says it.
        let options = [TcpOptionElement::MaximumSegmentSize(match source {
            IpAddr::V4(_) => 1460,
            IpAddr::V6(_) => 1440,
        })];
        let opens = |step: etherparse::PacketBuilderStep<etherparse::TcpHeader>| {
            step.syn()
                .options(&options)
                .context("cannot make a packet to try")
        };
        let written = match (self.protocol, self.part) {
            (Protocol::Echo, _) => match (source, to == ECHO_PORT) {
                (IpAddr::V4(_), true) => {
                    step.icmpv4_echo_request(from, 1).write(&mut bytes, PAYLOAD)
                }
                (IpAddr::V4(_), false) => step.icmpv4_echo_reply(to, 1).write(&mut bytes, PAYLOAD),
                (IpAddr::V6(_), true) => {
                    step.icmpv6_echo_request(from, 1).write(&mut bytes, PAYLOAD)
                }
                (IpAddr::V6(_), false) => step.icmpv6_echo_reply(to, 1).write(&mut bytes, PAYLOAD),
            },
            (Protocol::Udp, _) => step.udp(from, to).write(&mut bytes, PAYLOAD),
            (Protocol::Tcp, Part::Opens) => {
                opens(step.tcp(from, to, 1, WINDOW))?.write(&mut bytes, &[])
            }
            (Protocol::Tcp, Part::Accepts) => {
                opens(step.tcp(from, to, 1, WINDOW).ack(2))?.write(&mut bytes, &[])
            }
            (Protocol::Tcp, Part::Belongs) => {
                step.tcp(from, to, 2, WINDOW).ack(2).write(&mut bytes, &[])
            }
        };
        written.context("cannot make a packet to try")?;
        Ok(bytes)
    }
}

fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

impl Departed {
    /// Reads what a program left of a packet of `length` bytes that came in over such a link.
    pub fn read(bytes: &[u8], layer: LinkLayer, length: usize) -> Option<Self> {
        // A packet without link header that leaves by Ethernet has been given one.
        let is_frame = layer == LinkLayer::Ethernet || bytes.len() > length;
        let sliced = if is_frame {
            SlicedPacket::from_ethernet(bytes)
        } else {
            SlicedPacket::from_ip(bytes)
        };
        let sliced = sliced.ok()?;
        let (source, destination) = match sliced.net.as_ref()? {
            InternetSlice::Ipv4(ip) => (
                IpAddr::from(ip.header().source_addr()),
                IpAddr::from(ip.header().destination_addr()),
            ),
            InternetSlice::Ipv6(ip) => (
                IpAddr::from(ip.header().source_addr()),
                IpAddr::from(ip.header().destination_addr()),
            ),
            InternetSlice::Arp(_) => return None,
        };
        let (from, to, segment_size) = match sliced.transport.as_ref()? {
            TransportSlice::Tcp(tcp) => {
                let size = tcp.options_iterator().find_map(|option| match option {
                    Ok(TcpOptionElement::MaximumSegmentSize(size)) => Some(size),
                    Ok(_) | Err(_) => None,
                });
                (tcp.source_port(), tcp.destination_port(), size)
            }
            TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port(), None),
            TransportSlice::Icmpv4(icmp) => {
                let kind = icmp.icmp_type();
                if let Icmpv4Type::EchoRequest(echo) = kind {
                    (echo.id, ECHO_PORT, None)
                } else if let Icmpv4Type::EchoReply(echo) = kind {
                    (ECHO_PORT, echo.id, None)
                } else {
                    return None;
                }
            }
            TransportSlice::Icmpv6(icmp) => {
                let kind = icmp.icmp_type();
                if let Icmpv6Type::EchoRequest(echo) = kind {
                    (echo.id, ECHO_PORT, None)
                } else if let Icmpv6Type::EchoReply(echo) = kind {
                    (ECHO_PORT, echo.id, None)
                } else {
                    return None;
                }
            }
            TransportSlice::Igmp(_) => return None,
        };
        Some(Self {
            source: SocketAddr::new(source, from),
            destination: SocketAddr::new(destination, to),
            segment_size,
            mac: bytes
                .get(..6)
                .filter(|_| is_frame)
                .and_then(|mac| mac.try_into().ok()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_read_again() {
        for (source, destination) in [
            ("192.0.2.1:40000", "203.0.113.1:80"),
            ("[2001:db8::1]:40000", "[2001:db8::2]:80"),
            ("192.0.2.1:40000", "203.0.113.1:0"),
            ("[2001:db8::1]:0", "[2001:db8::2]:40000"),
        ] {
            let (source, destination): (SocketAddr, SocketAddr) =
                (source.parse().unwrap(), destination.parse().unwrap());
            let is_echo = source.port().min(destination.port()) == ECHO_PORT;
            let protocols = Protocol::ALL.into_iter();
            for protocol in protocols.filter(|of| (*of == Protocol::Echo) == is_echo) {
                for part in [Part::Opens, Part::Accepts, Part::Belongs] {
                    let packet = Packet {
                        protocol,
                        source,
                        destination,
                        part,
                    };
                    let frame = packet.bytes(LinkLayer::Ethernet, [7; 6]).unwrap();
                    let read = Departed::read(&frame, LinkLayer::Ethernet, frame.len()).unwrap();
                    assert_eq!(
                        (read.source, read.destination, read.mac),
                        (packet.source, packet.destination, Some([7; 6]))
                    );
                    let raw = packet.bytes(LinkLayer::Raw, [7; 6]).unwrap();
                    assert_eq!(&frame[14..], raw);
                    let opens = part != Part::Belongs && protocol == Protocol::Tcp;
                    assert_eq!(read.segment_size.is_some(), opens);
                    let read = Departed::read(&raw, LinkLayer::Raw, raw.len()).unwrap();
                    assert_eq!((read.source, read.mac), (packet.source, None));
                    // Given a link header on its way.
                    let read = Departed::read(&frame, LinkLayer::Raw, raw.len()).unwrap();
                    assert_eq!(read.mac, Some([7; 6]));
                }
            }
        }
    }
}
