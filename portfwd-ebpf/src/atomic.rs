//! Words that several CPUs change at the same time, each change at once. In assembly: Rust has no read-modify-write atomics for this
//! target, and those of the library do not build for it.

use core::{arch::asm, ptr};

/// Reads a word. An atomic load has LLVM 22 give up ("Cannot select: AtomicLoad"), and an aligned word is read at once.
///
/// # Safety
/// `word` must be aligned and in a map's element.
#[inline(always)]
pub unsafe fn load(word: *const u64) -> u64 {
    // SAFETY: the caller's.
    unsafe { ptr::read_volatile(word) }
}

/// `*word |= bits`; returns what was there before.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn fetch_or(word: *mut u64, bits: u64) -> u64 {
    let mut bits = bits;
    // SAFETY: the instruction changes the word and the register.
    unsafe {
        asm!("{0} = atomic_fetch_or((u64 *)({1} + 0), {0})", inout(reg) bits, in(reg) word);
    }
    bits
}

/// `*word &= bits`; returns what was there before.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn fetch_and(word: *mut u64, bits: u64) -> u64 {
    let mut bits = bits;
    // SAFETY: as above.
    unsafe {
        asm!("{0} = atomic_fetch_and((u64 *)({1} + 0), {0})", inout(reg) bits, in(reg) word);
    }
    bits
}

/// `*word += addend`, modulo 2^64; returns what was there before.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, addend: u64) -> u64 {
    let mut addend = addend;
    // SAFETY: as above.
    unsafe {
        asm!("{0} = atomic_fetch_add((u64 *)({1} + 0), {0})", inout(reg) addend, in(reg) word);
    }
    addend
}

/// Compare-and-exchange, a full barrier: the word becomes `to` if it is `from`; returns what was there before.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn exchange(word: *mut u64, from: u64, to: u64) -> u64 {
    let mut found = from;
    // SAFETY: the instruction compares the word with R0, and leaves in R0 what it found.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {to})",
            word = in(reg) word,
            to = in(reg) to,
            inout("r0") found,
            options(nostack),
        );
    }
    found
}
