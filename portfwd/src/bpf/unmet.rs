//! Halves of flows whose other half a sweep has not met.
//!
//! Every half that is new to a sweep must have another one. To ask for it takes a system call, and a sweep meets it anyway, before or
//! after. So of many it notes a flow when it meets the first half of it, and forgets it with the second. What is left at its end is
//! asked for by the next sweep: most of that are flows of which one half came or went while the tables were read.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
};

use bytemuck::bytes_of;
use portfwd_common::{
    abi::{FlowDir, FlowEntry, FlowKey},
    net::Address,
};

/// Halves that a sweep asks for at once: a few milliseconds.
const FEW: usize = 1 << 10;
/// Flows that are noted at a time, while a sweep lasts: nine megabytes of a hash table. As many as of a million flows in any order.
const MOST: usize = 1 << 19;

/// Flows by a digest that nobody outside can foresee.
#[derive(Debug, Default)]
pub(super) struct Unmet {
    digests: RandomState,
    /// Halves that the sweep that is under way has asked for.
    asked: usize,
    /// Met once by the sweep that is under way.
    once: HashSet<u64>,
    /// Met once by the sweep before.
    alone: HashSet<u64>,
}

impl Unmet {
    /// A sweep begins.
    pub(super) fn begin(&mut self) {
        self.asked = 0;
        let met = std::mem::take(&mut self.once);
        // A copy is as large as it must be; the table that so many were noted in is given back.
        self.alone = met.iter().copied().collect();
    }

    /// Whether the last sweep has met both halves of every flow of which it has met one.
    pub(super) fn is_empty(&self) -> bool {
        self.once.is_empty()
    }

    /// Whether the sweep before has met this half alone.
    pub(super) fn was_alone<A: Address>(&self, key: &FlowKey<A>, entry: &FlowEntry<A>) -> bool {
        !self.alone.is_empty() && self.alone.contains(&self.digest(key, entry))
    }

    /// Notes that a new half is met; false if its partner is to be asked for.
    pub(super) fn meet<A: Address>(&mut self, key: &FlowKey<A>, entry: &FlowEntry<A>) -> bool {
        if self.asked < FEW {
            self.asked += 1;
            return false;
        }
        let digest = self.digest(key, entry);
        if self.once.remove(&digest) {
            return true;
        }
        self.once.len() < MOST && self.once.insert(digest)
    }

    /// The same for both halves of one life of a flow.
    fn digest<A: Address>(&self, key: &FlowKey<A>, entry: &FlowEntry<A>) -> u64 {
        let partner = entry.partner(key);
        let (original, reply) = match entry.dir() {
            FlowDir::Original => (key, &partner),
            FlowDir::Reply => (&partner, key),
        };
        self.digests
            .hash_one((bytes_of(original), bytes_of(reply), entry.created.ticks()))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use portfwd_common::{
        abi::Instant,
        net::{Ipv4, be::Ports},
    };

    use super::*;

    type Half = (FlowKey<Ipv4>, FlowEntry<Ipv4>);

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

    /// Both halves of a flow that a client begins from a port at some time.
    fn halves(port: u16, created: u64) -> [Half; 2] {
        let key = |src, dst, ports| FlowKey {
            src: Ipv4::from(src),
            dst: Ipv4::from(dst),
            ports,
            protocol: 17,
        };
        let original = key(CLIENT, GATEWAY, Ports::new(port, 53));
        let forwarded = key(CLIENT, SERVER, Ports::new(port, 5353));
        let entry = |of: &FlowKey<Ipv4>, to: &FlowKey<Ipv4>, direction: FlowDir| FlowEntry {
            rewrite: of.rewrite_to(to),
            created: Instant::from_ticks(created),
            marks: direction.mark(),
            ..FlowEntry::default()
        };
        let reply = forwarded.reversed();
        [
            (original, entry(&original, &forwarded, FlowDir::Original)),
            (reply, entry(&reply, &original.reversed(), FlowDir::Reply)),
        ]
    }

    fn meet(unmet: &mut Unmet, (key, entry): &Half) -> bool {
        unmet.meet(key, entry)
    }

    /// A sweep begins that meets many.
    fn begin(unmet: &mut Unmet) {
        unmet.begin();
        for (port, _) in (0..).zip(0..FEW) {
            let [original, _] = halves(port, 1);
            assert!(!meet(unmet, &original));
        }
    }

    #[test]
    fn a_half_is_asked_for_after_a_sweep_that_met_it_alone() {
        let mut unmet = Unmet::default();
        let [original, reply] = halves(1, 7);
        let [lonely, _] = halves(2, 7);
        begin(&mut unmet);
        for half in [&reply, &lonely, &original] {
            assert!(meet(&mut unmet, half));
        }
        assert!(!unmet.is_empty());
        unmet.begin();
        for (half, was_alone) in [(&original, false), (&reply, false), (&lonely, true)] {
            assert_eq!(unmet.was_alone(&half.0, &half.1), was_alone);
        }
        unmet.begin();
        assert!(!unmet.was_alone(&lonely.0, &lonely.1) && unmet.is_empty());
    }

    #[test]
    fn halves_of_two_lives_of_a_flow_do_not_make_one() {
        let mut unmet = Unmet::default();
        let ([original, _], [_, reply]) = (halves(1, 7), halves(1, 8));
        begin(&mut unmet);
        assert!(meet(&mut unmet, &original) && meet(&mut unmet, &reply));
        unmet.begin();
        for half in [original, reply] {
            assert!(unmet.was_alone(&half.0, &half.1));
        }
    }

    #[test]
    fn who_is_not_noted_for_want_of_room_is_told() {
        let mut unmet = Unmet {
            once: (0..MOST as u64).collect(),
            asked: FEW,
            ..Unmet::default()
        };
        let [original, _] = halves(1, 7);
        assert!(!meet(&mut unmet, &original));
    }
}
