//! Maps with the ABI's own key and value types, element by element and in batches.
//!
//! aya has typed maps too, but none with batch operations, and its marker trait for values cannot be implemented here for
//! types of `portfwd-common`. So aya opens, creates and describes maps; reading and writing them is here.

use std::{
    marker::PhantomData,
    os::fd::AsFd,
    path::Path,
    sync::atomic::{Ordering, fence},
};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use bytemuck::{Pod, bytes_of, bytes_of_mut, cast_slice, cast_slice_mut};

pub use super::syscall::Update;
use super::{
    syscall::{self, BatchEnd},
    window::Window,
};

/// Elements moved by one system call: 100,000 elements in 25 calls, buffers of a few hundred kilobytes.
const BATCH: usize = 4_096;
/// Bytes moved by one system call, unless a few elements have more.
const BATCH_BYTES: usize = 1 << 20;
const FEWEST: usize = 16;

/// A hash map, LPM trie or array (`K` is `u32`).
#[derive(Debug)]
pub struct Map<K, V> {
    data: MapData,
    name: &'static str,
    max_entries: u32,
    types: PhantomData<(K, V)>,
}

/// An array that has every element once per CPU.
#[derive(Debug)]
pub struct PerCpuArray<V> {
    data: MapData,
    name: &'static str,
    cpus: usize,
    types: PhantomData<V>,
}

/// Opens a pinned map.
fn open(directory: &Path, name: &str) -> Result<MapData> {
    let path = directory.join(name);
    MapData::from_pin(&path).with_context(|| format!("cannot open map {}", path.display()))
}

/// Checks the sizes of a map's keys and values, and returns how many elements it has room for.
fn check(data: &MapData, name: &str, key_size: usize, value_size: usize) -> Result<u32> {
    let info = data
        .info()
        .with_context(|| format!("cannot ask the kernel about map {name}"))?;
    ensure!(
        info.key_size() as usize == key_size && info.value_size() as usize == value_size,
        "map {name} has keys of {} and values of {} bytes, not {key_size} and {value_size}: it is not portfwd's",
        info.key_size(),
        info.value_size(),
    );
    Ok(info.max_entries())
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Opens the map that is pinned in `directory` under its name.
    pub fn open(directory: &Path, name: &'static str) -> Result<Self> {
        Self::of(open(directory, name)?, name)
    }

    /// A map that is open already.
    pub fn of(data: MapData, name: &'static str) -> Result<Self> {
        let max_entries = check(&data, name, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            data,
            name,
            max_entries,
            types: PhantomData,
        })
    }

    /// Elements it has room for.
    pub const fn max_entries(&self) -> u32 {
        self.max_entries
    }

    /// The value of a key.
    pub fn lookup(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::zeroed();
        // SAFETY: `open` has compared the sizes of both types with the map.
        let found = unsafe {
            syscall::lookup_element(
                self.data.fd().as_fd(),
                bytes_of(key),
                bytes_of_mut(&mut value),
            )
        }
        .with_context(|| format!("cannot read map {}", self.name))?;
        Ok(found.then_some(value))
    }

    /// Takes an element out of a hash map.
    pub fn take(&mut self, key: &K) -> Result<Option<V>> {
        let mut value = V::zeroed();
        // SAFETY: `open` has compared the sizes of both types with the map.
        let found = unsafe {
            syscall::take_element(
                self.data.fd().as_fd(),
                bytes_of(key),
                bytes_of_mut(&mut value),
            )
        }
        .with_context(|| format!("cannot take from map {}", self.name))?;
        Ok(found.then_some(value))
    }

    /// Writes an element; false if [`Update::NoExist`] met a key that is there.
    pub fn update(&mut self, key: &K, value: &V, how: Update) -> Result<bool> {
        // SAFETY: `open` has compared the sizes of both types with the map.
        unsafe {
            syscall::update_element(self.data.fd().as_fd(), bytes_of(key), bytes_of(value), how)
        }
        .with_context(|| format!("cannot write map {}", self.name))
    }

    /// Writes an element whose key is not there, if there is room for it; whether it did.
    pub fn put_if_room(&mut self, key: &K, value: &V) -> Result<bool> {
        match self.update(key, value, Update::NoExist) {
            Err(error) if is_full(&error) => Ok(false),
            other => other,
        }
    }

    /// Writes an element, whether the key is there or not.
    pub fn set(&mut self, key: &K, value: &V) -> Result<()> {
        self.update(key, value, Update::Any).map(drop)
    }

    /// Deletes an element; false if it was not there.
    pub fn delete(&mut self, key: &K) -> Result<bool> {
        // SAFETY: `open` has compared the size of the key with the map.
        unsafe { syscall::delete_element(self.data.fd().as_fd(), bytes_of(key)) }
            .with_context(|| format!("cannot delete from map {}", self.name))
    }

    /// Every key, one system call each: for tries, whose batches the kernel numbers by key.
    pub fn keys(&self) -> Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        loop {
            let mut next = K::zeroed();
            // SAFETY: `open` has compared the size of the key with the map.
            let found = unsafe {
                syscall::next_key(
                    self.data.fd().as_fd(),
                    keys.last().map(bytes_of),
                    bytes_of_mut(&mut next),
                )
            }
            .with_context(|| format!("cannot list map {}", self.name))?;
            if !found {
                return Ok(keys);
            }
            keys.push(next);
        }
    }

    /// Shows every element of a hash map to `visit`, a batch at a time. An element that is inserted or deleted meanwhile may be
    /// seen or not.
    pub fn for_each_batch(&self, mut visit: impl FnMut(&[K], &[V]) -> Result<()>) -> Result<()> {
        let mut batches = self.batches();
        while let Some((keys, values)) = batches.next(self)? {
            visit(keys, values)?;
        }
        Ok(())
    }

    /// The same for those who change the map between one batch and the next.
    pub fn batches(&self) -> Batches<K, V> {
        let fit = (BATCH_BYTES / (size_of::<K>() + size_of::<V>())).max(FEWEST);
        let capacity = BATCH.min(fit).min(self.max_entries as usize).max(1);
        Batches {
            keys: vec![K::zeroed(); capacity],
            values: vec![V::zeroed(); capacity],
            place: Place::Begin,
        }
    }
}

/// A way through a hash map.
#[derive(Debug)]
pub struct Batches<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
    place: Place,
}

/// How far it has been gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Begin,
    /// By the kernel's token.
    At(u32),
    End,
}

impl<K: Pod, V: Pod> Batches<K, V> {
    /// The next elements of the map that it was begun for.
    pub fn next(&mut self, map: &Map<K, V>) -> Result<Option<(&[K], &[V])>> {
        loop {
            let token = match self.place {
                Place::Begin => None,
                Place::At(token) => Some(token),
                Place::End => return Ok(None),
            };
            let mut next = 0;
            let capacity = self.keys.len();
            let (keys_bytes, values_bytes) = (
                cast_slice_mut(&mut self.keys),
                cast_slice_mut(&mut self.values),
            );
            // SAFETY: both buffers have `capacity` elements of types whose sizes `open` has compared with the map, as it
            // has with any other of these types; the token is the map's own, or the kernel refuses it.
            let (count, end) = unsafe {
                syscall::lookup_batch(
                    map.data.fd().as_fd(),
                    token,
                    &mut next,
                    keys_bytes,
                    values_bytes,
                    capacity as u32,
                )
            }
            .with_context(|| format!("cannot dump map {}", map.name))?;
            match end {
                BatchEnd::More => self.place = Place::At(next),
                BatchEnd::Done => self.place = Place::End,
                BatchEnd::TooSmall => {
                    // One bucket holds more elements than the buffers: rare, but nothing bounds the length of a bucket.
                    self.keys.resize(2 * capacity, K::zeroed());
                    self.values.resize(2 * capacity, V::zeroed());
                }
            }
            if count > 0 {
                let count = count as usize;
                return Ok(Some((&self.keys[..count], &self.values[..count])));
            }
        }
    }
}

/// Whether a table had no room.
fn is_full(error: &anyhow::Error) -> bool {
    let system = error.downcast_ref::<std::io::Error>();
    system.and_then(std::io::Error::raw_os_error) == Some(libc::E2BIG)
}

/// An array that is made to be memory of this process (`BPF_F_MMAPABLE`).
impl<V: Pod> Map<u32, V> {
    /// Reads consecutive elements.
    pub fn read_range(&self, first: u32, count: u32) -> Result<Vec<V>> {
        let mut elements = Vec::with_capacity(count as usize);
        self.for_each_in(first, count, |_, element| elements.push(element))?;
        Ok(elements)
    }

    /// Shows consecutive elements to `visit`, each with its index.
    pub fn for_each_in(&self, first: u32, count: u32, mut visit: impl FnMut(u32, V)) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let window = self.window(first, count)?;
        for index in 0..count {
            visit(first + index, window.get(index)?);
        }
        Ok(())
    }

    /// Writes consecutive elements.
    pub fn write_range(&mut self, first: u32, elements: &[V]) -> Result<()> {
        if elements.is_empty() {
            return Ok(());
        }
        let window = self.window(first, elements.len() as u32)?;
        for (index, element) in (0..).zip(elements) {
            window.set(index, element)?;
        }
        // Changes are ordered writes to several maps: what is written to others from here on is not seen before it.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn window(&self, first: u32, count: u32) -> Result<Window<V>> {
        let reaching = || {
            format!(
                "cannot reach {count} elements of map {} from {first} on",
                self.name
            )
        };
        ensure!(
            first
                .checked_add(count)
                .is_some_and(|end| end <= self.max_entries),
            "{}: it has {}",
            reaching(),
            self.max_entries
        );
        Window::open(self.data.fd().as_fd(), first, count).with_context(reaching)
    }
}

impl<V: Pod> PerCpuArray<V> {
    /// The kernel rounds every CPU's value up to eight bytes; ours are such already.
    const WHOLE_WORDS: () = assert!(size_of::<V>().is_multiple_of(8));

    /// Opens the map that is pinned in `directory` under its name.
    pub fn open(directory: &Path, name: &'static str) -> Result<Self> {
        const { Self::WHOLE_WORDS };
        let data = open(directory, name)?;
        check(&data, name, size_of::<u32>(), size_of::<V>())?;
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, error)| error)
            .context("cannot read the number of CPUs")?;
        Ok(Self {
            data,
            name,
            cpus,
            types: PhantomData,
        })
    }

    /// Reads consecutive elements, the CPUs' values of each put together by `add`.
    pub fn read_range(&self, first: u32, count: u32, add: impl Fn(&mut V, &V)) -> Result<Vec<V>> {
        let mut sums = vec![V::zeroed(); count as usize];
        let mut values = vec![V::zeroed(); self.cpus * BATCH.min(sums.len())];
        for (chunk, sums) in sums.chunks_mut(BATCH).enumerate() {
            let start = first + (chunk * BATCH) as u32;
            let values = &mut values[..self.cpus * sums.len()];
            read_array(&self.data, start, sums.len(), cast_slice_mut(values))
                .with_context(|| format!("cannot read map {}", self.name))?;
            for (sum, values) in sums.iter_mut().zip(values.chunks(self.cpus)) {
                values.iter().for_each(|value| add(sum, value));
            }
        }
        Ok(sums)
    }
}

/// Reads `count` elements of an array into `values`, which must be exactly as long as they are for user space.
pub(super) fn read_array(
    data: &MapData,
    first: u32,
    count: usize,
    values: &mut [u8],
) -> Result<()> {
    let mut keys = vec![0u32; count];
    let mut next = 0;
    let token = first.checked_sub(1);
    // SAFETY: `keys` has `count` of an array's keys; the callers size `values` by the value size that `open` has compared and,
    // per CPU, the number of possible CPUs.
    let (read, _) = unsafe {
        syscall::lookup_batch(
            data.fd().as_fd(),
            token,
            &mut next,
            cast_slice_mut(&mut keys),
            values,
            count as u32,
        )
    }?;
    ensure!(
        read as usize == count,
        "elements {first} to {} are beyond its end",
        first as usize + count - 1
    );
    Ok(())
}

/// Inverse of [`read_array`].
pub(super) fn write_array(data: &MapData, first: u32, count: usize, values: &[u8]) -> Result<()> {
    let keys: Vec<u32> = (first..).take(count).collect();
    // SAFETY: as in `read_array`.
    unsafe { syscall::update_batch(data.fd().as_fd(), cast_slice(&keys), values, count as u32) }?;
    Ok(())
}
