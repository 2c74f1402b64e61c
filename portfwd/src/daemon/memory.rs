//! Memory that nobody needs any more goes back to the system.
//!
//! A start parses a kernel object, a configuration may have thousands of rules, a listing millions of flows: all of it is freed
//! soon. The C library keeps what was freed, for the next time, which a daemon that rests for weeks does not have. Measured with
//! glibc 2.36: 29 MiB of heap after a start and 57 MiB after 10,000 rules were applied; 3 and 16 MiB with what is here.

#[cfg(target_env = "gnu")]
use libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, c_int, mallopt};

/// Buffers of this size and more are mapped by themselves, and go when they are freed. It is the default, but one that grows
/// with what is freed unless it is set.
#[cfg(target_env = "gnu")]
const LARGE: c_int = 128 << 10;

/// Has the C library keep less. For the beginning, before there are other threads.
pub(super) fn be_thrifty() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes numbers, and no thread allocates meanwhile.
    unsafe {
        // One heap for all threads: they are few, and take turns.
        mallopt(M_ARENA_MAX, 1);
        mallopt(M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives back what was freed since the last time. Takes about a millisecond for what a start leaves, next to nothing after it.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes the heap's own lock, and touches only pages that nobody has.
    unsafe {
        libc::malloc_trim(0);
    }
}
