//! Sweeps of the connection table: they free the memory of flows that are over.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use anyhow::Result;
use log::debug;
use portfwd_common::{
    abi::{Config, Epoch, FlowDir, FlowEntry, FlowKey, Instant, Peer, Rule, Ticks},
    datapath::{
        Table,
        conntrack::{self, Pair, Term},
        late,
        verdict::{DropReason, Event},
    },
    net::Address,
};

use super::{
    clock::Clock,
    flows::{FlowMap, elapsed, protocol},
    map::Update,
    pools::{PoolKeeper, PoolsSwept, PortSet},
    tables::Tables,
    unmet::Unmet,
    usages::{Count, UsageKeeper},
};

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
    /// Of those that had expired or lost their rule, the ones whose reply half stays for what is late.
    pub late: u64,
    /// Flows that met a packet between being found expired and being taken out, and went back.
    pub revived: u64,
    /// Slots of rules that entries named when it began.
    pub rules: HashSet<u16>,
    /// Ports that stand for clients.
    pub pools: PoolsSwept,
    /// The soonest that a flow that it left may be over, from when it began; `None` if it left none.
    pub soonest: Option<Ticks>,
}

/// Frees the memory of flows that have expired. Expiry itself is decided by the datapath at every lookup.
#[derive(Debug)]
pub struct Sweeper {
    tables: Tables,
    pools: PoolKeeper,
    usages: UsageKeeper,
    /// What the last sweep knows.
    last: Option<Past>,
    /// Halves of flows that it met alone.
    unmet: Unmet,
    /// Entries that it left in the connection tables of both families.
    left: [u64; 2],
    /// The own addresses of the WAN that the last sweep found.
    own: Vec<(IpAddr, u32)>,
    /// The last look at what is not flows.
    others: Option<Look>,
}

/// A look at limits and at ports that stand for clients.
#[derive(Debug)]
struct Look {
    at: Instant,
    /// Then: no rule and no address has changed while it is the same.
    epoch: Epoch,
    /// Ports that have ever been given to clients, then.
    bound: u64,
    /// Whether every port that stands for nobody is given back.
    is_settled: bool,
}

/// What a sweep leaves behind for those who ask whether another is due.
#[derive(Debug)]
struct Past {
    began: Instant,
    /// See [`Sweeper::comers`]; before it began.
    comers: u64,
    timeouts: [Ticks; 4],
    /// See [`Swept::soonest`].
    soonest: Option<Ticks>,
    /// The ports that stood for the clients of the flows that it met, if it left any.
    ports: PortSet,
    /// Whether it took flows out: their ports are among these, and may go back.
    took_out: bool,
}

/// What every check of a sweep needs.
struct Sweep<'a> {
    clock: &'a Clock,
    config: Config,
    now: Instant,
    /// When the last sweep began.
    last: Option<Instant>,
    /// If they have changed: the own addresses of the WAN, and the slots of the rules that stand for all of them.
    readdressed: Option<(HashSet<IpAddr>, HashSet<u16>)>,
    /// Slots of rules whose flows go on; read after `now` was taken.
    active: HashSet<u16>,
}

/// How long a sweep is relied on: connections that lasted may have been closed since, which no flow that begins tells of.
const RELIANCE: Duration = Duration::from_secs(300);
/// How often ports that sockets have bound are looked for while no client needs one. Whoever gets a port before is asked for then.
const SOCKETS_PAUSE: Duration = Duration::from_secs(60);
/// A half may be seen before its partner is inserted; the gap is nanoseconds, and this is generous.
const ORPHAN_AGE: Duration = Duration::from_secs(2);

/// What a sweep has seen of all flows together.
#[derive(Debug)]
struct Seen<'a> {
    ports: PortSet,
    count: Count,
    unmet: &'a mut Unmet,
}

/// What becomes of the reply half of a flow whose rule is gone (`portfwd_common::datapath::late`).
enum Late<'a, A: Address> {
    /// It stays.
    Stays,
    /// It stays, unless a flow begins on its key, in this table.
    StaysBeside(&'a FlowMap<A>),
    /// It goes: others need its place.
    Goes,
}

/// An entry as it was seen.
type Half<A> = (FlowKey<A>, FlowEntry<A>);

/// What becomes of an entry that looked dead in the dump.
enum Fate<A: Address> {
    /// For so long at least.
    Lives {
        rest: Ticks,
    },
    Expired {
        original: Half<A>,
        reply: Half<A>,
    },
    Ended {
        original: Half<A>,
        reply: Half<A>,
        term: Term,
    },
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
            unmet: Unmet::default(),
            left: [0; 2],
            own: Vec::new(),
            others: None,
        }
    }

    /// Goes through both tables once.
    pub fn sweep(&mut self) -> Result<Swept> {
        let clock = *self.tables.clock();
        let comers = self.comers()?;
        let now = clock.now()?;
        let rules = self.tables.rules()?;
        let sweep = Sweep {
            clock: &clock,
            config: self.tables.config()?,
            now,
            last: self.last.as_ref().map(|last| last.began),
            readdressed: self.readdressed(&rules)?,
            active: active(&rules),
        };
        self.unmet.begin();
        let mut seen = Seen {
            ports: PortSet::default(),
            count: self.usages.begin(&mut self.tables, &rules)?,
            unmet: &mut self.unmet,
        };
        let mut swept = Swept::default();
        // In the order in which flows move: none is missed.
        let tables = &mut self.tables;
        sweep.opening(&mut tables.opening_v4, &mut swept, &mut seen)?;
        sweep.opening(&mut tables.opening_v6, &mut swept, &mut seen)?;
        let (opening, flows) = (&mut tables.opening_v4, &mut tables.flows_v4);
        self.left[0] = sweep.flows(flows, opening, self.left[0], &mut swept, &mut seen)?;
        let (opening, flows) = (&mut tables.opening_v6, &mut tables.flows_v6);
        self.left[1] = sweep.flows(flows, opening, self.left[1], &mut swept, &mut seen)?;
        let Seen { ports, count, .. } = seen;
        self.usages.finish(&mut self.tables, &count)?;
        swept.pools = self.keep_pools(&ports)?;
        self.last = Some(Past {
            began: sweep.now,
            comers,
            timeouts: timeouts(&sweep.config),
            soonest: swept.soonest,
            took_out: swept.expired + swept.orphans > 0,
            ports: if swept.soonest.is_some() {
                ports
            } else {
                PortSet::default()
            },
        });
        if swept.expired + swept.orphans + swept.late + swept.revived + swept.pools.given > 0 {
            debug!("{swept:?}");
        }
        Ok(swept)
    }

    /// Whether a sweep could do anything now that the last one could not, but for what only those know who change rules.
    pub fn is_due(&self) -> Result<bool> {
        let Some(last) = &self.last else {
            return Ok(true);
        };
        if self.comers()? != last.comers {
            return Ok(true);
        }
        let Some(soonest) = last.soonest else {
            return Ok(false);
        };
        let clock = self.tables.clock();
        let past = clock.now()?.since(last.began);
        let is_full_since = |ago| clock.ticks(ago) <= past;
        Ok(past >= soonest.min(clock.ticks(RELIANCE))
            || last.took_out
            || self.tables.full_ago()?.is_some_and(is_full_since)
            || !self.unmet.is_empty()
            || timeouts(&self.tables.config()?) != last.timeouts
            || self.tables.addresses()? != self.own
            || self.is_awaited()?)
    }

    /// Whether somebody waits for the next look at flows, whatever becomes of them: a rule that counts them, or one that is gone
    /// when its last flow is.
    fn is_awaited(&self) -> Result<bool> {
        let rules = self.tables.rules()?;
        let is_awaited =
            |rule: &Rule| rule.is_active() && (rule.limits.count_flows() || !rule.takes_flows());
        Ok(rules.iter().any(|(_, rule)| is_awaited(rule)))
    }

    /// Whether the last sweep left no flow.
    pub fn left_nothing(&self) -> bool {
        self.last
            .as_ref()
            .is_some_and(|last| last.soonest.is_none())
    }

    /// What tells the flows to addresses that the WAN no longer has, if it has others than at the last sweep.
    fn readdressed(
        &mut self,
        rules: &[(u16, Rule)],
    ) -> Result<Option<(HashSet<IpAddr>, HashSet<u16>)>> {
        let own = self.tables.addresses()?;
        if own == self.own {
            return Ok(None);
        }
        let any = rules.iter().filter(|(_, rule)| rule.is_any_address());
        let slots = any.map(|(slot, _)| *slot).collect();
        let addresses = own.iter().map(|(address, _)| *address).collect();
        self.own = own;
        Ok(Some((addresses, slots)))
    }

    /// Looks at limits, and at the ports that stand for clients, knowing that there are no flows but those that the last sweep met,
    /// and none that anybody counts. False if there was nothing to see, and it did not look.
    pub fn keep_others(&mut self) -> Result<bool> {
        if !self.are_others_due()? {
            return Ok(false);
        }
        let rules = self.tables.rules()?;
        let none = self.usages.begin(&mut self.tables, &rules)?;
        self.usages.finish(&mut self.tables, &none)?;
        let last = self.last.as_mut();
        let ports = last.map(|last| std::mem::take(&mut last.ports));
        let ports = ports.unwrap_or_default();
        let kept = self.keep_pools(&ports);
        // Flows have them, whatever came of the look.
        if let Some(last) = &mut self.last {
            last.ports = ports;
        }
        kept.map(|_| true)
    }

    fn are_others_due(&self) -> Result<bool> {
        let Some(look) = &self.others else {
            return Ok(true);
        };
        let clock = self.tables.clock();
        let past = clock.now()?.since(look.at);
        Ok(!look.is_settled
            || past >= clock.ticks(SOCKETS_PAUSE)
            || self.tables.config()?.epoch != look.epoch
            || self.bound()? != look.bound)
    }

    fn keep_pools(&mut self, ports: &PortSet) -> Result<PoolsSwept> {
        // Before the look: what changes meanwhile is for the next one.
        let (at, epoch) = (self.tables.clock().now()?, self.tables.config()?.epoch);
        let bound = self.bound()?;
        let swept = self.pools.keep(&mut self.tables, ports)?;
        self.others = Some(Look {
            at,
            epoch,
            bound,
            is_settled: swept.is_settled(),
        });
        Ok(swept)
    }

    /// Ports that have ever been given to clients.
    fn bound(&self) -> Result<u64> {
        Ok(self.tables.reasons()?[Event::Bound.index() as usize])
    }

    /// Flows that have ever begun, or have found no room or no port: those of closed connections are to come back.
    fn comers(&self) -> Result<u64> {
        let reasons = self.tables.reasons()?;
        let counted = [
            Event::FlowCreated.index(),
            DropReason::TableFull.index(),
            DropReason::NoPort.index(),
        ];
        Ok(counted.map(|index| reasons[index as usize]).iter().sum())
    }
}

/// Slots of rules whose flows go on.
fn active(rules: &[(u16, Rule)]) -> HashSet<u16> {
    let active = rules.iter().filter(|(_, rule)| rule.is_active());
    active.map(|(slot, _)| *slot).collect()
}

/// What flows live by.
const fn timeouts(config: &Config) -> [Ticks; 4] {
    [
        config.udp,
        config.tcp_opening,
        config.tcp_established,
        config.tcp_closing,
    ]
}

impl Swept {
    /// An entry stays whose flow may be over after so long.
    fn leave(&mut self, rest: Ticks) {
        self.soonest = Some(self.soonest.map_or(rest, |soonest| soonest.min(rest)));
    }

    /// An entry goes back that is another's than it was, or younger: the next sweep looks at it.
    fn revive(&mut self) {
        self.revived += 1;
        self.leave(Ticks(0));
    }
}

impl Sweep<'_> {
    /// Goes through a table in which flows begin. It makes room by itself.
    fn opening<A: Address>(
        &self,
        map: &mut FlowMap<A>,
        swept: &mut Swept,
        seen: &mut Seen<'_>,
    ) -> Result<()> {
        self.table(Table::Opening, map, &Late::Stays, swept, seen)
    }

    /// Goes through a connection table, in which the last sweep has left so many entries. Returns how many this one leaves.
    fn flows<A: Address>(
        &self,
        map: &mut FlowMap<A>,
        opening: &FlowMap<A>,
        left: u64,
        swept: &mut Swept,
        seen: &mut Seen<'_>,
    ) -> Result<u64> {
        let before = swept.left + swept.late;
        let late = if left > u64::from(map.max_entries() / 2) {
            Late::Goes
        } else {
            Late::StaysBeside(opening)
        };
        self.table(Table::Flows, map, &late, swept, seen)?;
        Ok(swept.left + swept.late - before)
    }

    fn table<A: Address>(
        &self,
        table: Table,
        map: &mut FlowMap<A>,
        late: &Late<'_, A>,
        swept: &mut Swept,
        seen: &mut Seen<'_>,
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
            for (key, entry) in keys.iter().zip(entries) {
                if self.is_suspect(key, entry, seen.unmet) {
                    suspects.push((*key, *entry));
                } else {
                    swept.left += 1;
                    swept.leave(self.soonest(key, entry));
                }
            }
            // Before the next batch: after a rush all entries are suspects, and the table may have millions.
            for suspect in suspects.drain(..) {
                match self.fate(map, late, &suspect)? {
                    Fate::Lives { rest } => {
                        swept.left += 1;
                        swept.leave(rest);
                    }
                    Fate::Expired { original, reply } => {
                        remove_pair(map, &original, &reply, swept)?;
                    }
                    Fate::Ended {
                        original,
                        reply,
                        term,
                    } => end_pair(map, late, &original, (&reply, term), swept)?,
                    Fate::Orphan => remove_orphan(map, &suspect, swept)?,
                }
            }
        }
        Ok(())
    }

    /// Whether the other half is worth a look: the flow may be over by what this one says, or has lost its rule, or nobody has met
    /// the other half.
    fn is_suspect<A: Address>(
        &self,
        key: &FlowKey<A>,
        entry: &FlowEntry<A>,
        unmet: &mut Unmet,
    ) -> bool {
        entry.is_late()
            || self.soonest(key, entry) == Ticks(0)
            || self.is_unlistened(key, entry)
            || self.is_without_rule(entry)
            || unmet.was_alone(key, entry)
            || self.is_new(entry) && !unmet.meet(key, entry)
    }

    /// The soonest that a half's flow may be over; at once if it is of a protocol that nobody tracks.
    fn soonest<A: Address>(&self, key: &FlowKey<A>, entry: &FlowEntry<A>) -> Ticks {
        protocol(key).map_or(Ticks(0), |protocol| {
            conntrack::Half::from(entry).soonest(protocol, &self.config, self.now)
        })
    }

    /// Whether it has come of the age at which the other half must be there since the last sweep.
    fn is_new<A: Address>(&self, entry: &FlowEntry<A>) -> bool {
        let grown_up = self.clock.ticks(ORPHAN_AGE);
        let is_unseen = |last| elapsed(last, entry.created) <= grown_up;
        elapsed(self.now, entry.created) > grown_up && self.last.is_none_or(is_unseen)
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

    fn fate<A: Address>(
        &self,
        map: &FlowMap<A>,
        late: &Late<'_, A>,
        half: &Half<A>,
    ) -> Result<Fate<A>> {
        let (key, entry) = half;
        if entry.is_late() {
            let rest = late::term(entry).rest(self.now);
            return Ok(match late {
                Late::Stays | Late::StaysBeside(_) if rest != Ticks(0) => Fate::Lives { rest },
                Late::Stays | Late::StaysBeside(_) | Late::Goes => Fate::Orphan,
            });
        }
        let partner_key = entry.partner(key);
        let complete = map.lookup(&partner_key)?.and_then(|partner| {
            let pair = Pair::of(entry.into(), (&partner).into())?;
            Some((pair, partner, protocol(key)?))
        });
        let Some((pair, partner, protocol)) = complete else {
            let grown_up = elapsed(self.now, entry.created) > self.clock.ticks(ORPHAN_AGE);
            let rest = self.clock.ticks(ORPHAN_AGE);
            return Ok(if grown_up {
                Fate::Orphan
            } else {
                Fate::Lives { rest }
            });
        };
        // A packet may have come since `now` was taken.
        let now = self.now.later(pair.last_seen());
        let term = pair.term(protocol, &self.config);
        let is_expired = term.is_over(now);
        let has_rule = !self.is_without_rule(entry);
        if has_rule && !is_expired && !self.is_unlistened(key, entry) {
            return Ok(Fate::Lives {
                rest: term.rest(now),
            });
        }
        let other = (partner_key, partner);
        let (original, reply) = match entry.dir() {
            FlowDir::Original => (*half, other),
            FlowDir::Reply => (other, *half),
        };
        // What answers to the gateway itself does not leave.
        let may_be_late = !has_rule && !is_expired && entry.peer() == Peer::Client;
        Ok(match late {
            Late::Stays | Late::StaysBeside(_) if may_be_late => Fate::Ended {
                original,
                reply,
                term,
            },
            Late::Stays | Late::StaysBeside(_) | Late::Goes => Fate::Expired { original, reply },
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
        Taken::Changed => swept.revive(),
        Taken::Unchanged => match take_unchanged(map, reply)? {
            Taken::Unchanged | Taken::Gone => swept.expired += 1,
            Taken::Changed => {
                swept.revive();
                // The reply half has gone back already. Should the original have begun a new life, that one wins.
                map.update(&original.0, &original.1, Update::NoExist)?;
            }
        },
    }
    Ok(())
}

/// Ends a flow whose rule is gone, as its next packet would: the reply half stays, marked as late. It goes first, so that the
/// target's next packet finds it.
fn end_pair<A: Address>(
    map: &mut FlowMap<A>,
    late: &Late<'_, A>,
    original: &Half<A>,
    (reply, term): (&Half<A>, Term),
    swept: &mut Swept,
) -> Result<()> {
    match take_unchanged(map, reply)? {
        // Seen already as the other half, or ended by a packet.
        Taken::Gone | Taken::Changed => return Ok(()),
        Taken::Unchanged => {}
    }
    let (key, mut entry) = *reply;
    late::mark(&mut entry, term);
    // Without room for it the flow is over all the same.
    let mut stays = map.put_if_room(&key, &entry)?;
    if let Late::StaysBeside(opening) = late
        && stays
        && opening.lookup(&key)?.is_some()
    {
        map.delete(&key)?;
        stays = false;
    }
    swept.expired += 1;
    if stays {
        swept.late += 1;
        swept.leave(term.length);
    }
    match take_unchanged(map, original)? {
        Taken::Unchanged | Taken::Gone => {}
        Taken::Changed => {
            // A packet came in between, and found that the rule still holds: its next one begins the flow anew.
            swept.revive();
            if stays {
                map.delete(&key)?;
            }
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
        Taken::Changed => swept.revive(),
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
