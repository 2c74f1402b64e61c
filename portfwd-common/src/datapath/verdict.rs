//! What becomes of a packet, and why. Pass and drop are different types; both carry a reason, and every reason is a counter.

use crate::net::headers::{Hop, MacWords};

/// Which hook sees the packet, and what it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP: redirects finished frames; everything else it leaves, untouched, to TC on the same interface.
    Xdp,
    /// TC ingress alone on its interface.
    Tc,
    /// TC ingress behind XDP: sees what XDP passed, whose pass reasons are counted already.
    TcSlow,
    /// TC egress: sees what the gateway itself sends.
    TcOut,
}

/// The decision on one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Left to the kernel, bit for bit as it came.
    Pass(PassReason),
    /// Dropped.
    Drop(DropReason),
    /// Dropped, and its sender is told by an ICMP error that the hook sends in its place.
    Refuse(DropReason),
    /// Translated; the hook sends it on.
    Forward(Departure),
}

/// How a translated packet leaves. A structure, all of whose fields are set always, rather than an enum with fields: LLVM
/// stores the fields that a variant does not have from registers that were never written ("R2 !read_ok", kernel 6.18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Departure {
    /// The way.
    pub way: Way,
    /// Kernel index of the egress interface; 0 if the stack decides.
    pub ifindex: u32,
    /// Its slot, if it is attached.
    pub slot: u16,
    /// MAC address of the next hop, for [`Way::Frame`] and [`Way::NewHeader`].
    pub next_hop: MacWords,
    /// Own MAC address, likewise.
    pub source: MacWords,
    /// For [`Way::Cut`]: bytes that a fragment may have.
    pub mtu: u16,
}

/// The way of a [`Departure`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// Out of an Ethernet interface, in the frame it came in.
    #[default]
    Frame,
    /// Out of an interface without link header.
    Raw,
    /// Out of an Ethernet interface, but the packet came without a link header: the hook puts one before it.
    NewHeader,
    /// Out of an interface whose kernel neighbour table finishes it: the next hop's MAC address is not known yet.
    Resolve,
    /// Up the stack, which routes it and takes the hop.
    Stack,
    /// Nowhere: the hook keeps the fragment, untouched, until the one in front of it has come.
    Hold,
    /// In again, untouched, and behind it the fragment that is held for it.
    Again,
    /// In again, untouched, in fragments.
    Cut,
}

impl Departure {
    /// Up the stack.
    pub const STACK: Self = Self {
        way: Way::Stack,
        ifindex: 0,
        slot: 0,
        next_hop: [0; 3],
        source: [0; 3],
        mtu: 0,
    };

    /// Kept until the fragment in front of it has come.
    pub const HOLD: Self = Self {
        way: Way::Hold,
        ..Self::STACK
    };

    /// In again, with the fragment that is held for it.
    pub const AGAIN: Self = Self {
        way: Way::Again,
        ..Self::STACK
    };

    /// In again, in fragments of at most `mtu` bytes.
    #[inline(always)]
    pub const fn cut(mtu: u16) -> Self {
        Self {
            way: Way::Cut,
            mtu,
            ..Self::STACK
        }
    }

    /// Who counts the hop.
    #[inline(always)]
    pub const fn hop(&self) -> Hop {
        match self.way {
            Way::Frame | Way::Raw | Way::NewHeader | Way::Resolve => Hop::Taken,
            Way::Stack | Way::Hold | Way::Again | Way::Cut => Hop::LeftToStack,
        }
    }
}

macro_rules! reasons {
    ($(#[$doc:meta])* $type:ident, $base:literal, $($(#[$line:meta])+ $variant:ident = $name:literal,)+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $type { $($(#[$line])+ $variant,)+ }

        impl Default for $type {
            fn default() -> Self {
                Self::ALL[0]
            }
        }

        impl $type {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The counter's name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Element of REASONS.
            #[inline(always)]
            pub const fn index(self) -> u32 {
                $base + self as u32
            }
        }
    };
}

/// Elements of REASONS.
pub const REASON_SLOTS: u32 = 96;

reasons! {
    /// Why a packet is left to the kernel.
    PassReason, 0,
    /// Not IPv4 or IPv6: ARP, VLAN tags, PPPoE, anything else.
    NotIp = "not_ip",
    /// Destination MAC is another station's, a group's or broadcast; or the interface is not attached.
    NotForUs = "not_for_us",
    /// Would begin a flow, but its source is an address that no router forwards (multicast, broadcast, loopback, unspecified,
    /// link-local), or its destination.
    NotUnicast = "not_unicast",
    /// Header cut short, or lengths that contradict each other.
    Malformed = "malformed",
    /// Fragment of a datagram that no rule and no flow is about.
    Fragment = "fragment",
    /// Neither TCP, UDP nor an ICMP error.
    Protocol = "protocol",
    /// Came in on the WAN and no rule listens there.
    NoRule = "no_rule",
    /// Came in on the LAN and belongs to no flow.
    NoFlow = "no_flow",
    /// An ICMP error about a packet of no flow.
    NoQuotedFlow = "no_quoted_flow",
    /// XDP left it to TC on the same interface: neighbour not resolved, TTL 1, too big, or egress without XDP transmit.
    SlowPath = "slow_path",
    /// A reply with TTL or hop limit 1: the kernel answers it with time exceeded.
    HopLimit = "hop_limit",
    /// A reply larger than the route's MTU that must not be fragmented: the kernel answers it with the right MTU.
    PacketTooBig = "packet_too_big",
    /// A reply the kernel has no route for: it answers.
    NoRoute = "no_route",
    /// Its IPv4 header says by what way it is to go (loose or strict source route): the kernel refuses it, or heeds that.
    SourceRoute = "source_route",
    /// Nobody but a rule for everything else would take it, and a socket of the gateway does.
    OwnSocket = "own_socket",
    /// Nobody but a rule for everything else would take it, and it answers what left the gateway before.
    Answer = "answer",
}

reasons! {
    /// Why a packet is refused.
    DropReason, 32,
    /// TCP flags that no stack sends (none, SYN+FIN, SYN+RST, FIN without ACK).
    BadTcpFlags = "bad_tcp_flags",
    /// Its target already answers the same client endpoint on another flow; one source port would carry two connections.
    TupleClash = "tuple_clash",
    /// Connection table full, and the rule's flows cannot do without entries.
    TableFull = "table_full",
    /// A reply larger than the route's MTU that may be fragmented, which takes its ports away.
    FragmentationNeeded = "fragmentation_needed",
    /// What was known of it has gone between two looks: its entry was removed, or the programs are being replaced.
    Vanished = "vanished",
    /// A kernel helper failed half way.
    RewriteFailed = "rewrite_failed",
    /// From a target of rules, of no flow, about to leave by a WAN interface, and no rule alone says what its source is to be
    /// there; or with a transport header that makes no sense; or of a flow that has ended with its rule.
    PrivateSource = "private_source",
    /// A fragment that no sender makes: the first without a whole transport header, one in the middle whose length is not a
    /// multiple of eight, one that ends beyond 65,535 bytes.
    BadFragment = "bad_fragment",
    /// A fragment with bytes that an earlier one of its datagram had.
    FragmentOverlap = "fragment_overlap",
    /// A fragment of a datagram whose first fragment was dropped, or that was given up.
    FragmentRefused = "fragment_refused",
    /// A fragment that came before the one in front of it and is too large to be held.
    FragmentTooLarge = "fragment_too_large",
    /// A TCP RST whose sequence number its receiver would not look at: forged, or very late.
    RstOutOfWindow = "rst_out_of_window",
    /// An ICMP error about a TCP segment that is not on its way: forged, or very late.
    ErrorOutOfWindow = "error_out_of_window",
    /// A new flow whose client is to be hidden, and every port that could stand for it is taken.
    NoPort = "no_port",
    /// A new flow whose client is to be hidden, and the way out has no address that could stand for it.
    NoSource = "no_source",
    /// Of a flow that hides its client, and cannot simply leave: TTL or hop limit 1, too big, no route.
    NoWayOut = "no_way_out",
    /// Would begin a flow of a rule whose lists of sources do not let its source in; or is sent to such a source, unasked.
    SourceRefused = "source_refused",
    /// Would begin a flow, and its source has begun as many as its rule allows in the time.
    SourceRate = "source_rate",
    /// Would begin a flow, and its source has as many of its rule's as that allows.
    SourceFlows = "source_flows",
    /// Would begin a flow, and as many have begun as its rule allows in the time.
    RuleRate = "rule_rate",
    /// Would begin a flow, and its rule has as many as it allows.
    RuleFlows = "rule_flows",
    /// Would begin a flow, but its source cannot be where it came from: an address of the gateway, a broadcast address, one that no
    /// route or one of the other side leads to.
    MartianSource = "martian_source",
}

reasons! {
    /// What else is worth counting about packets.
    Event, 64,
    /// Translated by the rule alone, without a flow entry.
    Stateless = "stateless",
    /// Flow entries created (pairs).
    FlowCreated = "flow_created",
    /// ICMP errors translated.
    IcmpTranslated = "icmp_translated",
    /// Sent through the kernel's neighbour table.
    Resolved = "resolved",
    /// Sent up the stack translated.
    Stack = "stack",
    /// Later fragments translated.
    FragmentTranslated = "fragment_translated",
    /// Fragments held because the one in front of them had not come.
    FragmentHeld = "fragment_held",
    /// Fragments that were held and came in again behind the one in front of them.
    FragmentReleased = "fragment_released",
    /// First fragments with the identification of a datagram that was not complete, and with other ports.
    FragmentClash = "fragment_clash",
    /// Packets cut into fragments because they were too big for their way out.
    Fragmented = "fragmented",
    /// A port of the gateway was given to a client.
    Bound = "bound",
    /// Flows that proved themselves and moved to the connection table.
    FlowProven = "flow_proven",
    /// SYNs and SYN-ACKs whose maximum segment size was lowered.
    MssClamped = "mss_clamped",
    /// ICMP errors sent to clients whose flow had no room.
    ErrorSent = "error_sent",
    /// Drops that the daemon's log was to tell of and had no room for.
    LogLost = "log_lost",
}

impl PassReason {
    /// Whether it says that the packet is none of a rule's or flow's; the others keep one of those from leaving.
    #[inline(always)]
    pub const fn is_about_others(self) -> bool {
        match self {
            Self::NotIp
            | Self::NotForUs
            | Self::NotUnicast
            | Self::Malformed
            | Self::Fragment
            | Self::Protocol
            | Self::NoRule
            | Self::NoFlow
            | Self::NoQuotedFlow
            | Self::SourceRoute
            | Self::OwnSocket
            | Self::Answer => true,
            Self::SlowPath | Self::HopLimit | Self::PacketTooBig | Self::NoRoute => false,
        }
    }
}

impl Verdict {
    /// Whether the program for fragments decides in the place of the slow path that came to this.
    #[inline(always)]
    pub const fn is_for_fragments(&self, hook: Hook) -> bool {
        match (self, hook) {
            (Self::Pass(PassReason::Fragment), Hook::Tc | Hook::TcSlow) => true,
            (Self::Pass(_), Hook::Xdp | Hook::Tc | Hook::TcSlow | Hook::TcOut)
            | (Self::Drop(_) | Self::Refuse(_) | Self::Forward(_), _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_and_a_name_of_its_own() {
        let mut seen = std::collections::HashMap::new();
        let passes = PassReason::ALL.iter().map(|r| (r.index(), r.name()));
        let drops = DropReason::ALL.iter().map(|r| (r.index(), r.name()));
        let events = Event::ALL.iter().map(|r| (r.index(), r.name()));
        for (index, name) in passes.chain(drops).chain(events) {
            assert!(index < REASON_SLOTS);
            assert_eq!(seen.insert(index, name), None, "{name}");
        }
    }
}
