//! When the connection table is swept.

use std::{collections::HashSet, pin::Pin, time::Duration};

use anyhow::{Context, Result};
use log::error;
use tokio::{
    task::JoinHandle,
    time::{Instant, Sleep},
};

use super::memory;
use crate::bpf::{Tables, pools::PoolKeeper, sweep::Sweeper, usages::UsageKeeper};

/// Between two sweeps, at least.
const PAUSE: Duration = Duration::from_secs(5);
/// And at most, however long they take: limits on numbers of flows trust a count for twice that.
const LONGEST: Duration = Duration::from_secs(300);
/// A sweep of a large table takes this share of the time: 1 in 100.
const SHARE: u32 = 100;

/// The sweeps, one after the other, each on a thread where it may take its time.
pub(super) struct Sweeping {
    step: Step,
    /// The next pause is left out.
    hurried: bool,
}

enum Step {
    Pause(Pin<Box<Sleep>>, Box<Sweeps>),
    Sweep(JoinHandle<Box<Sweeps>>),
    /// Between the two.
    Neither,
}

/// What goes from sweep to sweep.
struct Sweeps {
    sweeper: Sweeper,
    /// Whether the next one goes through the tables whatever there is to do.
    is_forced: bool,
    /// How long the last sweep took.
    took: Duration,
    /// What the last sweep found; `None` if it failed.
    found: Option<Found>,
}

/// Which rules have flows.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// When the sweep began.
    pub(super) began: std::time::Instant,
    /// Slots that entries of the connection table named.
    pub(super) rules: HashSet<u16>,
}

impl Sweeping {
    /// The first sweep comes after a pause.
    pub(super) fn start(tables: Tables, pools: PoolKeeper, usages: UsageKeeper) -> Self {
        let sweeps = Box::new(Sweeps {
            sweeper: Sweeper::new(tables, pools, usages),
            is_forced: false,
            took: Duration::ZERO,
            found: None,
        });
        Self {
            step: sweeps.pause(PAUSE),
            hurried: false,
        }
    }

    /// Has the next sweep begin at once: there is something to end that no timeout tells.
    pub(super) fn hurry(&mut self) {
        match &mut self.step {
            Step::Pause(sleep, sweeps) => {
                sweeps.is_forced = true;
                sleep.as_mut().reset(Instant::now());
            }
            // What has just been swept may have been swept too early.
            Step::Sweep(_) | Step::Neither => self.hurried = true,
        }
    }

    /// Waits for the end of a pause or of a sweep, and says what that has found; an error means that a sweep has panicked. Nothing
    /// is lost if this is dropped while it waits.
    pub(super) async fn next(&mut self) -> Result<Option<Found>> {
        match &mut self.step {
            Step::Pause(sleep, _) => sleep.await,
            Step::Sweep(sweep) => {
                let mut sweeps = sweep
                    .await
                    .context("a sweep of the connection table has ended early")?;
                let found = sweeps.found.take();
                let length = PAUSE.max(sweeps.took * SHARE).min(LONGEST);
                self.step = sweeps.pause(length);
                if std::mem::take(&mut self.hurried) {
                    self.hurry();
                }
                return Ok(found);
            }
            Step::Neither => {}
        }
        if let Step::Pause(_, sweeps) = std::mem::replace(&mut self.step, Step::Neither) {
            self.step = Step::Sweep(tokio::task::spawn_blocking(|| sweeps.sweep()));
        }
        Ok(None)
    }
}

impl Sweeps {
    fn pause(self: Box<Self>, length: Duration) -> Step {
        Step::Pause(Box::pin(tokio::time::sleep(length)), self)
    }

    fn sweep(mut self: Box<Self>) -> Box<Self> {
        let began = std::time::Instant::now();
        match self.sweep_once() {
            Ok(Some(rules)) => self.found = Some(Found { began, rules }),
            Ok(None) => {}
            // Expiry does not need the sweep, and the next one may succeed.
            Err(error) => error!("cannot sweep the connection table: {error:#}"),
        }
        self.took = began.elapsed();
        // What was asked for since the last sweep may have taken much, too.
        memory::give_back();
        self
    }

    /// The slots of rules that have flows; `None` if there is nothing to learn but what the last sweep found.
    fn sweep_once(&mut self) -> Result<Option<HashSet<u16>>> {
        if !self.is_forced && !self.sweeper.is_due()? {
            // What the gateway itself uses may have changed all the same.
            self.sweeper.keep_others()?;
            return Ok(self.sweeper.left_nothing().then(HashSet::new));
        }
        let swept = self.sweeper.sweep()?;
        self.is_forced = false;
        Ok(Some(swept.rules))
    }
}
