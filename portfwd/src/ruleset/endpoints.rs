//! What a rule is for, listens on and leads to, in words: PROTO, LISTEN and TARGET.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use portfwd_common::{
    abi::{Protocol, rule::ECHO_PORT},
    net::Family,
};
use serde::{Deserialize, Serialize};

use super::{Host, Refusal, RuleFamily};

/// The protocols of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// TCP and UDP.
    Both,
    /// Echo of ICMP or ICMPv6, by the target's family.
    Icmp,
    /// All of these, as far as they are nobody else's.
    Dmz,
}

/// Ports `first` to `last`, inclusive; never empty, and never port 0 but for [`PortRange::ECHO`] and [`PortRange::REST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// What a rule matches: what the world dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listen {
    /// `None` stands for every own address of the WAN interfaces.
    pub address: Option<IpAddr>,
    /// Its ports.
    pub ports: PortRange,
}

/// Where a rule forwards to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Address of the backend.
    pub address: IpAddr,
    /// Its ports, as many as listen ports.
    pub ports: PortRange,
}

impl RuleProtocol {
    /// One by one.
    pub const fn protocols(self) -> &'static [Protocol] {
        match self {
            Self::Tcp => &[Protocol::Tcp],
            Self::Udp => &[Protocol::Udp],
            Self::Both => &[Protocol::Tcp, Protocol::Udp],
            Self::Icmp => &[Protocol::Echo],
            Self::Dmz => &Protocol::ALL,
        }
    }

    /// The word on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Both => "both",
            Self::Icmp => "icmp",
            Self::Dmz => "dmz",
        }
    }
}

impl From<Protocol> for RuleProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Echo => Self::Icmp,
        }
    }
}

/// What stands in the place of the port of an ICMP rule.
const ECHO: &str = "echo";
/// What stands in the place of the ports of a rule for everything else.
const REST: &str = "rest";

impl PortRange {
    /// What ICMP has in the place of ports.
    pub const ECHO: Self = Self {
        first: ECHO_PORT,
        last: ECHO_PORT,
    };

    /// Every port there is.
    pub const ALL: Self = Self {
        first: 1,
        last: u16::MAX,
    };

    /// What is nobody else's.
    pub const REST: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// `first` to `last`; `None` if that is empty or holds port 0.
    pub const fn new(first: u16, last: u16) -> Option<Self> {
        if first == 0 || first > last {
            None
        } else {
            Some(Self { first, last })
        }
    }

    /// The first port.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The last port, inclusive.
    pub const fn last(self) -> u16 {
        self.last
    }

    /// How many ports: 1 to 65,535.
    pub const fn count(self) -> u32 {
        self.last as u32 - self.first as u32 + 1
    }

    /// Whether it is ports by number, and no word.
    pub const fn has_numbers(self) -> bool {
        self.first != 0
    }

    /// Whether it is a single port, which goes before every range.
    pub const fn is_exact(self) -> bool {
        self.first == self.last
    }
}

impl FromStr for RuleProtocol {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "both" => Ok(Self::Both),
            "icmp" => Ok(Self::Icmp),
            "dmz" => Ok(Self::Dmz),
            _ => Err(Refusal::UnknownProtocol {
                text: text.to_owned(),
            }),
        }
    }
}

impl FromStr for PortRange {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let illegal = || Refusal::IllegalPorts {
            text: text.to_owned(),
        };
        if text == ECHO {
            return Ok(Self::ECHO);
        }
        if text == REST {
            return Ok(Self::REST);
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self::new(
            port(first).ok_or_else(illegal)?,
            port(last).ok_or_else(illegal)?,
        );
        range.ok_or_else(illegal)
    }
}

/// Digits only: the standard parser would take `+80`.
fn port(text: &str) -> Option<u16> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// What stands before the ports.
pub(super) enum Split<'a> {
    /// `ADDR`, `[V6]` or bare `V6`.
    Address(IpAddr),
    /// `ADDR:PORTS` or `[V6]:PORTS`.
    Endpoint(IpAddr, &'a str),
    /// No address in it.
    Ports(&'a str),
    /// Neither.
    Illegal,
}

pub(super) fn split(text: &str) -> Split<'_> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Split::Address(address);
    }
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else {
            return Split::Illegal;
        };
        let Ok(address) = address.parse::<Ipv6Addr>() else {
            return Split::Illegal;
        };
        return match (after, after.strip_prefix(':')) {
            ("", _) => Split::Address(address.into()),
            (_, Some(ports)) => Split::Endpoint(address.into(), ports),
            (_, None) => Split::Illegal,
        };
    }
    match text.split_once(':') {
        Some((address, ports)) => match address.parse::<Ipv4Addr>() {
            Ok(address) => Split::Endpoint(address.into(), ports),
            Err(_) => Split::Illegal,
        },
        None => Split::Ports(text),
    }
}

impl FromStr for Listen {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match split(text) {
            Split::Ports(ports) => Ok(Self {
                address: None,
                ports: ports.parse()?,
            }),
            Split::Endpoint(address, ports) => Ok(Self {
                address: Some(address),
                ports: ports.parse()?,
            }),
            Split::Address(address) => Err(Refusal::ListenWithoutPort { address }),
            Split::Illegal => Err(Refusal::IllegalListen {
                text: text.to_owned(),
            }),
        }
    }
}

impl Target {
    /// Reads TARGET, which may be a name that has been resolved.
    pub(super) fn resolved(
        text: &str,
        family: Option<&str>,
        resolved: Option<IpAddr>,
        listen: PortRange,
    ) -> Result<(Self, Option<Host>), Refusal> {
        let family: Option<RuleFamily> = family.map(str::parse).transpose()?;
        let Some((name, ports)) = Host::split(text) else {
            let target = Self::parse(text, listen)?;
            if family.is_some() {
                return Err(Refusal::FamilyOfAddress {
                    text: text.to_owned(),
                });
            }
            return Ok((target, None));
        };
        let ports = ports.map_or(Ok(listen), str::parse)?;
        let host = Host::new(name, family);
        let address =
            resolved.filter(|address| family.is_none_or(|f| f == RuleFamily::of(*address)));
        let address = address.ok_or_else(|| Refusal::Unresolved {
            host: host.name().to_owned(),
        })?;
        Ok((Self { address, ports }, Some(host)))
    }

    /// The family of its address.
    pub const fn family(&self) -> Family {
        match self.address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Reads TARGET; without ports it keeps those of the listen.
    pub fn parse(text: &str, listen: PortRange) -> Result<Self, Refusal> {
        match split(text) {
            Split::Address(address) => Ok(Self {
                address,
                ports: listen,
            }),
            Split::Endpoint(address, ports) => Ok(Self {
                address,
                ports: ports.parse()?,
            }),
            Split::Ports(_) | Split::Illegal => Err(Refusal::IllegalTarget {
                text: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for RuleProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ECHO {
            f.write_str(ECHO)
        } else if *self == Self::REST {
            f.write_str(REST)
        } else if self.is_exact() {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write_endpoint(f, address, self.ports),
            None => self.ports.fmt(f),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_endpoint(f, self.address, self.ports)
    }
}

pub(super) fn write_endpoint(
    f: &mut fmt::Formatter<'_>,
    address: IpAddr,
    ports: PortRange,
) -> fmt::Result {
    match address {
        IpAddr::V4(v4) => write!(f, "{v4}:{ports}"),
        IpAddr::V6(v6) => write!(f, "[{v6}]:{ports}"),
    }
}
