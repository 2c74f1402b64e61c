//! When the names that targets are get resolved again.

use std::{pin::Pin, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    task::JoinHandle,
    time::{Sleep, sleep},
};

use crate::{
    control::gateway::Shared,
    resolve::{Answers, resolve_all},
};

/// Rounds of lookups, one after the other, with a pause in between.
pub(super) struct Naming {
    gateway: Shared,
    pause: Duration,
    step: Step,
}

enum Step {
    Pause(Pin<Box<Sleep>>),
    Lookups(JoinHandle<Answers>),
}

impl Naming {
    /// The first round begins at once: names may lead elsewhere than they did when the last daemon ended.
    pub(super) fn start(gateway: Shared, pause: Duration) -> Self {
        Self {
            gateway,
            pause,
            step: Step::Pause(Box::pin(sleep(Duration::ZERO))),
        }
    }

    /// Waits for the end of a pause or of a round; an error means that the round has panicked. Nothing is lost if this is
    /// dropped while it waits.
    pub(super) async fn next(&mut self) -> Result<()> {
        match &mut self.step {
            Step::Pause(pause) => {
                pause.await;
                let names = self.gateway.lock().names();
                self.step = Step::Lookups(tokio::spawn(resolve_all(names)));
            }
            Step::Lookups(round) => {
                let answers = round
                    .await
                    .context("the lookups of names have ended early")?;
                self.step = Step::Pause(Box::pin(sleep(self.pause)));
                self.gateway.lock().follow_names(&answers);
            }
        }
        Ok(())
    }
}
