//! How long a port that stood for a client is nobody else's after its last flow. No clock of its own: who looks says what time
//! it is.

use std::{collections::HashMap, time::Duration};

use portfwd_common::abi::{BindingKey, Instant, Protocol, Ticks};

use super::flows::elapsed;

/// RFC 6888 REQ-8: a port that carried UDP is nobody else's for this long after its last flow. The flow's own timeout is not
/// counted in.
pub(super) const UDP_REST: Duration = Duration::from_secs(120);

/// Bindings that no flow uses, as looks have found them.
#[derive(Debug, Default)]
pub(super) struct Resting {
    /// The first look that found a binding unused, and every one since.
    since: HashMap<BindingKey, Instant>,
}

/// One look at all bindings.
#[derive(Debug)]
pub(super) struct Look {
    before: HashMap<BindingKey, Instant>,
    since: HashMap<BindingKey, Instant>,
    now: Instant,
    udp_rest: Ticks,
}

impl Resting {
    /// Begins a look, at `now`; `udp_rest` is [`UDP_REST`] by the same clock. What the look does not meet is forgotten.
    pub(super) fn look(&mut self, now: Instant, udp_rest: Ticks) -> Look {
        Look {
            before: std::mem::take(&mut self.since),
            since: HashMap::new(),
            now,
            udp_rest,
        }
    }

    /// Remembers what a look has found.
    pub(super) fn remember(&mut self, look: Look) {
        self.since = look.since;
    }
}

impl Look {
    /// A binding that no flow uses. Whether its time of rest is over: then it can be taken out, and is forgotten.
    pub(super) fn is_over(&mut self, key: &BindingKey, protocol: Protocol) -> bool {
        let before = self.before.get(key).copied();
        let is_over = before.is_some_and(|since| match protocol {
            Protocol::Udp => elapsed(self.now, since) >= self.udp_rest,
            // The datapath follows TCP to its end, and the flow has been kept for minutes after that.
            // Nor does anybody come back to an identifier.
            Protocol::Tcp | Protocol::Echo => true,
        });
        if !is_over {
            self.since.insert(*key, before.unwrap_or(self.now));
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKS_PER_SECOND: u32 = 250;

    /// Bindings under a clock that the test turns.
    struct Hand {
        resting: Resting,
        start: Instant,
    }

    impl Hand {
        fn new() -> Self {
            Self {
                resting: Resting::default(),
                // The counter wraps in the middle of the rest.
                start: Instant::from_ticks(u64::from(u32::MAX) - 60 * u64::from(TICKS_PER_SECOND)),
            }
        }

        /// Looks at a time in ticks after the start; `unused` are the bindings that no flow uses. Which of them are over.
        fn look(&mut self, ticks: u32, unused: &[u16], protocol: Protocol) -> Vec<u16> {
            let now = self.start.plus(Ticks(ticks));
            let rest = Ticks(UDP_REST.as_secs() as u32 * TICKS_PER_SECOND);
            let mut look = self.resting.look(now, rest);
            let is_over = |port: &&u16| look.is_over(&binding(**port), protocol);
            let over = unused.iter().filter(is_over).copied().collect();
            self.resting.remember(look);
            over
        }
    }

    fn binding(port: u16) -> BindingKey {
        BindingKey {
            port,
            ..BindingKey::default()
        }
    }

    const fn seconds(seconds: u32) -> u32 {
        seconds * TICKS_PER_SECOND
    }

    #[test]
    fn a_port_that_carried_datagrams_rests_for_120_seconds_to_the_tick() {
        let mut hand = Hand::new();
        for ticks in [0, seconds(5), seconds(119), seconds(120) - 1] {
            assert_eq!(hand.look(ticks, &[1], Protocol::Udp), [0; 0], "{ticks}");
        }
        assert_eq!(hand.look(seconds(120), &[1], Protocol::Udp), [1]);
        // Should it be there again, it rests again.
        assert_eq!(hand.look(seconds(121), &[1], Protocol::Udp), [0; 0]);
        assert_eq!(hand.look(seconds(241), &[1], Protocol::Udp), [1]);
    }

    #[test]
    fn a_flow_that_begins_meanwhile_has_the_rest_begin_anew() {
        let mut hand = Hand::new();
        assert_eq!(hand.look(0, &[1, 2], Protocol::Udp), [0; 0]);
        // The second is in use.
        assert_eq!(hand.look(seconds(60), &[1], Protocol::Udp), [0; 0]);
        assert_eq!(hand.look(seconds(61), &[1, 2], Protocol::Udp), [0; 0]);
        assert_eq!(hand.look(seconds(120), &[1, 2], Protocol::Udp), [1]);
        assert_eq!(hand.look(seconds(180), &[2], Protocol::Udp), [0; 0]);
        assert_eq!(hand.look(seconds(181), &[2], Protocol::Udp), [2]);
    }

    #[test]
    fn a_port_that_carried_connections_is_over_at_the_second_look() {
        let mut hand = Hand::new();
        assert_eq!(hand.look(0, &[1], Protocol::Tcp), [0; 0]);
        assert_eq!(hand.look(1, &[1], Protocol::Tcp), [1]);
    }
}
