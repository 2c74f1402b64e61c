//! Finding a port that nobody has, in a bounded number of steps and without luck.
//!
//! Half the words of a pool hold even ports, half odd ones, and a word in the summary says of 64 of them which are full. So a
//! search looks at the word it starts in, at the eight words of the summary at most, and at the word that they name. It finds a
//! port whenever there is one, however full the pool is.
//!
//! The client's own port is taken if it is free, which keeps its class, its parity and its unpredictability. Otherwise the
//! search begins at a random port of the same class and parity (RFC 4787 REQ-3a and REQ-4, RFC 6056).

use super::tables::{Repeat, Repeated, Repeats};
use crate::abi::pool::{FULL_WORDS, POOL_WORDS, PoolRange, port_bit, port_of, port_word};

/// A pool's words, each of which changes at once, whoever else changes it.
pub trait PoolWords: Copy {
    /// A word of [`crate::abi::Pool::taken`].
    fn taken(self, word: usize) -> u64;
    /// Sets bits of such a word; returns what it was before.
    fn take(self, word: usize, bits: u64) -> u64;
    /// Clears bits of such a word.
    fn give(self, word: usize, bits: u64);
    /// A word of [`crate::abi::Pool::full`].
    fn full(self, word: usize) -> u64;
    /// Sets a bit of such a word.
    fn set_full(self, word: usize, bit: u64);
    /// Clears a bit of such a word.
    fn clear_full(self, word: usize, bit: u64);
}

/// What a client would have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its own port.
    pub port: u16,
    /// What the rule leaves it.
    pub range: PoolRange,
    /// Where to look if its own port is not to be had.
    pub seed: u32,
}

/// A search in progress. It lies in the workspace: what comes from memory has no history, so that the verifier finds every step
/// to begin as the one before it did, rather than following a million paths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// What is searched for.
    wish: Wish,
    /// The next way to please the client.
    choice: u32,
    /// Parity of the ports that are looked at; the others are half the number of such a port.
    odd: u32,
    /// The first of them.
    first: u32,
    /// The one that the search began with.
    start: u32,
    /// The one to look at.
    at: u32,
    /// The last one to look at.
    last: u32,
    /// 0 from the start to the end, 1 from the beginning to the start.
    pass: u32,
    /// The port that was found; 0 if none was.
    found: u32,
}

/// A search in its pool.
#[derive(Debug)]
struct Hunt<'a, P> {
    pool: P,
    search: &'a mut Search,
}

/// The first port that is not privileged.
const UNPRIVILEGED: u32 = 1_024;

/// A search that meets nobody else takes at most seven steps for each of four choices. The others are for ports that other CPUs
/// take while it looks at them.
const STEPS: u32 = 100;

/// Takes a port; `None` if no port that the client may have is left.
#[inline(always)]
pub fn take<P: PoolWords>(
    pool: P,
    wish: &Wish,
    search: &mut Search,
    repeat: &impl Repeats,
) -> Option<u16> {
    if wish.range.has(wish.port) && take_one(pool, port_word(wish.port), port_bit(wish.port)) {
        return Some(wish.port);
    }
    *search = Search {
        wish: *wish,
        at: 1,
        pass: 1,
        ..Search::default()
    };
    repeat.repeat(STEPS, &mut Hunt { pool, search });
    let found = search.found as u16;
    (found != 0).then_some(found)
}

/// Gives a port back.
#[inline(always)]
pub fn give<P: PoolWords>(pool: P, port: u16) {
    let word = port_word(port);
    pool.give(word, port_bit(port));
    pool.clear_full(word >> 6, 1 << (word & 63));
}

/// Changes a word as user space wants it.
#[inline(always)]
pub fn change<P: PoolWords>(pool: P, word: usize, take: u64, give: u64) {
    if give != 0 {
        pool.give(word, give);
        pool.clear_full(word >> 6, 1 << (word & 63));
    }
    if take != 0 {
        let before = pool.take(word, take);
        note_full(pool, word, before | take);
    }
}

/// Ways to please a client, best first: class and parity kept, class kept, parity kept, neither.
const CHOICES: u32 = 4;

impl Search {
    /// Goes on with the ports of the next choice; false if that was the last. A privileged port is given to a client that has none
    /// only if the rule's range has no other: the privilege is what some services go by.
    #[inline(always)]
    fn next_choice(&mut self) -> bool {
        let wish = self.wish;
        let (first, last) = (u32::from(wish.range.first), u32::from(wish.range.last));
        let port = u32::from(wish.port);
        let privileged = last < UNPRIVILEGED || port < UNPRIVILEGED;
        let choice = self.choice;
        if choice >= if privileged { CHOICES } else { CHOICES / 2 } {
            return false;
        }
        let (first, last) = if privileged && choice < CHOICES / 2 {
            (first, last.min(UNPRIVILEGED - 1))
        } else {
            (first.max(UNPRIVILEGED), last)
        };
        let odd = (port ^ choice) & 1;
        let (first, end) = ((first + 1 - odd) >> 1, (last + 2 - odd) >> 1);
        let count = end.saturating_sub(first);
        // Of no ports, the first is beyond the last.
        let start = first + wish.seed.checked_rem(count).unwrap_or(0);
        *self = Self {
            choice: choice + 1,
            odd,
            first,
            start,
            at: start,
            last: (first + count).saturating_sub(1),
            pass: u32::from(count == 0),
            ..*self
        };
        true
    }
}

impl<P: PoolWords> Repeated for Hunt<'_, P> {
    /// Looks at the rest of one word, and takes its first free port.
    #[inline(always)]
    fn step(&mut self) -> Repeat {
        let (pool, search) = (self.pool, &mut *self.search);
        let at = search.at;
        if at > search.last {
            // From the start to the end, then from the beginning to the start, then another choice.
            if search.pass == 0 && search.start != search.first {
                search.pass = 1;
                search.at = search.first;
                search.last = search.start - 1;
                return Repeat::GoOn;
            }
            return if search.next_choice() {
                Repeat::GoOn
            } else {
                Repeat::Enough
            };
        }
        let word = ((search.odd << 9) | (at >> 6)) as usize & (POOL_WORDS - 1);
        let free = !pool.taken(word) & (u64::MAX << (at & 63));
        if free == 0 {
            search.at = next_word(pool, search.odd, at);
            return Repeat::GoOn;
        }
        let bit = free.trailing_zeros();
        let found = (at & !63) | bit;
        // Beyond the end, or another CPU is faster.
        search.at = found + 1;
        if found <= search.last && take_one(pool, word, 1 << bit) {
            search.found = u32::from(port_of(word, bit));
            return Repeat::Enough;
        }
        Repeat::GoOn
    }
}

/// Words of the summary of one parity.
const SUMMARIES: u32 = FULL_WORDS as u32 / 2;

/// The first port of the next word that has one left; beyond all ports if there is none.
#[inline(always)]
fn next_word<P: PoolWords>(pool: P, odd: u32, at: u32) -> u32 {
    let next = (at >> 6) + 1;
    let (mut summary, mut wanted) = (next >> 6, u64::MAX << (next & 63));
    let mut steps = 0;
    while steps < SUMMARIES && summary < SUMMARIES {
        let open = !pool.full((odd * SUMMARIES + summary) as usize & (FULL_WORDS - 1)) & wanted;
        if open != 0 {
            return (summary << 12) | (open.trailing_zeros() << 6);
        }
        (summary, wanted) = (summary + 1, u64::MAX);
        steps += 1;
    }
    NOWHERE
}

/// Beyond all ports.
const NOWHERE: u32 = 1 << 15;

/// Takes a port if nobody has it.
#[inline(always)]
fn take_one<P: PoolWords>(pool: P, word: usize, bit: u64) -> bool {
    let before = pool.take(word, bit);
    if before & bit != 0 {
        return false;
    }
    note_full(pool, word, before | bit);
    true
}

/// Keeps the summary: a full word is marked, and unmarked again if a port came back meanwhile.
#[inline(always)]
fn note_full<P: PoolWords>(pool: P, word: usize, now: u64) {
    if now == u64::MAX {
        let bit = 1 << (word & 63);
        pool.set_full(word >> 6, bit);
        if pool.taken(word) != u64::MAX {
            pool.clear_full(word >> 6, bit);
        }
    }
}
