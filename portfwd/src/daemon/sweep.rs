//! When the connection table is swept.

use std::{pin::Pin, time::Duration};

use anyhow::{Context, Result};
use tokio::{task::JoinHandle, time::Sleep};

use crate::bpf::{
    Tables,
    flows::{Sweeper, Swept},
};

/// Between two sweeps, at least.
const PAUSE: Duration = Duration::from_secs(5);
/// A sweep of a large table takes this share of the time: 1 in 100.
const SHARE: u32 = 100;

/// The sweeps, one after the other, each on a thread where it may take its time.
pub(super) struct Sweeping {
    step: Step,
    /// Flows ever created and entries left, as the last sweep found them.
    last: Option<(u64, u64)>,
}

enum Step {
    Pause(Pin<Box<Sleep>>, Box<Sweeper>),
    Sweep(JoinHandle<(Box<Sweeper>, Result<Outcome>)>),
    /// The thread of a sweep is gone, which ends the daemon.
    Lost,
}

struct Outcome {
    created: u64,
    swept: Swept,
    took: Duration,
}

impl Sweeping {
    /// The first sweep comes after a pause.
    pub(super) fn start(tables: Tables) -> Self {
        Self {
            step: Step::Pause(pause(PAUSE), Box::new(Sweeper::new(tables))),
            last: None,
        }
    }

    /// Waits for the end of a pause or of a sweep. Nothing is lost if this is dropped while it waits.
    pub(super) async fn next(&mut self) -> Result<()> {
        match &mut self.step {
            Step::Pause(sleep, _) => {
                sleep.await;
                let Step::Pause(_, sweeper) = std::mem::replace(&mut self.step, Step::Lost) else {
                    return Ok(());
                };
                self.step = self.after_pause(sweeper)?;
            }
            Step::Sweep(sweep) => {
                let (sweeper, outcome) = sweep.await.context("the thread of a sweep has ended")?;
                let outcome = outcome.context("cannot sweep the connection table")?;
                let left =
                    outcome.swept.entries - 2 * outcome.swept.expired - outcome.swept.orphans;
                self.last = Some((outcome.created, left));
                self.step = Step::Pause(pause(PAUSE.max(outcome.took * SHARE)), sweeper);
            }
            Step::Lost => std::future::pending().await,
        }
        Ok(())
    }

    /// An empty table to which nothing was added needs no sweep: an idle gateway reads one array every few seconds.
    fn after_pause(&self, sweeper: Box<Sweeper>) -> Result<Step> {
        if self.last == Some((sweeper.flows_created()?, 0)) {
            return Ok(Step::Pause(pause(PAUSE), sweeper));
        }
        Ok(Step::Sweep(tokio::task::spawn_blocking(move || {
            sweep(sweeper)
        })))
    }
}

fn pause(length: Duration) -> Pin<Box<Sleep>> {
    Box::pin(tokio::time::sleep(length))
}

fn sweep(mut sweeper: Box<Sweeper>) -> (Box<Sweeper>, Result<Outcome>) {
    let began = std::time::Instant::now();
    let outcome = sweeper.flows_created().and_then(|created| {
        let swept = sweeper.sweep()?;
        Ok(Outcome {
            created,
            swept,
            took: began.elapsed(),
        })
    });
    (sweeper, outcome)
}
