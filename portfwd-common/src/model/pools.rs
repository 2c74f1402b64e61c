//! Pools of ports and bindings in plain collections.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use crate::{
    abi::{
        Binding, BindingKey, Instant, Pool, PoolKey,
        pool::{FULL_WORDS, POOL_WORDS},
    },
    datapath::{InsertError, PoolWords},
};

/// A pool whose words change one by one.
#[derive(Clone, Debug)]
pub struct PoolCells {
    taken: [Cell<u64>; POOL_WORDS],
    full: [Cell<u64>; FULL_WORDS],
}

impl PoolCells {
    /// A pool as it is.
    pub fn new(pool: &Pool) -> Self {
        Self {
            taken: pool.taken.map(Cell::new),
            full: pool.full.map(Cell::new),
        }
    }

    /// As it is by now.
    pub fn pool(&self) -> Pool {
        Pool {
            taken: std::array::from_fn(|word| self.taken[word].get()),
            full: std::array::from_fn(|word| self.full[word].get()),
        }
    }
}

impl PoolWords for &PoolCells {
    fn taken(self, word: usize) -> u64 {
        self.taken[word].get()
    }

    fn take(self, word: usize, bits: u64) -> u64 {
        self.taken[word].replace(self.taken[word].get() | bits)
    }

    fn give(self, word: usize, bits: u64) {
        self.taken[word].set(self.taken[word].get() & !bits);
    }

    fn full(self, word: usize) -> u64 {
        self.full[word].get()
    }

    fn set_full(self, word: usize, bit: u64) {
        self.full[word].set(self.full[word].get() | bit);
    }

    fn clear_full(self, word: usize, bit: u64) {
        self.full[word].set(self.full[word].get() & !bit);
    }
}

/// POOLS and BINDINGS.
#[derive(Clone, Debug, Default)]
pub struct Pools {
    pools: HashMap<PoolKey, PoolCells>,
    bindings: RefCell<HashMap<BindingKey, Binding>>,
    /// Bindings that fit, if not all do.
    room: Option<usize>,
}

impl Pools {
    /// Puts a pool there, or in the place of one.
    pub fn set(&mut self, key: PoolKey, pool: &Pool) {
        self.pools.insert(key, PoolCells::new(pool));
    }

    /// Makes room for so many bindings.
    pub const fn set_room(&mut self, bindings: usize) {
        self.room = Some(bindings);
    }

    /// The pools as they are.
    pub fn all(&self) -> HashMap<PoolKey, Pool> {
        self.pools
            .iter()
            .map(|(key, cells)| (*key, cells.pool()))
            .collect()
    }

    /// The bindings as they are.
    pub fn bindings(&self) -> HashMap<BindingKey, Binding> {
        self.bindings.borrow().clone()
    }

    /// Makes every binding older.
    pub fn age(&mut self, ticks: crate::abi::Ticks) {
        for binding in self.bindings.get_mut().values_mut() {
            binding.used = binding.used.minus(ticks);
        }
    }

    pub(super) fn pool(&self, key: &PoolKey) -> Option<&PoolCells> {
        self.pools.get(key)
    }

    pub(super) fn bound(&self, key: &BindingKey, now: Instant) -> Option<u16> {
        let mut bindings = self.bindings.borrow_mut();
        let binding = bindings.get_mut(key)?;
        binding.used = now;
        Some(binding.port)
    }

    pub(super) fn bind(&self, key: &BindingKey, binding: &Binding) -> Result<(), InsertError> {
        let mut bindings = self.bindings.borrow_mut();
        if bindings.contains_key(key) {
            return Err(InsertError::Exists);
        }
        if self.room.is_some_and(|room| bindings.len() >= room) {
            return Err(InsertError::Full);
        }
        bindings.insert(*key, *binding);
        Ok(())
    }
}
