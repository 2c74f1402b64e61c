//! The chaos matrix: everything that can happen to a gateway, with every kind of traffic going on, and what each kind loses by it.

mod disturbance;
mod traffic;

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::address::Family;
use crate::daemon::Mode;
use crate::deadline::here;

pub use disturbance::Disturbance;
pub use traffic::{Kind, Tally};

use disturbance::Scene;
use traffic::Load;

/// How often a disturbance happens, with traffic between one time and the next.
const TIMES: u32 = 3;
/// Beside a time in which nothing can come through, what a kind of traffic may take to go on: the next question, a neighbour's
/// answer, a timer of TCP's that has doubled meanwhile.
const SLACK: Duration = Duration::from_secs(3);

/// How long after a way is back questions may go without an answer: the kernel looks at carriers once a second, and asks for a
/// neighbour that it has not found a second later again.
const AFTER: Duration = Duration::from_secs(1);
/// How long after an address was replaced flows to it may live, and new ones to the new one not begin.
const MOVED: Duration = Duration::from_secs(1);

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
    Outage {
        /// The longest time without a way.
        longest: Duration,
        /// All of them together.
        all: Duration,
    },
    /// What is sent to an address until it is known to be another.
    Move,
}

impl Bound {
    /// Fails if more was lost, or nothing came through for longer.
    fn expect(self, kind: Kind, tally: Tally) -> Result<()> {
        ensure!(
            tally.lost <= self.most_lost(kind),
            "{kind:?} lost more than the {} that {self:?} may cost: {tally}",
            self.most_lost(kind)
        );
        let is_prompt = match self {
            Self::Nothing | Self::Replacement => true,
            // A timer of TCP's that runs at the end of the outage began when half of it was over, at the earliest.
            Self::Outage { longest, .. } => tally.longest <= 2 * longest + SLACK,
            // The question that was under way, and then one by the new address.
            Self::Move => tally.longest <= kind.most() + here(MOVED),
        };
        ensure!(is_prompt, "{kind:?} waited longer than {self:?}: {tally}");
        Ok(())
    }

    /// How many questions of a kind may go without an answer, in all.
    fn most_lost(self, kind: Kind) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Replacement if kind == Kind::Fragments => u64::from(TIMES) * CAUGHT,
            Self::Replacement => 0,
            Self::Outage { .. } if kind.is_one_connection() => 0,
            Self::Outage { all, .. } => asked_within(kind, all + TIMES * AFTER),
            Self::Move => asked_within(kind, TIMES * here(MOVED)),
        }
    }
}

/// How many questions of a kind end without an answer in a time at most: one after the other for as long as it takes, and each time
/// one that was under way when it began.
fn asked_within(kind: Kind, time: Duration) -> u64 {
    (time.as_nanos() / kind.least().as_nanos()) as u64 + u64::from(TIMES)
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
        for kind in Kind::ALL {
            let cell = self.cells.iter().find(|(of, _)| *of == kind);
            let text = cell.map_or("-".to_owned(), |(_, tally)| tally.to_string());
            write!(f, " {text:>18}")?;
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
    let moves = disturbance == Disturbance::WanMove;
    let kinds: Vec<_> = Kind::ALL
        .into_iter()
        .filter(|kind| !moves || kind.can_move())
        .collect();
    let load = Load::start(&scene.lab, family, &kinds)?;
    load.wait_for_more()?;
    let (mut longest, mut all) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..TIMES {
        let outage = scene.disturb(disturbance, &load)?;
        longest = longest.max(outage);
        all += outage;
        load.wait_for_more()
            .with_context(|| format!("after {disturbance:?}"))?;
    }
    Ok(Row {
        disturbance,
        bound: if moves {
            Bound::Move
        } else if longest != Duration::ZERO {
            Bound::Outage { longest, all }
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
        // Three outages, and three seconds behind them.
        let outage = Bound::Outage {
            longest: Duration::from_millis(500),
            all: Duration::from_millis(1_200),
        };
        let prompt = (Kind::Dns.most() + here(MOVED)).as_millis() as u64;
        let few = Bound::Move.most_lost(Kind::Dns);
        for (bound, kind, tally, is_kept) in [
            (Bound::Nothing, Kind::UdpStream, tally(0, 9_000), true),
            (Bound::Nothing, Kind::UdpStream, tally(1, 10), false),
            (Bound::Replacement, Kind::UdpStream, tally(1, 10), false),
            (Bound::Replacement, Kind::Fragments, tally(12, 10), true),
            (Bound::Replacement, Kind::Fragments, tally(13, 10), false),
            (outage, Kind::Dns, tally(11, 3_900), true),
            (outage, Kind::Dns, tally(12, 3_900), false),
            (outage, Kind::Dns, tally(11, 4_100), false),
            (outage, Kind::ShortTcp, tally(843, 10), true),
            (outage, Kind::ShortTcp, tally(844, 10), false),
            (outage, Kind::BulkTcp, tally(0, 3_900), true),
            (outage, Kind::BulkTcp, tally(1, 10), false),
            (Bound::Move, Kind::Dns, tally(few, prompt), true),
            (Bound::Move, Kind::Dns, tally(few, prompt + 1), false),
            (Bound::Move, Kind::Dns, tally(few + 1, 10), false),
        ] {
            let kept = bound.expect(kind, tally);
            assert_eq!(kept.is_ok(), is_kept, "{bound:?} {kind:?} {kept:?}");
        }
    }
}
