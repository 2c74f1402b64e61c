//! What rules with light tracking ask in the place of flows' entries. None of it is pinned: it is found anew within a packet.

use core::arch::asm;

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray},
    macros::btf_map,
};
use portfwd_common::abi::{
    ClientWay, MAX_RULES, RuleWay, Turns,
    light::{CLIENT_WAYS as CLIENT_WAY_SLOTS, Mark, TURN_CLASSES},
};

#[btf_map]
static RULE_WAYS: Array<RuleWay, { MAX_RULES as usize }> = Array::new();
#[btf_map]
static CLIENT_WAYS: PerCpuArray<ClientWay, { CLIENT_WAY_SLOTS as usize }> = PerCpuArray::new();
#[btf_map]
static TURNS: Array<Turns, 1> = Array::new();

/// How packets to the target of a rule leave.
#[inline(always)]
pub fn rule_way(slot: u16) -> RuleWay {
    RULE_WAYS.get(u32::from(slot)).copied().unwrap_or_default()
}

/// Sets that, with one write of one word.
#[inline(always)]
pub fn set_rule_way(slot: u16, way: RuleWay) {
    if let Some(there) = RULE_WAYS.get_ptr_mut(u32::from(slot)) {
        // SAFETY: the map gave out the element, an aligned word, which is written at once.
        unsafe { there.write_volatile(way) };
    }
}

/// How answers to a client leave.
#[inline(always)]
pub fn client_way(slot: u16) -> Option<&'static ClientWay> {
    // SAFETY: the element is this CPU's own, and nothing else runs on it meanwhile.
    CLIENT_WAYS
        .get_ptr(u32::from(slot))
        .map(|way| unsafe { &*way })
}

/// Sets that.
#[inline(always)]
pub fn set_client_way(slot: u16, way: &ClientWay) {
    if let Some(there) = CLIENT_WAYS.get_ptr_mut(u32::from(slot)) {
        // SAFETY: as above.
        unsafe { *there = *way };
    }
}

/// The mark of a class, `TURN_CLASSES` of which there are: every number of 16 bits is one.
#[inline(always)]
fn mark(class: u16) -> Option<*mut u8> {
    const _: () = assert!(TURN_CLASSES == 1 << 16);
    let turns = TURNS.get_ptr_mut(0)?;
    let mut index = usize::from(class);
    // LLVM knows that 16 bits are left and masks nothing; the verifier of Linux 6.1 loses sight of them in an exclusive or ("math
    // between map_value pointer and register with unbounded min value is not allowed").
    // SAFETY: one register is read and written.
    unsafe { asm!("{0} &= 0xffff", inout(reg) index, options(pure, nomem, nostack)) };
    // SAFETY: the map gave out the element, and the class is below the length of the array.
    Some(unsafe { (&raw mut (*turns).marks).cast::<u8>().add(index) })
}

/// When a class last had its turn.
#[inline(always)]
pub fn turn(class: u16) -> Mark {
    // SAFETY: in the element; CPUs that race read and write whole bytes.
    mark(class).map_or(Mark::DUE, |mark| Mark(unsafe { *mark }))
}

/// Sets that.
#[inline(always)]
pub fn set_turn(class: u16, to: Mark) {
    if let Some(mark) = mark(class) {
        // SAFETY: as above.
        unsafe { *mark = to.0 };
    }
}

/// How many packets had their turn in a tick.
#[inline(always)]
pub fn turns_spent() -> u64 {
    // SAFETY: the map gave out the element; CPUs that race read and write whole words.
    TURNS
        .get_ptr(0)
        .map_or(0, |turns| unsafe { (*turns).spent })
}

/// Sets that.
#[inline(always)]
pub fn spend_turns(spent: u64) {
    if let Some(turns) = TURNS.get_ptr_mut(0) {
        // SAFETY: as above.
        unsafe { (*turns).spent = spent };
    }
}
