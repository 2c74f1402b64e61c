//! What every reason means to somebody whose forward does not work. A new reason does not compile without its words.

use portfwd_common::datapath::verdict::{DropReason, Event, PassReason};

/// Why a packet is left to the kernel.
pub(super) const fn pass(reason: PassReason) -> &'static str {
    match reason {
        PassReason::NotIp => "it is neither IPv4 nor IPv6",
        PassReason::NotForUs => {
            "the interface is not attached, or the frame goes to another station's MAC address"
        }
        PassReason::NotUnicast => {
            "its source is an address that no router forwards, or that of its destination"
        }
        PassReason::Malformed => "its headers contradict each other",
        PassReason::Fragment => "it is a fragment of a datagram that no rule and no flow is about",
        PassReason::Protocol => "it is neither TCP nor UDP nor echo",
        PassReason::NoRule => "no rule listens there",
        PassReason::NoFlow => "it answers no packet that was forwarded",
        PassReason::NoQuotedFlow => "it is an error about a packet of no flow",
        PassReason::SlowPath => "XDP leaves it to TC on the same interface, which has more means",
        PassReason::HopLimit => "its TTL or hop limit ends here",
        PassReason::PacketTooBig => "it is larger than the route's MTU and must not be fragmented",
        PassReason::NoRoute => "the kernel has no route for it",
        PassReason::SourceRoute => {
            "it says by what way it is to go, which is for the kernel to refuse"
        }
        PassReason::OwnSocket => {
            "a socket of the gateway waits for it, which goes before a dmz rule"
        }
        PassReason::Answer => "it answers what has left by the WAN before, and is no dmz rule's",
    }
}

/// Why a packet is refused.
pub(super) const fn drop(reason: DropReason) -> &'static str {
    match reason {
        DropReason::BadTcpFlags => "it would begin a connection with flags that no stack sends",
        DropReason::TupleClash => {
            "its target already answers the same client endpoint on another flow"
        }
        DropReason::TableFull => "the connection table is full, and the rule needs an entry",
        DropReason::FragmentationNeeded => {
            "it is larger than the route's MTU and cannot be cut into fragments"
        }
        DropReason::Vanished => "its entry was removed while it was looked at",
        DropReason::RewriteFailed => "a kernel helper failed half way",
        DropReason::PrivateSource => {
            "it would leave by the WAN with the target's own address, and no rule says another"
        }
        DropReason::BadFragment => "it is a fragment that no sender makes",
        DropReason::FragmentOverlap => {
            "it is a fragment with bytes that an earlier one of its datagram had"
        }
        DropReason::FragmentRefused => {
            "it is a fragment of a datagram whose first fragment was dropped"
        }
        DropReason::FragmentTooLarge => {
            "it is a fragment that came early, and too large to wait for the one in front of it"
        }
        DropReason::RstOutOfWindow => {
            "it is a RST whose sequence number its receiver would not look at"
        }
        DropReason::ErrorOutOfWindow => {
            "it is an ICMP error about a TCP segment that is not on its way"
        }
        DropReason::NoPort => "every port that could stand for its client is taken",
        DropReason::NoSource => "the way out has no address that could stand for its client",
        DropReason::NoWayOut => {
            "it is too big, at the end of its hops or without a route, and the kernel cannot forward what hides its client"
        }
        DropReason::SourceRefused => "the rule's lists of sources do not let its client in",
        DropReason::SourceRate => {
            "its source has begun as many flows as the rule allows in the time"
        }
        DropReason::SourceFlows => "its source has as many flows as the rule allows",
        DropReason::RuleRate => "as many flows have begun as the rule allows in the time",
        DropReason::RuleFlows => "the rule has as many flows as it allows",
        DropReason::MartianSource => {
            "its source cannot be where it came from: the answer would go nowhere, or to the other side"
        }
    }
}

/// What else happened to a packet.
pub(super) const fn event(event: Event) -> &'static str {
    match event {
        Event::Stateless => "translated by the rule alone, without an entry",
        Event::FlowCreated => "begins a flow",
        Event::FlowProven => "proves its flow, which takes its place in the connection table",
        Event::IcmpTranslated => "an ICMP error, translated",
        Event::Resolved => "the next hop's MAC address is not known yet: the kernel asks for it",
        Event::Stack => "goes up the stack translated: the kernel decides",
        Event::FragmentTranslated => "a later fragment, translated as the first one was",
        Event::FragmentHeld => "a fragment that waits for the one in front of it",
        Event::FragmentReleased => "a fragment that waited comes in again",
        Event::FragmentClash => "a first fragment with the identification of another datagram",
        Event::Fragmented => "too big for its way out: it is cut into fragments",
        Event::ErrorSent => "its client is told so, by an ICMP error that takes its place",
        Event::MssClamped => "its maximum segment size is lowered to what fits",
        Event::Bound => "a port of the gateway stands for its client from here on",
        Event::LogLost => "the daemon's log had no room for it",
    }
}
