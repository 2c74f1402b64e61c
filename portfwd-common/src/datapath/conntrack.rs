//! Lifetime of flows: expiry is a property of the lookup, the sweep only frees memory.

use super::tcp::{Side, Since, TcpState};
use crate::{
    abi::{Config, FlowDir, FlowEntry, Instant, Protocol, Ticks},
    net::Address,
};

/// How long a silent flow of echo is kept, in seconds (RFC 5508 REQ-2: at least so long). Longer than an entry may be good for without
/// another look at it.
pub const ECHO_SECONDS: u32 = 60;

/// What lifetime and state need to know of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half {
    /// See [`FlowEntry::created`].
    pub created: Instant,
    /// See [`FlowEntry::last_seen`].
    pub last_seen: Instant,
    /// What it has shown of TCP.
    pub side: Side,
    /// Its direction.
    pub direction: FlowDir,
    /// Whether any packet passed.
    pub has_traffic: bool,
}

/// Both halves of one life of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// From the client.
    pub original: Half,
    /// From the backend.
    pub reply: Half,
}

/// How long a flow lives if nothing more comes of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Term {
    /// From when it counts.
    pub since: Instant,
    /// How long.
    pub length: Ticks,
}

impl Term {
    /// Whether it is over, whichever CPU has noted when it began.
    #[inline(always)]
    pub fn is_over(self, now: Instant) -> bool {
        now.since_any_cpu(self.since) > self.length
    }
}

/// What a flow is doing, for listings and lifetimes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowState {
    /// UDP: only the client has sent.
    Unreplied,
    /// UDP: both have sent.
    Replied,
    /// Echo: nobody has answered.
    Unanswered,
    /// Echo: it was answered.
    Answered,
    /// TCP.
    Tcp(TcpState),
}

impl<A: Address> From<&FlowEntry<A>> for Half {
    #[inline(always)]
    fn from(entry: &FlowEntry<A>) -> Self {
        Self {
            created: entry.created,
            last_seen: entry.last_seen,
            side: Side::of(entry),
            direction: entry.dir(),
            has_traffic: entry.traffic.packets != 0,
        }
    }
}

impl Half {
    /// How long its flow lives by what it alone says: the longest that it may.
    #[inline(always)]
    pub const fn term(&self, protocol: Protocol, config: &Config) -> Term {
        Term {
            since: self.last_seen,
            length: match protocol {
                Protocol::Tcp => config.tcp_established,
                Protocol::Udp => config.udp,
                Protocol::Echo => FlowState::Answered.timeout(config),
            },
        }
    }
}

impl Pair {
    /// The two halves, whichever is given first; `None` if they are not two halves of one life of a flow.
    #[inline(always)]
    pub fn of(one: Half, other: Half) -> Option<Self> {
        if one.created != other.created {
            return None;
        }
        match (one.direction, other.direction) {
            (FlowDir::Original, FlowDir::Reply) => Some(Self {
                original: one,
                reply: other,
            }),
            (FlowDir::Reply, FlowDir::Original) => Some(Self {
                original: other,
                reply: one,
            }),
            (FlowDir::Original, FlowDir::Original) | (FlowDir::Reply, FlowDir::Reply) => None,
        }
    }

    /// When either side last sent.
    #[inline(always)]
    pub const fn last_seen(&self) -> Instant {
        self.original.last_seen.later(self.reply.last_seen)
    }

    /// The state of a TCP connection.
    #[inline(always)]
    pub const fn tcp_state(&self) -> TcpState {
        TcpState::of(
            (&self.original.side, self.original.last_seen),
            (&self.reply.side, self.reply.last_seen),
        )
    }

    /// What the flow is doing.
    #[inline(always)]
    pub const fn state(&self, protocol: Protocol) -> FlowState {
        match protocol {
            Protocol::Tcp => FlowState::Tcp(self.tcp_state()),
            Protocol::Udp if !self.reply.has_traffic => FlowState::Unreplied,
            Protocol::Udp => FlowState::Replied,
            Protocol::Echo if !self.reply.has_traffic => FlowState::Unanswered,
            Protocol::Echo => FlowState::Answered,
        }
    }

    /// Whether it counts where flows are limited.
    #[inline(always)]
    pub fn is_open(&self, protocol: Protocol, config: &Config, now: Instant) -> bool {
        let is_open = match protocol {
            Protocol::Tcp => self.tcp_state().is_open(),
            Protocol::Udp | Protocol::Echo => true,
        };
        is_open && !self.is_expired(protocol, config, now)
    }

    /// Whether it has been there, or silent, for longer than its state allows.
    #[inline(always)]
    pub fn is_expired(&self, protocol: Protocol, config: &Config, now: Instant) -> bool {
        self.term(protocol, config).is_over(now)
    }

    /// How long it lives by what it is doing.
    #[inline(always)]
    pub fn term(&self, protocol: Protocol, config: &Config) -> Term {
        let state = self.state(protocol);
        Term {
            since: match state.since() {
                Since::Created => self.original.created,
                Since::LastSeen => self.last_seen(),
            },
            length: state.timeout(config),
        }
    }
}

impl FlowState {
    /// How long a silent flow in this state is kept.
    #[inline(always)]
    pub const fn timeout(self, config: &Config) -> Ticks {
        match self {
            Self::Unreplied | Self::Replied => config.udp,
            Self::Unanswered | Self::Answered => {
                Ticks(config.ticks_per_second.wrapping_mul(ECHO_SECONDS))
            }
            Self::Tcp(state) => state.timeout(config),
        }
    }

    /// From when that counts.
    #[inline(always)]
    pub const fn since(self) -> Since {
        match self {
            Self::Unreplied | Self::Replied | Self::Unanswered | Self::Answered => Since::LastSeen,
            Self::Tcp(state) => state.since(),
        }
    }

    /// Name for listings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreplied | Self::Unanswered => "unreplied",
            Self::Replied | Self::Answered => "replied",
            Self::Tcp(state) => state.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seen in listings: a live flow was gone because its other half had just been stamped, and the difference wrapped.
    #[test]
    fn a_flow_whose_other_half_was_stamped_after_now_was_read_is_alive() {
        let now = Instant::from_ticks(1_000);
        let half = |direction, last_seen| Half {
            created: now,
            last_seen,
            side: Side::default(),
            direction,
            has_traffic: true,
        };
        let pair = Pair::of(
            half(FlowDir::Original, now.plus(Ticks(1))),
            half(FlowDir::Reply, now),
        )
        .unwrap();
        let config = Config {
            udp: Ticks(300),
            ..Config::default()
        };
        assert!(!pair.is_expired(Protocol::Udp, &config, now));
        assert!(!pair.is_expired(Protocol::Udp, &config, now.plus(Ticks(301))));
        assert!(pair.is_expired(Protocol::Udp, &config, now.plus(Ticks(302))));
    }
}
