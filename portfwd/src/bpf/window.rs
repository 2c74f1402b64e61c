//! Elements of an array as memory of this process (`BPF_F_MMAPABLE`). A system call for a batch copies every key and every value,
//! which for an array of all ports takes longer than all else that a restart does.
//!
//! What the kernel's program and this one see of each other's writes is whole words. An element is a whole number of them: what it has
//! behind its value is nobody's.

use std::{
    ffi::c_void,
    io,
    marker::PhantomData,
    num::NonZeroUsize,
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result, ensure};
use bytemuck::{Pod, bytes_of, bytes_of_mut};
use nix::{
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
    unistd::{SysconfVar, sysconf},
};

/// The kernel rounds the size of an element up to it (`array_map_alloc`).
const WORD: usize = size_of::<u64>();

/// Consecutive elements of an array, for as long as it lives.
#[derive(Debug)]
pub(super) struct Window<V> {
    memory: NonNull<c_void>,
    length: usize,
    /// Bytes before the first element.
    offset: usize,
    count: u32,
    values: PhantomData<V>,
}

impl<V: Pod> Window<V> {
    const STRIDE: usize = size_of::<V>().next_multiple_of(WORD);

    /// Opens it on `count` elements, at least one, of an array of `V` that was made for it.
    pub fn open(map: BorrowedFd<'_>, first: u32, count: u32) -> Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.context("pages have no size")?;
        let page = usize::try_from(page)?;
        let (begin, bytes) = (first as usize * Self::STRIDE, count as usize * Self::STRIDE);
        let offset = begin % page;
        let length = NonZeroUsize::new(offset + bytes).context("it has no element")?;
        // SAFETY: a new mapping, wherever the kernel puts it; it refuses one that reaches beyond the array's last page.
        let memory = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map,
                i64::try_from(begin - offset)?,
            )
        }
        .map_err(io::Error::from)?;
        Ok(Self {
            memory,
            length: length.get(),
            offset,
            count,
            values: PhantomData,
        })
    }

    /// An element, counted from the window's first.
    pub fn get(&self, index: u32) -> Result<V> {
        let mut value = V::zeroed();
        let element = self.element(index)?;
        let words = bytes_of_mut(&mut value).chunks_mut(WORD);
        for (number, bytes) in words.enumerate() {
            // SAFETY: the element is in the mapping, and so are the words that it is made of, each at a multiple of its size.
            let place = unsafe { AtomicU64::from_ptr(element.add(number)) };
            let word = place.load(Ordering::Relaxed).to_ne_bytes();
            bytes.copy_from_slice(&word[..bytes.len()]);
        }
        Ok(value)
    }

    /// Writes an element, where it differs. What was written to other maps before is seen before it.
    pub fn set(&self, index: u32, value: &V) -> Result<()> {
        let element = self.element(index)?;
        for (number, bytes) in bytes_of(value).chunks(WORD).enumerate() {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            let word = u64::from_ne_bytes(word);
            // SAFETY: as in `get`.
            let place = unsafe { AtomicU64::from_ptr(element.add(number)) };
            if place.load(Ordering::Relaxed) != word {
                place.store(word, Ordering::Release);
            }
        }
        Ok(())
    }

    fn element(&self, index: u32) -> Result<*mut u64> {
        ensure!(
            index < self.count,
            "there are {} elements, and none {index}",
            self.count
        );
        let begin = self.offset + index as usize * Self::STRIDE;
        // SAFETY: the mapping has `count` elements behind the offset.
        Ok(unsafe { self.memory.cast::<u8>().as_ptr().add(begin).cast() })
    }
}

impl<V> Drop for Window<V> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.memory, self.length) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::{
        sys::memfd::{MFdFlags, memfd_create},
        unistd::ftruncate,
    };

    use super::*;

    /// Writes elements through one window, and reads them through others that begin on either side of a page's end.
    fn round_trip<V: Pod + PartialEq + std::fmt::Debug>(value: impl Fn(u32) -> V) {
        const ELEMENTS: u32 = 1_500;
        let file = memfd_create(c"elements", MFdFlags::empty()).unwrap();
        let bytes = ELEMENTS as usize * Window::<V>::STRIDE;
        ftruncate(&file, i64::try_from(bytes).unwrap()).unwrap();
        let all = Window::<V>::open(file.as_fd(), 0, ELEMENTS).unwrap();
        for number in 0..ELEMENTS {
            all.set(number, &value(number)).unwrap();
        }
        for first in [0, 1, 127, 128, 129, 511, 512, 513, ELEMENTS - 1] {
            let window = Window::<V>::open(file.as_fd(), first, ELEMENTS - first).unwrap();
            for number in first..ELEMENTS {
                assert_eq!(window.get(number - first).unwrap(), value(number));
            }
            assert!(window.get(ELEMENTS - first).is_err());
            assert!(window.set(ELEMENTS - first, &value(0)).is_err());
        }
    }

    #[test]
    fn elements_are_where_an_array_of_the_kernel_has_them() {
        round_trip(|number| number);
        round_trip(|number| [number, !number, number / 2]);
        round_trip(|number| [u64::from(number), !u64::from(number)]);
        round_trip(|number| [u64::from(number); 5]);
    }
}
