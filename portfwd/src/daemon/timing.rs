//! When rules end, open and close.

use std::{sync::Arc, time::Duration};

use log::error;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::control::gateway::Shared;

/// While anything is timed, the clocks are looked at so often: somebody may set the one on the wall.
const GLANCE: Duration = Duration::from_millis(500);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// What the time brings about.
pub(super) struct Timing {
    gateway: Shared,
    changed: Arc<Notify>,
}

impl Timing {
    pub(super) fn new(gateway: Shared) -> Self {
        let changed = gateway.lock().timing();
        Self { gateway, changed }
    }

    /// Waits until something may be due, or may be due at another time than before. Nothing is lost
    /// if this is dropped while it waits.
    pub(super) async fn due(&self) {
        let next = self.gateway.lock().next_due();
        match next {
            Ok(None) => self.changed.notified().await,
            // Elapsed or told: either way it is time to look.
            Ok(Some(wait)) => drop(timeout(wait.min(GLANCE), self.changed.notified()).await),
            Err(error) => {
                error!("cannot tell when rules are due: {error}");
                sleep(PAUSE).await;
            }
        }
    }

    /// Does what is due; what fails is tried again.
    pub(super) fn tick(&self) {
        if let Err(error) = self.gateway.lock().tick() {
            error!("cannot end, open or close rules that are due: {error}");
        }
    }
}
