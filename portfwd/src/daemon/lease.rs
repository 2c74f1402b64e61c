//! The daemon vouches for what flows have found: while it does, they look again less often.

use std::time::Duration;

use anyhow::Result;
use log::{error, info};
use portfwd_common::abi::{Config, Epoch, Instant, Ticks};
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::options::Timeouts;
use crate::{bpf::clock::Clock, control::gateway::Shared};

/// A daemon that has died, or does not get on, ceases to vouch so long after it last did.
const LEASE: Duration = Duration::from_secs(3);
/// It vouches again this often, long before that.
const RENEWAL: Duration = Duration::from_secs(1);
/// How long a flow's look at rule, route and partner is good while the daemon vouches, at most: as long as the daemon itself goes
/// without a look around ([`super::REVIEW`]).
const LONGEST: Duration = Duration::from_secs(30);
/// Such a look is good for this part of the shortest timeout, at most.
const SHARE: u32 = 4;
/// Entries keep the low 16 bits of the time of that look, and it may lie twice as long back.
const MOST: Ticks = Ticks((1 << 15) - 1);

/// For how long entries are good while the daemon vouches; 0 if that is no longer than without it.
pub(super) fn validity(clock: &Clock, timeouts: &Timeouts, otherwise: Duration) -> Ticks {
    let shortest = timeouts
        .udp
        .min(timeouts.tcp_opening)
        .min(timeouts.tcp_established)
        .min(timeouts.tcp_closing);
    let validity = LONGEST.min(shortest / SHARE);
    if validity <= otherwise {
        return Ticks(0);
    }
    clock.ticks(validity).min(MOST)
}

/// The lease in CONFIG.
pub(super) struct Lease {
    gateway: Shared,
    renewal: Interval,
    generations: Generations,
}

impl Lease {
    pub(super) fn new(gateway: Shared) -> Self {
        let mut renewal = interval(RENEWAL);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            gateway,
            renewal,
            generations: Generations::default(),
        }
    }

    /// Waits until it is time to vouch again.
    pub(super) async fn due(&mut self) {
        self.renewal.tick().await;
    }

    /// Vouches. If that fails, flows look again every second, as without a daemon.
    pub(super) fn renew(&mut self) {
        if let Err(error) = self.try_renew() {
            error!("cannot vouch for the flows: {error:#}");
        }
    }

    fn try_renew(&mut self) -> Result<()> {
        let mut gateway = self.gateway.lock();
        let tables = gateway.tables_mut();
        let (config, now) = (tables.config()?, tables.clock().now()?);
        let epoch = self.generations.next(&config, now);
        let lease_end = now.plus(tables.clock().ticks(LEASE));
        tables.write_config(&Config {
            epoch,
            lease_end,
            ..config
        })
    }

    /// Ceases to vouch.
    pub(super) fn end(&self) {
        let mut gateway = self.gateway.lock();
        let tables = gateway.tables_mut();
        let ended = tables.config().and_then(|config| {
            let lease_end = tables.clock().now()?;
            tables.write_config(&Config {
                lease_end,
                ..config
            })
        });
        if let Err(error) = ended {
            info!("flows go on being vouched for, for a few seconds: {error:#}");
        }
    }
}

/// Which generation the daemon vouches for.
///
/// What a packet looks up while something changes may be the old, and the generation by which it is remembered the new: the
/// kernel tells that a link goes down before it takes the routes away, and packets of another CPU are under way while a rule is
/// closed. So once a change is a renewal old, the generation goes up again. And after a time in which nobody vouched, changes
/// may still be waiting to be heard.
#[derive(Debug, Default)]
struct Generations {
    last: Option<u16>,
    /// The generation went up between the last two renewals.
    has_changed: bool,
}

impl Generations {
    fn next(&mut self, config: &Config, now: Instant) -> Epoch {
        let changes = self.last != Some(config.generation());
        let has_settled = self.has_changed && !changes;
        self.has_changed = changes;
        let epoch = if has_settled || !config.is_leased(now) {
            config.epoch.next()
        } else {
            config.epoch
        };
        self.last = Some(epoch.generation());
        epoch
    }
}

#[cfg(test)]
mod tests {
    use portfwd_common::abi::Bank;

    use super::*;

    const NOW: Instant = Instant::from_ticks(0xffff_ffff);

    fn leased(generation: u16) -> Config {
        Config {
            epoch: Epoch::new(generation, Bank::B),
            leased_validity: Ticks(100),
            lease_end: NOW.plus(Ticks(10)),
            ..Config::default()
        }
    }

    #[test]
    fn a_change_makes_flows_look_again_once_it_has_settled() {
        let mut generations = Generations::default();
        let mut vouched_for = |told| generations.next(&leased(told), NOW).generation();
        assert_eq!(vouched_for(7), 7, "whatever was before has just begun");
        assert_eq!(vouched_for(7), 8, "and has settled");
        assert_eq!(vouched_for(8), 8, "its own step is no change");
        assert_eq!(vouched_for(8), 8);
        assert_eq!(vouched_for(9), 9, "a change");
        assert_eq!(vouched_for(12), 12, "and more");
        assert_eq!(vouched_for(12), 13, "all of which has settled");
        assert_eq!(vouched_for(13), 13);
        assert_eq!(vouched_for(u16::MAX), u16::MAX);
        assert_eq!(vouched_for(u16::MAX), 0);
    }

    #[test]
    fn after_a_time_in_which_nobody_vouched_flows_look_again() {
        let mut generations = Generations::default();
        for told in [7, 8] {
            let _ = generations.next(&leased(told), NOW);
        }
        let lapsed = Config {
            lease_end: NOW,
            ..leased(8)
        };
        let epoch = Epoch::new(9, Bank::B);
        assert_eq!(generations.next(&lapsed, NOW), epoch);
        assert_eq!(generations.next(&leased(9), NOW), epoch);
    }
}
