//! What a rule's target sees of its clients: `--masquerade` and `--snat`.

use std::{fmt, net::IpAddr};

use super::{
    PortRange, Refusal, RuleWords,
    endpoints::{Split, split, write_endpoint},
    spec::check_unicast,
};

/// Whom the target takes for the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Source {
    /// The client, as it is. A client on the LAN has the address that it dialled all the same.
    #[default]
    Client,
    /// The gateway: its own address on the interface towards the target.
    Masquerade,
    /// A certain address, and one of certain ports.
    Snat(SnatSource),
}

/// ADDR or ADDR:FIRST-LAST of `--snat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SnatSource {
    /// The address.
    pub address: IpAddr,
    /// The ports; `None` leaves them to portfwd.
    pub ports: Option<PortRange>,
}

impl Source {
    /// Reads the words; `target` is the address that it must be of one family with.
    pub(super) fn parse(words: &RuleWords, target: IpAddr) -> Result<Self, Refusal> {
        let Some(text) = &words.snat else {
            return Ok(if words.masquerade {
                Self::Masquerade
            } else {
                Self::Client
            });
        };
        if words.masquerade {
            return Err(Refusal::TwoSources);
        }
        let (address, ports) = match split(text) {
            Split::Address(address) => (address, None),
            Split::Endpoint(address, ports) => (address, Some(ports.parse()?)),
            Split::Ports(_) | Split::Illegal => {
                return Err(Refusal::IllegalSource { text: text.clone() });
            }
        };
        check_unicast("--snat", address)?;
        if address.is_ipv4() != target.is_ipv4() {
            return Err(Refusal::SourceFamily {
                snat: address,
                target,
            });
        }
        if address == target {
            return Err(Refusal::SourceIsTarget { address });
        }
        Ok(Self::Snat(SnatSource { address, ports }))
    }

    /// Whether `--masquerade` was said.
    pub const fn is_masquerade(&self) -> bool {
        matches!(self, Self::Masquerade)
    }

    /// What was said behind `--snat`, if anything.
    pub const fn snat(&self) -> Option<SnatSource> {
        match self {
            Self::Snat(source) => Some(*source),
            Self::Client | Self::Masquerade => None,
        }
    }

    /// For listings; `None` for a rule that shows its clients.
    pub fn words(&self) -> Option<String> {
        match self {
            Self::Client => None,
            Self::Masquerade => Some("masquerade".to_owned()),
            Self::Snat(source) => Some(format!("snat {source}")),
        }
    }
}

impl fmt::Display for SnatSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ports {
            Some(ports) => write_endpoint(f, self.address, ports),
            None => self.address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::RuleSpec;

    fn words(target: &str, masquerade: bool, snat: Option<&str>) -> RuleWords {
        RuleWords {
            masquerade,
            snat: snat.map(str::to_owned),
            ..RuleWords::new("tcp", "80", target)
        }
    }

    #[test]
    fn what_stands_for_clients_is_understood_and_reads_back() {
        for (target, masquerade, snat, said) in [
            ("10.0.0.2", false, None, None),
            ("10.0.0.2", true, None, Some("masquerade")),
            ("10.0.0.2", false, Some("10.0.0.1"), Some("snat 10.0.0.1")),
            (
                "10.0.0.2",
                false,
                Some("10.0.0.1:2000-2999"),
                Some("snat 10.0.0.1:2000-2999"),
            ),
            (
                "2001:db8::2",
                false,
                Some("[2001:db8::1]:2000"),
                Some("snat [2001:db8::1]:2000"),
            ),
        ] {
            let words = words(target, masquerade, snat);
            let spec = RuleSpec::parse(&words).unwrap();
            assert_eq!(spec.source().words().as_deref(), said);
            assert_eq!(RuleSpec::parse(&spec.words()).unwrap(), spec);
        }
    }

    #[test]
    fn what_cannot_stand_for_clients_is_refused_with_its_reason() {
        for (target, masquerade, snat, reason) in [
            ("10.0.0.2", true, Some("10.0.0.1"), "TwoSources"),
            ("10.0.0.2", false, Some("2000-2999"), "IllegalSource"),
            ("10.0.0.2", false, Some("example.org"), "IllegalSource"),
            ("10.0.0.2", false, Some("10.0.0.1:0"), "IllegalPorts"),
            ("10.0.0.2", false, Some("10.0.0.1:9-1"), "IllegalPorts"),
            ("10.0.0.2", false, Some("127.0.0.1"), "NotUnicast"),
            ("10.0.0.2", false, Some("2001:db8::1"), "SourceFamily"),
            ("10.0.0.2", false, Some("10.0.0.2"), "SourceIsTarget"),
        ] {
            let refusal = RuleSpec::parse(&words(target, masquerade, snat)).unwrap_err();
            assert!(format!("{refusal:?}").starts_with(reason), "{refusal:?}");
        }
    }
}
