//! Which rule a packet meets, and what the rule makes of its 5-tuple.

use super::{Scene, binding::still_stands, known::light_slot, tables::Tables, workspace::Side};
use crate::{
    abi::{Admission, EndpointKey, FlowKey, Peer, Protocol, Rule, SourceKey, rule::port_index},
    net::{Address, Ipv6, be::Ports},
};

/// A rule's decision on a 5-tuple, besides the 5-tuple after translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Slot of the rule.
    pub rule: u16,
    /// Element of COUNTERS.
    pub counter: u32,
    /// Whether it holds without entries.
    pub stateless: bool,
    /// What stands for the client.
    pub hiding: Hiding,
    /// List of sources that may use the rule; 0 for everybody.
    pub sources: u32,
    /// Whether its flows are limited.
    pub limited: bool,
    /// The rule's slot, if it has light tracking and carries by itself; 0 if not.
    pub light: u16,
}

/// What stands for the client of a flow, before its target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hiding {
    /// Nothing: the target sees the client.
    #[default]
    None,
    /// The address that it dialled: the target would answer a client of its own network directly, past the gateway (hairpin).
    BehindListen,
    /// The rule's address (SNAT).
    BehindSource,
    /// The egress interface's own address (masquerade).
    BehindEgress,
}

impl Hiding {
    /// Whom the target takes for the client.
    #[inline(always)]
    pub const fn peer(self) -> Peer {
        match self {
            Self::None => Peer::Client,
            Self::BehindListen | Self::BehindSource | Self::BehindEgress => Peer::Gateway,
        }
    }

    /// Of a first packet.
    #[inline(always)]
    fn of<A: Address, T>(rule: &Rule, client: A, side: Side, scene: &Scene<'_, T>) -> Self {
        if rule.is_snat() {
            return Self::BehindSource;
        }
        if rule.is_masquerade() {
            return Self::BehindEgress;
        }
        match side {
            Side::Lan => Self::BehindListen,
            Side::Both if scene.ingress.is_near(client) => Self::BehindListen,
            Side::Wan | Side::Both | Side::Out => Self::None,
        }
    }
}

/// The rule that may listen on a packet's destination, by slot; 0 if there is none.
#[inline(always)]
pub fn listening<A: Address, T: Tables>(key: &FlowKey<A>, protocol: Protocol, tables: &T) -> u16 {
    let port = key.ports.dst();
    let covering = tables.port(port_index(protocol.class(A::FAMILY), port));
    let scoped = if covering.is_scoped() {
        tables.listen(&EndpointKey::new(key.dst, protocol, port))
    } else {
        0
    };
    if scoped != 0 { scoped } else { covering.rule() }
}

/// The translation of a packet that came from a client, into `to`, by the rule in a slot, if there is one that listens there.
#[inline(always)]
pub fn to_target<A: Address, T: Tables>(
    slot: u16,
    key: &FlowKey<A>,
    to: &mut FlowKey<A>,
    side: Side,
    scene: &Scene<'_, T>,
) -> Option<Mapping> {
    if slot == 0 {
        return None;
    }
    let (tables, port) = (scene.tables, key.ports.dst());
    let rule = tables.rule(slot)?;
    if !rule.covers(port) || !listens_on(rule, key.dst, tables) {
        return None;
    }
    *to = FlowKey {
        src: key.src,
        dst: A::narrow(rule.target),
        ports: Ports::new(key.ports.src(), rule.target_port(port)),
        protocol: key.protocol,
    };
    let hiding = Hiding::of(rule, key.src, side, scene);
    Some(Mapping {
        rule: slot,
        counter: rule.counter(port),
        stateless: rule.carries_without_entries() && hiding == Hiding::None,
        hiding,
        sources: rule.sources,
        limited: rule.limits.bind(),
        light: light_slot(rule, slot),
    })
}

/// The translation of a packet that came from a target and has no entry: the inverse, where the rule in `slot`, that of its
/// source (see [`Tables::target`]), alone determines it. Goes into `to`. `source` is the egress interface's address, which a
/// rule without listen address stands for.
#[inline(always)]
pub fn to_client<A: Address, T: Tables>(
    slot: u16,
    key: &FlowKey<A>,
    to: &mut FlowKey<A>,
    source: Option<A>,
    tables: &T,
) -> Option<Mapping> {
    if slot == 0 {
        return None;
    }
    let rule = tables.rule(slot)?;
    if !rule.is_stateless() {
        return None;
    }
    let listen = rule.listen_port(key.ports.src())?;
    let address = if rule.is_any_address() {
        source?
    } else {
        A::narrow(rule.listen)
    };
    *to = FlowKey {
        src: address,
        dst: key.dst,
        ports: Ports::new(listen, key.ports.dst()),
        protocol: key.protocol,
    };
    Some(Mapping {
        rule: slot,
        counter: rule.counter(listen),
        stateless: true,
        hiding: Hiding::None,
        sources: rule.sources,
        // What the target begins is its own affair.
        limited: false,
        light: light_slot(rule, slot),
    })
}

/// Whether a flow is still what its rule says: the slot may be empty or hold another rule by now. `original` and `reply` are
/// the keys of its two halves, `peer` is whom the target takes for the client.
#[inline(always)]
pub fn still_holds<A: Address, T: Tables>(
    rule: u16,
    counter: u32,
    original: &FlowKey<A>,
    reply: &FlowKey<A>,
    peer: Peer,
    tables: &T,
) -> bool {
    let (listen, target) = (original.ports.dst(), reply.ports.src());
    tables.rule(rule).is_some_and(|rule| {
        rule.covers(listen)
            && rule.target == reply.src.widen()
            && rule.target_port(listen) == target
            && rule.counter(listen) == counter
            && listens_on(rule, original.dst, tables)
            && still_stands(rule, peer, [original.dst, reply.dst], tables)
            && admits(rule.sources, original.src, tables)
    })
}

/// Whether a rule's list of sources lets a client in.
#[inline(always)]
pub fn admits<A: Address, T: Tables>(list: u32, client: A, tables: &T) -> bool {
    list == 0
        || match tables.admission(&SourceKey::new(list, client)) {
            Admission::Allowed => true,
            Admission::Denied => false,
        }
}

#[inline(always)]
fn listens_on<A: Address, T: Tables>(rule: &Rule, address: A, tables: &T) -> bool {
    if rule.is_any_address() {
        tables.is_own(address)
    } else {
        let listen: Ipv6 = rule.listen;
        listen == address.widen()
    }
}
