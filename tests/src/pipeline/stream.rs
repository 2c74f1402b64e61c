//! What a generator sends: frames of many flows that differ in the client's address and port only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};

use crate::address::{Family, GATEWAY_WAN, SERVER};
use crate::link::End;

/// Words of the longest headers: Ethernet, IPv6, TCP.
pub const MOST_WORDS: usize = 37;
/// The shortest frame that Ethernet carries, without its check sequence.
pub const SHORTEST: usize = 60;

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A transport, with what a frame of it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A datagram.
    Udp,
    /// A segment.
    Tcp(Segment),
}

/// What a TCP segment says of its connection. Every flow of a stream says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Byte 13 of the header.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
}

impl Segment {
    /// A client's first segment.
    pub const SYN: Self = Self {
        flags: 0x02,
        sequence: 1_000,
        acknowledgement: 0,
    };
    /// The server's answer to it.
    pub const SYN_ACK: Self = Self {
        flags: 0x12,
        sequence: 5_000,
        acknowledgement: 1_001,
    };
    /// The client's answer to that, and all that it sends afterwards.
    pub const CLIENT_ACK: Self = Self {
        flags: 0x10,
        sequence: 1_001,
        acknowledgement: 5_001,
    };
    /// What the server sends afterwards.
    pub const SERVER_ACK: Self = Self {
        flags: 0x10,
        sequence: 5_001,
        acknowledgement: 1_001,
    };
}

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heading {
    /// From clients.
    ToTarget,
    /// From the server.
    ToClient,
}

/// A stream of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// IPv4 or IPv6.
    pub family: Family,
    /// UDP or TCP.
    pub transport: Transport,
    /// Which way.
    pub heading: Heading,
    /// Bytes of a frame without its check sequence; less than the headers need is taken as that.
    pub frame: usize,
    /// The endpoint that is not the client's: what clients dial, or what the server sends from.
    pub endpoint: (IpAddr, u16),
}

/// Clients have the addresses `10.77.0.0/16` and `2001:db8:77::/112`, which the lab routes to its client.
const CLIENTS_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 0);
const CLIENTS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 0);

/// The clients' networks, as `ip route` takes them.
pub fn client_networks() -> [(Family, String); 2] {
    [
        (Family::V4, format!("{CLIENTS_V4}/16")),
        (Family::V6, format!("{CLIENTS_V6}/112")),
    ]
}

impl Stream {
    /// Datagrams in the shortest frames to a port of the gateway, over IPv4.
    pub fn to_gateway(port: u16) -> Self {
        Self {
            family: Family::V4,
            transport: Transport::Udp,
            heading: Heading::ToTarget,
            frame: SHORTEST,
            endpoint: (GATEWAY_WAN.v4.into(), port),
        }
    }

    /// The same over another family.
    #[must_use]
    pub fn over(self, family: Family) -> Self {
        let address = match (family, self.heading) {
            (Family::V4, Heading::ToTarget) => GATEWAY_WAN.v4.into(),
            (Family::V6, Heading::ToTarget) => GATEWAY_WAN.v6.into(),
            (Family::V4, Heading::ToClient) => SERVER.v4.into(),
            (Family::V6, Heading::ToClient) => SERVER.v6.into(),
        };
        Self {
            family,
            endpoint: (address, self.endpoint.1),
            ..self
        }
    }

    /// The same over another transport.
    #[must_use]
    pub fn of(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    /// The same in frames of another size.
    #[must_use]
    pub fn in_frames(self, frame: usize) -> Self {
        Self { frame, ..self }
    }

    /// What the server answers from `port`.
    #[must_use]
    pub fn answered_from(self, port: u16) -> Self {
        let answer = Self {
            heading: Heading::ToClient,
            endpoint: (self.endpoint.0, port),
            ..self
        };
        answer.over(self.family)
    }

    /// The same to an address that the gateway only routes.
    #[must_use]
    pub fn routed_to(self, address: IpAddr, port: u16) -> Self {
        Self {
            endpoint: (address, port),
            ..self
        }
    }

    /// The generator's program.
    pub fn program(&self) -> &'static str {
        match (self.family, self.transport, self.heading) {
            (Family::V4, Transport::Udp, Heading::ToTarget) => "lab_udp4",
            (Family::V4, Transport::Tcp(_), Heading::ToTarget) => "lab_tcp4",
            (Family::V6, Transport::Udp, Heading::ToTarget) => "lab_udp6",
            (Family::V6, Transport::Tcp(_), Heading::ToTarget) => "lab_tcp6",
            (Family::V4, Transport::Udp, Heading::ToClient) => "lab_udp4_back",
            (Family::V4, Transport::Tcp(_), Heading::ToClient) => "lab_tcp4_back",
            (Family::V6, Transport::Udp, Heading::ToClient) => "lab_udp6_back",
            (Family::V6, Transport::Tcp(_), Heading::ToClient) => "lab_tcp6_back",
        }
    }

    /// Bytes of a frame, at least its headers.
    pub fn frame_len(&self) -> usize {
        self.frame.max(SHORTEST).max(self.headers_len())
    }

    fn headers_len(&self) -> usize {
        ETHERNET + self.network_len() + self.transport_len()
    }

    fn network_len(&self) -> usize {
        match self.family {
            Family::V4 => 20,
            Family::V6 => 40,
        }
    }

    fn transport_len(&self) -> usize {
        match self.transport {
            Transport::Udp => 8,
            Transport::Tcp(_) => 20,
        }
    }

    /// The headers of a frame that `sender` sends to `receiver`, with the low half of the client's address and its port 0, in
    /// the sums too. What is behind them is zeros.
    ///
    /// # Errors
    /// If an endpoint's address is of the other family, or an interface has no MAC address.
    pub fn template(&self, sender: End<'_>, receiver: End<'_>) -> Result<[u16; MOST_WORDS]> {
        let (address, port) = self.endpoint;
        ensure!(
            Family::of(address) == self.family,
            "{address} is not {}",
            self.family
        );
        let client: IpAddr = match self.family {
            Family::V4 => CLIENTS_V4.into(),
            Family::V6 => CLIENTS_V6.into(),
        };
        let (src, dst, ports) = match self.heading {
            Heading::ToTarget => (client, address, [0, port]),
            Heading::ToClient => (address, client, [port, 0]),
        };
        let payload = (self.frame_len() - ETHERNET - self.network_len()) as u16;
        let mut bytes = Vec::with_capacity(2 * MOST_WORDS);
        bytes.extend(receiver.mac()?);
        bytes.extend(sender.mac()?);
        let network = self.network_header(src, dst, payload);
        bytes.extend(match self.family {
            Family::V4 => [0x08, 0x00],
            Family::V6 => [0x86, 0xdd],
        });
        bytes.extend(&network);
        bytes.extend(self.transport_header(src, dst, ports, payload));
        bytes.resize(2 * MOST_WORDS, 0);
        let words: Vec<u16> = bytes
            .chunks_exact(2)
            .map(|pair| u16::from_ne_bytes([pair[0], pair[1]]))
            .collect();
        words.try_into().ok().context("headers are too long")
    }

    fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Udp => UDP,
            Transport::Tcp(_) => TCP,
        }
    }

    fn network_header(&self, src: IpAddr, dst: IpAddr, payload: u16) -> Vec<u8> {
        let mut header = match self.family {
            Family::V4 => {
                let [high, low] = (payload + 20).to_be_bytes();
                vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, self.protocol(), 0, 0]
            }
            Family::V6 => {
                let [high, low] = payload.to_be_bytes();
                vec![0x60, 0, 0, 0, high, low, self.protocol(), 64]
            }
        };
        header.extend(octets(src));
        header.extend(octets(dst));
        if self.family == Family::V4 {
            let sum = header_sum(&header, 0);
            header[10..12].copy_from_slice(&sum);
        }
        header
    }

    fn transport_header(&self, src: IpAddr, dst: IpAddr, ports: [u16; 2], length: u16) -> Vec<u8> {
        let mut header: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        let sum_at = match self.transport {
            Transport::Udp => {
                header.extend(length.to_be_bytes());
                header.extend([0, 0]);
                6
            }
            Transport::Tcp(Segment {
                flags,
                sequence,
                acknowledgement,
            }) => {
                header.extend(sequence.to_be_bytes());
                header.extend(acknowledgement.to_be_bytes());
                header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
                16
            }
        };
        let mut summed = octets(src);
        summed.extend(octets(dst));
        summed.extend(&header);
        let sum = header_sum(&summed, u32::from(length) + u32::from(self.protocol()));
        header[sum_at..sum_at + 2].copy_from_slice(&sum);
        header
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn header_sum(bytes: &[u8], extra: u32) -> [u8; 2] {
    let mut sum = extra;
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!(sum as u16)).to_be_bytes()
}
