//! Places in the maps: rule slots and blocks of counters.

use std::collections::{BTreeMap, VecDeque};

/// Free elements of RULES. The one that was freed longest ago is taken first: flows of the rule
/// that had it are gone by then.
#[derive(Debug)]
pub struct Slots {
    free: VecDeque<u16>,
}

/// Free elements of COUNTERS, as runs by first element. First fit.
#[derive(Debug)]
pub struct Blocks {
    free: BTreeMap<u32, u32>,
}

impl Slots {
    /// Slots 1 to `capacity - 1` but those for which `taken` says so, beginning behind `cursor`,
    /// the slot given out last.
    pub fn new(capacity: u16, cursor: u16, taken: impl Fn(u16) -> bool) -> Self {
        let behind = cursor.saturating_add(1)..capacity;
        let before = 1..capacity.min(cursor.saturating_add(1));
        Self {
            free: behind.chain(before).filter(|slot| !taken(*slot)).collect(),
        }
    }

    /// A free slot.
    pub fn take(&mut self) -> Option<u16> {
        self.free.pop_front()
    }

    /// Gives a slot back that was in use.
    pub fn give(&mut self, slot: u16) {
        self.free.push_back(slot);
    }

    /// Gives a slot back that was never used: it is the next again.
    pub fn untake(&mut self, slot: u16) {
        self.free.push_front(slot);
    }
}

impl Blocks {
    /// All of `capacity` elements.
    pub fn new(capacity: u32) -> Self {
        Self {
            free: if capacity == 0 {
                BTreeMap::new()
            } else {
                BTreeMap::from([(0, capacity)])
            },
        }
    }

    /// The first `count` elements that lie together.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        let (first, length) = self
            .free
            .iter()
            .map(|(first, length)| (*first, *length))
            .find(|(_, length)| *length >= count)?;
        self.cut(first, length, first, count);
        Some(first)
    }

    /// Takes a certain block; `false` if any of it is taken.
    #[must_use]
    pub fn reserve(&mut self, first: u32, count: u32) -> bool {
        let Some((run, length)) = self
            .free
            .range(..=first)
            .next_back()
            .map(|(run, length)| (*run, *length))
        else {
            return false;
        };
        let fits = u64::from(first) + u64::from(count) <= u64::from(run) + u64::from(length);
        if fits {
            self.cut(run, length, first, count);
        }
        fits
    }

    /// Takes `count` elements from `first` out of the free run of `length` at `run`, which holds
    /// them.
    fn cut(&mut self, run: u32, length: u32, first: u32, count: u32) {
        self.free.remove(&run);
        if first > run {
            self.free.insert(run, first - run);
        }
        let rest = (run + length) - (first + count);
        if rest > 0 {
            self.free.insert(first + count, rest);
        }
    }

    /// Gives a block back.
    pub fn give(&mut self, first: u32, count: u32) {
        let (mut first, mut count) = (first, count);
        if let Some(after) = self.free.remove(&(first + count)) {
            count += after;
        }
        if let Some((run, length)) = self
            .free
            .range(..first)
            .next_back()
            .map(|(run, length)| (*run, *length))
            && run + length == first
        {
            self.free.remove(&run);
            first = run;
            count += length;
        }
        self.free.insert(first, count);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slot_comes_back_after_all_others() {
        let mut slots = Slots::new(5, 0, |_| false);
        assert_eq!(slots.take(), Some(1));
        slots.give(1);
        assert_eq!(
            [
                slots.take(),
                slots.take(),
                slots.take(),
                slots.take(),
                slots.take()
            ],
            [Some(2), Some(3), Some(4), Some(1), None]
        );
    }

    #[test]
    fn a_new_daemon_goes_on_behind_the_last_slot() {
        let mut slots = Slots::new(6, 3, |slot| slot == 5);
        assert_eq!(
            [
                slots.take(),
                slots.take(),
                slots.take(),
                slots.take(),
                slots.take()
            ],
            [Some(4), Some(1), Some(2), Some(3), None]
        );
        let mut slots = Slots::new(4, u16::MAX, |_| false);
        assert_eq!(
            [slots.take(), slots.take(), slots.take(), slots.take()],
            [Some(1), Some(2), Some(3), None]
        );
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_and_come_back_whole(
            steps in prop::collection::vec(
                (any::<bool>(), 1..40u32, any::<prop::sample::Index>()), 1..200,
            ),
        ) {
            const CAPACITY: u32 = 500;
            let mut blocks = Blocks::new(CAPACITY);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, count, index) in steps {
                if take || taken.is_empty() {
                    let mut map = vec![false; CAPACITY as usize];
                    taken.iter().for_each(|(f, c)| map[*f as usize..(*f + *c) as usize].fill(true));
                    let is_free = |f: &u32| map[*f as usize..(*f + count) as usize].iter().all(|t| !t);
                    let fits = (0..=CAPACITY - count).find(is_free);
                    prop_assert_eq!(blocks.take(count), fits);
                    taken.extend(fits.map(|first| (first, count)));
                } else {
                    let (first, count) = taken.swap_remove(index.index(taken.len()));
                    prop_assert!(!blocks.reserve(first, 1));
                    blocks.give(first, count);
                    prop_assert!(blocks.reserve(first, count));
                    blocks.give(first, count);
                }
            }
            taken.into_iter().for_each(|(first, count)| blocks.give(first, count));
            prop_assert_eq!(blocks.free, BTreeMap::from([(0, CAPACITY)]));
        }
    }
}
