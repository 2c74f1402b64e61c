//! Rules as their maps hold them, worked out the plain way: port by port, every rule looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    abi::{
        Admission, EndpointKey, Limits, PoolRange, PortSlot, Protocol, Rule, SourceKey,
        rule::{CLASSES, ECHO_PORT, port_index},
    },
    net::{Be16, Family, Ipv6},
};

/// A rule of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Its protocol.
    pub protocol: Protocol,
    /// Listen address; every own address of the WAN interfaces if there is none.
    pub listen: Option<IpAddr>,
    /// First listen port.
    pub first: u16,
    /// Last listen port, inclusive.
    pub last: u16,
    /// Target address.
    pub target: IpAddr,
    /// Target port of the first listen port.
    pub target_first: u16,
    /// What stands for clients.
    pub source: Source,
    /// Whether the segment sizes that its SYNs say stay as they are.
    pub keeps_mss: bool,
    /// How many flows it takes.
    pub limits: Limits,
    /// Whether it takes only what is nobody else's.
    pub is_rest: bool,
    /// Whether entries of its flows are records.
    pub is_light: bool,
}

/// What stands for clients before a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// Nothing, unless the client is on the LAN.
    #[default]
    Client,
    /// The egress interface's own address.
    Masquerade,
    /// An address, and ports of it.
    Snat(IpAddr, PoolRange),
}

/// A key of LISTENS, TARGETS or SOURCES.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    /// Bits of the key that count.
    pub length: u32,
    /// The bytes of the key, as they lie in memory.
    pub bytes: [u8; 20],
}

/// Rules in the form of their maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lowered {
    /// Elements of RULES by slot.
    pub rules: BTreeMap<u16, Rule>,
    /// Elements of PORTS that are not empty.
    pub ports: BTreeMap<u32, PortSlot>,
    /// LISTENS.
    pub listens: BTreeMap<Prefix, u16>,
    /// TARGETS.
    pub targets: BTreeMap<Prefix, u16>,
    /// RESTS.
    pub rests: BTreeMap<Prefix, u16>,
    /// SOURCES.
    pub sources: BTreeMap<Prefix, Admission>,
}

impl Prefix {
    /// Whether an endpoint or a source begins with this prefix.
    pub fn covers(&self, key: &impl bytemuck::NoUninit) -> bool {
        let bytes = bytemuck::bytes_of(key);
        let (whole, rest) = ((self.length / 8) as usize, self.length % 8);
        let mask = !(0xff_u8.checked_shr(rest).unwrap_or(0));
        self.bytes[..whole] == bytes[..whole]
            && (rest == 0 || (self.bytes[whole] ^ bytes[whole]) & mask == 0)
    }

    /// The key, as the maps' keys are typed.
    pub fn key<K: bytemuck::AnyBitPattern>(&self) -> K {
        bytemuck::pod_read_unaligned(&self.bytes)
    }
}

impl Forward {
    /// A rule for one port of every own address.
    pub fn new(protocol: Protocol, port: u16, target: SocketAddr) -> Self {
        Self {
            protocol,
            listen: None,
            first: port,
            last: port,
            target: target.ip(),
            target_first: target.port(),
            source: Source::Client,
            keeps_mss: false,
            limits: Limits::NONE,
            is_rest: false,
            is_light: false,
        }
    }

    /// A rule for what is nobody else's, on every own address; one protocol of it.
    pub fn rest(protocol: Protocol, target: IpAddr) -> Self {
        let (first, last) = match protocol {
            Protocol::Tcp | Protocol::Udp => (1, u16::MAX),
            Protocol::Echo => (ECHO_PORT, ECHO_PORT),
        };
        Self {
            last,
            is_rest: true,
            ..Self::new(protocol, first, SocketAddr::new(target, first))
        }
    }

    /// The same, without clamping of the maximum segment size.
    #[must_use]
    pub const fn keeping_mss(self) -> Self {
        Self {
            keeps_mss: true,
            ..self
        }
    }

    /// The same with light tracking.
    #[must_use]
    pub const fn light(self) -> Self {
        Self {
            is_light: true,
            ..self
        }
    }

    /// The same with something that stands for clients.
    #[must_use]
    pub const fn from(self, source: Source) -> Self {
        Self { source, ..self }
    }

    /// The same with limits.
    #[must_use]
    pub const fn limited(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The same for a range of ports up to `last`, inclusive.
    #[must_use]
    pub const fn to(self, last: u16) -> Self {
        Self { last, ..self }
    }

    /// The same on one listen address.
    #[must_use]
    pub const fn on(self, listen: IpAddr) -> Self {
        Self {
            listen: Some(listen),
            ..self
        }
    }

    /// Its family and protocol.
    pub const fn family(&self) -> Family {
        match self.target {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// How many ports are counted.
    pub fn ports(&self) -> u32 {
        if self.is_rest {
            return 1;
        }
        u32::from(self.last) - u32::from(self.first) + 1
    }

    fn listen_or_any(&self) -> IpAddr {
        self.listen.unwrap_or(match self.target {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        })
    }

    fn covers(&self, class: u16, port: u16) -> bool {
        !self.is_rest
            && self.protocol.class(self.family()) == class
            && self.first <= port
            && port <= self.last
    }

    fn targets(&self, other: &Self) -> bool {
        let last = |f: &Self| f.target_first + (f.last - f.first);
        self.protocol == other.protocol
            && self.target == other.target
            && self.target_first <= last(other)
            && other.target_first <= last(self)
    }
}

impl Lowered {
    /// The maps of rules, whose slots are 1, 2, 3 and so on, and whose counters lie one after another.
    pub fn of(forwards: &[Forward]) -> Self {
        let mut lowered = Self::default();
        let mut counter_base = 0;
        // Rules for what is nobody else's are in no table of the others.
        let others: Vec<Forward> = forwards.iter().copied().filter(|f| !f.is_rest).collect();
        for (slot, forward) in (1..).zip(forwards) {
            let is_shared = forwards
                .iter()
                .zip(1..)
                .any(|(other, number)| number != slot && !other.is_rest && forward.targets(other));
            let is_shaded = forwards.iter().any(|other| {
                other.is_rest
                    && (other.protocol, other.target) == (forward.protocol, forward.target)
            });
            let mut rule = element(forward, slot, counter_base, is_shared);
            if forward.is_light && is_shaded {
                rule.flags |= Rule::SHADED;
            }
            lowered.rules.insert(slot, rule);
            counter_base += forward.ports();
            if forward.is_rest {
                let class = forward.protocol.class(forward.family());
                let mut prefix = exact(forward.listen_or_any(), class, 0);
                prefix.length -= u16::BITS;
                lowered.rests.insert(prefix, slot);
            } else {
                lowered.add_targets(&others, forward, slot);
            }
        }
        for class in 0..CLASSES {
            lowered.add_listens(forwards, class);
        }
        lowered
    }

    /// Leaves a port of the gateway to itself, whatever rules for everything else say.
    #[must_use]
    pub fn excepting(mut self, forward: &Forward, port: u16) -> Self {
        let class = forward.protocol.class(forward.family());
        let key = exact(forward.listen_or_any(), class, port);
        self.rests.insert(key, 0);
        self
    }

    /// Gives the rule in a slot a list of sources: what becomes of the rest, then prefixes by address and length in bits.
    #[must_use]
    pub fn admitting(
        mut self,
        slot: u16,
        rest: Admission,
        prefixes: &[(IpAddr, u32, Admission)],
    ) -> Self {
        let list = u32::from(slot);
        if let Some(rule) = self.rules.get_mut(&slot) {
            rule.sources = list;
        }
        let everybody = [(Ipv6::UNSPECIFIED, 0, rest)];
        let named = prefixes
            .iter()
            .map(|(address, length, admission)| (Ipv6::from(*address), *length, *admission));
        for (address, length, admission) in named.chain(everybody) {
            let mut bytes = [0; 20];
            bytes.copy_from_slice(bytemuck::bytes_of(&SourceKey::new(list, address)));
            let length = SourceKey::LIST_BITS + length;
            self.sources.insert(Prefix { length, bytes }, admission);
        }
        self
    }

    /// Who covers each port: those with an address before those without, an exact port before a range.
    fn add_listens(&mut self, forwards: &[Forward], class: u16) {
        let covered: BTreeSet<u16> = forwards
            .iter()
            .filter(|f| !f.is_rest && f.protocol.class(f.family()) == class)
            .flat_map(|f| f.first..=f.last)
            .collect();
        for port in covered {
            let mut covering: Vec<_> = (1..)
                .zip(forwards)
                .filter(|(_, f)| f.covers(class, port))
                .collect();
            // The last one written stays: ranges first, exact ports over them.
            covering.sort_by_key(|(_, f)| f.first == f.last);
            let any = covering
                .iter()
                .rev()
                .find(|(_, f)| f.listen.is_none())
                .map_or(0, |(slot, _)| *slot);
            let scoped = covering.iter().filter(|(_, f)| f.listen.is_some());
            let word = match covering.as_slice() {
                [] => continue,
                [(slot, _)] => PortSlot::only(*slot),
                _ if scoped.clone().next().is_none() => PortSlot::only(any),
                _ => {
                    for (slot, forward) in scoped {
                        if let Some(address) = forward.listen {
                            self.listens.insert(exact(address, class, port), *slot);
                        }
                    }
                    PortSlot::scoped(any)
                }
            };
            self.ports.insert(port_index(class, port), word);
        }
    }

    /// Who has each target endpoint, 0 if several have it: aligned blocks where one rule has it alone, else exact ports.
    fn add_targets(&mut self, forwards: &[Forward], forward: &Forward, slot: u16) {
        let class = forward.protocol.class(forward.family());
        let shared = |port: u16| {
            forwards
                .iter()
                .filter(|other| {
                    let exact = Forward {
                        first: port,
                        last: port,
                        target_first: port,
                        ..*forward
                    };
                    other.targets(&exact)
                })
                .count()
                > 1
        };
        let (mut port, end) = (
            u32::from(forward.target_first),
            u32::from(forward.target_first) + forward.ports(),
        );
        let is_alone = forwards
            .iter()
            .filter(|other| forward.targets(other))
            .count()
            == 1;
        while port < end {
            let bits = if is_alone {
                port.trailing_zeros().min((end - port).ilog2())
            } else {
                0
            };
            let mut prefix = exact(forward.target, class, port as u16);
            prefix.length -= bits;
            let word = if !is_alone && shared(port as u16) {
                0
            } else {
                slot
            };
            self.targets.insert(prefix, word);
            port += 1 << bits;
        }
    }
}

fn element(forward: &Forward, slot: u16, counter_base: u32, is_shared: bool) -> Rule {
    let mut flags = Rule::ACTIVE;
    if forward.family() == Family::V6 {
        flags |= Rule::V6;
    }
    if forward.listen.is_none() {
        flags |= Rule::ANY_ADDRESS;
    }
    if forward.is_rest {
        flags |= Rule::REST;
    }
    if forward.is_light {
        flags |= Rule::LIGHT;
    }
    if forward.keeps_mss {
        flags |= Rule::KEEPS_MSS;
    }
    let (mut source, mut source_ports) = (Ipv6::UNSPECIFIED, PoolRange::ALL);
    match forward.source {
        Source::Client if is_shared || forward.is_rest => {}
        Source::Client => flags |= Rule::STATELESS,
        Source::Masquerade => flags |= Rule::MASQUERADE,
        Source::Snat(address, ports) => {
            flags |= Rule::SNAT;
            (source, source_ports) = (address.into(), ports);
        }
    }
    Rule {
        listen: forward.listen.map_or(Ipv6::UNSPECIFIED, Ipv6::from),
        target: forward.target.into(),
        first: forward.first,
        last: forward.last,
        target_first: forward.target_first,
        flags,
        counter_base,
        id: u32::from(slot),
        protocol: u32::from(forward.protocol.number()),
        source,
        source_ports,
        sources: 0,
        limits: forward.limits,
    }
}

fn exact(address: IpAddr, class: u16, port: u16) -> Prefix {
    let key = EndpointKey {
        address: address.into(),
        class: Be16::new(class),
        port: Be16::new(port),
    };
    let mut bytes = [0; 20];
    bytes.copy_from_slice(bytemuck::bytes_of(&key));
    Prefix {
        length: EndpointKey::BITS,
        bytes,
    }
}
