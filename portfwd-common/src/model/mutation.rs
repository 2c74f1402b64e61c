//! Inputs that nobody thought of: kept ones, changed at random.

use std::time::{Duration, Instant};

/// The variable that says for how many minutes to go on: `cargo xtask fuzz` sets it.
pub const MINUTES: &str = "PORTFWD_FUZZ_MINUTES";

/// Bytes that bring parsers to their limits.
const EDGES: [u8; 12] = [0, 1, 4, 5, 0x0f, 0x40, 0x45, 0x60, 0x7f, 0x80, 0xfe, 0xff];

/// A source of numbers, the same ones for the same seed (splitmix64).
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub const fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, or 0 if that is 0.
    pub const fn below(&mut self, end: usize) -> usize {
        if end == 0 {
            return 0;
        }
        (self.number() % end as u64) as usize
    }
}

/// Changes an input in one to eight places. `other` is another one, of which a piece may come in; `words` are pieces that mean
/// something.
pub fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8], words: &[&[u8]]) {
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        let end = (at + random.below(16)).min(input.len());
        match random.below(9) {
            0 | 1 if at < input.len() => input[at] ^= 1 << random.below(8),
            2 | 3 if at < input.len() => input[at] = EDGES[random.below(EDGES.len())],
            4 if at < input.len() => input[at] = random.number() as u8,
            5 => {
                input.drain(at..end);
            }
            6 => {
                let copy = input[at..end].to_vec();
                input.splice(at..at, copy);
            }
            7 => {
                let from = random.below(other.len());
                let to = (from + random.below(40)).min(other.len());
                input.splice(at..end, other[from..to].iter().copied());
            }
            _ if !words.is_empty() => {
                let word = words[random.below(words.len())];
                input.splice(at..end, word.iter().copied());
            }
            _ => input.truncate(at),
        }
    }
}

/// How long a run lasts: so many inputs every day, so many minutes when [`MINUTES`] says so.
#[derive(Clone, Copy, Debug)]
pub enum Run {
    /// Inputs that are left.
    Inputs(u64),
    /// When it ends.
    Until(Instant),
}

impl Run {
    /// As the environment has it.
    ///
    /// # Panics
    ///
    /// If the variable is no number.
    #[must_use]
    pub fn of_environment(inputs: u64) -> Self {
        match std::env::var(MINUTES) {
            Ok(minutes) => {
                let minutes: f64 = minutes
                    .parse()
                    .unwrap_or_else(|_| panic!("{MINUTES}={minutes} is not a number"));
                Self::Until(Instant::now() + Duration::from_secs_f64(minutes * 60.0))
            }
            Err(_) => Self::Inputs(inputs),
        }
    }

    /// Whether there is another input.
    pub fn goes_on(&mut self) -> bool {
        match self {
            Self::Inputs(0) => false,
            Self::Inputs(left) => {
                *left -= 1;
                true
            }
            Self::Until(end) => Instant::now() < *end,
        }
    }

    /// Where its numbers begin: every day at the same place, a long run anywhere.
    #[must_use]
    pub fn seed(self) -> u64 {
        match self {
            Self::Inputs(_) => 20_261_127,
            Self::Until(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as u64),
        }
    }
}
