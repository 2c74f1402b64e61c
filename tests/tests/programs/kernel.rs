//! The programs in the kernel, with maps of their own.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::hash::Hash;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use bytemuck::Pod;
use portfwd::bpf::frames::Frames;
use portfwd::bpf::load::{Programs, Sizes, load};
use portfwd::bpf::map::Map;
use portfwd::bpf::{EndpointTrie, Pins, SourcePrefix, Tables};
use portfwd::instance::Instance;
use portfwd_common::{
    abi::{
        Bank, Binding, BindingKey, ClockReading, Config, ERROR_BUDGETS, Epoch, FlowEntry, FlowKey,
        Instant, LinkLayer, Pace, Pool, PoolKey, PortCounters, PortSlot, Pressure, Protocol, Rule,
        Ticks, Usage, UsageKey,
        config::OwnAddress,
        fragment::{Datagram, DatagramKey},
        names,
    },
    datapath::{Arrival, Hook, Table},
    model::{
        maps::pool_key,
        rules::{Lowered, Prefix},
        world::{LAN, WAN, World, interfaces},
    },
    net::{Address, Ipv4, Ipv6},
};
use portfwd_tests::bpffs;

use crate::test_run::{self, Run, Segments, Sums};

/// Counted ports: few, so that the maps are made quickly.
const MAX_PORTS: u32 = 256;
/// Flows that may be beginning: so many that none makes room unless a test is about that.
pub const MAX_HALF_OPEN: u32 = 1 << 14;

/// A directory of pins, removed on drop.
struct PinDirectory(PathBuf);

impl PinDirectory {
    fn new() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        bpffs::ensure_mounted()?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pfwd-{}-{number}-programs", std::process::id());
        Ok(Self(PathBuf::from(bpffs::PATH).join(name)))
    }
}

impl Drop for PinDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A program, and what it sees of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// XDP.
    Xdp,
    /// TC alone on its interface.
    Tc,
    /// TC on an interface without link header.
    TcRaw,
    /// TC behind XDP.
    TcSlow,
    /// TC egress.
    TcOut,
}

impl Entry {
    const fn program(self) -> &'static str {
        match self {
            Self::Xdp => names::PROGRAM_XDP,
            Self::Tc => names::PROGRAM_TC,
            Self::TcRaw => names::PROGRAM_TC_RAW,
            Self::TcSlow => names::PROGRAM_TC_SLOW,
            Self::TcOut => names::PROGRAM_TC_OUT,
        }
    }

    /// What the core calls it.
    pub const fn hook(self) -> Hook {
        match self {
            Self::Xdp => Hook::Xdp,
            Self::Tc | Self::TcRaw => Hook::Tc,
            Self::TcSlow => Hook::TcSlow,
            Self::TcOut => Hook::TcOut,
        }
    }

    /// What precedes the IP header.
    pub const fn link(self) -> LinkLayer {
        match self {
            Self::TcRaw => LinkLayer::Raw,
            Self::Xdp | Self::Tc | Self::TcSlow | Self::TcOut => LinkLayer::Ethernet,
        }
    }

    /// What the core is told about a frame.
    pub const fn arrival(self, ifindex: u32, segments: Segments) -> Arrival {
        Arrival {
            hook: self.hook(),
            link: self.link(),
            ifindex,
            segment_size: segments.size,
        }
    }
}

/// The flows of one family.
pub type FlowMap<A> = HashMap<FlowKey<A>, FlowEntry<A>>;

/// Programs and maps. Made and used in the gateway's namespace.
pub struct Kernel {
    programs: Programs,
    tables: Tables,
    flows_v4: Map<FlowKey<Ipv4>, FlowEntry<Ipv4>>,
    flows_v6: Map<FlowKey<Ipv6>, FlowEntry<Ipv6>>,
    opening_v4: Map<FlowKey<Ipv4>, FlowEntry<Ipv4>>,
    opening_v6: Map<FlowKey<Ipv6>, FlowEntry<Ipv6>>,
    datagrams: Map<DatagramKey, Datagram>,
    pressure: Map<u32, Pressure>,
    pools: Map<PoolKey, Pool>,
    bindings: Map<BindingKey, Binding>,
    rule_usage: Map<u32, Usage>,
    source_usage: Map<UsageKey, Usage>,
    error_budget: Map<u32, u64>,
    clock: Map<u32, ClockReading>,
    rules: Lowered,
    // Last: the pins go when everything that came from them has gone.
    _pins: PinDirectory,
}

impl Kernel {
    /// Loads the programs and attaches, as far as the maps know, the interfaces of the world.
    pub fn new(max_flows: u32) -> Result<Self> {
        let directory = PinDirectory::new()?;
        let pins = Pins::new(&directory.0);
        let sizes = Sizes {
            max_flows: Some(max_flows),
            max_half_open: Some(MAX_HALF_OPEN),
            max_ports: Some(MAX_PORTS),
        };
        let programs = load(
            &Instance::new(Some("programs"), None)?,
            &pins,
            sizes,
            Frames::Scattered,
        )?;
        let mut tables = Tables::open_pinned(&directory.0)?;
        for interface in interfaces() {
            tables.write_interface(&interface)?;
        }
        let (wan, lan) = (
            OwnAddress {
                is_wan: 1,
                ifindex: WAN,
            },
            OwnAddress {
                is_wan: 0,
                ifindex: LAN,
            },
        );
        let mut pools: Map<PoolKey, Pool> = Map::open(&pins.maps(), names::POOLS)?;
        let mut own = Vec::new();
        for world in World::both() {
            own.extend([
                (world.listen, wan),
                (world.second_listen, wan),
                (world.arm_listen, wan),
                (world.lan_address, lan),
            ]);
        }
        for (address, _) in &own {
            for protocol in Protocol::ALL {
                pools.set(&pool_key(*address, protocol), &Pool::FREE)?;
            }
        }
        tables.replace_addresses(&own)?;
        Ok(Self {
            programs,
            tables,
            flows_v4: Map::open(&pins.maps(), names::FLOWS_V4)?,
            flows_v6: Map::open(&pins.maps(), names::FLOWS_V6)?,
            opening_v4: Map::open(&pins.maps(), names::OPENING_V4)?,
            opening_v6: Map::open(&pins.maps(), names::OPENING_V6)?,
            datagrams: Map::open(&pins.maps(), names::FRAGMENTS)?,
            pressure: Map::open(&pins.maps(), names::PRESSURE)?,
            pools,
            bindings: Map::open(&pins.maps(), names::BINDINGS)?,
            rule_usage: Map::open(&pins.maps(), names::RULE_USAGE)?,
            source_usage: Map::open(&pins.maps(), names::SOURCE_USAGE)?,
            error_budget: Map::open(&pins.maps(), names::ERROR_BUDGET)?,
            clock: Map::open(&pins.maps(), names::CLOCK)?,
            rules: Lowered::default(),
            _pins: directory,
        })
    }

    /// A program of a hook.
    pub fn program(&self, entry: Entry) -> Result<BorrowedFd<'_>> {
        Ok(self.programs.fd(entry.program())?.as_fd())
    }

    /// Runs a program on a frame.
    pub fn run(
        &self,
        entry: Entry,
        ifindex: u32,
        frame: &[u8],
        segments: Segments,
        sums: Sums,
    ) -> Result<Run> {
        let program = self.program(entry)?;
        let run = match entry {
            Entry::Xdp => test_run::xdp(program, ifindex, frame),
            Entry::Tc | Entry::TcRaw | Entry::TcSlow | Entry::TcOut => {
                test_run::tc(program, ifindex, frame, segments, sums)
            }
        };
        run.with_context(|| {
            format!(
                "run {} on a frame of {} bytes",
                entry.program(),
                frame.len()
            )
        })
    }

    /// The datapath's clock, as the datapath itself reads it. The kernel's ticks may come late, when the machine that it runs
    /// on has other things to do: user space, which reckons them from the time, is ahead of them then.
    pub fn now(&self) -> Result<Instant> {
        const FRAME: [u8; 64] = [0; 64];
        let program = self.programs.fd(names::PROGRAM_CLOCK)?.as_fd();
        test_run::tc(program, WAN, &FRAME, Segments::default(), Sums::Unknown)
            .context("read the kernel's clock")?;
        let reading = self.clock.lookup(&0)?.context("CLOCK has no element")?;
        Ok(Instant::from_ticks(reading.ticks))
    }

    /// Configures the datapath as the daemon does, but for how long an entry stays fresh: `validity` in seconds.
    pub fn configure(&mut self, validity: u32) -> Result<Config> {
        let second = self.tables.clock().ticks_per_second();
        let udp = Ticks(300 * second);
        let pace = Pace::of(second, udp);
        let config = Config {
            epoch: Epoch::new(1, Bank::A),
            ticks_per_second: second,
            validity: Ticks(validity * second),
            leased_validity: Ticks(0),
            lease_end: Instant::default(),
            udp,
            tcp_opening: Ticks(240 * second),
            tcp_established: Ticks(7_440 * second),
            tcp_closing: Ticks(240 * second),
            seed: [0x5eed, 0xcafe],
            flags: 0,
            turn_bits: pace.period_bits,
            turns_per_tick: pace.per_tick,
        };
        self.write_config(&config)?;
        Ok(config)
    }

    /// Writes timeouts and generation.
    pub fn write_config(&mut self, config: &Config) -> Result<()> {
        // The bank is what the rules have made it.
        let bank = self.tables.config()?.bank();
        let epoch = Epoch::new(config.generation(), bank);
        self.tables.write_config(&Config { epoch, ..*config })
    }

    /// Puts other rules in the place of those that are there: into one bank, which packets look at from then on, and then into the
    /// other one.
    pub fn set_rules(&mut self, rules: Lowered) -> Result<()> {
        let old = std::mem::replace(&mut self.rules, rules);
        for prefix in old.sources.keys() {
            self.tables.remove_source(source_prefix(prefix))?;
        }
        for (prefix, admission) in &self.rules.sources {
            self.tables
                .insert_source(source_prefix(prefix), *admission)?;
        }
        let bank = self.tables.config()?.bank();
        write_bank(&mut self.tables, bank.other(), &old, &self.rules)?;
        self.tables.turn(bank.other(), false)?;
        write_bank(&mut self.tables, bank, &old, &self.rules)
    }

    /// The IPv4 flows of a table.
    pub fn flows_v4(&self, table: Table) -> Result<FlowMap<Ipv4>> {
        dump(match table {
            Table::Flows => &self.flows_v4,
            Table::Opening => &self.opening_v4,
        })
    }

    /// The IPv6 flows of a table.
    pub fn flows_v6(&self, table: Table) -> Result<FlowMap<Ipv6>> {
        dump(match table {
            Table::Flows => &self.flows_v6,
            Table::Opening => &self.opening_v6,
        })
    }

    /// All flows.
    pub fn flows(&self) -> Result<[(FlowMap<Ipv4>, FlowMap<Ipv6>); 2]> {
        let of = |table| Ok::<_, anyhow::Error>((self.flows_v4(table)?, self.flows_v6(table)?));
        Ok([of(Table::Flows)?, of(Table::Opening)?])
    }

    /// Forgets what has been used of limits.
    pub fn forget_usages(&mut self) -> Result<()> {
        for id in dump_map(&self.rule_usage)?.keys() {
            self.rule_usage.delete(id)?;
        }
        for key in dump_map(&self.source_usage)?.keys() {
            self.source_usage.delete(key)?;
        }
        Ok(())
    }

    /// Has every word that limits ICMP errors say the same.
    pub fn fill_error_budgets(&mut self, due: u64) -> Result<()> {
        for slot in 0..ERROR_BUDGETS {
            self.error_budget.set(&slot, &due)?;
        }
        Ok(())
    }

    /// Takes every flow and every datagram in fragments out of the tables, and forgets what has been used of limits.
    pub fn forget_flows(&mut self) -> Result<()> {
        self.forget_usages()?;
        forget(&mut self.flows_v4)?;
        forget(&mut self.opening_v4)?;
        forget(&mut self.flows_v6)?;
        forget(&mut self.opening_v6)?;
        let mut datagrams = Vec::new();
        self.datagrams.for_each_batch(|keys, _| {
            datagrams.extend_from_slice(keys);
            Ok(())
        })?;
        for key in datagrams {
            self.datagrams.delete(&key)?;
        }
        Ok(())
    }

    /// Makes every instant in the tables earlier.
    pub fn age(&mut self, ticks: Ticks) -> Result<()> {
        age(&mut self.flows_v4, ticks)?;
        age(&mut self.flows_v6, ticks)?;
        for (key, binding) in self.bindings()? {
            let used = binding.used.minus(ticks);
            self.bindings.set(&key, &Binding { used, ..binding })?;
        }
        let back = u64::from(ticks.0) << 32;
        for (id, usage) in dump_map(&self.rule_usage)? {
            let due = usage.due.wrapping_sub(back);
            self.rule_usage.set(&id, &Usage { due, ..usage })?;
        }
        for (key, usage) in dump_map(&self.source_usage)? {
            let due = usage.due.wrapping_sub(back);
            self.source_usage.set(&key, &Usage { due, ..usage })?;
        }
        age(&mut self.opening_v4, ticks)?;
        age(&mut self.opening_v6, ticks)?;
        let pressure = self.pressure()?;
        let full_at = pressure.full_at.minus(ticks);
        self.pressure.set(
            &0,
            &Pressure {
                full_at,
                ..pressure
            },
        )
    }

    /// The pools of ports that stand for clients.
    pub fn pools(&self) -> Result<HashMap<PoolKey, Pool>> {
        dump_map(&self.pools)
    }

    /// Which clients those ports stand for.
    pub fn bindings(&self) -> Result<HashMap<BindingKey, Binding>> {
        dump_map(&self.bindings)
    }

    /// What has been used of limits, by rule and by source.
    pub fn usages(&self) -> Result<(HashMap<u32, Usage>, HashMap<UsageKey, Usage>)> {
        Ok((dump_map(&self.rule_usage)?, dump_map(&self.source_usage)?))
    }

    /// When the connection table was last found full.
    pub fn pressure(&self) -> Result<Pressure> {
        self.tables.pressure()
    }

    /// Counters that are not zero, by element.
    pub fn counters(&self) -> Result<BTreeMap<u32, PortCounters>> {
        let counters = self.tables.counters(0, MAX_PORTS)?;
        Ok((0..)
            .zip(counters)
            .filter(|(_, counted)| *counted != PortCounters::default())
            .collect())
    }

    /// Reasons and events that were counted, by element.
    pub fn reasons(&self) -> Result<BTreeMap<u32, u64>> {
        let reasons = self.tables.reasons()?;
        Ok((0..)
            .zip(reasons)
            .filter(|(_, count)| *count != 0)
            .collect())
    }
}

/// Makes a bank that holds rules hold others.
fn write_bank(tables: &mut Tables, bank: Bank, old: &Lowered, new: &Lowered) -> Result<()> {
    for slot in gone(&old.rules, &new.rules) {
        tables.write_rule(bank, *slot, &Rule::default())?;
    }
    for (slot, rule) in &new.rules {
        tables.write_rule(bank, *slot, rule)?;
    }
    for index in gone(&old.ports, &new.ports) {
        tables.write_ports(bank, *index, &[PortSlot::EMPTY])?;
    }
    for (index, word) in &new.ports {
        tables.write_ports(bank, *index, &[*word])?;
    }
    for (trie, old, new) in [
        (EndpointTrie::Listens, &old.listens, &new.listens),
        (EndpointTrie::Targets, &old.targets, &new.targets),
        (EndpointTrie::Rests, &old.rests, &new.rests),
    ] {
        let removed = gone(old, new).map(|prefix| (prefix, None));
        let set = new.iter().map(|(prefix, slot)| (prefix, Some(*slot)));
        for (prefix, slot) in removed.chain(set) {
            tables.write_endpoint(trie, bank, prefix.length, prefix.key(), slot)?;
        }
    }
    Ok(())
}

/// Keys that are no longer there.
fn gone<'a, K: Ord, V>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    old.keys().filter(|key| !new.contains_key(key))
}

fn source_prefix(prefix: &Prefix) -> SourcePrefix {
    SourcePrefix {
        length: prefix.length,
        key: prefix.key(),
    }
}

fn dump<A: Address>(map: &Map<FlowKey<A>, FlowEntry<A>>) -> Result<FlowMap<A>>
where
    FlowKey<A>: Pod,
{
    dump_map(map)
}

fn dump_map<K: Pod + Eq + Hash, V: Pod>(map: &Map<K, V>) -> Result<HashMap<K, V>> {
    let mut all = HashMap::new();
    map.for_each_batch(|keys, values| {
        all.extend(keys.iter().copied().zip(values.iter().copied()));
        Ok(())
    })?;
    Ok(all)
}

fn forget<A: Address>(map: &mut Map<FlowKey<A>, FlowEntry<A>>) -> Result<()> {
    for key in dump(map)?.keys() {
        map.delete(key)?;
    }
    Ok(())
}

fn age<A: Address>(map: &mut Map<FlowKey<A>, FlowEntry<A>>, ticks: Ticks) -> Result<()> {
    for (key, entry) in dump(map)? {
        map.set(&key, &older(entry, ticks))?;
    }
    Ok(())
}

/// The entry as it would be if all of it had happened earlier.
pub fn older<A: Address>(entry: FlowEntry<A>, ticks: Ticks) -> FlowEntry<A> {
    FlowEntry {
        validated: entry.validated.minus(ticks),
        last_seen: entry.last_seen.minus(ticks),
        created: entry.created.minus(ticks),
        ..entry
    }
}
