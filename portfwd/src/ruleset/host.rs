//! A TARGET that is a name: what it looks like, and which addresses of the name are meant.

use std::{fmt, net::IpAddr, str::FromStr};

use portfwd_common::net::Family;

use super::Refusal;

/// A name that a resolver turns into addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host {
    name: String,
    family: Option<RuleFamily>,
}

/// Which addresses of a name are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleFamily {
    /// A records.
    Ipv4,
    /// AAAA records.
    Ipv6,
}

/// Longest name, and longest part between dots (RFC 1035 section 2.3.4).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

impl Host {
    /// Splits a TARGET into name and ports, if it is a name with or without ports; the rest of what a TARGET can be is an
    /// address. RFC 1123 section 2.1: letters, digits and hyphens, and not all digits behind the last dot, so that no name
    /// looks like an address.
    pub fn split(target: &str) -> Option<(&str, Option<&str>)> {
        let (name, ports) = match target.split_once(':') {
            Some((name, ports)) => (name, Some(ports)),
            None => (target, None),
        };
        // An IPv6 address may begin like a name, fe80, but does not end with one colon.
        let is_address = ports.is_some_and(|ports| ports.contains(':'));
        (is_name(name) && !is_address).then_some((name, ports))
    }

    /// A name whose addresses are of a family, or of either.
    pub fn new(name: &str, family: Option<RuleFamily>) -> Self {
        Self {
            name: name.to_ascii_lowercase(),
            family,
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which addresses are taken, if it is said.
    pub const fn family(&self) -> Option<RuleFamily> {
        self.family
    }

    /// The address to take of those that a resolver gave: the one in use if it is still among them, else the first of the
    /// family; of both families IPv4, unless another is in use.
    pub fn choose(&self, addresses: &[IpAddr], current: Option<IpAddr>) -> Option<IpAddr> {
        let family = self.family.or(current.map(RuleFamily::of));
        let fits =
            |address: &&IpAddr| family.is_none_or(|family| family == RuleFamily::of(**address));
        let mut fitting = addresses.iter().filter(fits);
        if let Some(current) = current
            && fitting.clone().any(|address| *address == current)
        {
            return Some(current);
        }
        fitting
            .clone()
            .find(|address| address.is_ipv4())
            .or_else(|| fitting.next())
            .copied()
    }
}

impl RuleFamily {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }

    /// The word on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }
}

impl From<Family> for RuleFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::V4 => Self::Ipv4,
            Family::V6 => Self::Ipv6,
        }
    }
}

impl FromStr for RuleFamily {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        [Self::Ipv4, Self::Ipv6]
            .into_iter()
            .find(|family| family.word() == text)
            .ok_or_else(|| Refusal::UnknownFamily {
                text: text.to_owned(),
            })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn is_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= MAX_NAME
        && name.split('.').all(is_label)
        // 10.0.0 is no address, and 5000-5099 a range without one.
        && !last
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_addresses_and_ports() {
        for (target, expected) in [
            ("web", Some(("web", None))),
            ("web:80", Some(("web", Some("80")))),
            ("web.lan:80-89", Some(("web.lan", Some("80-89")))),
            ("a-b.example.org.", Some(("a-b.example.org.", None))),
            ("4.web", Some(("4.web", None))),
            ("10.0.0.2", None),
            ("10.0.0.2:80", None),
            ("10.0.0", None),
            ("8080", None),
            ("80-90", None),
            ("2001:db8::2", None),
            ("[2001:db8::2]:80", None),
            ("fe80::2%eth0", None),
            ("", None),
            (".web", None),
            ("we b", None),
            ("-web", None),
            ("web-", None),
            ("wéb", None),
        ] {
            assert_eq!(Host::split(target), expected, "{target:?}");
        }
        assert_eq!(Host::split(&"x".repeat(64)), None);
        assert_eq!(Host::split(&"x.".repeat(128)), None);
    }

    #[test]
    fn an_address_stays_as_long_as_the_name_has_it() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let (a, b, c) = (ip("10.0.0.1"), ip("10.0.0.2"), ip("2001:db8::1"));
        for (family, addresses, current, expected) in [
            (None, vec![a, b], None, Some(a)),
            (None, vec![c, b], None, Some(b)),
            (None, vec![c], None, Some(c)),
            (None, vec![a, b], Some(b), Some(b)),
            (None, vec![a], Some(b), Some(a)),
            // A rule does not change its family.
            (None, vec![a], Some(c), None),
            (None, vec![a, c], Some(c), Some(c)),
            (Some(RuleFamily::Ipv6), vec![a, c], None, Some(c)),
            (Some(RuleFamily::Ipv6), vec![a], None, None),
            (None, vec![], Some(a), None),
        ] {
            let host = Host::new("web", family);
            assert_eq!(
                host.choose(&addresses, current),
                expected,
                "{family:?} {addresses:?} {current:?}"
            );
        }
    }
}
