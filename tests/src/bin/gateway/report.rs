//! A line for each check.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};

/// Set by the first Ctrl-C: the check at hand is the last, and everything is taken down.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets SIGINT and SIGTERM end the run between two checks, so that nothing is left behind.
pub(super) fn clean_up_on_interrupt() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block()?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// What was checked, and what of it failed.
pub(super) struct Report {
    linux: String,
    /// What every line says before its check.
    circumstances: String,
    checks: usize,
    failed: Vec<String>,
}

impl Report {
    /// Nothing is checked yet on a kernel.
    pub(super) fn new(linux: &str) -> Self {
        Self {
            linux: linux.to_owned(),
            circumstances: String::new(),
            checks: 0,
            failed: Vec::new(),
        }
    }

    /// Under what the next checks are made.
    pub(super) fn under(&mut self, circumstances: &str) {
        circumstances.clone_into(&mut self.circumstances);
    }

    /// Makes a check, says what came of it and how long it took, and returns whether it passed.
    ///
    /// # Errors
    /// When the run was interrupted.
    pub(super) fn check(
        &mut self,
        what: &str,
        work: impl FnOnce() -> Result<String>,
    ) -> Result<bool> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted; everything is taken down");
        }
        let start = Instant::now();
        let outcome = work();
        let seconds = start.elapsed().as_secs_f32();
        let line = format!("{} | {} | {what}", self.linux, self.circumstances);
        self.checks += 1;
        match outcome {
            Ok(found) => {
                println!("ok     {line}: {found} ({seconds:.1} s)");
                Ok(true)
            }
            Err(error) => {
                println!("FAILED {line}: {error:#} ({seconds:.1} s)");
                self.failed.push(format!("{} | {what}", self.circumstances));
                Ok(false)
            }
        }
    }

    /// How many checks were made.
    ///
    /// # Errors
    /// When one has failed.
    pub(super) fn finish(self) -> Result<usize> {
        ensure!(
            self.failed.is_empty(),
            "{} of {} checks failed: {}",
            self.failed.len(),
            self.checks,
            self.failed.join("; ")
        );
        Ok(self.checks)
    }
}
