//! The connection table as user space lists it.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use anyhow::Result;
use portfwd_common::{
    abi::{Config, FlowDir, FlowEntry, FlowKey, Instant, Protocol, Ticks, Traffic},
    datapath::conntrack::Pair,
    net::Address,
};

use super::{clock::Clock, map::Map};

/// A live flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Who dialled.
    pub client: SocketAddr,
    /// What the client dialled.
    pub listen: SocketAddr,
    /// Who serves it.
    pub target: SocketAddr,
    /// Whom the target takes for the client.
    pub source: SocketAddr,
    /// Slot of its rule.
    pub rule: u16,
    /// What it is doing.
    pub state: &'static str,
    /// Time since its first packet.
    pub age: Duration,
    /// Time since its last packet.
    pub idle: Duration,
    /// Original direction.
    pub to_target: Traffic,
    /// Reply direction.
    pub to_client: Traffic,
}

/// The table of one address family.
pub(super) type FlowMap<A> = Map<FlowKey<A>, FlowEntry<A>>;

/// Flows that are complete and not expired.
pub(super) fn live<A: Address>(
    map: &FlowMap<A>,
    clock: &Clock,
    config: &Config,
    now: Instant,
) -> Result<Vec<Flow>> {
    let mut originals = Vec::new();
    let mut replies = HashMap::new();
    map.for_each_batch(|keys, entries| {
        for (key, entry) in keys.iter().zip(entries) {
            match entry.dir() {
                FlowDir::Original => originals.push((*key, *entry)),
                FlowDir::Reply => drop(replies.insert(*key, *entry)),
            }
        }
        Ok(())
    })?;
    let flow = |(key, original): &(FlowKey<A>, FlowEntry<A>)| {
        let partner = original.partner(key);
        let reply = replies.get(&partner)?;
        let pair = Pair::of(original.into(), reply.into())?;
        let protocol = protocol(key)?;
        // The datapath goes on while the table is read: packets may have passed since `now` was taken.
        let now = now.later(pair.last_seen());
        if pair.is_expired(protocol, config, now) {
            return None;
        }
        Some(Flow {
            protocol,
            client: SocketAddr::new(key.src.ip(), key.ports.src()),
            listen: SocketAddr::new(key.dst.ip(), key.ports.dst()),
            target: SocketAddr::new(partner.src.ip(), partner.ports.src()),
            source: SocketAddr::new(partner.dst.ip(), partner.ports.dst()),
            rule: original.rule,
            state: pair.state(protocol).name(),
            age: clock.duration(elapsed(now, original.created)),
            idle: clock.duration(elapsed(now, pair.last_seen())),
            to_target: original.traffic,
            to_client: reply.traffic,
        })
    };
    Ok(originals.iter().filter_map(flow).collect())
}

/// Entries of the original direction, one per flow.
pub(super) fn count_pairs<A: Address>(map: &FlowMap<A>) -> Result<u64> {
    let mut pairs = 0;
    map.for_each_batch(|_, entries| {
        pairs += entries
            .iter()
            .filter(|entry| entry.dir() == FlowDir::Original)
            .count() as u64;
        Ok(())
    })?;
    Ok(pairs)
}

/// The protocol of an entry; the datapath makes none of another.
pub(super) fn protocol<A>(key: &FlowKey<A>) -> Option<Protocol> {
    u8::try_from(key.protocol)
        .ok()
        .and_then(Protocol::from_number)
}

/// Time since an instant. The datapath goes on while user space reads: what was stamped after `now` was taken is no age.
pub(super) fn elapsed(now: Instant, then: Instant) -> Ticks {
    if now.later(then) == now {
        now.since(then)
    } else {
        Ticks(0)
    }
}
