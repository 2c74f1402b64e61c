//! Ports that stand for clients: pools are made here, kept from what the gateway itself uses, and swept.
//!
//! The datapath only takes ports. Whether one can go back is seen by looking at everything that could use it: a binding that
//! no flow has used for its time of rest is taken out, and a port that neither a binding nor a flow has, twice in a row, is
//! given back. The second look comes seconds after the first, and a program runs for microseconds, so nothing that was on its
//! way then can still be. Nothing is remembered but what was seen last: whatever a crash has left is found like anything else.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use anyhow::{Context, Result};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use portfwd_common::{
    abi::{
        Binding, BindingKey, FlowDir, FlowEntry, FlowKey, Instant, Peer, Pool, PoolKey, PoolTask,
        Protocol, Rule, names,
        pool::{FULL_WORDS, POOL_WORDS},
    },
    net::{Address, Family, Ipv4, Ipv6},
};

use super::{
    flows::protocol,
    map::Update,
    pins::Pins,
    rest::{Resting, UDP_REST},
    tables::Tables,
};
use crate::gateway_ports::GatewayPorts;

/// Ports, by pool.
#[derive(Debug, Default)]
pub struct PortSet(HashMap<PoolKey, Pool>);

/// No port, not even 0.
const NONE: Pool = Pool {
    taken: [0; POOL_WORDS],
    full: [0; FULL_WORDS],
};

impl PortSet {
    /// Adds a port.
    fn insert(&mut self, pool: PoolKey, port: u16) {
        self.0.entry(pool).or_insert(NONE).take(port);
    }

    /// Whether it has a port.
    fn has(&self, pool: &PoolKey, port: u16) -> bool {
        self.0.get(pool).is_some_and(|pool| pool.is_taken(port))
    }

    /// A word of a pool's ports.
    fn word(&self, pool: &PoolKey, word: usize) -> u64 {
        self.0.get(pool).map_or(0, |pool| pool.taken[word])
    }

    /// Adds the port that stands for a flow's client, seen in either half.
    pub(super) fn insert_of<A: Address>(&mut self, key: &FlowKey<A>, entry: &FlowEntry<A>) {
        let Some(protocol) = protocol(key) else {
            return;
        };
        let (address, port) = match (entry.peer(), entry.dir()) {
            (Peer::Client, _) => return,
            (Peer::Gateway, FlowDir::Original) => (entry.rewrite.src, entry.rewrite.ports.src()),
            (Peer::Gateway, FlowDir::Reply) => (key.dst, key.ports.dst()),
        };
        self.insert(PoolKey::new(address, protocol), port);
    }
}

fn pools_of(address: IpAddr) -> impl Iterator<Item = PoolKey> {
    Protocol::ALL
        .into_iter()
        .map(move |protocol| match address {
            IpAddr::V4(v4) => PoolKey::new(Ipv4::from(v4), protocol),
            IpAddr::V6(v6) => PoolKey::new(Ipv6::from(v6), protocol),
        })
}

/// What of a pool's address is an address again.
fn address_of(key: &PoolKey) -> IpAddr {
    match family_of(key) {
        Family::V4 => Ipv4::narrow(key.address).ip(),
        Family::V6 => key.address.ip(),
    }
}

fn protocol_of(key: &PoolKey) -> Protocol {
    let is_it = |protocol: &Protocol| {
        [Family::V4, Family::V6]
            .iter()
            .any(|family| u32::from(protocol.class(*family)) == key.class)
    };
    Protocol::ALL.into_iter().find(is_it).unwrap_or_default()
}

fn family_of(key: &PoolKey) -> Family {
    if u32::from(protocol_of(key).class(Family::V4)) == key.class {
        Family::V4
    } else {
        Family::V6
    }
}

impl Tables {
    /// Makes the pools that addresses and rules call for and that are not there.
    pub fn make_pools(&mut self) -> Result<()> {
        let rules = self.rules_of_both_banks()?;
        self.make_pools_for(&rules)
    }

    /// Rules in use, also those that packets do not find yet, or under way alone.
    fn rules_of_both_banks(&self) -> Result<Vec<(u16, Rule)>> {
        let [mut rules, hidden] = {
            let bank = self.config()?.bank();
            [self.rules_in(bank)?, self.rules_in(bank.other())?]
        };
        let found: BTreeMap<u16, Rule> = rules.iter().copied().collect();
        let differs = |(slot, rule): &(u16, Rule)| found.get(slot) != Some(rule);
        rules.extend(hidden.into_iter().filter(differs));
        Ok(rules)
    }

    /// Makes those that these rules, and addresses, call for.
    pub fn make_pools_for(&mut self, rules: &[(u16, Rule)]) -> Result<()> {
        let wanted = self.pool_addresses(rules)?;
        let mut ports = None;
        for key in wanted.into_iter().flat_map(pools_of) {
            if self.pools.lookup(&key)?.is_some() {
                continue;
            }
            let ports = match &mut ports {
                Some(ports) => ports,
                None => ports.insert(GatewayPorts::of(self, &self.rules_of_both_banks()?)?),
            };
            let kept = ports.of_address(address_of(&key), protocol_of(&key));
            // Should somebody else have made it meanwhile, it is as good.
            self.pools.update(&key, &kept, Update::NoExist)?;
        }
        Ok(())
    }

    /// Addresses that may stand for clients.
    fn pool_addresses(&self, rules: &[(u16, Rule)]) -> Result<Vec<IpAddr>> {
        let mut addresses: Vec<_> = self
            .own_addresses()?
            .into_iter()
            .map(|(ip, _)| ip)
            .collect();
        for (_, rule) in rules {
            if rule.is_snat() {
                addresses.push(if rule.flags & Rule::V6 == 0 {
                    Ipv4::narrow(rule.source).ip()
                } else {
                    rule.source.ip()
                });
            }
        }
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }
}

/// What the sweep knows of the pools.
#[derive(Debug)]
pub struct PoolKeeper {
    program: SchedClassifier,
    /// Bindings that no flow uses.
    resting: Resting,
    /// Ports that nothing seemed to use at the last look.
    loose: PortSet,
}

/// What a look at the pools found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolsSwept {
    /// Bindings that stay.
    pub bindings: u64,
    /// Ports that will go back with the next look.
    pub loose: u64,
    /// Ports that went back.
    pub given: u64,
}

impl PoolsSwept {
    /// Whether another look has anything to do.
    pub const fn is_settled(&self) -> bool {
        self.bindings == 0 && self.loose == 0
    }
}

impl PoolKeeper {
    /// With the pinned program that changes pools among packets.
    pub fn open(pins: &Pins) -> Result<Self> {
        let path = pins.program(names::PROGRAM_POOL);
        let program = SchedClassifier::from_pin(&path)
            .with_context(|| format!("cannot open program {}", path.display()))?;
        Ok(Self {
            program,
            resting: Resting::default(),
            loose: PortSet::default(),
        })
    }

    /// Looks at all bindings and pools, given the ports that flows use.
    pub(super) fn keep(&mut self, tables: &mut Tables, used: &PortSet) -> Result<PoolsSwept> {
        let now = tables.clock().now()?;
        let bound = self.rest(tables, used, now)?;
        let mut swept = PoolsSwept::default();
        let rules = tables.rules_of_both_banks()?;
        let addresses = tables.pool_addresses(&rules)?;
        let ports = GatewayPorts::of(tables, &rules)?;
        let (mut tasks, mut loose) = (Vec::new(), PortSet::default());
        let mut unwanted = Vec::new();
        tables.pools.for_each_batch(|keys, pools| {
            for (key, pool) in keys.iter().zip(pools) {
                let address = address_of(key);
                let kept = ports.of_address(address, protocol_of(key));
                let is_used = used.0.contains_key(key) || bound.0.contains_key(key);
                if !is_used && !addresses.contains(&address) {
                    unwanted.push(*key);
                    continue;
                }
                for word in 0..POOL_WORDS {
                    let (taken, keep) = (pool.taken[word], kept.taken[word]);
                    let has = used.word(key, word) | bound.word(key, word);
                    let free = taken & !keep & !has;
                    let give = free & self.loose.word(key, word);
                    let later = free & !give;
                    if later != 0 {
                        loose.0.entry(*key).or_insert(NONE).taken[word] = later;
                        swept.loose += u64::from(later.count_ones());
                    }
                    let take = keep & !taken;
                    if take | give != 0 {
                        swept.given += u64::from(give.count_ones());
                        tasks.push(PoolTask {
                            pool: *key,
                            word: word as u32,
                            take,
                            give,
                        });
                    }
                }
            }
            Ok(())
        })?;
        for task in tasks {
            self.carry_out(tables, &task)?;
        }
        if unwanted.is_empty() {
            tables.make_pools_for(&rules)?;
        } else {
            for key in unwanted {
                tables.pools.delete(&key)?;
            }
            // A rule or an address may have come since the rules were read, and want one of them.
            tables.make_pools()?;
        }
        self.loose = loose;
        swept.bindings = bound.0.values().map(count).sum();
        Ok(swept)
    }

    /// Takes out the bindings whose time of rest is over. Returns the ports of all that were there.
    fn rest(&mut self, tables: &mut Tables, used: &PortSet, now: Instant) -> Result<PortSet> {
        let mut look = self.resting.look(now, tables.clock().ticks(UDP_REST));
        let (mut bound, mut rested) = (PortSet::default(), Vec::new());
        tables.bindings.for_each_batch(|keys, bindings| {
            for (key, binding) in keys.iter().zip(bindings) {
                let pool = key.pool();
                bound.insert(pool, binding.port);
                let is_used = used.has(&pool, binding.port);
                if !is_used && look.is_over(key, protocol_of(&pool)) {
                    rested.push((*key, *binding));
                }
            }
            Ok(())
        })?;
        self.resting.remember(look);
        for (key, seen) in rested {
            take_unused(tables, &key, &seen)?;
        }
        Ok(bound)
    }

    /// Has the datapath's own program change a word.
    fn carry_out(&self, tables: &mut Tables, task: &PoolTask) -> Result<()> {
        /// The kernel wants an Ethernet header at least.
        const FRAME: [u8; 64] = [0; 64];
        tables.pool_task.set(&0, task)?;
        self.program
            .test_run(TestRunOptions {
                data_in: Some(&FRAME),
                ..TestRunOptions::new()
            })
            .context("cannot run the program that changes pools")?;
        Ok(())
    }
}

fn count(pool: &Pool) -> u64 {
    pool.taken
        .iter()
        .map(|word| u64::from(word.count_ones()))
        .sum()
}

/// Takes a binding out, unless a flow has begun with it since it was seen.
fn take_unused(tables: &mut Tables, key: &BindingKey, seen: &Binding) -> Result<()> {
    if let Some(taken) = tables.bindings.take(key)?
        && taken != *seen
    {
        tables.bindings.update(key, &taken, Update::NoExist)?;
    }
    Ok(())
}
