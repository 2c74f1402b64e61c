//! What the service manager that started the daemon is told, if one did (sd_notify(3)).

use std::{future::pending, time::Duration};

use log::warn;
use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// The line to the service manager.
pub(super) struct Service {
    /// When it is to be told that the daemon is alive, if it wants to know.
    watchdog: Option<Interval>,
}

impl Service {
    /// The daemon is at work; `status` says at what.
    pub(super) fn ready(status: &str) -> Self {
        tell(&[NotifyState::Ready, NotifyState::Status(status)]);
        // Half of the time that it has patience for, as sd_watchdog_enabled(3) advises.
        let half = sd_notify::watchdog_enabled().map(|patience| patience / 2);
        Self {
            watchdog: half.filter(|half| *half > Duration::ZERO).map(every),
        }
    }

    /// Returns when it is time for [`Self::alive`]; never if nobody wants to know.
    pub(super) async fn is_curious(&mut self) {
        match &mut self.watchdog {
            Some(watchdog) => drop(watchdog.tick().await),
            None => pending().await,
        }
    }

    /// The event loop goes round.
    pub(super) fn alive(&self) {
        tell(&[NotifyState::Watchdog]);
    }

    /// The daemon ends.
    pub(super) fn stopping(self) {
        tell(&[NotifyState::Stopping]);
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot notify the service manager: {error}");
    }
}
