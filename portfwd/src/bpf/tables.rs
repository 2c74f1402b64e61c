//! The maps of an instance by what they hold. Everything is a system call; nothing is cached.

use std::{
    collections::HashSet,
    net::IpAddr,
    path::Path,
    sync::atomic::{Ordering, fence},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use bytemuck::{Pod, Zeroable};
use portfwd_common::{
    abi::{
        Admission, AnswerKey, Bank, Binding, BindingKey, Config, EndpointKey, FlowEntry, FlowKey,
        Instant, Interface, MAX_RULES, Pool, PoolKey, PoolTask, PortCounters, PortSlot, Pressure,
        Recount, Rule, SourceKey, Transmission, Usage, UsageKey, UsageTask,
        config::{INTERFACE_SLOTS, OwnAddress, interface_slot},
        names,
        rule::AddressKey,
    },
    datapath::verdict::REASON_SLOTS,
    net::{Address, Ipv4, Ipv6, be::Ports},
};

use super::{
    clock::Clock,
    counters::Counters,
    flows::{self, Flow, count_pairs},
    half_open,
    map::{Map, PerCpuArray},
    pins::Pins,
};
use crate::netlink::conntrack::Tuple;

/// Key of an LPM trie: the kernel wants the prefix length first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Prefix {
    length: u32,
    key: EndpointKey,
}

/// Key of SOURCES, likewise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct SourcePrefix {
    /// Bits of the key that count.
    pub length: u32,
    /// List and address.
    pub key: SourceKey,
}

/// A trie from endpoints to slots of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointTrie {
    /// LISTENS.
    Listens,
    /// TARGETS; slot 0 stands for several rules.
    Targets,
    /// RESTS; slot 0 leaves ports to the gateway.
    Rests,
}

/// Value of EGRESS: an interface without a program of its own.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Egress {
    ifindex: u32,
    program: u32,
}

/// The maps of an instance, with write access.
#[derive(Debug)]
pub struct Tables {
    config: Map<u32, Config>,
    pressure: Map<u32, Pressure>,
    interfaces: Map<u32, Interface>,
    egress: Map<u32, Egress>,
    addresses: Map<AddressKey, OwnAddress>,
    ports: Map<u32, PortSlot>,
    rules: Map<u32, Rule>,
    listens: Map<Prefix, u32>,
    targets: Map<Prefix, u32>,
    rests: Map<Prefix, u32>,
    answers: Map<AnswerKey, Instant>,
    sources: Map<SourcePrefix, u32>,
    pub(super) flows_v4: Map<FlowKey<Ipv4>, FlowEntry<Ipv4>>,
    pub(super) flows_v6: Map<FlowKey<Ipv6>, FlowEntry<Ipv6>>,
    pub(super) pools: Map<PoolKey, Pool>,
    pub(super) bindings: Map<BindingKey, Binding>,
    pub(super) pool_task: Map<u32, PoolTask>,
    pub(super) opening_v4: Map<FlowKey<Ipv4>, FlowEntry<Ipv4>>,
    pub(super) opening_v6: Map<FlowKey<Ipv6>, FlowEntry<Ipv6>>,
    pub(super) rule_usage: Map<u32, Usage>,
    pub(super) source_usage: Map<UsageKey, Usage>,
    pub(super) usage_task: Map<u32, UsageTask>,
    pub(super) recount: Map<u32, Recount>,
    counters: Counters,
    reasons: PerCpuArray<u64>,
    clock: Clock,
}

impl Tables {
    /// Opens the maps that are pinned for the instance in `directory`.
    pub fn open_pinned(directory: &Path) -> Result<Self> {
        let pins = Pins::new(directory);
        let maps = pins.maps();
        Ok(Self {
            config: Map::open(&maps, names::CONFIG)?,
            pressure: Map::open(&maps, names::PRESSURE)?,
            interfaces: Map::open(&maps, names::INTERFACES)?,
            egress: Map::open(&maps, names::EGRESS)?,
            addresses: Map::open(&maps, names::ADDRESSES)?,
            ports: Map::open(&maps, names::PORTS)?,
            rules: Map::open(&maps, names::RULES)?,
            listens: Map::open(&maps, names::LISTENS)?,
            targets: Map::open(&maps, names::TARGETS)?,
            rests: Map::open(&maps, names::RESTS)?,
            answers: Map::open(&maps, names::ANSWERS)?,
            sources: Map::open(&maps, names::SOURCES)?,
            flows_v4: Map::open(&maps, names::FLOWS_V4)?,
            flows_v6: Map::open(&maps, names::FLOWS_V6)?,
            pools: Map::open(&maps, names::POOLS)?,
            bindings: Map::open(&maps, names::BINDINGS)?,
            pool_task: Map::open(&maps, names::POOL_TASK)?,
            opening_v4: Map::open(&maps, names::OPENING_V4)?,
            opening_v6: Map::open(&maps, names::OPENING_V6)?,
            rule_usage: Map::open(&maps, names::RULE_USAGE)?,
            source_usage: Map::open(&maps, names::SOURCE_USAGE)?,
            usage_task: Map::open(&maps, names::USAGE_TASK)?,
            recount: Map::open(&maps, names::RECOUNT)?,
            counters: Counters::open(&maps)?,
            reasons: PerCpuArray::open(&maps, names::REASONS)?,
            clock: Clock::read(&pins)?,
        })
    }

    /// The datapath's clock.
    pub const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Timeouts and generation.
    pub fn config(&self) -> Result<Config> {
        self.config.lookup(&0)?.context("map CONFIG has no element")
    }

    /// Writes timeouts and generation.
    pub fn write_config(&mut self, config: &Config) -> Result<()> {
        self.config.set(&0, config)
    }

    /// Makes every flow look at rule and route again with its next packet.
    pub fn bump_generation(&mut self) -> Result<()> {
        let bank = self.config()?.bank();
        self.turn(bank, true)
    }

    /// Has packets look at a bank of the rule tables, and flows at rule and route again if `asks_flows`, both from the same moment on.
    pub fn turn(&mut self, to: Bank, asks_flows: bool) -> Result<()> {
        // Whoever sees it sees what was written before, and what is written from here on is not seen before it.
        fence(Ordering::SeqCst);
        let config = self.config()?;
        let mut epoch = config.epoch;
        if epoch.bank() != to {
            epoch = epoch.switched();
        }
        if asks_flows {
            epoch = epoch.next();
        }
        self.write_config(&Config { epoch, ..config })?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Whether the connection table was full, and when.
    pub fn pressure(&self) -> Result<Pressure> {
        self.pressure
            .lookup(&0)?
            .context("map PRESSURE has no element")
    }

    /// How long ago the connection table was last found full; `None` if it never was.
    pub fn full_ago(&self) -> Result<Option<Duration>> {
        let pressure = self.pressure()?;
        let ago = self.clock.now()?.since_any_cpu(pressure.full_at);
        Ok((pressure.was_full != 0).then(|| self.clock.duration(ago)))
    }

    /// Rules in use that packets may find, by slot.
    pub fn rules(&self) -> Result<Vec<(u16, Rule)>> {
        self.rules_in(self.config()?.bank())
    }

    /// Rules in use in a bank, by slot.
    pub fn rules_in(&self, bank: Bank) -> Result<Vec<(u16, Rule)>> {
        let mut used = Vec::new();
        let first = bank.element(0, MAX_RULES);
        self.rules.for_each_in(first, MAX_RULES, |element, rule| {
            if rule.is_used() {
                used.push(((element - first) as u16, rule));
            }
        })?;
        Ok(used)
    }

    /// Writes a rule to a bank; one without flags frees the slot.
    pub fn write_rule(&mut self, bank: Bank, slot: u16, rule: &Rule) -> Result<()> {
        let element = bank.rule(slot).context("there is no such slot")?;
        self.rules.set(&element, rule)
    }

    /// Writes consecutive elements of a bank of PORTS.
    pub fn write_ports(&mut self, bank: Bank, first: u32, slots: &[PortSlot]) -> Result<()> {
        self.ports.write_range(bank.port(first), slots)
    }

    /// Has a prefix of a bank lead to a slot, or to none; one that is to be removed need not be there.
    pub fn write_endpoint(
        &mut self,
        trie: EndpointTrie,
        bank: Bank,
        length: u32,
        key: EndpointKey,
        slot: Option<u16>,
    ) -> Result<()> {
        let trie = match trie {
            EndpointTrie::Listens => &mut self.listens,
            EndpointTrie::Targets => &mut self.targets,
            EndpointTrie::Rests => &mut self.rests,
        };
        let key = key.in_bank(bank);
        let prefix = Prefix { length, key };
        match slot {
            Some(slot) => trie.set(&prefix, &u32::from(slot)),
            None => trie.delete(&prefix).map(drop),
        }
    }

    /// The prefixes of RESTS in either bank: lengths and keys.
    pub fn rests(&self) -> Result<Vec<(u32, EndpointKey)>> {
        let keys = self.rests.keys()?.into_iter();
        let both = keys.map(|prefix| (prefix.length, prefix.key.of_bank().1));
        let both: HashSet<_> = both.collect();
        Ok(both.into_iter().collect())
    }

    /// Has the datapath ask RESTS, and remember what leaves, or neither; false if it does so already.
    pub fn set_rests(&mut self, has_rests: bool) -> Result<bool> {
        let config = self.config()?;
        if config.has_rests() == has_rests {
            return Ok(false);
        }
        self.write_config(&Config {
            flags: config.flags ^ Config::HAS_RESTS,
            ..config
        })?;
        Ok(true)
    }

    /// Has packets ask for rules with light tracking before they look at their flow's entry, or not.
    pub fn set_lights(&mut self, has_lights: bool) -> Result<()> {
        let config = self.config()?;
        if config.has_lights() == has_lights {
            return Ok(());
        }
        self.write_config(&Config {
            flags: config.flags ^ Config::HAS_LIGHTS,
            ..config
        })
    }

    /// Remembers packets that are for somebody, as if what they answer had just left: those of connections to the gateway's own
    /// addresses. Others come to no rule without address.
    pub fn await_answers(&mut self, tuples: &[Tuple]) -> Result<()> {
        let own: HashSet<IpAddr> = self
            .own_addresses()?
            .into_iter()
            .map(|(address, _)| address)
            .collect();
        let now = self.clock.now()?;
        let is_own = |tuple: &&Tuple| own.is_empty() || own.contains(&tuple.destination.ip());
        for tuple in tuples.iter().filter(is_own) {
            self.answers.set(&answer_key(tuple), &now)?;
        }
        Ok(())
    }

    /// Writes a prefix of SOURCES.
    pub fn insert_source(&mut self, prefix: SourcePrefix, admission: Admission) -> Result<()> {
        self.sources.set(&prefix, &admission.word())
    }

    /// Removes a prefix of SOURCES; false if it was not there.
    pub fn remove_source(&mut self, prefix: SourcePrefix) -> Result<bool> {
        self.sources.delete(&prefix)
    }

    /// Everything in SOURCES.
    pub fn sources(&self) -> Result<Vec<(SourcePrefix, Admission)>> {
        let mut sources = Vec::new();
        for prefix in self.sources.keys()? {
            // This daemon alone writes to it: what is listed is there.
            if let Some(word) = self.sources.lookup(&prefix)? {
                sources.push((prefix, Admission::from_word(word)));
            }
        }
        Ok(sources)
    }

    /// Own addresses of the WAN interfaces, with the interface's kernel index.
    pub fn addresses(&self) -> Result<Vec<(IpAddr, u32)>> {
        let all = self.own_addresses()?.into_iter();
        let wan = all.filter(|(_, own)| own.is_wan != 0);
        Ok(wan.map(|(address, own)| (address, own.ifindex)).collect())
    }

    /// Own addresses of the attached interfaces.
    pub fn own_addresses(&self) -> Result<Vec<(IpAddr, OwnAddress)>> {
        let mut addresses = Vec::new();
        self.addresses.for_each_batch(|keys, own| {
            addresses.extend(
                keys.iter()
                    .zip(own)
                    .map(|(key, own)| (address_of(key), *own)),
            );
            Ok(())
        })?;
        addresses.sort();
        Ok(addresses)
    }

    /// Makes `addresses` the own addresses of the attached interfaces; those that stay are never missing. True if that changed
    /// anything.
    pub fn replace_addresses(&mut self, addresses: &[(IpAddr, OwnAddress)]) -> Result<bool> {
        let before = self.own_addresses()?;
        if addresses.len() > self.addresses.max_entries() as usize {
            return Err(anyhow!(
                "the interfaces have {} addresses, and {} fit",
                addresses.len(),
                self.addresses.max_entries()
            ));
        }
        let gone = before
            .iter()
            .filter(|(old, _)| !addresses.iter().any(|(new, _)| new == old));
        for (address, _) in gone {
            self.addresses.delete(&address_key(*address))?;
        }
        for (address, own) in addresses.iter().filter(|entry| !before.contains(entry)) {
            self.addresses.set(&address_key(*address), own)?;
        }
        let mut after = addresses.to_vec();
        after.sort();
        Ok(before != after)
    }

    /// Attached interfaces.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        let slots = self.interfaces.read_range(0, INTERFACE_SLOTS)?;
        Ok(slots
            .into_iter()
            .filter(|interface| interface.ifindex != 0)
            .collect())
    }

    /// Writes an attached interface, and whether XDP may transmit on it. True if that changed anything.
    pub fn write_interface(&mut self, interface: &Interface) -> Result<bool> {
        let slot = u32::from(interface_slot(interface.ifindex));
        // The datapath looks at INTERFACES first: an interface that takes frames is in EGRESS before it says so.
        let takes_any = interface.transmission() != Transmission::Nothing;
        let is_there = self.egress.lookup(&slot)?.is_some();
        if is_there == takes_any && self.interfaces.lookup(&slot)? == Some(*interface) {
            return Ok(false);
        }
        if takes_any {
            self.egress.set(
                &slot,
                &Egress {
                    ifindex: interface.ifindex,
                    program: 0,
                },
            )?;
        }
        self.interfaces.set(&slot, interface)?;
        if !takes_any {
            self.egress.delete(&slot)?;
        }
        Ok(true)
    }

    /// Removes an interface that is no longer attached.
    pub fn remove_interface(&mut self, ifindex: u32) -> Result<()> {
        let slot = u32::from(interface_slot(ifindex));
        self.interfaces.set(&slot, &Interface::default())?;
        self.egress.delete(&slot)?;
        Ok(())
    }

    /// Counters of consecutive elements, summed over the CPUs.
    pub fn counters(&self, first: u32, count: u32) -> Result<Vec<PortCounters>> {
        self.counters.read_range(first, count)
    }

    /// Sets consecutive counters to zero.
    pub fn clear_counters(&mut self, first: u32, count: u32) -> Result<()> {
        self.counters.clear_range(first, count)
    }

    /// Packets by reason, summed over the CPUs, see `datapath::verdict`.
    pub fn reasons(&self) -> Result<Vec<u64>> {
        self.reasons
            .read_range(0, REASON_SLOTS, |sum, cpu| *sum = sum.wrapping_add(*cpu))
    }

    /// Live flows.
    pub fn flows(&self) -> Result<Vec<Flow>> {
        let (config, now) = (self.config()?, self.clock.now()?);
        let mut flows = flows::live(&self.flows_v4, &self.clock, &config, now)?;
        flows.extend(flows::live(&self.flows_v6, &self.clock, &config, now)?);
        flows.extend(flows::live(&self.opening_v4, &self.clock, &config, now)?);
        flows.extend(flows::live(&self.opening_v6, &self.clock, &config, now)?);
        Ok(flows)
    }

    /// Flows in the connection table, live or not yet swept.
    pub fn flow_entries(&self) -> Result<u64> {
        Ok(count_pairs(&self.flows_v4)? + count_pairs(&self.flows_v6)?)
    }

    /// Flows that have not proven themselves, live or not yet swept.
    pub fn half_open_entries(&self) -> Result<u64> {
        Ok(count_pairs(&self.opening_v4)? + count_pairs(&self.opening_v6)?)
    }

    /// Flows that fit without having proven themselves, of each family.
    pub fn max_half_open(&self) -> Result<u32> {
        half_open::flows(self.opening_v4.max_entries())
    }

    /// Flows that fit, of each family.
    pub const fn max_flows(&self) -> u32 {
        self.flows_v4.max_entries() / 2
    }

    /// Listen ports that can be counted.
    pub const fn max_ports(&self) -> u32 {
        self.counters.ports()
    }
}

fn answer_key(tuple: &Tuple) -> AnswerKey {
    let (source, destination) = (tuple.source, tuple.destination);
    let ports = Ports::new(source.port(), destination.port());
    let protocol = u32::from(tuple.protocol.number());
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => AnswerKey::new(
            &FlowKey {
                src: Ipv4::from(src),
                dst: Ipv4::from(dst),
                ports,
                protocol,
            },
            tuple.protocol,
        ),
        (src, dst) => AnswerKey::new(
            &FlowKey {
                src: Ipv6::from(src),
                dst: Ipv6::from(dst),
                ports,
                protocol,
            },
            tuple.protocol,
        ),
    }
}

fn address_key(address: IpAddr) -> AddressKey {
    match address {
        IpAddr::V4(v4) => AddressKey::new(Ipv4::from(v4)),
        IpAddr::V6(v6) => AddressKey::new(Ipv6::from(v6)),
    }
}

fn address_of(key: &AddressKey) -> IpAddr {
    match key.family {
        4 => Ipv4::narrow(key.address).ip(),
        _ => key.address.ip(),
    }
}
