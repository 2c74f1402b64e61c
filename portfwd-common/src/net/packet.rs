//! The packet as the datapath sees it: a cursor over bytes that may end anywhere.

use bytemuck::Pod;

use super::{Delta, Sum};

/// A view of a packet from some offset on. Cheap to copy, like a pointer; every access is checked against the end.
///
/// Headers are 2-aligned within a frame, so `T` must not need more than that: a wider `T` would be loaded byte by byte on
/// BPF, or be refused by the host's model.
pub trait PacketBuf: Copy {
    /// Bytes from here to the end of the packet, also those that [`PacketBuf::read`] cannot reach (paged data of a socket
    /// buffer).
    fn remaining(self) -> u32;

    /// A copy of the bytes at offset `at`, `None` if they are not there.
    fn read<T: Pod>(self, at: usize) -> Option<T>;

    /// Overwrites the bytes at offset `at`, `None` if they are not there.
    #[must_use]
    fn write<T: Pod>(self, at: usize, value: T) -> Option<()>;

    /// The view that starts `bytes` further on. `bytes` is a header length, at most [`super::headers::MAX_HEADER_LEN`].
    fn after(self, bytes: usize) -> Self;

    /// Updates the header sum of the transport layer. The last access of a rewrite: a hook may have to call the kernel for
    /// it, after which the view is no longer good. `None` if the sum is not there or the kernel refused.
    #[must_use]
    fn update_sum(self, change: SumChange) -> Option<()>;

    /// Updates a sum over the whole packet (`CHECKSUM_COMPLETE`), if the hook has one, of a packet whose transport header is not
    /// written: see [`SumChange::packet`]. The last access of such a rewrite.
    fn update_whole_sum(self, change: Delta);
}

/// Which transport's header sum is updated: its place and its rule about zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumKind {
    /// TCP.
    Tcp,
    /// UDP: 0x0000 means none (RFC 768).
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
}

/// An update of a transport's header sum, split as an unfinished (partial) sum needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumChange {
    /// The transport.
    pub kind: SumKind,
    /// Change of the words of the pseudo-header.
    pub pseudo: Delta,
    /// Change of the words of the segment itself.
    pub body: Delta,
    /// What a sum over the whole packet (`CHECKSUM_COMPLETE`) changes by, beyond what `pseudo` does to it over IPv4: nothing
    /// over IPv4, whose header sum makes up for every change; over IPv6 the pseudo-header (see the kernel's
    /// `inet_proto_csum_replace_by_diff`) and the hop limit.
    pub packet: Delta,
}

impl SumKind {
    /// Offset of the header sum in the transport header.
    #[inline(always)]
    pub const fn offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
            Self::Icmp => 2,
        }
    }

    /// The new header sum for a full (not partial) one.
    #[inline(always)]
    pub const fn updated(self, header_sum: u16, change: Sum) -> u16 {
        match self {
            Self::Tcp | Self::Icmp => change.apply(header_sum),
            Self::Udp => change.apply_udp(header_sum),
        }
    }
}

impl SumChange {
    /// The update of a full sum in packet memory, for views that are plain bytes.
    #[inline(always)]
    #[must_use]
    pub fn apply_to_bytes<P: PacketBuf>(self, transport: P) -> Option<()> {
        let at = self.kind.offset();
        let old: u16 = transport.read(at)?;
        transport.write(
            at,
            self.kind
                .updated(old, self.pseudo.sum().plus(self.body.word())),
        )
    }
}
