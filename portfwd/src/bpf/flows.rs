//! The connection table as user space sees it: listing and sweeping.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::Result;
use log::debug;
use portfwd_common::{
    abi::{Config, FlowDir, FlowEntry, FlowKey, Instant, Peer, Protocol, Ticks, Traffic},
    datapath::{
        Table,
        conntrack::Pair,
        late,
        tcp::{Side, TcpState},
        verdict::Event,
    },
    net::Address,
};

use super::{
    clock::Clock,
    map::{Map, Update},
    pools::{PoolKeeper, PoolsSwept, PortSet},
    tables::Tables,
    usages::{Count, UsageKeeper},
};

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
type FlowMap<A> = Map<FlowKey<A>, FlowEntry<A>>;

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

/// What a sweep did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that it saw.
    pub entries: u64,
    /// Those of them that stay, but for the revived.
    pub left: u64,
    /// Flows that had expired, or whose rule or listen address has gone.
    pub expired: u64,
    /// Halves without the other one.
    pub orphans: u64,
    /// Flows that it has ended because their rule is gone, of which the reply half stays for what is late.
    pub late: u64,
    /// Flows that met a packet between being found expired and being taken out, and went back.
    pub revived: u64,
    /// Slots of rules that entries named when it began.
    pub rules: HashSet<u16>,
    /// Ports that stand for clients.
    pub pools: PoolsSwept,
}

/// Frees the memory of flows that have expired. Expiry itself is decided by the datapath at every lookup.
#[derive(Debug)]
pub struct Sweeper {
    tables: Tables,
    pools: PoolKeeper,
    usages: UsageKeeper,
    /// When the last sweep began.
    last: Option<Instant>,
    /// Entries that it left.
    left: u64,
    /// The own addresses of the WAN that the last sweep found.
    own: Vec<(IpAddr, u32)>,
}

/// What every check of a sweep needs.
struct Sweep<'a> {
    clock: &'a Clock,
    config: Config,
    now: Instant,
    last: Option<Instant>,
    /// If they have changed: the own addresses of the WAN, and the slots of the rules that stand for all of them.
    readdressed: Option<(HashSet<IpAddr>, HashSet<u16>)>,
    /// Slots of rules whose flows go on; read after `now` was taken.
    active: HashSet<u16>,
    /// Whether the tables need the places of halves that are late.
    is_crowded: bool,
}

/// A half may be seen before its partner is inserted; the gap is nanoseconds, and this is generous.
const ORPHAN_AGE: Duration = Duration::from_secs(2);

/// What a sweep has seen of all flows together.
#[derive(Debug)]
struct Seen {
    ports: PortSet,
    count: Count,
}

impl Seen {
    fn new(count: Count) -> Self {
        Self {
            ports: PortSet::default(),
            count,
        }
    }
}

/// An entry as it was seen.
type Half<A> = (FlowKey<A>, FlowEntry<A>);

/// What becomes of an entry that looked dead in the dump.
enum Fate<A: Address> {
    Lives,
    Expired { original: Half<A>, reply: Half<A> },
    Ended { original: Half<A>, reply: Half<A> },
    Orphan,
}

impl Sweeper {
    /// A sweeper with access of its own to the maps.
    pub fn new(tables: Tables, pools: PoolKeeper, usages: UsageKeeper) -> Self {
        Self {
            tables,
            pools,
            usages,
            last: None,
            left: 0,
            own: Vec::new(),
        }
    }

    /// Goes through both tables once.
    pub fn sweep(&mut self) -> Result<Swept> {
        let clock = *self.tables.clock();
        let sweep = Sweep {
            clock: &clock,
            config: self.tables.config()?,
            now: clock.now()?,
            last: self.last,
            readdressed: self.readdressed()?,
            active: self.active()?,
            is_crowded: self.left > u64::from(self.tables.flows_v4.max_entries() / 2),
        };
        let count = self.usages.begin(&mut self.tables)?;
        let (mut swept, mut seen) = (Swept::default(), Seen::new(count));
        // In the order in which flows move: none is missed.
        let tables = &mut self.tables;
        sweep.table(
            Table::Opening,
            &mut tables.opening_v4,
            &mut swept,
            &mut seen,
        )?;
        sweep.table(
            Table::Opening,
            &mut tables.opening_v6,
            &mut swept,
            &mut seen,
        )?;
        sweep.table(Table::Flows, &mut tables.flows_v4, &mut swept, &mut seen)?;
        sweep.table(Table::Flows, &mut tables.flows_v6, &mut swept, &mut seen)?;
        self.usages.finish(&mut self.tables, &seen.count)?;
        swept.pools = self.pools.keep(&mut self.tables, &seen.ports)?;
        self.last = Some(sweep.now);
        self.left = swept.left + swept.late;
        if swept.expired + swept.orphans + swept.late + swept.revived + swept.pools.given > 0 {
            debug!("{swept:?}");
        }
        Ok(swept)
    }

    /// Slots of rules whose flows go on.
    fn active(&self) -> Result<HashSet<u16>> {
        let rules = self.tables.rules()?.into_iter();
        let active = rules.filter(|(_, rule)| rule.is_active());
        Ok(active.map(|(slot, _)| slot).collect())
    }

    /// What tells the flows to addresses that the WAN no longer has, if it has others than at the last sweep.
    fn readdressed(&mut self) -> Result<Option<(HashSet<IpAddr>, HashSet<u16>)>> {
        let own = self.tables.addresses()?;
        if own == self.own {
            return Ok(None);
        }
        let rules = self.tables.rules()?;
        let any = rules.iter().filter(|(_, rule)| rule.is_any_address());
        let slots = any.map(|(slot, _)| *slot).collect();
        let addresses = own.iter().map(|(address, _)| *address).collect();
        self.own = own;
        Ok(Some((addresses, slots)))
    }

    /// Looks at limits, and at the ports that stand for clients, knowing that there is no flow.
    pub fn keep_others(&mut self) -> Result<PoolsSwept> {
        let none = self.usages.begin(&mut self.tables)?;
        self.usages.finish(&mut self.tables, &none)?;
        self.pools.keep(&mut self.tables, &PortSet::default())
    }

    /// Flows ever created, for a cheap look whether there can be anything to sweep.
    pub fn flows_created(&self) -> Result<u64> {
        Ok(self.tables.reasons()?[Event::FlowCreated.index() as usize])
    }
}

impl Sweep<'_> {
    fn table<A: Address>(
        &self,
        table: Table,
        map: &mut FlowMap<A>,
        swept: &mut Swept,
        seen: &mut Seen,
    ) -> Result<()> {
        let (mut batches, mut suspects) = (map.batches(), Vec::new());
        while let Some((keys, entries)) = batches.next(map)? {
            swept.entries += keys.len() as u64;
            let named = entries.iter().filter(|entry| !entry.is_late());
            swept.rules.extend(named.map(|entry| entry.rule));
            for (key, entry) in keys.iter().zip(entries) {
                seen.ports.insert_of(key, entry);
                if entry.dir() == FlowDir::Original && seen.count.is_about(entry.rule) {
                    let partner = map.lookup(&entry.partner(key))?;
                    let moment = (&self.config, self.now);
                    seen.count.see(table, key, entry, partner.as_ref(), moment);
                }
            }
            suspects.extend(
                keys.iter()
                    .zip(entries)
                    .filter(|(key, entry)| {
                        entry.is_late()
                            || self.is_suspect(entry)
                            || self.is_unlistened(key, entry)
                            || self.is_without_rule(entry)
                    })
                    .map(|(key, entry)| (*key, *entry)),
            );
            swept.left += (keys.len() - suspects.len()) as u64;
            // Before the next batch: after a rush all entries are suspects, and the table may have millions.
            for suspect in suspects.drain(..) {
                match self.fate(map, &suspect)? {
                    Fate::Lives => swept.left += 1,
                    Fate::Expired { original, reply } => {
                        remove_pair(map, &original, &reply, swept)?;
                    }
                    Fate::Ended { original, reply } => {
                        end_pair(map, &original, &reply, swept)?;
                    }
                    Fate::Orphan => remove_orphan(map, &suspect, swept)?,
                }
            }
        }
        Ok(())
    }

    /// Whether the other half is worth a look: this one has been silent for longer than the shortest timeout, or has come of
    /// the age at which the other must be there.
    fn is_suspect<A: Address>(&self, entry: &FlowEntry<A>) -> bool {
        let config = &self.config;
        let shortest = config
            .udp
            .min(config.tcp_opening)
            .min(config.tcp_established)
            .min(config.tcp_closing);
        // What one side has refused or reset is soon over.
        let shortest = if Side::of(entry).has(Side::RST) {
            shortest.min(TcpState::Refused.timeout(config))
        } else {
            shortest
        };
        if elapsed(self.now, entry.last_seen) > shortest
            || (!Side::of(entry).is_settled()
                && elapsed(self.now, entry.created) > config.tcp_opening)
        {
            return true;
        }
        let grown_up = self.clock.ticks(ORPHAN_AGE);
        let age = elapsed(self.now, entry.created);
        let unseen = self
            .last
            .is_none_or(|last| elapsed(last, entry.created) <= grown_up);
        age > grown_up && unseen
    }

    /// Whether it is the original half of a flow to an address that the WAN had. Its next packet would end it; one that is
    /// silent ends here.
    fn is_unlistened<A: Address>(&self, key: &FlowKey<A>, entry: &FlowEntry<A>) -> bool {
        self.readdressed.as_ref().is_some_and(|(own, any)| {
            entry.dir() == FlowDir::Original
                && any.contains(&entry.rule)
                && !own.contains(&key.dst.ip())
        })
    }

    /// Whether its rule is gone, or closed to the flows that it had. Its next packet would end it; one that is silent ends
    /// here. One that has just begun may be a rule's that was not there yet when the rules were read.
    fn is_without_rule<A: Address>(&self, entry: &FlowEntry<A>) -> bool {
        !self.active.contains(&entry.rule)
            && elapsed(self.now, entry.created) > self.clock.ticks(ORPHAN_AGE)
    }

    fn fate<A: Address>(&self, map: &FlowMap<A>, half: &Half<A>) -> Result<Fate<A>> {
        let (key, entry) = half;
        if entry.is_late() {
            let is_due = protocol(key)
                .is_some_and(|protocol| late::is_due(entry, protocol, &self.config, self.now));
            return Ok(if is_due && !self.is_crowded {
                Fate::Lives
            } else {
                Fate::Orphan
            });
        }
        let partner_key = entry.partner(key);
        let complete = map.lookup(&partner_key)?.and_then(|partner| {
            let pair = Pair::of(entry.into(), (&partner).into())?;
            Some((pair, partner, protocol(key)?))
        });
        let Some((pair, partner, protocol)) = complete else {
            let grown_up = elapsed(self.now, entry.created) > self.clock.ticks(ORPHAN_AGE);
            return Ok(if grown_up { Fate::Orphan } else { Fate::Lives });
        };
        // A packet may have come since `now` was taken.
        let now = self.now.later(pair.last_seen());
        let is_expired = pair.is_expired(protocol, &self.config, now);
        let has_rule = !self.is_without_rule(entry);
        if has_rule && !is_expired && !self.is_unlistened(key, entry) {
            return Ok(Fate::Lives);
        }
        let other = (partner_key, partner);
        let (original, reply) = match entry.dir() {
            FlowDir::Original => (*half, other),
            FlowDir::Reply => (other, *half),
        };
        // What answers to the gateway itself does not leave.
        let may_be_late = !has_rule && !is_expired && entry.peer() == Peer::Client;
        Ok(if may_be_late && !self.is_crowded {
            Fate::Ended { original, reply }
        } else {
            Fate::Expired { original, reply }
        })
    }
}

/// Takes both halves out, unless a packet comes in between.
fn remove_pair<A: Address>(
    map: &mut FlowMap<A>,
    original: &Half<A>,
    reply: &Half<A>,
    swept: &mut Swept,
) -> Result<()> {
    match take_unchanged(map, original)? {
        // Seen already as the other half.
        Taken::Gone => {}
        Taken::Changed => swept.revived += 1,
        Taken::Unchanged => match take_unchanged(map, reply)? {
            Taken::Unchanged | Taken::Gone => swept.expired += 1,
            Taken::Changed => {
                swept.revived += 1;
                // The reply half has gone back already. Should the original have begun a new life, that one wins.
                map.update(&original.0, &original.1, Update::NoExist)?;
            }
        },
    }
    Ok(())
}

/// Ends a flow whose rule is gone, as its next packet would: the reply half stays, marked as late. Should a flow begin on its key in
/// between, that one stays.
fn end_pair<A: Address>(
    map: &mut FlowMap<A>,
    original: &Half<A>,
    reply: &Half<A>,
    swept: &mut Swept,
) -> Result<()> {
    match take_unchanged(map, original)? {
        // Seen already as the other half.
        Taken::Gone => {}
        Taken::Changed => swept.revived += 1,
        Taken::Unchanged => {
            if let Taken::Unchanged = take_unchanged(map, reply)? {
                let (key, mut entry) = *reply;
                entry.marks |= FlowEntry::<A>::LATE;
                map.update(&key, &entry, Update::NoExist)?;
            }
            swept.late += 1;
        }
    }
    Ok(())
}

fn remove_orphan<A: Address>(
    map: &mut FlowMap<A>,
    half: &Half<A>,
    swept: &mut Swept,
) -> Result<()> {
    match take_unchanged(map, half)? {
        Taken::Unchanged => swept.orphans += 1,
        Taken::Changed => swept.revived += 1,
        Taken::Gone => {}
    }
    Ok(())
}

/// What taking an entry out met.
enum Taken {
    /// It was as expected, and is out.
    Unchanged,
    /// It was another life, or a packet had passed, or it is late by now; it is in again.
    Changed,
    /// It was not there.
    Gone,
}

fn take_unchanged<A: Address>(map: &mut FlowMap<A>, (key, expected): &Half<A>) -> Result<Taken> {
    let Some(taken) = map.take(key)? else {
        return Ok(Taken::Gone);
    };
    let as_expected = |of: &FlowEntry<A>| (of.created, of.last_seen, of.is_late());
    if as_expected(&taken) == as_expected(expected) {
        return Ok(Taken::Unchanged);
    }
    map.update(key, &taken, Update::NoExist)?;
    Ok(Taken::Changed)
}
