//! Which rules cover a port, in every listen scope: what PORTS and LISTENS must say.

use std::collections::{BTreeMap, HashMap};

use portfwd_common::{
    abi::{PortSlot, rule::ports_of_class},
    net::Ipv6,
};

use super::prefix::{Entry, PortBlock};

/// What the rules of all scopes say about a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Port {
    /// Scopes that cover it.
    scopes: u16,
    /// The winners of those scopes, all XORed: with one scope, its winner.
    winners: u16,
    /// The winner of the scope without address, 0 if it does not cover the port.
    any: u16,
}

/// The rules of one scope: one listen address, or none.
#[derive(Debug, Default)]
struct ScopeRules {
    exact: BTreeMap<u16, u16>,
    /// By first port: last port and slot.
    ranges: BTreeMap<u16, (u16, u16)>,
}

/// All ports of one family and protocol.
#[derive(Debug)]
pub struct PortTable {
    /// [`portfwd_common::abi::Protocol::class`].
    class: u16,
    ports: Box<[Port]>,
    scopes: HashMap<Option<Ipv6>, ScopeRules>,
}

/// The listen side of a rule in one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenScope {
    /// `None` for every address of the WAN interfaces.
    pub address: Option<Ipv6>,
    /// First port.
    pub first: u16,
    /// Last port, inclusive.
    pub last: u16,
}

impl Port {
    fn slot(self) -> PortSlot {
        match self.scopes {
            0 => PortSlot::EMPTY,
            1 => PortSlot::only(self.winners),
            _ => PortSlot::scoped(self.any),
        }
    }

    /// The winner of a scope changes from `old` to `new`; 0 is none.
    fn change(&mut self, is_any: bool, old: u16, new: u16) {
        self.winners ^= old ^ new;
        self.scopes = self.scopes + u16::from(old == 0) - u16::from(new == 0);
        if is_any {
            self.any = new;
        }
    }
}

impl ScopeRules {
    fn range_at(&self, port: u16) -> Option<u16> {
        let (_, (last, slot)) = self.ranges.range(..=port).next_back()?;
        (*last >= port).then_some(*slot)
    }
}

impl PortTable {
    /// No rule of this class.
    pub fn new(class: u16) -> Self {
        Self {
            class,
            ports: vec![Port::default(); ports_of_class(class) as usize].into(),
            scopes: HashMap::new(),
        }
    }

    /// The words of PORTS from `first` to `last`.
    pub fn words(&self, first: u16, last: u16) -> Vec<PortSlot> {
        self.ports[usize::from(first)..=usize::from(last)]
            .iter()
            .map(|port| port.slot())
            .collect()
    }

    /// The rules without address of ports from `first` to `last`, 0 for none.
    pub fn anys(&self, first: u16, last: u16) -> impl Iterator<Item = u16> {
        let ports = &self.ports[usize::from(first)..=usize::from(last)];
        ports.iter().map(|port| port.any)
    }

    /// Everything LISTENS must hold.
    pub fn all(&self) -> impl Iterator<Item = Entry> {
        self.scopes.iter().flat_map(move |(address, scope)| {
            let exact = scope.exact.iter().map(|(port, slot)| (*port, *port, *slot));
            let ranges = scope
                .ranges
                .iter()
                .map(|(first, (last, slot))| (*first, *last, *slot));
            exact.chain(ranges).flat_map(move |(first, last, slot)| {
                let listen = ListenScope {
                    address: *address,
                    first,
                    last,
                };
                entries(self.class, scope, listen, Some(slot))
            })
        })
    }

    /// A rule begins to listen. No rule of equal precedence covers its ports.
    pub fn insert(&mut self, listen: ListenScope, slot: u16) -> Vec<Entry> {
        let scope = self.scopes.entry(listen.address).or_default();
        if listen.first == listen.last {
            let before = scope.range_at(listen.first).unwrap_or(0);
            scope.exact.insert(listen.first, slot);
            self.ports[usize::from(listen.first)].change(listen.address.is_none(), before, slot);
        } else {
            scope.ranges.insert(listen.first, (listen.last, slot));
            for_ports_without_exact(&scope.exact, listen, |port| {
                self.ports[port].change(listen.address.is_none(), 0, slot);
            });
        }
        entries(self.class, scope, listen, Some(slot))
    }

    /// A rule that listens ceases to.
    pub fn remove(&mut self, listen: ListenScope, slot: u16) -> Vec<Entry> {
        let Some(scope) = self.scopes.get_mut(&listen.address) else {
            return Vec::new();
        };
        let entries = if listen.first == listen.last {
            scope.exact.remove(&listen.first);
            let after = scope.range_at(listen.first).unwrap_or(0);
            self.ports[usize::from(listen.first)].change(listen.address.is_none(), slot, after);
            let is_block = |block: &PortBlock| block.port == listen.first && block.bits == 0;
            let restored = scope.ranges.range(..=listen.first).next_back().and_then(
                |(first, (last, range))| {
                    PortBlock::cover(*first, *last)
                        .iter()
                        .any(is_block)
                        .then_some(*range)
                },
            );
            entries(self.class, scope, listen, restored)
        } else {
            scope.ranges.remove(&listen.first);
            for_ports_without_exact(&scope.exact, listen, |port| {
                self.ports[port].change(listen.address.is_none(), slot, 0);
            });
            entries(self.class, scope, listen, None)
        };
        if scope.exact.is_empty() && scope.ranges.is_empty() {
            self.scopes.remove(&listen.address);
        }
        entries
    }
}

/// Ports of a range that an exact rule has win over the range.
fn for_ports_without_exact(
    exact: &BTreeMap<u16, u16>,
    listen: ListenScope,
    mut visit: impl FnMut(usize),
) {
    let mut exact = exact
        .range(listen.first..=listen.last)
        .map(|(port, _)| *port)
        .peekable();
    for port in listen.first..=listen.last {
        if exact.next_if_eq(&port).is_none() {
            visit(usize::from(port));
        }
    }
}

/// The keys of LISTENS that a listen owns: of a range, all blocks but single ports that an exact
/// rule has.
fn entries(class: u16, scope: &ScopeRules, listen: ListenScope, slot: Option<u16>) -> Vec<Entry> {
    let Some(address) = listen.address else {
        return Vec::new();
    };
    let is_exact = listen.first == listen.last;
    PortBlock::cover(listen.first, listen.last)
        .into_iter()
        .filter(|block| is_exact || block.bits > 0 || !scope.exact.contains_key(&block.port))
        .map(|block| Entry {
            prefix: block.prefix(address, class),
            slot,
        })
        .collect()
}
