//! The connection table in hash maps of fixed capacity, one per family, as the kernel preallocates them.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::BuildHasherDefault,
};

use crate::{
    abi::{
        FlowEntry, FlowKey, Instant,
        fragment::{Datagram, DatagramKey, HeldKey},
    },
    datapath::{Flows, Fragments, InsertError, Table},
    net::{Address, Ipv4, Ipv6},
};

/// A map whose order does not change from run to run.
pub type FlowMap<A> =
    HashMap<FlowKey<A>, FlowEntry<A>, BuildHasherDefault<std::hash::DefaultHasher>>;

/// The connection table, and that of flows which have not proven themselves. The latter never fills up here: a test takes out what
/// is to make room.
#[derive(Clone, Debug)]
pub struct FlowMaps {
    /// IPv4 flows, two entries each.
    pub v4: FlowMap<Ipv4>,
    /// IPv6 flows, two entries each.
    pub v6: FlowMap<Ipv6>,
    /// IPv4 flows that have not proven themselves.
    pub opening_v4: FlowMap<Ipv4>,
    /// IPv6 flows that have not proven themselves.
    pub opening_v6: FlowMap<Ipv6>,
    /// Entries that fit into either of the first two.
    pub capacity: usize,
    /// Datagrams in fragments.
    pub datagrams: HashMap<DatagramKey, Datagram>,
    /// Fragments that came before the one in front of them: when, and the IP packet.
    pub held: HashMap<HeldKey, (Instant, Vec<u8>)>,
}

impl FlowMaps {
    /// Empty tables with room for `capacity` entries each.
    pub fn new(capacity: usize) -> Self {
        Self {
            v4: FlowMap::default(),
            v6: FlowMap::default(),
            opening_v4: FlowMap::default(),
            opening_v6: FlowMap::default(),
            capacity,
            datagrams: HashMap::new(),
            held: HashMap::new(),
        }
    }

    /// Entries in all tables.
    pub fn len(&self) -> usize {
        self.proven() + self.opening_v4.len() + self.opening_v6.len()
    }

    /// Entries in the connection tables.
    pub fn proven(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Entries that are all that is left of flows which have ended with their rule.
    pub fn late(&self) -> usize {
        fn of<A: Address>(map: &FlowMap<A>) -> usize {
            map.values().filter(|entry| entry.is_late()).count()
        }
        of(&self.v4) + of(&self.v6) + of(&self.opening_v4) + of(&self.opening_v6)
    }

    /// Keeps entries by their marks, in all tables.
    pub fn retain_marked(&mut self, mut keeps: impl FnMut(u8) -> bool) {
        for map in [&mut self.v4, &mut self.opening_v4] {
            map.retain(|_, entry| keeps(entry.marks));
        }
        for map in [&mut self.v6, &mut self.opening_v6] {
            map.retain(|_, entry| keeps(entry.marks));
        }
    }

    /// Whether there is no flow.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn insert<A: Address>(
    map: &mut FlowMap<A>,
    capacity: usize,
    key: &FlowKey<A>,
    entry: &FlowEntry<A>,
) -> Result<(), InsertError> {
    let room = map.len() < capacity;
    match map.entry(*key) {
        Entry::Occupied(_) => Err(InsertError::Exists),
        Entry::Vacant(_) if !room => Err(InsertError::Full),
        Entry::Vacant(vacant) => {
            vacant.insert(*entry);
            Ok(())
        }
    }
}

macro_rules! impl_flows {
    ($($address:ty => $map:ident, $opening:ident;)+) => {$(
        impl Flows<$address> for FlowMaps {
            fn flow(&mut self, table: Table, key: &FlowKey<$address>) -> Option<&mut FlowEntry<$address>> {
                match table {
                    Table::Flows => self.$map.get_mut(key),
                    Table::Opening => self.$opening.get_mut(key),
                }
            }

            fn insert(&mut self, table: Table, key: &FlowKey<$address>, entry: &FlowEntry<$address>) -> Result<(), InsertError> {
                match table {
                    Table::Flows => insert(&mut self.$map, self.capacity, key, entry),
                    Table::Opening => insert(&mut self.$opening, usize::MAX, key, entry),
                }
            }

            fn remove(&mut self, table: Table, key: &FlowKey<$address>) {
                match table {
                    Table::Flows => self.$map.remove(key),
                    Table::Opening => self.$opening.remove(key),
                };
            }
        }
    )+};
}

impl Fragments for FlowMaps {
    fn datagram(&mut self, key: &DatagramKey) -> Option<&mut Datagram> {
        self.datagrams.get_mut(key)
    }

    fn remember(&mut self, key: &DatagramKey, datagram: &Datagram) {
        self.datagrams.insert(*key, *datagram);
    }

    fn forget(&mut self, key: &DatagramKey) {
        self.datagrams.remove(key);
    }

    fn held_since(&self, key: &HeldKey) -> Option<Instant> {
        self.held.get(key).map(|(since, _)| *since)
    }
}

impl_flows!(Ipv4 => v4, opening_v4; Ipv6 => v6, opening_v6;);
