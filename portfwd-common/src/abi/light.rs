//! What packets of rules with light tracking ask in the place of their flow's entry: ways out, by rule and by client, and whose turn
//! it is to be met by its entry.

use bytemuck::{Pod, Zeroable};

use super::{Config, FlowDir, FlowKey, Instant, Protocol, Ticks};
use crate::net::{Address, Delta, Ipv6};

/// An element of RULE_WAYS: how packets to the target of a rule leave. One word, so that whoever reads it reads something whole.
/// Bits 0 to 31 are when it was found, 32 to 47 the generation, 48 to 63 the number in NEXT_HOPS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct RuleWay(pub u64);

impl RuleWay {
    /// A way that was found now.
    #[inline(always)]
    pub const fn new(number: u16, config: &Config, now: Instant) -> Self {
        let generation = config.generation();
        Self((number as u64) << 48 | (generation as u64) << 32 | now.ticks() as u64)
    }

    /// Its number in NEXT_HOPS.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// Whether it may be used as it is, as a flow's entry may: found under the present generation, and not too long ago.
    #[inline(always)]
    pub fn is_good(self, config: &Config, now: Instant) -> bool {
        (self.0 >> 32) as u16 == config.generation()
            && is_within(Instant::from_ticks(self.0), config, now)
    }
}

/// An element of CLIENT_WAYS: how what a target endpoint answers to a client leaves, and as what. Each CPU has its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ClientWay {
    /// Address of the target in the first bytes ([`Address::widen`]).
    pub target: Ipv6,
    /// Address of the client, likewise.
    pub client: Ipv6,
    /// Address that the client has dialled, likewise.
    pub listen: Ipv6,
    /// Port of the target.
    pub target_port: u16,
    /// Port that the client has dialled.
    pub listen_port: u16,
    /// [`Protocol::class`].
    pub class: u16,
    /// Number in NEXT_HOPS.
    pub number: u16,
    /// Element of COUNTERS.
    pub counter: u32,
    /// When it was found.
    pub found: Instant,
    /// [`Config::generation`] then.
    pub generation: u16,
    /// What translation changes in the addresses.
    pub address_delta: Delta,
    /// The same of the ports.
    pub port_delta: Delta,
    /// Zero.
    pub padding: u16,
}

/// Elements of CLIENT_WAYS.
pub const CLIENT_WAYS: u32 = 4_096;

impl ClientWay {
    /// Whether it is that of a packet. None that nobody has written is: its target has no address.
    #[inline(always)]
    pub fn is_of<A: Address>(&self, key: &FlowKey<A>, protocol: Protocol) -> bool {
        A::narrow(self.target) == key.src
            && A::narrow(self.client) == key.dst
            && self.target_port == key.ports.src()
            && self.class == protocol.class(A::FAMILY)
    }

    /// Whether it may be used as it is.
    #[inline(always)]
    pub fn is_good(&self, config: &Config, now: Instant) -> bool {
        self.generation == config.generation() && is_within(self.found, config, now)
    }

    /// Whether it was good a short while ago: it is worth a packet's slow path to find it anew.
    #[inline(always)]
    pub fn is_recent(&self, config: &Config, now: Instant) -> bool {
        now.since(self.found).0 < 2 * config.leased_validity.0.max(config.validity.0)
    }

    /// The element that a packet of a target may have.
    #[inline(always)]
    pub fn slot<A: Address>(key: &FlowKey<A>) -> u16 {
        let word = mixed(fold(key.src) ^ u32::from(key.ports.src()).wrapping_mul(ODD));
        // The upper bits, which depend on all of the lower ones.
        (mixed(word ^ fold(key.dst)) >> (u32::BITS - CLIENT_WAYS.ilog2())) as u16
    }
}

/// Whether what was found then is not too old: for the longer validity while the daemon vouches.
#[inline(always)]
const fn is_within(found: Instant, config: &Config, now: Instant) -> bool {
    let validity = if config.is_leased(now) {
        config.leased_validity
    } else {
        config.validity
    };
    now.since(found).0 < validity.0
}

/// The only element of TURNS. Packets fall into classes; of each class one goes to its flow's entry in a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Turns {
    /// How many of them went in this tick: the tick in the upper half of the word.
    pub spent: u64,
    /// [`Mark`]s by class.
    pub marks: [u8; TURN_CLASSES],
}

/// Classes.
pub const TURN_CLASSES: usize = 1 << 16;
/// Packets that go to entries in a second, at most, of all rules together; those that a connection begins with not counted.
const TURNS_PER_SECOND: u32 = 8_192;
/// In a UDP timeout every class has so many turns, or up to twice as many.
const TURNS_PER_TIMEOUT: u32 = 32;

/// What is known of a class: when it last had its turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(pub u8);

impl Mark {
    /// It has its turn with its next packet, as has a class that never had one.
    pub const DUE: Self = Self(0);
    /// The same, whatever has been spent: a connection has begun.
    pub const OWED: Self = Self(0x80);

    /// Had its turn in this period.
    #[inline(always)]
    pub const fn taken(period: u32) -> Self {
        let low = period as u8 & 0x7f;
        Self(if low == 0 { 1 } else { low })
    }
}

/// How often packets go to entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Period, as power of two of ticks.
    pub period_bits: u32,
    /// Packets in a tick.
    pub per_tick: u32,
}

impl Pace {
    /// For timeouts and ticks like these.
    pub fn of(ticks_per_second: u32, udp: Ticks) -> Self {
        Self {
            period_bits: (udp.0 / TURNS_PER_TIMEOUT).max(1).ilog2(),
            per_tick: TURNS_PER_SECOND.div_ceil(ticks_per_second.max(1)),
        }
    }
}

/// The class of a client's packets in a period, or of what answers them, which have turns of their own. Drawn anew in every period,
/// so that of flows that share a class not always the same one goes first.
#[inline(always)]
pub fn turn_class<A: Address>(
    client: A,
    client_port: u16,
    listen_port: u16,
    direction: FlowDir,
    period: u32,
) -> u16 {
    let way = match direction {
        FlowDir::Original => 0,
        FlowDir::Reply => 1 << 31,
    };
    let ports = u32::from(listen_port) << 16 | u32::from(client_port);
    let word = mixed(fold(client) ^ way ^ period.wrapping_mul(ODD));
    (mixed(word ^ ports) >> 16) as u16
}

const ODD: u32 = 0x9e37_79b1;

#[inline(always)]
fn fold<A: Address>(address: A) -> u32 {
    // What tells hosts of one network apart are the low bits of the number, not of the word in memory.
    let [a, b, c, d] = address.widen().raw().map(u32::from_be);
    a ^ b.rotate_left(7) ^ c.rotate_left(13) ^ d.rotate_left(21)
}

#[inline(always)]
const fn mixed(word: u32) -> u32 {
    let mixed = word.wrapping_mul(ODD);
    mixed ^ mixed >> 15
}

const _: () = assert!(size_of::<ClientWay>() == 72);
const _: () = assert!(CLIENT_WAYS.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Bank, Epoch};

    #[test]
    fn a_way_of_a_rule_is_good_for_a_validity_under_its_generation() {
        let config = Config {
            epoch: Epoch::new(u16::MAX, Bank::B),
            validity: Ticks(250),
            ..Config::default()
        };
        let now = Instant::from_ticks(0xffff_fff0);
        let way = RuleWay::new(0xabcd, &config, now);
        assert_eq!(way.number(), 0xabcd);
        for (age, is_good) in [(0, true), (249, true), (250, false), (0xffff_0000, false)] {
            assert_eq!(way.is_good(&config, now.plus(Ticks(age))), is_good, "{age}");
        }
        // Whatever bank packets look at.
        for (epoch, is_good) in [
            (config.epoch.switched(), true),
            (config.epoch.next(), false),
        ] {
            assert_eq!(way.is_good(&Config { epoch, ..config }, now), is_good);
        }
        assert!(!RuleWay::default().is_good(&config, now));
    }

    #[test]
    fn classes_are_taken_evenly_by_clients_that_look_alike() {
        use crate::net::Ipv4;
        let mut taken = vec![0_u32; TURN_CLASSES];
        for flow in 0..1_u32 << 20 {
            let client = Ipv4::from(std::net::Ipv4Addr::from_bits(0x0a65_0000 | flow >> 12));
            let port = 20_000 + (flow & 0xfff) as u16;
            taken[usize::from(turn_class(client, port, 53, FlowDir::Original, 7))] += 1;
        }
        // Sixteen on the average.
        assert!(taken.iter().all(|flows| *flows < 64));
        assert!(taken.iter().filter(|flows| **flows == 0).count() < 600);
    }

    #[test]
    fn clients_that_look_alike_have_ways_of_their_own() {
        use crate::net::Ipv4;
        let mut taken = std::collections::BTreeSet::new();
        for host in 0..1_024 {
            let key = FlowKey {
                src: Ipv4::from(std::net::Ipv4Addr::new(10, 2, 0, 2)),
                dst: Ipv4::from(std::net::Ipv4Addr::from_bits(0x0a01_0002 + host)),
                ports: crate::net::be::Ports::new(6_000, 1_024),
                protocol: 17,
            };
            taken.insert(ClientWay::slot(&key));
        }
        // A quarter of the places: at random 906 would be taken.
        assert!(taken.len() > 850, "{}", taken.len());
        assert!(taken.iter().all(|slot| u32::from(*slot) < CLIENT_WAYS));
    }

    #[test]
    fn no_period_looks_like_a_class_that_is_to_have_its_turn() {
        for period in 0..1_000 {
            assert_ne!(Mark::taken(period), Mark::OWED);
            assert_ne!(Mark::taken(period), Mark::DUE);
            assert!(period % 128 < 1 || Mark::taken(period) != Mark::taken(period + 1));
        }
    }
}
