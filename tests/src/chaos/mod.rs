//! The chaos matrix: everything that can happen to a gateway, with every kind of traffic going on, and what each kind loses by it.

mod disturbance;
mod traffic;

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::address::Family;
use crate::daemon::Mode;

pub use disturbance::Disturbance;
pub use traffic::{Kind, Tally};

use disturbance::Scene;
use traffic::Load;

/// How often a disturbance happens, with traffic between one time and the next.
const TIMES: u32 = 3;
/// Beside a time in which nothing can come through, what a kind of traffic may take to go on: the next question, a neighbour's
/// answer, a timer of TCP's that has doubled meanwhile.
const SLACK: Duration = Duration::from_secs(3);

/// Datagrams in fragments that may meet the programs of two objects, each time that one takes another's place: those are dropped
/// (`docs/design/0017`). They always go from program to program, and these are replaced one by one.
const CAUGHT: u64 = 4;

/// What a disturbance may cost traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Nothing at all.
    Nothing,
    /// Nothing but the few datagrams in fragments that go from an old program to a new one.
    Replacement,
    /// What is sent while there is no way; no connection breaks.
    Outage(Duration),
}

impl Bound {
    /// Fails if more was lost.
    fn expect(self, kind: Kind, tally: Tally) -> Result<()> {
        let is_kept = match self {
            Self::Nothing => tally.lost == 0,
            Self::Replacement => {
                tally.lost == 0
                    || kind == Kind::Fragments && tally.lost <= u64::from(TIMES) * CAUGHT
            }
            // A timer of TCP's that runs at the end of the outage began when half of it was over, at the earliest.
            Self::Outage(length) => {
                tally.longest <= 2 * length + SLACK
                    && (tally.lost == 0 || !kind.is_one_connection())
            }
        };
        ensure!(is_kept, "{kind:?} lost more than {self:?}: {tally}");
        Ok(())
    }
}

/// What a disturbance has cost each kind of traffic.
#[derive(Clone, Debug)]
pub struct Row {
    /// What happened.
    pub disturbance: Disturbance,
    /// What it may cost.
    pub bound: Bound,
    /// What it did.
    pub cells: Vec<(Kind, Tally)>,
}

impl Row {
    /// Fails if any kind of traffic lost more than the disturbance may cost.
    pub fn expect_bounded(&self) -> Result<()> {
        for (kind, tally) in &self.cells {
            self.bound
                .expect(*kind, *tally)
                .with_context(|| format!("{:?}", self.disturbance))?;
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<16}", self.disturbance.name())?;
        for (_, tally) in &self.cells {
            write!(f, " {:>18}", tally.to_string())?;
        }
        Ok(())
    }
}

/// The matrix's head, above its [`Row`]s.
#[must_use]
pub fn head() -> String {
    let mut line = format!("{:<16}", "");
    for kind in Kind::ALL {
        line += &format!(" {:>18}", kind.name());
    }
    line
}

/// Has a disturbance happen a few times with every kind of traffic going on.
///
/// # Errors
/// When the lab, the daemon or the disturbance fails, or traffic does not go on at all.
pub fn run(mode: Mode, family: Family, disturbance: Disturbance) -> Result<Row> {
    let mut scene = Scene::new(mode, family, disturbance)?;
    let load = Load::start(&scene.lab, family)?;
    load.wait_for_more()?;
    let mut longest = Duration::ZERO;
    for _ in 0..TIMES {
        longest = longest.max(scene.disturb(disturbance)?);
        load.wait_for_more()
            .with_context(|| format!("after {disturbance:?}"))?;
    }
    Ok(Row {
        disturbance,
        bound: if longest != Duration::ZERO {
            Bound::Outage(longest)
        } else if disturbance == Disturbance::Upgrade {
            Bound::Replacement
        } else {
            Bound::Nothing
        },
        cells: load.finish()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_held_against_its_bound() {
        let tally = |lost, longest| Tally {
            answered: 100,
            lost,
            longest: Duration::from_millis(longest),
        };
        let outage = Bound::Outage(Duration::from_millis(500));
        for (bound, kind, tally, is_kept) in [
            (Bound::Nothing, Kind::UdpStream, tally(0, 9_000), true),
            (Bound::Nothing, Kind::UdpStream, tally(1, 10), false),
            (Bound::Replacement, Kind::UdpStream, tally(1, 10), false),
            (Bound::Replacement, Kind::Fragments, tally(12, 10), true),
            (Bound::Replacement, Kind::Fragments, tally(13, 10), false),
            (outage, Kind::Dns, tally(9, 3_900), true),
            (outage, Kind::Dns, tally(9, 4_100), false),
            (outage, Kind::BulkTcp, tally(0, 3_900), true),
            (outage, Kind::BulkTcp, tally(1, 10), false),
        ] {
            let kept = bound.expect(kind, tally);
            assert_eq!(kept.is_ok(), is_kept, "{bound:?} {kind:?} {kept:?}");
        }
    }
}
