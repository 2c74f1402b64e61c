//! Header layouts. Headers are 2-aligned within a frame, and so are these structures, whose longer fields are in words as in the
//! drawings of the RFCs: one load or store each (see [`PacketBuf`]).

use bytemuck::{Pod, Zeroable};
use network_types::ip::IpProto;

use super::{Address, Be16, Delta, Ipv4, Ipv6, PacketBuf, Sum, be::Ports};

/// A MAC address as three words of packet memory.
pub type MacWords = [u16; 3];

/// Ethernet II.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Ethernet {
    /// Destination MAC.
    pub dst: MacWords,
    /// Source MAC.
    pub src: MacWords,
    /// Ethertype.
    pub ethertype: Be16,
}

/// Length of an Ethernet header, bytes.
pub const ETHERNET_LEN: usize = size_of::<Ethernet>();

/// An IPv4 header without options.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub struct Ipv4Header {
    pub(super) version_ihl: u8,
    pub(super) tos: u8,
    pub(super) total_length: Be16,
    pub(super) id: u16,
    pub(super) fragment: Be16,
    pub(super) tail: Ipv4Tail,
}

/// Bytes 8 to 20 of an IPv4 header: all that a rewrite touches.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub(super) struct Ipv4Tail {
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    pub(super) header_sum: u16,
    pub(super) src: Ipv4,
    pub(super) dst: Ipv4,
}

/// IPv6 fixed header.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub struct Ipv6Header {
    pub(super) version_class: u8,
    pub(super) class_flow: u8,
    pub(super) flow: u16,
    pub(super) tail: Ipv6Tail,
}

/// Bytes 4 to 40 of an IPv6 header: all that a rewrite touches, and what else is in the first word of it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub(super) struct Ipv6Tail {
    pub(super) payload_length: Be16,
    pub(super) next_header: u8,
    pub(super) hop_limit: u8,
    pub(super) src: Ipv6,
    pub(super) dst: Ipv6,
}

/// Length of an IPv4 header without options, bytes.
pub const IPV4_LEN: usize = size_of::<Ipv4Header>();
const IPV4_TAIL: usize = 8;
const IPV6_LEN: usize = size_of::<Ipv6Header>();
const IPV6_TAIL: usize = 4;

/// "More fragments" in the word of an IPv4 header that has the offset, host order.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// The offset in that word, in units of eight bytes.
pub const OFFSET_MASK: u16 = 0x1fff;

/// Whether a packet is a piece of a larger one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fragment {
    /// A whole packet.
    #[default]
    Whole,
    /// The first piece: it has the transport header.
    First,
    /// A later piece: what follows the IP header is payload.
    Later,
}

/// What an IP header says, whichever the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkHeader<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// Transport protocol, or the first extension header.
    pub protocol: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// "Do not fragment"; always true of IPv6, which only the sender fragments.
    pub dont_fragment: bool,
    /// Whole packet or fragment.
    pub fragment: Fragment,
    /// Length of this header with its options, bytes; at most 60, or once unfolded [`MAX_HEADER_LEN`].
    pub header_len: usize,
    /// Length of header and payload as the header says, bytes.
    pub total_len: u32,
    /// Length of what follows this header, bytes: of transport header and payload.
    pub transport_len: u32,
}

/// Longest IP header with extension headers, bytes: a mask that bounds it for the verifier.
pub const MAX_HEADER_LEN: u16 = 0x7ff;

/// Where a packet's payload lies in the datagram that it may be a piece of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Identification, as it lies in memory; 0 of a whole IPv6 packet.
    pub id: u32,
    /// Where it begins in the datagram, in units of eight bytes.
    pub offset: u16,
    /// Whether another piece follows.
    pub more: bool,
    /// Bytes in front of it in the packet.
    pub at: usize,
}

/// Whether a rewrite counts as a hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// portfwd forwards the packet: TTL or hop limit goes down by one.
    Taken,
    /// The kernel forwards it, and counts the hop itself.
    LeftToStack,
}

/// The family's header: reading it, and writing the fields that NAT changes.
pub trait Network: Sized {
    /// Transport protocol number of this family's ICMP.
    const ICMP: u8;
    /// Length of a header without options, bytes.
    const HEADER_LEN: usize;

    /// Reads the header at `packet`. `None` if it is cut short or contradicts itself.
    fn parse<P: PacketBuf>(packet: P) -> Option<NetworkHeader<Self>>;

    /// Goes on to the transport header: over IPv6, makes the header end behind its extension headers, as one. `None` if they are
    /// not understood.
    fn unfold<P: PacketBuf>(packet: P, header: &mut NetworkHeader<Self>) -> Option<Extent>;

    /// Writes both addresses, whose words changed by `delta`, and takes the hop. Returns what that adds to the sum over the
    /// whole packet beyond the pseudo-header's share (see [`super::packet::SumChange::packet`]). `None` if the header is not
    /// there; then nothing was written.
    fn rewrite<P: PacketBuf>(
        packet: P,
        src: Self,
        dst: Self,
        delta: Delta,
        hop: Hop,
    ) -> Option<Delta>;
}

/// What one hop adds to a sum: the high byte of a word goes down by one, `-0x0100` (RFC 1141's constant, in memory order).
const HOP_DELTA_HIGH: u32 = Be16::new(0xfeff).word() as u32;
/// The same in the low byte of a word, `-0x0001`.
const HOP_DELTA_LOW: u32 = Be16::new(0xfffe).word() as u32;

impl Network for Ipv4 {
    const ICMP: u8 = IpProto::Icmp as u8;
    const HEADER_LEN: usize = IPV4_LEN;

    #[inline(always)]
    fn parse<P: PacketBuf>(packet: P) -> Option<NetworkHeader<Self>> {
        let header: Ipv4Header = packet.read(0)?;
        // The mask bounds the offset for the verifier; the version is compared beside it.
        let header_len = usize::from(header.version_ihl & 0x0f) * 4;
        let total_len = u32::from(header.total_length.host());
        if header.version_ihl >> 4 != 4
            || header_len < IPV4_LEN
            || (total_len as usize) < header_len
        {
            return None;
        }
        let field = header.fragment.host();
        let fragment = match (field & OFFSET_MASK, field & MORE_FRAGMENTS) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            (_, _) => Fragment::Later,
        };
        Some(NetworkHeader {
            src: header.tail.src,
            dst: header.tail.dst,
            protocol: header.tail.protocol,
            hop_limit: header.tail.ttl,
            dont_fragment: field & 0x4000 != 0,
            fragment,
            header_len,
            total_len,
            transport_len: total_len - header_len as u32,
        })
    }

    #[inline(always)]
    fn unfold<P: PacketBuf>(packet: P, header: &mut NetworkHeader<Self>) -> Option<Extent> {
        let [id, field]: [u16; 2] = packet.read(4)?;
        let field = Be16::from_word(field).host();
        Some(Extent {
            id: u32::from(id),
            offset: field & OFFSET_MASK,
            more: field & MORE_FRAGMENTS != 0,
            at: header.header_len,
        })
    }

    #[inline(always)]
    fn rewrite<P: PacketBuf>(
        packet: P,
        src: Self,
        dst: Self,
        delta: Delta,
        hop: Hop,
    ) -> Option<Delta> {
        let mut tail: Ipv4Tail = packet.read(IPV4_TAIL)?;
        tail.src = src;
        tail.dst = dst;
        let sum = match hop {
            Hop::Taken => {
                tail.ttl = tail.ttl.wrapping_sub(1);
                delta.sum().plus(HOP_DELTA_HIGH)
            }
            Hop::LeftToStack => delta.sum(),
        };
        tail.header_sum = sum.apply(tail.header_sum);
        packet.write(IPV4_TAIL, tail)?;
        Some(Delta::ZERO)
    }
}

impl Network for Ipv6 {
    const ICMP: u8 = IpProto::Ipv6Icmp as u8;
    const HEADER_LEN: usize = IPV6_LEN;

    #[inline(always)]
    fn parse<P: PacketBuf>(packet: P) -> Option<NetworkHeader<Self>> {
        let header: Ipv6Header = packet.read(0)?;
        if header.version_class >> 4 != 6 {
            return None;
        }
        let fragment = if header.tail.next_header == IpProto::Ipv6Frag as u8 {
            Fragment::Later
        } else {
            Fragment::Whole
        };
        Some(NetworkHeader {
            src: header.tail.src,
            dst: header.tail.dst,
            protocol: header.tail.next_header,
            hop_limit: header.tail.hop_limit,
            dont_fragment: true,
            fragment,
            header_len: IPV6_LEN,
            total_len: IPV6_LEN as u32 + u32::from(header.tail.payload_length.host()),
            transport_len: u32::from(header.tail.payload_length.host()),
        })
    }

    #[inline(always)]
    fn unfold<P: PacketBuf>(packet: P, header: &mut NetworkHeader<Self>) -> Option<Extent> {
        let mut extent = Extent {
            id: 0,
            offset: 0,
            more: false,
            at: IPV6_LEN,
        };
        let (mut at, mut view, mut is_piece) = (IPV6_LEN, packet.after(IPV6_LEN), false);
        header.fragment = Fragment::Whole;
        for _ in 0..=MAX_EXTENSIONS {
            let bytes = match Extension::of(header.protocol) {
                None => {
                    header.header_len = at;
                    return Some(extent);
                }
                Some(Extension::Fragment) if is_piece => return None,
                Some(Extension::Fragment) => {
                    let header_of_piece: FragmentHeader = view.read(0)?;
                    let field = header_of_piece.field.host();
                    is_piece = true;
                    header.protocol = header_of_piece.next_header;
                    extent = Extent {
                        id: header_of_piece.id,
                        offset: field >> 3,
                        more: field & 1 != 0,
                        at: at + FRAGMENT_HEADER_LEN,
                    };
                    header.fragment = match (extent.offset, extent.more) {
                        // An atomic fragment is a whole packet, whatever other pieces have its identification (RFC 6946).
                        (0, false) => Fragment::Whole,
                        (0, true) => Fragment::First,
                        (_, _) => {
                            header.fragment = Fragment::Later;
                            header.header_len = extent.at;
                            return Some(extent);
                        }
                    };
                    FRAGMENT_HEADER_LEN
                }
                Some(kind @ (Extension::Options | Extension::Routing)) => {
                    let [next, units, _, segments_left]: [u8; 4] = view.read(0)?;
                    // A packet that has not come to its last destination, and with it routing header 0 (RFC 5095), goes by its
                    // header, not by a rule.
                    if units > MAX_EXTENSION_UNITS
                        || (kind == Extension::Routing && segments_left != 0)
                    {
                        return None;
                    }
                    header.protocol = next;
                    (usize::from(units & MAX_EXTENSION_UNITS) + 1) * 8
                }
            };
            at += bytes;
            view = view.after(bytes);
        }
        None
    }

    #[inline(always)]
    fn rewrite<P: PacketBuf>(
        packet: P,
        src: Self,
        dst: Self,
        delta: Delta,
        hop: Hop,
    ) -> Option<Delta> {
        let mut tail: Ipv6Tail = packet.read(IPV6_TAIL)?;
        tail.src = src;
        tail.dst = dst;
        let delta = match hop {
            Hop::Taken => {
                tail.hop_limit = tail.hop_limit.wrapping_sub(1);
                Sum::ZERO.plus(delta.word()).plus(HOP_DELTA_LOW).delta()
            }
            Hop::LeftToStack => delta,
        };
        packet.write(IPV6_TAIL, tail)?;
        Some(delta)
    }
}

/// Extension headers that are followed at most, and units of eight bytes behind the first of each: enough for what is seen, and
/// few enough for the verifier.
const MAX_EXTENSIONS: usize = 5;
const MAX_EXTENSION_UNITS: u8 = 31;
const FRAGMENT_HEADER_LEN: usize = size_of::<FragmentHeader>();

/// IPv6 fragment header.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
struct FragmentHeader {
    next_header: u8,
    reserved: u8,
    /// Offset in units of eight bytes, two bits of nothing, "more fragments".
    field: Be16,
    id: u32,
}

/// An IPv6 extension header that is stepped over (RFC 8200 section 4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extension {
    /// Hop-by-hop or destination options.
    Options,
    /// Routing.
    Routing,
    /// Fragment.
    Fragment,
}

impl Extension {
    #[inline(always)]
    const fn of(number: u8) -> Option<Self> {
        const HOP_BY_HOP: u8 = IpProto::HopOpt as u8;
        const ROUTING: u8 = IpProto::Ipv6Route as u8;
        const FRAGMENT: u8 = IpProto::Ipv6Frag as u8;
        const DESTINATION: u8 = IpProto::Ipv6Opts as u8;
        match number {
            HOP_BY_HOP | DESTINATION => Some(Self::Options),
            ROUTING => Some(Self::Routing),
            FRAGMENT => Some(Self::Fragment),
            _ => None,
        }
    }
}

/// TCP and UDP as far as NAT looks: ports, and for TCP the bytes 12 and 13.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub struct TcpHeader {
    /// Source and destination port.
    pub ports: Ports,
    /// Sequence number, wire order.
    pub sequence: u32,
    /// Acknowledgement number, wire order.
    pub acknowledgement: u32,
    /// Header length in words, upper four bits.
    pub data_offset: u8,
    /// Flags, see [`crate::datapath::tcp::TcpFlags`].
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Header sum.
    pub header_sum: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

/// The first eight bytes of a transport header, all that an ICMP error must quote (RFC 792).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub struct TransportStart {
    /// Source and destination port.
    pub ports: Ports,
    /// Of TCP the sequence number, wire order; whatever has its place of UDP.
    pub sequence: u32,
}

/// UDP.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, packed(2))]
pub struct UdpHeader {
    /// Source and destination port.
    pub ports: Ports,
    /// Length of header and payload.
    pub length: Be16,
    /// Header sum; 0 is none.
    pub header_sum: u16,
}

/// ICMP and ICMPv6: the eight bytes before what an error quotes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct IcmpHeader {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Header sum.
    pub header_sum: u16,
    /// MTU, pointer or length, by type.
    pub rest: [u16; 2],
}

/// Length of an ICMP header, bytes.
pub const ICMP_LEN: usize = size_of::<IcmpHeader>();

/// The change of sum when `old` gives way to `new`, both addresses.
#[inline(always)]
pub fn address_delta<A: Address>(old: [A; 2], new: [A; 2]) -> Delta {
    Sum::ZERO
        .replace_sum(old[0].sum(), new[0].sum())
        .replace_sum(old[1].sum(), new[1].sum())
        .delta()
}
