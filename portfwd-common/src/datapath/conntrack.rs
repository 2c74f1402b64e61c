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

    /// In how many ticks it is over; none if it is.
    pub const fn rest(self, now: Instant) -> Ticks {
        let Ticks(past) = now.since_any_cpu(self.since);
        Ticks(self.length.0.saturating_add(1).saturating_sub(past))
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

impl Half {
    /// The soonest that its flow may be over, by what it alone says. Of a flow that is over one half at least says so: what makes
    /// a TCP connection shorter than an established one is shown by one of its sides, which has given up, has ended, has opened
    /// anew or has not acknowledged.
    pub fn soonest(&self, protocol: Protocol, config: &Config, now: Instant) -> Ticks {
        let silent = |length| Term {
            since: self.last_seen,
            length,
        };
        let longest = self.term(protocol, config).rest(now);
        match protocol {
            Protocol::Udp | Protocol::Echo => longest,
            Protocol::Tcp => {
                let closing = silent(config.tcp_closing);
                let refused = silent(TcpState::Refused.timeout(config));
                let alone = Term {
                    since: self.created,
                    length: config.tcp_opening.min(config.tcp_closing),
                };
                let shown = [
                    (self.side.has(Side::RST), refused),
                    (
                        self.side.has(Side::RST | Side::FIN | Side::REOPENED),
                        closing,
                    ),
                    (!self.side.has(Side::ACK), alone),
                ];
                let shorter = shown
                    .into_iter()
                    .filter(|(is_shown, _)| *is_shown)
                    .map(|(_, term)| term.rest(now));
                shorter.fold(longest, Ticks::min)
            }
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

    /// For all that two sides can have shown, and every order of what happened when.
    #[test]
    fn of_a_flow_that_is_over_one_half_says_so() {
        const HZ: u32 = 4;
        let config = Config {
            ticks_per_second: HZ,
            udp: Ticks(300 * HZ),
            tcp_opening: Ticks(120 * HZ),
            tcp_established: Ticks(7_440 * HZ),
            tcp_closing: Ticks(240 * HZ),
            ..Config::default()
        };
        let created = Instant::from_ticks(u64::from(u32::MAX - 50 * HZ));
        let mut over = 0;
        let spans =
            [0, 9, 11, 59, 61, 119, 121, 239, 241, 299, 301, 7_439, 7_441].map(|span| span * HZ);
        let halves = |direction| {
            (0..=u8::MAX).flat_map(move |seen| {
                spans.map(|span| Half {
                    created,
                    last_seen: created.plus(Ticks(span)),
                    side: Side {
                        seen,
                        ..Side::default()
                    },
                    direction,
                    has_traffic: seen & 1 != 0,
                })
            })
        };
        for original in halves(FlowDir::Original) {
            for reply in halves(FlowDir::Reply) {
                let pair = Pair::of(original, reply).unwrap();
                for protocol in Protocol::ALL {
                    let term = pair.term(protocol, &config);
                    for now in [
                        pair.last_seen().plus(Ticks(1)),
                        term.since.plus(Ticks(term.length.0 + 1)),
                    ] {
                        let now = now.later(pair.last_seen());
                        let soonest = original
                            .soonest(protocol, &config, now)
                            .min(reply.soonest(protocol, &config, now));
                        let rest = term.rest(now);
                        assert!(
                            soonest <= rest,
                            "{protocol:?} {pair:?}: over in {rest:?}, not in {soonest:?}"
                        );
                        assert_eq!(rest == Ticks(0), pair.is_expired(protocol, &config, now));
                        over += u32::from(rest == Ticks(0));
                    }
                }
            }
        }
        assert!(over > 0);
    }

    /// What is silent and has shown nothing that ends soon need not be looked at for hours.
    #[test]
    fn a_half_of_an_established_connection_says_that_it_may_last() {
        let config = Config {
            ticks_per_second: 1,
            tcp_opening: Ticks(120),
            tcp_established: Ticks(7_440),
            tcp_closing: Ticks(240),
            ..Config::default()
        };
        let now = Instant::from_ticks(10_000);
        let half = Half {
            created: Instant::from_ticks(1_000),
            last_seen: Instant::from_ticks(9_000),
            side: Side {
                seen: Side::SYN | Side::ACK | Side::SETTLED,
                ..Side::default()
            },
            direction: FlowDir::Original,
            has_traffic: true,
        };
        assert_eq!(half.soonest(Protocol::Tcp, &config, now), Ticks(6_441));
    }

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
