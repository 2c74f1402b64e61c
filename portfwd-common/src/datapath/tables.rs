//! What the datapath asks of its surroundings. Two implementations: kernel maps in `portfwd-ebpf`, and the host's model.

use core::ops::Deref;

use super::{
    limits::{RateWord, UsageWords},
    nat::Hiding,
    pool::PoolWords,
    verdict::Event,
};
use crate::{
    abi::{
        Admission, AnswerKey, Binding, BindingKey, ClientWay, Config, EndpointKey, FlowDir,
        FlowEntry, FlowKey, Instant, Interface, NextHop, PoolKey, PortSlot, Pressure, Protocol,
        Recount, Rule, RuleWay, SourceKey, Spender, Traffic, Usage, UsageKey,
        fragment::{Datagram, DatagramKey, HeldKey},
        light::Mark,
        next_hop::Hold,
    },
    net::{Address, headers::MacWords},
};

/// Where a flow has its entries: both halves in the same table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Table {
    /// The connection table. Nobody in it loses a place to another; without room, nobody comes in.
    #[default]
    Flows,
    /// Flows that have not proven themselves. Without room, those go that were met longest ago.
    Opening,
}

/// The tables of one family's flows.
pub trait Flows<A: Address> {
    /// The entry of a packet's direction.
    fn flow(&mut self, table: Table, key: &FlowKey<A>) -> Option<&mut FlowEntry<A>>;
    /// Adds an entry if there is none for the key: the arbiter between CPUs that see one flow begin.
    fn insert(
        &mut self,
        table: Table,
        key: &FlowKey<A>,
        entry: &FlowEntry<A>,
    ) -> Result<(), InsertError>;
    /// Removes an entry, if it is there.
    fn remove(&mut self, table: Table, key: &FlowKey<A>);
}

impl Table {
    /// Where a flow begins. One that holds a port of the gateway begins where nobody takes its place: of an entry that makes room
    /// nobody hears, and the port would be given to another while the client still uses it.
    #[inline(always)]
    pub const fn first(hiding: Hiding) -> Self {
        match hiding {
            Hiding::None => Self::Opening,
            Hiding::BehindListen | Hiding::BehindSource | Hiding::BehindEgress => Self::Flows,
        }
    }

    /// The one that it is not.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Flows => Self::Opening,
            Self::Opening => Self::Flows,
        }
    }
}

/// Why an entry was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The key has an entry.
    Exists,
    /// No room.
    Full,
}

/// Datagrams in fragments.
pub trait Fragments {
    /// What is known of a datagram.
    fn datagram(&mut self, key: &DatagramKey) -> Option<&mut Datagram>;
    /// Keeps what is known of a datagram, in the place of what was.
    fn remember(&mut self, key: &DatagramKey, datagram: &Datagram);
    /// Forgets a datagram.
    fn forget(&mut self, key: &DatagramKey);
    /// When a fragment that is held came.
    fn held_since(&self, key: &HeldKey) -> Option<Instant>;
}

/// Work in equal steps.
pub trait Repeated {
    /// One of them.
    fn step(&mut self) -> Repeat;
}

/// Whether there is another step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// If any are left.
    GoOn,
    /// None is needed.
    Enough,
}

/// Repeats work. In the kernel a helper does it (`bpf_loop`), so that the verifier looks at one step and not at all of them.
pub trait Repeats {
    /// Does at most so many steps.
    fn repeat<R: Repeated>(&self, times: u32, work: &mut R);
}

/// Rules, interfaces, routes and counters. Rules, and what leads to them, are those of one bank ([`crate::abi::bank`]).
pub trait Tables: Repeats {
    /// A pool of ports.
    type Pool<'a>: PoolWords
    where
        Self: 'a;
    /// What has been used of a rule's limits.
    type Usage<'a>: UsageWords
    where
        Self: 'a;
    /// When a client may be told of another refusal.
    type ErrorBudget<'a>: RateWord
    where
        Self: 'a;
    /// Timeouts and generation; `None` before the daemon has written them.
    fn config(&self) -> Option<&Config>;
    /// An attached interface, by slot; empty slots have `ifindex` 0.
    fn interface(&self, slot: u16) -> Option<&Interface>;
    /// A way out, by its number; elements that nobody has used have `ifindex` 0.
    ///
    /// Not a copy: the hot path reads of it where it needs it, and need not carry it along.
    fn next_hop(&self, slot: u16) -> Option<impl Deref<Target = NextHop>>;
    /// Changes who has a way out, if it is still `from` that has it: compare-and-exchange, the arbiter between CPUs.
    fn hold_next_hop(&self, slot: u16, from: Hold, to: Hold) -> bool;
    /// Writes a way out whose [`NextHop::hold`] the caller has made [`Hold::WRITING`]; that word last.
    fn write_next_hop(&self, slot: u16, hop: &NextHop);
    /// How packets to the target of a rule leave, by slot.
    fn rule_way(&self, slot: u16) -> RuleWay;
    /// Sets that, with one write of one word.
    fn set_rule_way(&self, slot: u16, way: RuleWay);
    /// How answers to a client leave, by [`ClientWay::slot`]. This CPU's.
    fn client_way(&self, slot: u16) -> Option<impl Deref<Target = ClientWay>>;
    /// Sets that.
    fn set_client_way(&self, slot: u16, way: &ClientWay);
    /// The number of this CPU.
    fn cpu(&self) -> u32;
    /// When a class of packets last had its turn to go to entries, see [`crate::abi::light::turn_class`].
    fn turn(&self, class: u16) -> Mark;
    /// Sets that.
    fn set_turn(&self, class: u16, mark: Mark);
    /// How many packets went to entries in a tick, see [`crate::abi::Turns::spent`].
    fn turns_spent(&self) -> u64;
    /// Sets that.
    fn spend_turns(&self, spent: u64);
    /// What covers a listen port, by [`crate::abi::rule::port_index`].
    fn port(&self, index: u32) -> PortSlot;
    /// The rule with a listen address that covers an endpoint; slot 0 if there is none.
    fn listen(&self, endpoint: &EndpointKey) -> u16;
    /// The only rule that has an endpoint among its targets, slot 0 if there are several; `None` if it is nobody's target.
    fn target(&self, endpoint: &EndpointKey) -> Option<u16>;
    /// The rule with this listen address that takes what is nobody else's, slot 0 if it leaves the port to the gateway; `None` if no
    /// such rule has the address. An unspecified address stands for every own address of the WAN interfaces.
    fn rest(&self, endpoint: &EndpointKey) -> Option<u16>;
    /// When a packet last left that this one would answer.
    fn answered(&self, key: &AnswerKey) -> Option<Instant>;
    /// Remembers that a packet leaves, by the key of its answer.
    fn await_answer(&self, key: &AnswerKey, now: Instant);
    /// Whether the gateway has a socket for a packet that comes in.
    fn has_socket<A: Address>(&self, key: &FlowKey<A>, protocol: Protocol) -> bool;
    /// A rule, by slot.
    fn rule(&self, slot: u16) -> Option<&Rule>;
    /// What a list of sources says about an address.
    fn admission(&self, source: &SourceKey) -> Admission;
    /// Whether an address is one of the WAN interfaces' own.
    fn is_own<A: Address>(&self, address: A) -> bool;
    /// Whether an address is one of the attached interfaces' own.
    fn is_local<A: Address>(&self, address: A) -> bool;
    /// The ports of an address that stand for clients; `None` if it is not to stand for any.
    fn pool(&self, key: &PoolKey) -> Option<Self::Pool<'_>>;
    /// The port that stands for a client endpoint; it is used now.
    fn bound(&self, key: &BindingKey, now: Instant) -> Option<u16>;
    /// Has a port stand for a client endpoint, if none does.
    fn bind(&self, key: &BindingKey, binding: &Binding) -> Result<(), InsertError>;
    /// What has been used of a rule's limits; `None` if nobody has written it.
    fn usage(&self, spender: Spender, key: &UsageKey) -> Option<Self::Usage<'_>>;
    /// Begins to write that, if nobody has.
    fn begin_usage(&self, spender: Spender, key: &UsageKey, usage: &Usage);
    /// When flows were last counted.
    fn recount(&self) -> Recount;
    /// The word that limits the ICMP errors to some clients, by a slot below [`crate::abi::ERROR_BUDGETS`].
    fn error_budget(&self, slot: u32) -> Option<Self::ErrorBudget<'_>>;
    /// The kernel's route for a packet with these addresses that came in by the interface with index `ingress`.
    fn route<A: Address>(&self, key: &FlowKey<A>, ingress: u32) -> Route;
    /// Counts a packet of a rule's listen port.
    fn count(&self, counter: u32, direction: FlowDir, traffic: Traffic);
    /// Counts an event.
    fn note(&self, event: Event);
    /// Whether, and when, the connection table was last found full.
    fn pressure(&self) -> Pressure;
    /// Remembers that the connection table was found full.
    fn under_pressure(&self, now: Instant);
}

/// The kernel's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Next hop known.
    Via {
        /// Index of the egress interface.
        ifindex: u32,
        /// MAC address of the next hop.
        next_hop: MacWords,
        /// Largest IP packet of the route, bytes.
        mtu: u32,
    },
    /// Next hop's MAC address not known, or the interface has none.
    Unresolved {
        /// Index of the egress interface.
        ifindex: u32,
    },
    /// Nowhere that a packet could be sent: no route, one that refuses (blackhole, unreachable, prohibit), an address of the
    /// gateway, or a broadcast address.
    Refused,
    /// The kernel does not say: forwarding is off, or the packet would be encapsulated.
    Stack,
}
