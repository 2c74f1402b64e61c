//! Numbers for ways out: flows that leave alike share an element of NEXT_HOPS.
//!
//! An element is found by hash and a short probe. One that says the same is used again; one that nobody can refer to any more is
//! overwritten. A flow entry refers to its element only while it is fresh, and whoever makes it fresh has just held the element:
//! so after several periods of validity without being held, no entry can. Two CPUs decide by compare-and-exchange on the word
//! [`Hold`] who writes; the other goes without a number, and asks again with its next packet.

use super::tables::Tables;
use crate::abi::{
    Config, Instant, NextHop, Ticks,
    next_hop::{Hold, NEXT_HOP_SLOTS},
};

/// Elements that are looked at.
const PROBES: u16 = 4;
/// An element rests for this many periods of validity before it is overwritten.
const REST: u32 = 4;
/// The same in periods of validity while the daemon vouches.
const LEASED_REST: u32 = 2;

/// The number of a way out, entered if it has none. `None` if all elements that it may have are in use, or another CPU is
/// writing to the one it would have.
#[inline(always)]
pub fn number<T: Tables>(way: &NextHop, config: &Config, now: Instant, tables: &T) -> Option<u16> {
    let first = hash(way);
    let (held, rest) = (Hold::at(now), rest(config));
    let mut free = None;
    for probe in 0..PROBES {
        let slot = first.wrapping_add(probe) & MASK;
        let there = *tables.next_hop(slot)?;
        if there.hold.0 & Hold::WRITING.0 == 0 && there.is_same_way(way) {
            // Held in this tick: nobody overwrites it for a while.
            if there.hold == held {
                return Some(slot);
            }
            if !tables.hold_next_hop(slot, there.hold, held) {
                return None;
            }
            // Held now: it stays as it is. But it may have become another before.
            return tables
                .next_hop(slot)
                .filter(|there| there.is_same_way(way))
                .map(|_| slot);
        }
        if free.is_none() && there.hold.is_free(now, rest) {
            free = Some((slot, there.hold));
        }
    }
    let (slot, hold) = free?;
    if !tables.hold_next_hop(slot, hold, Hold::WRITING) {
        return None;
    }
    tables.write_next_hop(slot, &NextHop { hold: held, ..*way });
    Some(slot)
}

/// For how long an element that nobody holds stays as it is: longer than any entry that refers to it can be used.
#[inline(always)]
fn rest(config: &Config) -> Ticks {
    let (validity, leased) = (config.validity.0, config.leased_validity.0);
    Ticks(
        validity
            .saturating_mul(REST)
            .max(leased.saturating_mul(LEASED_REST)),
    )
}

const MASK: u16 = (NEXT_HOP_SLOTS - 1) as u16;
const _: () = assert!(NEXT_HOP_SLOTS.is_power_of_two() && NEXT_HOP_SLOTS <= 1 << 16);

/// The first element that a way out may have.
#[inline(always)]
fn hash(way: &NextHop) -> u16 {
    const ODD: u32 = 0x9e37_79b1;
    let [a, b, c] = way.mac;
    let words = [
        way.ifindex,
        u32::from(a) | u32::from(b) << 16,
        u32::from(c) | u32::from(way.mtu) << 16,
    ];
    let mut mixed = 0_u32;
    for word in words {
        mixed = (mixed ^ word).wrapping_mul(ODD);
        mixed ^= mixed >> 15;
    }
    mixed as u16
}
