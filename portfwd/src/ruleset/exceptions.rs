//! Ports that a rule for everything else leaves to the gateway.

use std::{fmt, str::FromStr};

use portfwd_common::abi::Protocol;

use super::{PortRange, Refusal, RuleProtocol, RuleWords, prefix::PortBlock};

/// A port, a range of ports, or echo, that stays the gateway's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Exception {
    protocol: RuleProtocol,
    ports: PortRange,
}

/// Exceptions of a rule, at most.
const MAX_EXCEPTIONS: usize = 64;

impl Exception {
    /// Those of a rule; one that is said twice is there once.
    pub fn parse_all(words: &RuleWords, protocol: RuleProtocol) -> Result<Vec<Self>, Refusal> {
        let mut exceptions = Vec::new();
        for text in &words.except {
            if protocol != RuleProtocol::Dmz {
                return Err(Refusal::ExceptionsOfProtocol { protocol });
            }
            let exception: Self = text.parse()?;
            if !exceptions.contains(&exception) {
                exceptions.push(exception);
            }
        }
        if exceptions.len() > MAX_EXCEPTIONS {
            return Err(Refusal::TooManyExceptions {
                max: MAX_EXCEPTIONS,
            });
        }
        Ok(exceptions)
    }

    /// What of it is of a protocol, in aligned blocks.
    pub fn blocks(&self, protocol: Protocol) -> Vec<PortBlock> {
        if self.protocol.protocols().contains(&protocol) {
            PortBlock::cover(self.ports.first(), self.ports.last())
        } else {
            Vec::new()
        }
    }
}

impl FromStr for Exception {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let illegal = || Refusal::IllegalException {
            text: text.to_owned(),
        };
        if text == RuleProtocol::Icmp.word() {
            return Ok(Self {
                protocol: RuleProtocol::Icmp,
                ports: PortRange::ECHO,
            });
        }
        let (protocol, ports) = text.split_once('/').ok_or_else(illegal)?;
        let protocol: RuleProtocol = protocol.parse().map_err(|_| illegal())?;
        let ports: PortRange = ports.parse().map_err(|_| illegal())?;
        match protocol {
            RuleProtocol::Tcp | RuleProtocol::Udp | RuleProtocol::Both if ports.has_numbers() => {
                Ok(Self { protocol, ports })
            }
            RuleProtocol::Tcp
            | RuleProtocol::Udp
            | RuleProtocol::Both
            | RuleProtocol::Icmp
            | RuleProtocol::Dmz => Err(illegal()),
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ports == PortRange::ECHO {
            self.protocol.fmt(f)
        } else {
            write!(f, "{}/{}", self.protocol, self.ports)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_ports_of_a_protocol_or_icmp() {
        for text in ["tcp/22", "udp/500-4500", "both/53", "icmp"] {
            let exception: Exception = text.parse().unwrap();
            assert_eq!(exception.to_string(), text);
        }
        for text in [
            "",
            "22",
            "tcp",
            "tcp/",
            "/22",
            "tcp/0",
            "tcp/echo",
            "tcp/rest",
            "icmp/echo",
            "icmp/22",
            "dmz/22",
            "dmz/rest",
            "dmz",
            "sctp/22",
            "tcp/22/23",
            "tcp/22,23",
        ] {
            let refused = text.parse::<Exception>();
            assert!(
                matches!(refused, Err(Refusal::IllegalException { .. })),
                "{text:?}: {refused:?}"
            );
        }
    }
}
