//! How many flows a rule takes: `--rate`, `--max-flows`, and the same of each source.

use std::{fmt, str::FromStr};

use portfwd_common::{abi, net::Family};
use thiserror::Error;

use super::RuleWords;

/// New flows in a time: `200/s`, `20/min:60`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    flows: u32,
    unit: Unit,
    burst: u32,
}

/// The time of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Unit {
    Second,
    Minute,
    Hour,
}

/// What a rule allows; nothing said is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Limits {
    rate: Option<Rate>,
    rate_per_source: Option<Rate>,
    max_flows: Option<u32>,
    max_flows_per_source: Option<u32>,
    /// As said; see [`default_prefix`].
    source_prefix: Option<u8>,
}

/// Why limits are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LimitRefusal {
    /// Not a rate.
    #[error("{text:?} is not a rate of new flows")]
    IllegalRate {
        /// Key of a file, and of the command line but for the dashes.
        key: &'static str,
        /// As given.
        text: String,
    },
    /// A burst that takes longer to come back than the datapath's clock can tell.
    #[error("at {rate} a burst of {burst} takes longer than ten days to come back")]
    LongBurst {
        /// Key.
        key: &'static str,
        /// The rate alone.
        rate: String,
        /// The burst.
        burst: u32,
    },
    /// No flow at all.
    #[error("a rule that takes no flow is none")]
    NoFlows {
        /// Key.
        key: &'static str,
    },
    /// Not a length of prefixes of the rule's family.
    #[error("{bits} is not a length of {family} prefixes")]
    IllegalPrefix {
        /// As given.
        bits: u8,
        /// The rule's family.
        family: &'static str,
    },
    /// Sources are told apart for nothing.
    #[error("nothing is limited by source")]
    PrefixWithoutLimit,
}

/// One source, where nothing is said: an IPv4 address, and the network that an IPv6 host chooses its addresses from (RFC 7421).
const fn default_prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 64,
    }
}

const fn longest_prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

const RATE: &str = "rate";
const RATE_PER_SOURCE: &str = "rate_per_source";
const MAX_FLOWS: &str = "max_flows";
const MAX_FLOWS_PER_SOURCE: &str = "max_flows_per_source";
const SOURCE_PREFIX: &str = "source_prefix";

impl Unit {
    const ALL: [Self; 3] = [Self::Second, Self::Minute, Self::Hour];

    const fn seconds(self) -> u32 {
        match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3_600,
        }
    }

    /// The word that is printed, and others that are understood.
    const fn words(self) -> [&'static str; 3] {
        match self {
            Self::Second => ["s", "sec", "second"],
            Self::Minute => ["min", "m", "minute"],
            Self::Hour => ["h", "hr", "hour"],
        }
    }
}

impl Rate {
    fn parse(key: &'static str, text: &str) -> Result<Self, LimitRefusal> {
        let rate: Self = text.parse().map_err(|NotARate| LimitRefusal::IllegalRate {
            key,
            text: text.to_owned(),
        })?;
        if rate.seconds_of_burst() > abi::Rate::LONGEST {
            let bare = Self {
                burst: rate.flows,
                ..rate
            };
            return Err(LimitRefusal::LongBurst {
                key,
                rate: bare.to_string(),
                burst: rate.burst,
            });
        }
        Ok(rate)
    }

    /// Until a whole burst has come back, rounded up.
    fn seconds_of_burst(self) -> u64 {
        (u64::from(self.burst) * u64::from(self.unit.seconds())).div_ceil(u64::from(self.flows))
    }

    const fn lowered(self) -> abi::Rate {
        abi::Rate {
            flows: self.flows,
            seconds: self.unit.seconds(),
            burst: self.burst,
        }
    }
}

/// A text that is no rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotARate;

impl FromStr for Rate {
    type Err = NotARate;

    fn from_str(text: &str) -> Result<Self, NotARate> {
        let (rate, burst) = match text.split_once(':') {
            Some((rate, burst)) => (rate, Some(burst)),
            None => (text, None),
        };
        let (flows, unit) = rate.split_once('/').ok_or(NotARate)?;
        let unit = Unit::ALL
            .into_iter()
            .find(|known| known.words().contains(&unit))
            .ok_or(NotARate)?;
        let flows = count(flows)?;
        let burst = burst.map_or(Ok(flows), count)?;
        Ok(Self { flows, unit, burst })
    }
}

/// Digits only: the standard parser would take `+80`.
fn count(text: &str) -> Result<u32, NotARate> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let count: u32 = text.parse().map_err(|_| NotARate)?;
    if is_plain && (1..=abi::Rate::MOST).contains(&count) {
        Ok(count)
    } else {
        Err(NotARate)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [unit, ..] = self.unit.words();
        write!(f, "{}/{unit}", self.flows)?;
        if self.burst == self.flows {
            Ok(())
        } else {
            write!(f, ":{}", self.burst)
        }
    }
}

impl Limits {
    /// Reads what a rule of a family says.
    pub fn parse(words: &RuleWords, family: Family) -> Result<Self, LimitRefusal> {
        let rate = |key, text: &Option<String>| {
            let text = text.as_deref();
            text.map(|text| Rate::parse(key, text)).transpose()
        };
        let some = |key, flows: Option<u32>| match flows {
            Some(0) => Err(LimitRefusal::NoFlows { key }),
            Some(_) | None => Ok(flows),
        };
        let limits = Self {
            rate: rate(RATE, &words.rate)?,
            rate_per_source: rate(RATE_PER_SOURCE, &words.rate_per_source)?,
            max_flows: some(MAX_FLOWS, words.max_flows)?,
            max_flows_per_source: some(MAX_FLOWS_PER_SOURCE, words.max_flows_per_source)?,
            source_prefix: words.source_prefix,
        };
        if let Some(bits) = limits.source_prefix {
            if !(1..=longest_prefix(family)).contains(&bits) {
                let family = match family {
                    Family::V4 => "IPv4",
                    Family::V6 => "IPv6",
                };
                return Err(LimitRefusal::IllegalPrefix { bits, family });
            }
            if limits.rate_per_source.is_none() && limits.max_flows_per_source.is_none() {
                return Err(LimitRefusal::PrefixWithoutLimit);
            }
        }
        Ok(limits)
    }

    /// Puts what [`Self::parse`] reads into the words of a rule.
    #[must_use]
    pub fn put(&self, words: RuleWords) -> RuleWords {
        RuleWords {
            rate: self.rate.map(|rate| rate.to_string()),
            rate_per_source: self.rate_per_source.map(|rate| rate.to_string()),
            max_flows: self.max_flows,
            max_flows_per_source: self.max_flows_per_source,
            source_prefix: self.source_prefix,
            ..words
        }
    }

    /// As the datapath has them.
    pub fn lowered(&self, family: Family) -> abi::Limits {
        let rate = |rate: Option<Rate>| rate.map_or(abi::Rate::NONE, Rate::lowered);
        let limits = abi::Limits {
            rate: rate(self.rate),
            source_rate: rate(self.rate_per_source),
            flows: self.max_flows.unwrap_or(0),
            source_flows: self.max_flows_per_source.unwrap_or(0),
            source_bits: 0,
        };
        if limits.bind_sources() {
            let bits = self.source_prefix.unwrap_or(default_prefix(family));
            abi::Limits {
                source_bits: u32::from(bits),
                ..limits
            }
        } else {
            limits
        }
    }
}

impl LimitRefusal {
    /// The key of a file, and option of the command line, that it is about.
    pub const fn key(&self) -> &'static str {
        match self {
            Self::IllegalRate { key, .. } | Self::LongBurst { key, .. } | Self::NoFlows { key } => {
                key
            }
            Self::IllegalPrefix { .. } | Self::PrefixWithoutLimit => SOURCE_PREFIX,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::IllegalRate { .. } => format!(
                "COUNT/s, COUNT/min or COUNT/h, and behind : how many at once, each from 1 to {}: for example 200/s or 20/min:60",
                abi::Rate::MOST
            ),
            Self::LongBurst { .. } => "allow fewer at once, or more in the time".into(),
            Self::NoFlows { .. } => "leave it out for any number, or `--disabled` for none".into(),
            Self::IllegalPrefix { .. } => {
                "1 to 32 for a rule of IPv4, 1 to 128 for one of IPv6".into()
            }
            Self::PrefixWithoutLimit => {
                "say rate_per_source or max_flows_per_source too, or leave the prefix out".into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(change: impl FnOnce(&mut RuleWords), family: Family) -> LimitRefusal {
        let mut words = RuleWords::new("tcp", "80", "10.0.0.2");
        change(&mut words);
        Limits::parse(&words, family).unwrap_err()
    }

    #[test]
    fn rates_are_understood() {
        for (text, expected, printed) in [
            ("200/s", (200, 1, 200), "200/s"),
            ("200/s:400", (200, 1, 400), "200/s:400"),
            ("5/minute:5", (5, 60, 5), "5/min"),
            ("1/h:240", (1, 3_600, 240), "1/h:240"),
            ("1000000/sec:1", (1_000_000, 1, 1), "1000000/s:1"),
        ] {
            let rate = Rate::parse(RATE, text).unwrap();
            let abi::Rate {
                flows,
                seconds,
                burst,
            } = rate.lowered();
            assert_eq!((flows, seconds, burst), expected);
            assert_eq!(rate.to_string(), printed);
        }
    }

    #[test]
    fn what_is_no_limit_is_refused_by_its_key() {
        for text in [
            "",
            "200",
            "/s",
            "200/",
            "0/s",
            "1/s:0",
            "1/s:",
            "+1/s",
            "1.5/s",
            "-1/s",
            "1/d",
            "1000001/s",
            "1/s:1000001",
            "1 /s",
            "200/s burst 400",
            "200/s:400:1",
        ] {
            let refusal = refused(|words| words.rate = Some(text.to_owned()), Family::V4);
            assert_eq!(refusal.key(), "rate", "{text:?}");
            assert!(
                matches!(refusal, LimitRefusal::IllegalRate { .. }),
                "{text:?}"
            );
        }
        let refusal = refused(
            |words| words.rate_per_source = Some("1/h:241".to_owned()),
            Family::V4,
        );
        assert_eq!(
            refusal.to_string(),
            "at 1/h a burst of 241 takes longer than ten days to come back"
        );
        let refusal = refused(|words| words.max_flows = Some(0), Family::V4);
        assert_eq!(refusal, LimitRefusal::NoFlows { key: MAX_FLOWS });
        let prefix = |bits| {
            move |words: &mut RuleWords| {
                words.max_flows_per_source = Some(9);
                words.source_prefix = Some(bits);
            }
        };
        for (bits, family) in [
            (0, Family::V4),
            (33, Family::V4),
            (0, Family::V6),
            (129, Family::V6),
        ] {
            let refusal = refused(prefix(bits), family);
            assert!(matches!(refusal, LimitRefusal::IllegalPrefix { .. }));
        }
        let refusal = refused(|words| words.source_prefix = Some(24), Family::V4);
        assert_eq!(refusal, LimitRefusal::PrefixWithoutLimit);
    }

    #[test]
    fn a_source_is_an_ipv4_address_or_a_network_of_ipv6_if_nothing_is_said() {
        let words = RuleWords {
            max_flows_per_source: Some(9),
            ..RuleWords::new("tcp", "80", "10.0.0.2")
        };
        for (family, bits) in [(Family::V4, 32), (Family::V6, 64)] {
            let limits = Limits::parse(&words, family).unwrap().lowered(family);
            assert_eq!((limits.source_flows, limits.source_bits), (9, bits));
        }
        assert_eq!(Limits::default().lowered(Family::V6), abi::Limits::NONE);
    }

    fn rates() -> impl Strategy<Value = Option<Rate>> {
        let unit = prop::sample::select(Unit::ALL.to_vec());
        let rate = (1..=abi::Rate::MOST, unit, 1..=abi::Rate::MOST);
        let possible = rate
            .prop_map(|(flows, unit, burst)| Rate { flows, unit, burst })
            .prop_filter("too long", |rate| {
                rate.seconds_of_burst() <= abi::Rate::LONGEST
            });
        prop::option::of(possible)
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(
            rate in rates(), rate_per_source in rates(),
            max_flows in prop::option::of(1..=u32::MAX), max_flows_per_source in prop::option::of(1..=u32::MAX),
            bits in prop::option::of(1..=128_u8),
        ) {
            let limits = Limits { rate, rate_per_source, max_flows, max_flows_per_source, source_prefix: None };
            let by_source = rate_per_source.is_some() || max_flows_per_source.is_some();
            let limits = Limits { source_prefix: bits.filter(|_| by_source), ..limits };
            let words = limits.put(RuleWords::new("tcp", "80", "::1"));
            prop_assert_eq!(Limits::parse(&words, Family::V6), Ok(limits));
        }

        /// The datapath works out how long a burst takes in 64 bits.
        #[test]
        fn every_burst_fits_into_the_datapaths_arithmetic(rate in rates()) {
            if let Some(rate) = rate {
                let lowered = rate.lowered();
                let interval = ((u128::from(lowered.seconds) * 1_000) << 32).div_ceil(u128::from(lowered.flows));
                prop_assert!(interval * u128::from(lowered.burst) < 1 << 62);
            }
        }
    }
}
