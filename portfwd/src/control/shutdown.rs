//! The request to end: from a signal, or from the control socket.

use std::sync::Arc;

use tokio::sync::watch;

/// Shared by everybody who may ask the daemon to end, or who ends with it.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<watch::Sender<bool>>);

impl Shutdown {
    /// Nobody has asked yet.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    /// Asks everybody to end.
    pub fn request(&self) {
        self.0.send_replace(true);
    }

    /// Returns once somebody has asked, at once if that was before.
    pub async fn requested(&self) {
        // An error would mean that the sender is gone, which `self` holds.
        let _ = self.0.subscribe().wait_for(|asked| *asked).await;
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}
