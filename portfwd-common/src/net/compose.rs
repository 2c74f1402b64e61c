//! Headers of packets that the gateway itself sends. One of the places that know IPv4 from IPv6, see [`super::address`].

use bytemuck::Pod;
use network_types::ip::IpProto;

use super::{
    Address as _, Be16, Ipv4, Ipv6, Sum,
    headers::{IPV4_LEN, Ipv4Header, Ipv4Tail, Ipv6Header, Ipv6Tail},
};

/// TTL or hop limit of what the gateway sends (RFC 1700, IP parameters; the kernel's default too).
const HOP_LIMIT: u8 = 64;
/// Precedence "internetwork control" and no particular service, which an ICMP error should have (RFC 1812 section 4.3.2.5; the
/// kernel's `IPTOS_PREC_INTERNETCONTROL`).
const CONTROL: u8 = 0xc0;
/// "Do not fragment" in the word of an IPv4 header that has the offset, host order.
const DONT_FRAGMENT: u16 = 0x4000;

/// What a family's ICMP packets are made of.
pub trait Compose: Sized {
    /// An IP header without options.
    type Header: Pod;
    /// Type and code of an ICMP error that says that a host cannot be reached: one that does not end a connection (RFC 1122
    /// section 4.2.3.9, RFC 5461), as what it is about may change any moment.
    const HOST_UNREACHABLE: [u8; 2];
    /// The same of one that says that TTL or hop limit has come to its end on the way.
    const HOP_LIMIT_EXCEEDED: [u8; 2];
    /// The same of one that says that a packet does not fit, and must not be cut. The MTU is in the last two bytes of its header.
    const PACKET_TOO_BIG: [u8; 2];
    /// The header of an ICMP packet of `len` bytes behind it.
    fn icmp_packet(src: Self, dst: Self, len: u16) -> Self::Header;
    /// What the pseudo-header of such a packet adds to its sum; nothing over IPv4, where ICMP has none.
    fn icmp_pseudo_header(src: Self, dst: Self, len: u16) -> Sum;
}

impl Compose for Ipv4 {
    type Header = Ipv4Header;
    /// Destination unreachable, host unreachable (RFC 6888 REQ-11).
    const HOST_UNREACHABLE: [u8; 2] = [3, 1];
    /// Time exceeded, in transit (RFC 792).
    const HOP_LIMIT_EXCEEDED: [u8; 2] = [11, 0];
    /// Destination unreachable, fragmentation needed (RFC 1191 section 4).
    const PACKET_TOO_BIG: [u8; 2] = [3, 4];

    #[inline(always)]
    fn icmp_packet(src: Self, dst: Self, len: u16) -> Ipv4Header {
        const VERSION_IHL: u8 = 0x45;
        const PROTOCOL: u8 = IpProto::Icmp as u8;
        let total_length = Be16::new(IPV4_LEN as u16 + len);
        let words = [
            Be16::new(u16::from_be_bytes([VERSION_IHL, CONTROL])),
            total_length,
            Be16::new(DONT_FRAGMENT),
            Be16::new(u16::from_be_bytes([HOP_LIMIT, PROTOCOL])),
        ];
        let sum = Sum::ZERO
            .plus(u32::from(words[0].word()))
            .plus(u32::from(words[1].word()))
            .plus(u32::from(words[2].word()))
            .plus(u32::from(words[3].word()))
            .plus(src.sum())
            .plus(dst.sum());
        Ipv4Header {
            version_ihl: VERSION_IHL,
            tos: CONTROL,
            total_length,
            // A packet that is never fragmented needs none (RFC 6864 section 4.1), and a number would have to be counted.
            id: 0,
            fragment: Be16::new(DONT_FRAGMENT),
            tail: Ipv4Tail {
                ttl: HOP_LIMIT,
                protocol: PROTOCOL,
                header_sum: sum.header_sum(),
                src,
                dst,
            },
        }
    }

    #[inline(always)]
    fn icmp_pseudo_header(_: Self, _: Self, _: u16) -> Sum {
        Sum::ZERO
    }
}

impl Compose for Ipv6 {
    type Header = Ipv6Header;
    /// Destination unreachable, address unreachable.
    const HOST_UNREACHABLE: [u8; 2] = [1, 3];
    /// Time exceeded, hop limit (RFC 4443 section 3.3).
    const HOP_LIMIT_EXCEEDED: [u8; 2] = [3, 0];
    /// Packet too big (RFC 4443 section 3.2).
    const PACKET_TOO_BIG: [u8; 2] = [2, 0];

    #[inline(always)]
    fn icmp_packet(src: Self, dst: Self, len: u16) -> Ipv6Header {
        Ipv6Header {
            version_class: 0x60,
            class_flow: 0,
            flow: 0,
            tail: Ipv6Tail {
                payload_length: Be16::new(len),
                next_header: IpProto::Ipv6Icmp as u8,
                hop_limit: HOP_LIMIT,
                src,
                dst,
            },
        }
    }

    #[inline(always)]
    fn icmp_pseudo_header(src: Self, dst: Self, len: u16) -> Sum {
        const NEXT_HEADER: Be16 = Be16::new(IpProto::Ipv6Icmp as u16);
        Sum::ZERO
            .plus(src.sum())
            .plus(dst.sum())
            .plus(u32::from(Be16::new(len).word()))
            .plus(u32::from(NEXT_HEADER.word()))
    }
}
