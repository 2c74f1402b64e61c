//! Frames, built and summed by etherparse, which knows nothing of the code under test.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, Ipv4Header,
    Ipv6Header, TcpHeader, UdpHeader,
};

use crate::net::headers::{ETHERNET_LEN, MacWords};

/// A MAC address as on the wire.
pub type Mac = [u8; 6];

/// Bytes of a transport header without its payload that an ICMP error quotes at least.
pub const QUOTED_TRANSPORT: usize = 8;

/// What a packet carries above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP with this flags byte.
    Tcp(u8),
    /// UDP.
    Udp,
    /// UDP without a checksum.
    UdpWithoutSum,
    /// ICMP echo: a request from the port that is its identifier to port 0, or a reply from port 0 to that.
    Echo,
}

/// A TCP, UDP or echo packet that is to be built. Everything not named here is filled in with values that differ from zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Source endpoint.
    pub source: SocketAddr,
    /// Destination endpoint, of the same family.
    pub destination: SocketAddr,
    /// What it carries above IP.
    pub transport: Transport,
    /// TCP sequence number; of echo its lower half.
    pub sequence: u32,
    /// TCP acknowledgement number.
    pub acknowledgement: u32,
    /// TCP window.
    pub window: u16,
    /// The ninth TCP flag, which the flags byte has no room for: AE (RFC 9768), once NS (RFC 3540).
    pub accurate_ecn: bool,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// IPv4 "do not fragment".
    pub dont_fragment: bool,
    /// IPv4 options, a multiple of four bytes, at most 40.
    pub ip_options: Vec<u8>,
    /// TCP options, a multiple of four bytes, at most 40.
    pub tcp_options: Vec<u8>,
    /// What the transport carries.
    pub payload: Vec<u8>,
}

impl Draft {
    /// A TCP segment.
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        Self {
            source,
            destination,
            transport: Transport::Tcp(flags),
            sequence: 0x1234_5678,
            // Both sides are where the other expects them, if both send this.
            acknowledgement: 0x1234_5678,
            window: 0x2345,
            accurate_ecn: false,
            hop_limit: 64,
            dont_fragment: true,
            ip_options: Vec::new(),
            tcp_options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// A UDP datagram.
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            transport: Transport::Udp,
            payload: b"datagram".to_vec(),
            ..Self::tcp(source, destination, 0)
        }
    }

    /// An echo request, with an identifier.
    pub fn echo(source: IpAddr, identifier: u16, destination: IpAddr) -> Self {
        Self {
            transport: Transport::Echo,
            ..Self::udp(
                SocketAddr::new(source, identifier),
                SocketAddr::new(destination, 0),
            )
        }
    }

    /// The same with other TCP numbers.
    #[must_use]
    pub fn numbers(self, sequence: u32, acknowledgement: u32) -> Self {
        Self {
            sequence,
            acknowledgement,
            ..self
        }
    }

    /// The same with another payload.
    #[must_use]
    pub fn payload(self, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            payload: payload.into(),
            ..self
        }
    }

    /// The same with another TTL or hop limit.
    #[must_use]
    pub fn hop_limit(self, hop_limit: u8) -> Self {
        Self { hop_limit, ..self }
    }

    /// The same from somewhere else to somewhere else.
    #[must_use]
    pub fn between(&self, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            source,
            destination,
            ..self.clone()
        }
    }

    /// The same after a router.
    #[must_use]
    pub fn hop(self) -> Self {
        let hop_limit = self.hop_limit.wrapping_sub(1);
        Self { hop_limit, ..self }
    }

    /// The IP packet.
    pub fn packet(&self) -> Vec<u8> {
        let (source, destination) = (self.source.ip(), self.destination.ip());
        let transport = self.transport_bytes();
        let protocol = match self.transport {
            Transport::Tcp(_) => IpNumber::TCP,
            Transport::Udp | Transport::UdpWithoutSum => IpNumber::UDP,
            Transport::Echo if source.is_ipv4() => IpNumber::ICMP,
            Transport::Echo => IpNumber::IPV6_ICMP,
        };
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = ipv4(
                    source.octets(),
                    destination.octets(),
                    protocol,
                    transport.len(),
                );
                header.time_to_live = self.hop_limit;
                header.dont_fragment = self.dont_fragment;
                header.options = self
                    .ip_options
                    .as_slice()
                    .try_into()
                    .expect("options are a multiple of four bytes, at most 40");
                header.total_len += self.ip_options.len() as u16;
                finish_ipv4(header, &transport)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut header = ipv6(
                    source.octets(),
                    destination.octets(),
                    protocol,
                    transport.len(),
                );
                header.hop_limit = self.hop_limit;
                [&header.to_bytes()[..], &transport].concat()
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                panic!("{source} and {destination} are of two families")
            }
        }
    }

    /// Length of the IP packet's headers, bytes.
    pub fn headers_len(&self) -> usize {
        self.packet().len() - self.payload.len()
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let header: Vec<u8> = match self.transport {
            Transport::Tcp(flags) => self.tcp_header(flags),
            Transport::Udp => self.udp_header(),
            Transport::UdpWithoutSum => {
                let mut header = self.udp_header();
                header[6..].fill(0);
                header
            }
            Transport::Echo => self.echo_header(),
        };
        [&header[..], &self.payload].concat()
    }

    fn tcp_header(&self, flags: u8) -> Vec<u8> {
        let mut header = TcpHeader::new(
            self.source.port(),
            self.destination.port(),
            self.sequence,
            self.window,
        );
        let is_set = |bit: u8| flags & (1 << bit) != 0;
        (header.fin, header.syn, header.rst, header.psh) =
            (is_set(0), is_set(1), is_set(2), is_set(3));
        (header.ack, header.urg, header.ece, header.cwr) =
            (is_set(4), is_set(5), is_set(6), is_set(7));
        header.ns = self.accurate_ecn;
        header.acknowledgment_number = self.acknowledgement;
        header.urgent_pointer = 0x0102;
        header
            .set_options_raw(&self.tcp_options)
            .expect("options are a multiple of four bytes, at most 40");
        header.checksum = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), &self.payload)
            }
            (source, destination) => {
                header.calc_checksum_ipv4_raw(octets(source), octets(destination), &self.payload)
            }
        }
        .expect("the segment fits into a packet");
        header.to_bytes().to_vec()
    }

    fn echo_header(&self) -> Vec<u8> {
        let echo = IcmpEchoHeader {
            id: self.source.port() | self.destination.port(),
            seq: self.sequence as u16,
        };
        let asks = self.destination.port() == 0;
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let kind = if asks {
                    Icmpv6Type::EchoRequest(echo)
                } else {
                    Icmpv6Type::EchoReply(echo)
                };
                let (source, destination) = (source.octets(), destination.octets());
                Icmpv6Header::with_checksum(kind, source, destination, &self.payload)
                    .expect("the message fits into a packet")
                    .to_bytes()
                    .to_vec()
            }
            (IpAddr::V4(_) | IpAddr::V6(_), _) => {
                let kind = if asks {
                    Icmpv4Type::EchoRequest(echo)
                } else {
                    Icmpv4Type::EchoReply(echo)
                };
                Icmpv4Header::with_checksum(kind, &self.payload)
                    .to_bytes()
                    .to_vec()
            }
        }
    }

    fn udp_header(&self) -> Vec<u8> {
        let mut header = UdpHeader {
            source_port: self.source.port(),
            destination_port: self.destination.port(),
            length: (UdpHeader::LEN + self.payload.len()) as u16,
            checksum: 0,
        };
        header.checksum = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), &self.payload)
            }
            (source, destination) => {
                header.calc_checksum_ipv4_raw(octets(source), octets(destination), &self.payload)
            }
        }
        .expect("the datagram fits into a packet");
        header.to_bytes().to_vec()
    }
}

/// An ICMP or ICMPv6 error as an IP packet. `rest` is what follows the checksum: MTU, pointer or length.
pub fn error(
    source: IpAddr,
    destination: IpAddr,
    kind: u8,
    code: u8,
    rest: [u8; 4],
    quoted: &[u8],
) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let kind = Icmpv4Type::Unknown {
                type_u8: kind,
                code_u8: code,
                bytes5to8: rest,
            };
            let icmp = Icmpv4Header::with_checksum(kind, quoted).to_bytes();
            let message = [&icmp[..], quoted].concat();
            let header = ipv4(
                source.octets(),
                destination.octets(),
                IpNumber::ICMP,
                message.len(),
            );
            finish_ipv4(header, &message)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let kind = Icmpv6Type::Unknown {
                type_u8: kind,
                code_u8: code,
                bytes5to8: rest,
            };
            let icmp =
                Icmpv6Header::with_checksum(kind, source.octets(), destination.octets(), quoted)
                    .expect("the error fits into a packet")
                    .to_bytes();
            let message = [&icmp[..], quoted].concat();
            let header = ipv6(
                source.octets(),
                destination.octets(),
                IpNumber::IPV6_ICMP,
                message.len(),
            );
            [&header.to_bytes()[..], &message].concat()
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            panic!("{source} and {destination} are of two families")
        }
    }
}

/// An IP packet in fragments that carry at most `size` bytes, a multiple of eight. Over IPv6 their header is the last extension
/// header; `behind` is how many bytes of extension headers stay in front of it.
pub fn fragments(packet: &[u8], id: u32, size: usize, behind: usize) -> Vec<Vec<u8>> {
    let (head, payload) = if packet[0] >> 4 == 4 {
        packet.split_at(usize::from(packet[0] & 0xf) * 4)
    } else {
        packet.split_at(IPV6_LEN + behind)
    };
    let count = payload.len().div_ceil(size);
    let last = count.saturating_sub(1);
    (0..count)
        .zip(payload.chunks(size))
        .map(|(number, part)| fragment(head, id, number * size / 8, number < last, part))
        .collect()
}

const IPV6_LEN: usize = 40;

/// A fragment: the headers in front of it, where it begins in units of eight bytes, whether others follow, and what it carries.
pub fn fragment(head: &[u8], id: u32, offset: usize, more: bool, part: &[u8]) -> Vec<u8> {
    if head[0] >> 4 == 4 {
        let (mut header, _) = Ipv4Header::from_slice(head).expect("an IPv4 header");
        header.identification = id as u16;
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = (offset as u16).try_into().expect("thirteen bits");
        header.total_len = (head.len() + part.len()) as u16;
        return finish_ipv4(header, part);
    }
    // The next header is named in the last one before this: the fixed header, or an options header of eight bytes.
    let mut head = head.to_vec();
    let name = if head.len() == IPV6_LEN {
        6
    } else {
        head.len() - 8
    };
    let next = std::mem::replace(&mut head[name], IpNumber::IPV6_FRAGMENTATION_HEADER.0);
    let field = (offset << 3) as u16 | u16::from(more);
    let length = (head.len() - IPV6_LEN + 8 + part.len()) as u16;
    head[4..6].copy_from_slice(&length.to_be_bytes());
    head.extend([next, 0]);
    head.extend(field.to_be_bytes());
    head.extend(id.to_be_bytes());
    head.extend(part);
    head
}

/// An IPv6 packet with an options header of eight bytes (hop-by-hop 0, destination options 60) behind its header.
pub fn with_options(packet: &[u8], kind: u8) -> Vec<u8> {
    let mut out = packet[..IPV6_LEN].to_vec();
    let next = std::mem::replace(&mut out[6], kind);
    let length = (packet.len() - IPV6_LEN + 8) as u16;
    out[4..6].copy_from_slice(&length.to_be_bytes());
    // One option of six bytes: padding.
    out.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    out.extend(&packet[IPV6_LEN..]);
    out
}

/// A MAC address as packet memory has it.
pub fn mac_words(mac: Mac) -> MacWords {
    bytemuck::cast(mac)
}

/// The packet after a router that changes nothing else.
pub fn after_hop(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        let (mut header, payload) = Ipv4Header::from_slice(&packet).expect("an IPv4 header");
        let payload = payload.to_vec();
        header.time_to_live = header.time_to_live.wrapping_sub(1);
        finish_ipv4(header, &payload)
    } else {
        packet[7] = packet[7].wrapping_sub(1);
        packet
    }
}

/// A packet in an Ethernet frame.
pub fn ethernet(destination: Mac, source: Mac, packet: &[u8]) -> Vec<u8> {
    let ethertype: [u8; 2] = if packet.first().is_some_and(|byte| byte >> 4 == 4) {
        [0x08, 0x00]
    } else {
        [0x86, 0xdd]
    };
    let mut frame = Vec::with_capacity(ETHERNET_LEN + packet.len());
    frame.extend(destination);
    frame.extend(source);
    frame.extend(ethertype);
    frame.extend(packet);
    frame
}

fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => panic!("{address} is not an IPv4 address"),
    }
}

fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: IpNumber, payload: usize) -> Ipv4Header {
    let mut header = Ipv4Header::new(payload as u16, 64, protocol, source, destination)
        .expect("the payload fits into a packet");
    header.identification = 0x4321;
    header.dscp = 10.try_into().expect("six bits");
    header
}

fn finish_ipv4(mut header: Ipv4Header, payload: &[u8]) -> Vec<u8> {
    header.header_checksum = header.calc_header_checksum();
    [&header.to_bytes()[..], payload].concat()
}

fn ipv6(source: [u8; 16], destination: [u8; 16], protocol: IpNumber, payload: usize) -> Ipv6Header {
    Ipv6Header {
        traffic_class: 0x28,
        flow_label: 0x1_2345.try_into().expect("twenty bits"),
        payload_length: payload as u16,
        next_header: protocol,
        hop_limit: 64,
        source,
        destination,
    }
}
