//! What a packet is: the first step, which says what it saw and decides nothing else.

use network_types::eth::EtherType;

use super::{
    Views,
    options::{self, Cursor},
    path::Load,
    tables::Repeats,
    tcp::{Numbers, TcpFlags},
    verdict::PassReason,
};
use crate::{
    abi::{FlowKey, LinkLayer, Protocol, Traffic, rule::ECHO_PORT},
    net::{
        Address, Be16, Delta, Family, PacketBuf,
        be::Ports,
        headers::{
            ETHERNET_LEN, Ethernet, Extent, Fragment, ICMP_LEN, IcmpHeader, MAX_HEADER_LEN,
            MacWords, NetworkHeader, TcpHeader, TransportStart, UdpHeader,
        },
        packet::SumKind,
    },
};

/// What the hook knows of a packet besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The hook.
    pub hook: super::verdict::Hook,
    /// What precedes the IP header.
    pub link: LinkLayer,
    /// Index of the interface: ingress, or egress for [`super::verdict::Hook::TcOut`].
    pub ifindex: u32,
    /// Payload of each of the packets on the wire that this one stands for, but for the last, which may have less, bytes; 0 if it
    /// is a single packet.
    pub segment_size: u32,
}

/// A packet taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Packet<A, P> {
    /// From the link header on.
    pub frame: P,
    /// From the IP header on.
    pub network: P,
    /// From the transport header on.
    pub transport: P,
    /// What the IP header says.
    pub header: NetworkHeader<A>,
}

/// TCP, UDP or echo.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Which of them.
    pub protocol: Protocol,
    /// Both ports.
    pub ports: Ports,
    /// TCP flags, none for others.
    pub flags: TcpFlags,
    /// Length of the transport header, bytes.
    pub header_len: u32,
}

/// A TCP or UDP packet, as far as the rest of the pipeline must know it.
#[derive(Clone, Copy, Debug)]
pub struct Classified<A, P> {
    /// The packet.
    pub packet: Packet<A, P>,
    /// Its transport header.
    pub segment: Segment,
    /// The key of its flow.
    pub key: FlowKey<A>,
}

/// The packet an ICMP error is about.
#[derive(Clone, Copy, Debug)]
pub struct Quoted<A> {
    /// Key of a packet that would answer the quoted one: it travels as the error does.
    pub key: FlowKey<A>,
    /// Which transport.
    pub protocol: Protocol,
    /// Length of the quoted IP header, bytes; at most 60.
    pub header_len: usize,
    /// Bytes of the quoted transport that are there.
    pub transport_len: u32,
    /// Of TCP, the sequence number; whatever has its place of UDP.
    pub sequence: u32,
}

/// The family of a frame. Says nothing of where its IP header starts (see [`Views::of`]): a result that holds either a packet
/// pointer or a reason has LLVM put the one's bits into the other ("math between pkt pointer and 4294967040 is not allowed",
/// kernel 6.18, LLVM 22).
#[inline(always)]
pub fn link<P: PacketBuf>(
    frame: P,
    link: LinkLayer,
    own: Option<MacWords>,
) -> Result<Family, PassReason> {
    match link {
        LinkLayer::Ethernet => {
            let header: Ethernet = frame.read(0).ok_or(PassReason::Malformed)?;
            // XDP runs before the kernel sorts out frames to other stations (PACKET_OTHERHOST), groups and broadcast.
            if own.is_some_and(|own| !is_same_station(header.dst, own)) {
                return Err(PassReason::NotForUs);
            }
            match header.ethertype {
                t if t == ethertype(EtherType::Ipv4) => Ok(Family::V4),
                t if t == ethertype(EtherType::Ipv6) => Ok(Family::V6),
                _ => Err(PassReason::NotIp),
            }
        }
        LinkLayer::Raw => match frame.read::<[u8; 2]>(0).ok_or(PassReason::Malformed)?[0] >> 4 {
            4 => Ok(Family::V4),
            6 => Ok(Family::V6),
            _ => Err(PassReason::NotIp),
        },
    }
}

impl<P: PacketBuf> Views<P> {
    /// Of a frame on a link.
    #[inline(always)]
    pub fn of(frame: P, link: LinkLayer) -> Self {
        match link {
            LinkLayer::Ethernet => Self {
                frame,
                network: frame.after(ETHERNET_LEN),
            },
            LinkLayer::Raw => Self {
                frame,
                network: frame,
            },
        }
    }
}

/// Whether two MAC addresses are the same. Comparing the arrays has LLVM store the frame's first and load it again.
#[inline(always)]
const fn is_same_station(one: MacWords, other: MacWords) -> bool {
    const fn number([a, b, c]: MacWords) -> u64 {
        a as u64 | (b as u64) << 16 | (c as u64) << 32
    }
    number(one) == number(other)
}

/// The library's constants are in memory order.
#[inline(always)]
const fn ethertype(value: EtherType) -> Be16 {
    Be16::from_word(value as u16)
}

/// The IP header of a whole packet, if it has no options: those may say things that the slow path looks at. Without a reason if it
/// is none: LLVM would put that in the place of an address, and take the address apart.
#[inline(always)]
pub fn network<A: Address, P: PacketBuf>(network: P) -> Option<NetworkHeader<A>> {
    let header = A::parse(network)?;
    match header.fragment {
        Fragment::Whole
            if header.header_len == A::HEADER_LEN && header.total_len <= network.remaining() =>
        {
            Some(header)
        }
        Fragment::Whole | Fragment::First | Fragment::Later => None,
    }
}

/// What an IP header and its extension headers lead to. It is kept in memory between the step that follows them and those that
/// need it: the verifier would look at all that comes after once for every number of headers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unfolded {
    /// Length of all of them, bytes.
    header_len: u16,
    /// Protocol behind them.
    protocol: u8,
    /// Whole packet or fragment.
    pub fragment: Fragment,
    /// Where the payload lies in its datagram.
    pub extent: Extent,
    /// Whether XDP has the packet in several buffers, of which the first has all headers.
    pub is_scattered: bool,
    /// Whether an IPv4 header says by what way the packet is to go.
    has_source_route: bool,
    /// How far the options of an IPv4 header have been read.
    cursor: Cursor,
}

/// Loose and strict source route (RFC 791 section 3.1).
const LOOSE_ROUTE: u8 = 131;
const STRICT_ROUTE: u8 = 137;

impl Unfolded {
    /// Length of all headers in front of the transport header, bytes; at most [`MAX_HEADER_LEN`].
    #[inline(always)]
    pub const fn header_len(&self) -> u32 {
        (self.header_len & MAX_HEADER_LEN) as u32
    }

    /// Whether the header is one of IPv4 with options.
    #[inline(always)]
    pub fn has_options<A: Address>(&self) -> bool {
        match A::FAMILY {
            Family::V4 => usize::from(self.header_len) > A::HEADER_LEN,
            Family::V6 => false,
        }
    }

    /// Reads the options of an IPv4 header. A packet that says by what way it is to go is none of ours: whether that is heeded is
    /// for the kernel, which refuses by itself (RFC 7126 sections 4.3.5 and 4.4.5; `accept_source_route`).
    #[inline(always)]
    pub fn read_options<P: PacketBuf>(
        &mut self,
        network: P,
        repeat: &impl Repeats,
    ) -> Result<(), PassReason> {
        self.has_source_route = false;
        let (cursor, has_source_route) = (&mut self.cursor, &mut self.has_source_route);
        options::walk(
            network,
            u32::from(self.header_len),
            cursor,
            repeat,
            |option| match option.kind {
                LOOSE_ROUTE | STRICT_ROUTE => {
                    *has_source_route = true;
                    None
                }
                _ => Some(()),
            },
        );
        if self.has_source_route {
            Err(PassReason::SourceRoute)
        } else {
            Ok(())
        }
    }

    /// The transport header of a frame whose headers have been followed.
    #[inline(always)]
    pub fn transport<P: PacketBuf>(&self, views: &Views<P>) -> P {
        views
            .network
            .after(usize::from(self.header_len & MAX_HEADER_LEN))
    }
}

/// Follows the headers of a packet of either family, be it whole or a fragment, of which `available` bytes have come.
#[inline(always)]
pub fn unfolded<A: Address, P: PacketBuf>(
    network: P,
    available: u32,
) -> Result<Unfolded, PassReason> {
    let mut header = A::parse(network).ok_or(PassReason::Malformed)?;
    if header.total_len > available {
        return Err(PassReason::Malformed);
    }
    let extent = A::unfold(network, &mut header).ok_or(PassReason::Malformed)?;
    Ok(Unfolded {
        header_len: header.header_len as u16,
        protocol: header.protocol,
        fragment: header.fragment,
        extent,
        is_scattered: available > network.remaining(),
        has_source_route: false,
        cursor: Cursor::default(),
    })
}

impl<A: Address, P: PacketBuf> Packet<A, P> {
    /// Of a frame whose headers have been followed.
    #[inline(always)]
    pub fn unfolded(views: &Views<P>, unfolded: &Unfolded) -> Result<Self, PassReason> {
        let mut header = A::parse(views.network).ok_or(PassReason::Malformed)?;
        header.header_len = usize::from(unfolded.header_len & MAX_HEADER_LEN);
        header.transport_len = header.total_len.saturating_sub(header.header_len as u32);
        header.protocol = unfolded.protocol;
        header.fragment = unfolded.fragment;
        Ok(Self::of(*views, header))
    }

    /// Of a frame with this IP header.
    #[inline(always)]
    pub fn of(views: Views<P>, header: NetworkHeader<A>) -> Self {
        Self {
            frame: views.frame,
            network: views.network,
            transport: views.network.after(header.header_len),
            header,
        }
    }

    /// From the IP header on that an ICMP error quotes.
    #[inline(always)]
    pub fn quoted_network(&self) -> P {
        self.transport.after(ICMP_LEN)
    }

    /// Bytes of transport header and payload: from the IP header's length, never from the frame's, which may be padded.
    #[inline(always)]
    fn transport_len(&self) -> u32 {
        self.header.transport_len
    }

    /// The echo that it is, if it is any. Without a reason: what is not is looked at by others.
    #[inline(always)]
    pub fn echo(&self) -> Option<Echo> {
        let header: IcmpHeader = self.transport.read(0)?;
        if self.header.protocol != A::ICMP || self.transport_len() < ICMP_LEN as u32 {
            return None;
        }
        Echo::of(A::FAMILY, header.kind)
    }

    /// Its transport header.
    #[inline(always)]
    pub fn segment(&self, protocol: Protocol) -> Result<Segment, PassReason> {
        let available = self.transport_len();
        match protocol {
            Protocol::Tcp => {
                let header: TcpHeader = self.transport.read(0).ok_or(PassReason::Malformed)?;
                let header_len = u32::from(header.data_offset >> 4) * 4;
                if header_len < size_of::<TcpHeader>() as u32 || header_len > available {
                    return Err(PassReason::Malformed);
                }
                Ok(Segment {
                    protocol,
                    ports: header.ports,
                    flags: TcpFlags(header.flags),
                    header_len,
                })
            }
            Protocol::Udp => {
                let header: UdpHeader = self.transport.read(0).ok_or(PassReason::Malformed)?;
                let (header_len, length) = (
                    size_of::<UdpHeader>() as u32,
                    u32::from(header.length.host()),
                );
                let is_cut_off = match self.header.fragment {
                    Fragment::Whole => length > available,
                    // The rest is in other fragments.
                    Fragment::First | Fragment::Later => header_len > available,
                };
                if length < header_len || is_cut_off {
                    return Err(PassReason::Malformed);
                }
                Ok(Segment {
                    protocol,
                    ports: header.ports,
                    flags: TcpFlags(0),
                    header_len,
                })
            }
            Protocol::Echo => {
                let header: IcmpHeader = self.transport.read(0).ok_or(PassReason::Malformed)?;
                let echo = Echo::of(A::FAMILY, header.kind).ok_or(PassReason::Protocol)?;
                Ok(Segment {
                    protocol,
                    ports: echo.ports(&header),
                    flags: TcpFlags(0),
                    header_len: ICMP_LEN as u32,
                })
            }
        }
    }

    /// It and its transport header.
    #[inline(always)]
    pub fn with(self, segment: Segment) -> Classified<A, P> {
        let key = self.key(segment.protocol, segment.ports);
        Classified {
            packet: self,
            segment,
            key,
        }
    }

    /// The key of its flow, given its ports.
    #[inline(always)]
    pub fn key(&self, protocol: Protocol, ports: Ports) -> FlowKey<A> {
        FlowKey {
            src: self.header.src,
            dst: self.header.dst,
            ports,
            protocol: u32::from(protocol.number()),
        }
    }

    /// What lies where TCP and UDP have their ports; of echo, what has their place.
    #[inline(always)]
    pub fn ports(&self) -> Option<Ports> {
        if let Some(echo) = self.echo() {
            return Some(echo.ports(&self.transport.read(0)?));
        }
        let words: [u16; 2] = self.transport.read(0)?;
        (self.transport_len() >= size_of::<[u16; 2]>() as u32).then(|| Ports::from_words(words))
    }

    /// Length of the largest packet it becomes on the wire.
    #[inline(always)]
    pub fn wire_len(&self, headers: u32, arrival: &Arrival) -> u32 {
        match arrival.segment_size {
            0 => self.header.total_len,
            payload => self.header.header_len as u32 + headers + payload,
        }
    }

    /// The packet that an ICMP error quotes.
    #[inline(always)]
    pub fn quoted(&self) -> Result<Quoted<A>, PassReason> {
        let icmp: IcmpHeader = self.transport.read(0).ok_or(PassReason::Malformed)?;
        if !is_error(A::FAMILY, icmp.kind) {
            return Err(PassReason::Protocol);
        }
        let network = self.quoted_network();
        let header = A::parse(network).ok_or(PassReason::Malformed)?;
        // A later fragment has payload where ports would be.
        if header.fragment == Fragment::Later {
            return Err(PassReason::NoQuotedFlow);
        }
        let transport = network.after(header.header_len);
        // RFC 792: at least 64 bits of the original datagram's data.
        let transport_len = self
            .transport_len()
            .saturating_sub((ICMP_LEN + header.header_len) as u32);
        if transport_len < 8 {
            return Err(PassReason::Malformed);
        }
        // Behind a short fragment there may be padding and extensions (RFC 4884), which are no transport header.
        let transport_len =
            transport_len.min(header.total_len.saturating_sub(header.header_len as u32));
        let start: TransportStart = transport.read(0).ok_or(PassReason::Malformed)?;
        let (protocol, ports) = if header.protocol == A::ICMP {
            let icmp: IcmpHeader = transport.read(0).ok_or(PassReason::Malformed)?;
            let echo = Echo::of(A::FAMILY, icmp.kind).ok_or(PassReason::NoQuotedFlow)?;
            (Protocol::Echo, echo.ports(&icmp))
        } else {
            let protocol = Protocol::with_ports(header.protocol).ok_or(PassReason::NoQuotedFlow)?;
            (protocol, start.ports)
        };
        let quoted = FlowKey {
            src: header.src,
            dst: header.dst,
            ports,
            protocol: u32::from(protocol.number()),
        };
        Ok(Quoted {
            key: quoted.reversed(),
            protocol,
            header_len: header.header_len,
            transport_len,
            sequence: u32::from_be(start.sequence),
        })
    }
}

impl<A: Address, P: PacketBuf> Classified<A, P> {
    /// What it counts as, on the wire.
    #[inline(always)]
    pub fn traffic(&self, arrival: &Arrival) -> Traffic {
        let headers = self.packet.header.header_len as u32 + self.segment.header_len;
        let total_len = self.packet.header.total_len;
        let bytes = u64::from(total_len);
        if arrival.segment_size == 0 {
            return Traffic { packets: 1, bytes };
        }
        // Not what the kernel has counted: of what a virtio card or a tap delivers it has counted none.
        let payload = total_len.saturating_sub(headers);
        let packets = u64::from(payload.div_ceil(arrival.segment_size).max(1));
        Traffic {
            packets,
            bytes: bytes + (packets - 1) * u64::from(headers),
        }
    }

    /// The numbers of a TCP segment, read again: to carry them along would cost more.
    #[inline(always)]
    pub fn numbers(&self) -> Option<Numbers> {
        let header: TcpHeader = self.packet.transport.read(0)?;
        // Not negative: the segment's header was found to be there.
        let payload = self.packet.transport_len() - self.segment.header_len;
        Some(Numbers::of(&header, payload))
    }

    /// What may keep it from leaving.
    #[inline(always)]
    pub fn load(&self, arrival: &Arrival) -> Load {
        Load::of(&self.packet, self.segment.header_len, arrival)
    }
}

/// Which of the two an echo message is (RFC 792, RFC 4443 sections 4.1 and 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// A request.
    Request,
    /// A reply.
    Reply,
}

impl Echo {
    /// By the message's type; `None` if it is no echo.
    #[inline(always)]
    const fn of(family: Family, kind: u8) -> Option<Self> {
        match (family, kind) {
            (Family::V4, 8) | (Family::V6, 128) => Some(Self::Request),
            (Family::V4, 0) | (Family::V6, 129) => Some(Self::Reply),
            (Family::V4 | Family::V6, _) => None,
        }
    }

    /// What has the place of ports: the identifier is that of who asks.
    #[inline(always)]
    const fn ports(self, header: &IcmpHeader) -> Ports {
        let [identifier, _] = header.rest;
        match self {
            Self::Request => Ports::from_words([identifier, ECHO_PORT]),
            Self::Reply => Ports::from_words([ECHO_PORT, identifier]),
        }
    }
}

/// Writes what has the place of a transport's ports.
#[inline(always)]
#[must_use]
pub fn write_ports<P: PacketBuf>(transport: P, protocol: Protocol, ports: Ports) -> Option<()> {
    match protocol {
        Protocol::Tcp | Protocol::Udp => transport.write(0, ports.words()),
        Protocol::Echo => {
            // One of them is `ECHO_PORT`, which is 0, and the other the identifier.
            let [src, dst] = ports.words();
            transport.write(core::mem::offset_of!(IcmpHeader, rest), src | dst)
        }
    }
}

/// What a transport's header sum covers besides the packet's own words: ICMP has no pseudo-header over IPv4, and one over IPv6
/// (RFC 4443 section 2.3).
#[inline(always)]
pub const fn pseudo_header(family: Family, protocol: Protocol, addresses: Delta) -> Delta {
    match (protocol, family) {
        (Protocol::Tcp | Protocol::Udp, _) | (Protocol::Echo, Family::V6) => addresses,
        (Protocol::Echo, Family::V4) => Delta::ZERO,
    }
}

/// Whether an ICMP type is an error that quotes a packet and may cross a NAT. Source quench is deprecated (RFC 6633) and
/// redirects are for the local link only.
#[inline(always)]
const fn is_error(family: Family, kind: u8) -> bool {
    match family {
        // Destination unreachable, time exceeded, parameter problem (RFC 792).
        Family::V4 => matches!(kind, 3 | 11 | 12),
        // Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
        Family::V6 => matches!(kind, 1..=4),
    }
}

/// The sum that a protocol's rewrite updates.
#[inline(always)]
pub const fn sum_kind(protocol: Protocol) -> SumKind {
    match protocol {
        Protocol::Tcp => SumKind::Tcp,
        Protocol::Udp => SumKind::Udp,
        Protocol::Echo => SumKind::Icmp,
    }
}
