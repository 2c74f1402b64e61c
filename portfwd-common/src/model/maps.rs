//! Rules, interfaces, routes and counters in plain collections.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    ops::Deref,
};

use super::{
    pools::{PoolCells, Pools},
    rules::{Lowered, Prefix},
    usages::{BudgetCell, ErrorBudgets, UsageCells, Usages},
};
use crate::{
    abi::{
        Admission, AnswerKey, Binding, BindingKey, ClientWay, Config, EndpointKey, FlowDir,
        FlowKey, Instant, Interface, Limits, MAX_RULES, NextHop, Pool, PoolKey, PoolRange,
        PortCounters, PortSlot, Pressure, Protocol, Recount, Rule, RuleWay, SourceKey, Spender,
        Traffic, Usage, UsageKey,
        config::{INTERFACE_SLOTS, interface_slot},
        light::{CLIENT_WAYS, Mark},
        next_hop::{Hold, NEXT_HOP_SLOTS},
        rule::AddressKey,
    },
    datapath::{
        Event, InsertError, Repeat, Repeated, Repeats, Route, Tables, verdict::REASON_SLOTS,
    },
    net::{Address, Ipv4, Ipv6},
};

/// What the kernel object has in maps, and in the kernel's forwarding table.
#[derive(Debug, Default)]
pub struct Maps {
    /// `None` before the daemon has written it.
    pub config: Option<Config>,
    /// Rules by slot, with their ports and prefixes.
    pub rules: Lowered,
    /// Ports that stand for clients.
    pub pools: Pools,
    /// What has been used of rules' limits.
    pub usages: Usages,
    /// How many ICMP errors clients may get.
    pub error_budgets: ErrorBudgets,
    /// When the daemon last counted flows.
    pub recount: Recount,
    interfaces: HashMap<u16, Interface>,
    addresses: HashMap<AddressKey, bool>,
    routes: Vec<Destination>,
    counters: RefCell<BTreeMap<u32, PortCounters>>,
    reasons: RefCell<BTreeMap<u32, u64>>,
    pressure: Cell<Pressure>,
    next_hops: RefCell<BTreeMap<u16, NextHop>>,
    answers: RefCell<HashMap<AnswerKey, Instant>>,
    sockets: Vec<Socket>,
    rule_ways: RefCell<BTreeMap<u16, RuleWay>>,
    client_ways: RefCell<BTreeMap<u16, ClientWay>>,
    turns: RefCell<BTreeMap<u16, Mark>>,
    turns_spent: Cell<u64>,
}

/// A socket of the gateway.
#[derive(Clone, Copy, Debug)]
struct Socket {
    protocol: Protocol,
    own: SocketAddr,
    /// Whom it is connected to, if it is.
    peer: Option<SocketAddr>,
}

/// A route: the first `length` bits of an address, and where packets to such addresses go.
#[derive(Debug)]
struct Destination {
    network: IpAddr,
    length: u32,
    route: Route,
}

impl Maps {
    /// No rules, no interfaces, no routes.
    pub fn new(config: Config) -> Self {
        Self {
            config: Some(config),
            ..Self::default()
        }
    }

    /// Attaches an interface, or changes it.
    pub fn set_interface(&mut self, interface: Interface) {
        let slot = interface_slot(interface.ifindex);
        self.interfaces.insert(slot, interface);
    }

    /// Makes an address one of the WAN interfaces' own.
    pub fn add_address(&mut self, address: IpAddr) {
        self.addresses.insert(address_key(address), true);
    }

    /// Makes an address one of the LAN interfaces' own.
    pub fn add_lan_address(&mut self, address: IpAddr) {
        self.addresses.insert(address_key(address), false);
    }

    /// Has an address stand for clients, by any of its ports.
    pub fn add_pools(&mut self, address: IpAddr) {
        for protocol in Protocol::ALL {
            self.pools.set(pool_key(address, protocol), &Pool::FREE);
        }
    }

    /// An address is no longer one of the attached interfaces' own.
    pub fn remove_address(&mut self, address: IpAddr) {
        self.addresses.remove(&address_key(address));
    }

    /// Sets the kernel's answer for addresses that begin like `network` for `length` bits. What no route covers is the stack's.
    pub fn set_route(&mut self, network: IpAddr, length: u32, route: Route) {
        self.routes
            .retain(|known| (known.network, known.length) != (network, length));
        self.routes.push(Destination {
            network,
            length,
            route,
        });
    }

    /// Opens a socket of the gateway, connected to a peer or not.
    pub fn add_socket(&mut self, protocol: Protocol, own: SocketAddr, peer: Option<SocketAddr>) {
        self.sockets.push(Socket {
            protocol,
            own,
            peer,
        });
    }

    /// Answers that are waited for.
    pub fn awaited(&self) -> usize {
        self.answers.borrow().len()
    }

    /// Counters that are not zero, by element.
    pub fn counters(&self) -> BTreeMap<u32, PortCounters> {
        self.counters.borrow().clone()
    }

    /// Reasons and events that were counted, by element of REASONS.
    pub fn reasons(&self) -> BTreeMap<u32, u64> {
        self.reasons.borrow().clone()
    }

    /// How often a reason or an event was counted.
    pub fn reason(&self, index: u32) -> u64 {
        self.reasons.borrow().get(&index).copied().unwrap_or(0)
    }

    /// Counts a reason or an event.
    pub fn count_reason(&self, index: u32) {
        if index < REASON_SLOTS {
            *self.reasons.borrow_mut().entry(index).or_default() += 1;
        }
    }

    /// Ways out that have a number, by it.
    pub fn next_hops(&self) -> BTreeMap<u16, NextHop> {
        self.next_hops.borrow().clone()
    }

    /// Puts a way out where one of these would be, as if another CPU had.
    pub fn set_next_hop(&self, slot: u16, hop: NextHop) {
        self.next_hops.borrow_mut().insert(slot, hop);
    }

    /// Sets when the connection table was last found full.
    pub fn set_pressure(&mut self, pressure: Pressure) {
        self.pressure.set(pressure);
    }
}

/// The pool of an address and protocol.
pub fn pool_key(address: IpAddr, protocol: Protocol) -> PoolKey {
    match address {
        IpAddr::V4(v4) => PoolKey::new(Ipv4::from(v4), protocol),
        IpAddr::V6(v6) => PoolKey::new(Ipv6::from(v6), protocol),
    }
}

fn address_key(address: IpAddr) -> AddressKey {
    match address {
        IpAddr::V4(v4) => AddressKey::new(Ipv4::from(v4)),
        IpAddr::V6(v6) => AddressKey::new(Ipv6::from(v6)),
    }
}

/// The longest prefix that covers an endpoint, found by looking at every one.
fn longest(prefixes: &BTreeMap<Prefix, u16>, endpoint: &EndpointKey) -> Option<u16> {
    prefixes
        .iter()
        .filter(|(prefix, _)| prefix.covers(endpoint))
        .max_by_key(|(prefix, _)| prefix.length)
        .map(|(_, slot)| *slot)
}

/// Whether two addresses are of one family and begin alike for `length` bits.
fn begin_alike(one: IpAddr, other: IpAddr, length: u32) -> bool {
    let (difference, bits) = match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            (u128::from(one.to_bits() ^ other.to_bits()), u32::BITS)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits(), u128::BITS),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    difference.checked_shr(bits - length).unwrap_or(0) == 0
}

/// The plain way.
#[derive(Clone, Copy, Debug)]
pub struct Plainly;

impl Repeats for Plainly {
    fn repeat<R: Repeated>(&self, times: u32, work: &mut R) {
        for _ in 0..times {
            match work.step() {
                Repeat::GoOn => {}
                Repeat::Enough => return,
            }
        }
    }
}

impl Repeats for Maps {
    fn repeat<R: Repeated>(&self, times: u32, work: &mut R) {
        Plainly.repeat(times, work);
    }
}

impl Repeats for &Maps {
    fn repeat<R: Repeated>(&self, times: u32, work: &mut R) {
        Plainly.repeat(times, work);
    }
}

impl Tables for Maps {
    type Pool<'a> = &'a PoolCells;
    type Usage<'a> = UsageCells;
    type ErrorBudget<'a> = BudgetCell<'a>;

    fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    fn interface(&self, slot: u16) -> Option<&Interface> {
        const EMPTY: &Interface = &Interface {
            ifindex: 0,
            mtu: 0,
            mac: [0; 3],
            flags: 0,
            ipv4: Ipv4::from_words([0; 2]),
            ipv6: Ipv6::UNSPECIFIED,
            ipv4_prefix: 0,
            ipv6_prefix: 0,
            padding: 0,
        };
        (u32::from(slot) < INTERFACE_SLOTS).then(|| self.interfaces.get(&slot).unwrap_or(EMPTY))
    }

    fn next_hop(&self, slot: u16) -> Option<impl Deref<Target = NextHop>> {
        let hops = self.next_hops.borrow();
        (u32::from(slot) < NEXT_HOP_SLOTS)
            .then(|| Box::new(hops.get(&slot).copied().unwrap_or_default()))
    }

    fn hold_next_hop(&self, slot: u16, from: Hold, to: Hold) -> bool {
        let mut hops = self.next_hops.borrow_mut();
        let there = hops.entry(slot).or_default();
        let is_unchanged = there.hold == from;
        if is_unchanged {
            there.hold = to;
        }
        is_unchanged
    }

    fn write_next_hop(&self, slot: u16, hop: &NextHop) {
        self.set_next_hop(slot, *hop);
    }

    fn rule_way(&self, slot: u16) -> RuleWay {
        let ways = self.rule_ways.borrow();
        ways.get(&slot).copied().unwrap_or_default()
    }

    fn set_rule_way(&self, slot: u16, way: RuleWay) {
        self.rule_ways.borrow_mut().insert(slot, way);
    }

    fn client_way(&self, slot: u16) -> Option<impl Deref<Target = ClientWay>> {
        let ways = self.client_ways.borrow();
        (u32::from(slot) < CLIENT_WAYS)
            .then(|| Box::new(ways.get(&slot).copied().unwrap_or_default()))
    }

    fn set_client_way(&self, slot: u16, way: &ClientWay) {
        self.client_ways.borrow_mut().insert(slot, *way);
    }

    fn cpu(&self) -> u32 {
        0
    }

    fn turn(&self, class: u16) -> Mark {
        let turns = self.turns.borrow();
        turns.get(&class).copied().unwrap_or_default()
    }

    fn set_turn(&self, class: u16, mark: Mark) {
        self.turns.borrow_mut().insert(class, mark);
    }

    fn turns_spent(&self) -> u64 {
        self.turns_spent.get()
    }

    fn spend_turns(&self, spent: u64) {
        self.turns_spent.set(spent);
    }

    fn port(&self, index: u32) -> PortSlot {
        self.rules
            .ports
            .get(&index)
            .copied()
            .unwrap_or(PortSlot::EMPTY)
    }

    fn listen(&self, endpoint: &EndpointKey) -> u16 {
        longest(&self.rules.listens, endpoint).unwrap_or(0)
    }

    fn target(&self, endpoint: &EndpointKey) -> Option<u16> {
        longest(&self.rules.targets, endpoint)
    }

    fn rule(&self, slot: u16) -> Option<&Rule> {
        const EMPTY: &Rule = &Rule {
            listen: Ipv6::UNSPECIFIED,
            target: Ipv6::UNSPECIFIED,
            first: 0,
            last: 0,
            target_first: 0,
            flags: 0,
            counter_base: 0,
            id: 0,
            protocol: 0,
            source: Ipv6::UNSPECIFIED,
            source_ports: PoolRange::ALL,
            sources: 0,
            limits: Limits::NONE,
        };
        (u32::from(slot) < MAX_RULES).then(|| self.rules.rules.get(&slot).unwrap_or(EMPTY))
    }

    fn rest(&self, endpoint: &EndpointKey) -> Option<u16> {
        longest(&self.rules.rests, endpoint)
    }

    fn answered(&self, key: &AnswerKey) -> Option<Instant> {
        self.answers.borrow().get(key).copied()
    }

    fn await_answer(&self, key: &AnswerKey, now: Instant) {
        self.answers.borrow_mut().insert(*key, now);
    }

    fn has_socket<A: Address>(&self, key: &FlowKey<A>, protocol: Protocol) -> bool {
        let own = SocketAddr::new(key.dst.ip(), key.ports.dst());
        let peer = SocketAddr::new(key.src.ip(), key.ports.src());
        self.sockets.iter().any(|socket| {
            let is_for = socket.peer.is_none_or(|connected| connected == peer);
            socket.protocol == protocol && socket.own == own && is_for
        })
    }

    fn admission(&self, source: &SourceKey) -> Admission {
        self.rules
            .sources
            .iter()
            .filter(|(prefix, _)| prefix.covers(source))
            .max_by_key(|(prefix, _)| prefix.length)
            .map_or(Admission::Denied, |(_, admission)| *admission)
    }

    fn is_own<A: Address>(&self, address: A) -> bool {
        self.addresses.get(&AddressKey::new(address)) == Some(&true)
    }

    fn is_local<A: Address>(&self, address: A) -> bool {
        self.addresses.contains_key(&AddressKey::new(address))
    }

    fn pool(&self, key: &PoolKey) -> Option<&PoolCells> {
        self.pools.pool(key)
    }

    fn bound(&self, key: &BindingKey, now: Instant) -> Option<u16> {
        self.pools.bound(key, now)
    }

    fn bind(&self, key: &BindingKey, binding: &Binding) -> Result<(), InsertError> {
        self.pools.bind(key, binding)
    }

    fn usage(&self, spender: Spender, key: &UsageKey) -> Option<UsageCells> {
        self.usages.usage(spender, key)
    }

    fn begin_usage(&self, spender: Spender, key: &UsageKey, usage: &Usage) {
        self.usages.begin(spender, key, usage);
    }

    fn recount(&self) -> Recount {
        self.recount
    }

    fn error_budget(&self, slot: u32) -> Option<BudgetCell<'_>> {
        self.error_budgets.word(slot)
    }

    fn route<A: Address>(&self, translated: &FlowKey<A>, _ingress: u32) -> Route {
        let dst = translated.dst.ip();
        self.routes
            .iter()
            .filter(|known| begin_alike(known.network, dst, known.length))
            .max_by_key(|known| known.length)
            .map_or(Route::Refused, |known| known.route)
    }

    fn count(&self, counter: u32, direction: FlowDir, traffic: Traffic) {
        let mut counters = self.counters.borrow_mut();
        counters
            .entry(counter)
            .or_default()
            .direction(direction)
            .add(traffic);
    }

    fn note(&self, event: Event) {
        self.count_reason(event.index());
    }

    fn pressure(&self) -> Pressure {
        self.pressure.get()
    }

    fn under_pressure(&self, now: Instant) {
        self.pressure.set(Pressure {
            full_at: now,
            was_full: 1,
        });
    }
}

/// The slow path's job owns its tables; the model keeps them.
impl Tables for &Maps {
    type Pool<'a>
        = &'a PoolCells
    where
        Self: 'a;
    type Usage<'a>
        = UsageCells
    where
        Self: 'a;
    type ErrorBudget<'a>
        = BudgetCell<'a>
    where
        Self: 'a;

    fn config(&self) -> Option<&Config> {
        Maps::config(self)
    }

    fn interface(&self, slot: u16) -> Option<&Interface> {
        Maps::interface(self, slot)
    }

    fn next_hop(&self, slot: u16) -> Option<impl Deref<Target = NextHop>> {
        Maps::next_hop(self, slot)
    }

    fn hold_next_hop(&self, slot: u16, from: Hold, to: Hold) -> bool {
        Maps::hold_next_hop(self, slot, from, to)
    }

    fn write_next_hop(&self, slot: u16, hop: &NextHop) {
        Maps::write_next_hop(self, slot, hop);
    }

    fn rule_way(&self, slot: u16) -> RuleWay {
        Maps::rule_way(self, slot)
    }

    fn set_rule_way(&self, slot: u16, way: RuleWay) {
        Maps::set_rule_way(self, slot, way);
    }

    fn client_way(&self, slot: u16) -> Option<impl Deref<Target = ClientWay>> {
        Maps::client_way(self, slot)
    }

    fn set_client_way(&self, slot: u16, way: &ClientWay) {
        Maps::set_client_way(self, slot, way);
    }

    fn cpu(&self) -> u32 {
        Maps::cpu(self)
    }

    fn turn(&self, class: u16) -> Mark {
        Maps::turn(self, class)
    }

    fn set_turn(&self, class: u16, mark: Mark) {
        Maps::set_turn(self, class, mark);
    }

    fn turns_spent(&self) -> u64 {
        Maps::turns_spent(self)
    }

    fn spend_turns(&self, spent: u64) {
        Maps::spend_turns(self, spent);
    }

    fn port(&self, index: u32) -> PortSlot {
        Maps::port(self, index)
    }

    fn listen(&self, endpoint: &EndpointKey) -> u16 {
        Maps::listen(self, endpoint)
    }

    fn target(&self, endpoint: &EndpointKey) -> Option<u16> {
        Maps::target(self, endpoint)
    }

    fn rule(&self, slot: u16) -> Option<&Rule> {
        Maps::rule(self, slot)
    }

    fn rest(&self, endpoint: &EndpointKey) -> Option<u16> {
        Maps::rest(self, endpoint)
    }

    fn answered(&self, key: &AnswerKey) -> Option<Instant> {
        Maps::answered(self, key)
    }

    fn await_answer(&self, key: &AnswerKey, now: Instant) {
        Maps::await_answer(self, key, now);
    }

    fn has_socket<A: Address>(&self, key: &FlowKey<A>, protocol: Protocol) -> bool {
        Maps::has_socket(self, key, protocol)
    }

    fn admission(&self, source: &SourceKey) -> Admission {
        Maps::admission(self, source)
    }

    fn is_own<A: Address>(&self, address: A) -> bool {
        Maps::is_own(self, address)
    }

    fn is_local<A: Address>(&self, address: A) -> bool {
        Maps::is_local(self, address)
    }

    fn pool(&self, key: &PoolKey) -> Option<&PoolCells> {
        Maps::pool(self, key)
    }

    fn bound(&self, key: &BindingKey, now: Instant) -> Option<u16> {
        Maps::bound(self, key, now)
    }

    fn bind(&self, key: &BindingKey, binding: &Binding) -> Result<(), InsertError> {
        Maps::bind(self, key, binding)
    }

    fn usage(&self, spender: Spender, key: &UsageKey) -> Option<UsageCells> {
        Maps::usage(self, spender, key)
    }

    fn begin_usage(&self, spender: Spender, key: &UsageKey, usage: &Usage) {
        Maps::begin_usage(self, spender, key, usage);
    }

    fn recount(&self) -> Recount {
        Maps::recount(self)
    }

    fn error_budget(&self, slot: u32) -> Option<BudgetCell<'_>> {
        Maps::error_budget(self, slot)
    }

    fn route<A: Address>(&self, translated: &FlowKey<A>, ingress: u32) -> Route {
        Maps::route(self, translated, ingress)
    }

    fn count(&self, counter: u32, direction: FlowDir, traffic: Traffic) {
        Maps::count(self, counter, direction, traffic);
    }

    fn note(&self, event: Event) {
        Maps::note(self, event);
    }

    fn pressure(&self) -> Pressure {
        Maps::pressure(self)
    }

    fn under_pressure(&self, now: Instant) {
        Maps::under_pressure(self, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_route_of_the_family_wins() {
        let via = |ifindex| Route::Unresolved { ifindex };
        let mut maps = Maps::default();
        for (network, length, ifindex) in [
            ("0.0.0.0", 0, 1),
            ("10.2.0.0", 16, 2),
            ("10.2.0.7", 32, 3),
            ("2001:db8::", 32, 4),
        ] {
            maps.set_route(network.parse().unwrap(), length, via(ifindex));
        }
        for (dst, route) in [
            ("198.51.100.1", via(1)),
            ("10.2.9.9", via(2)),
            ("10.2.0.7", via(3)),
            ("2001:db8::1", via(4)),
            ("2001:db9::1", Route::Refused),
        ] {
            let got = match dst.parse().unwrap() {
                IpAddr::V4(v4) => maps.route(&key(Ipv4::from(v4)), 0),
                IpAddr::V6(v6) => maps.route(&key(Ipv6::from(v6)), 0),
            };
            assert_eq!(got, route, "{dst}");
        }
    }

    fn key<A: Address>(dst: A) -> FlowKey<A> {
        FlowKey {
            dst,
            ..FlowKey::default()
        }
    }
}
