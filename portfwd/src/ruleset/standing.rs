//! Where a slot of RULES stands, and what a change makes of the flows of a rule that goes.

use std::{fmt, str::FromStr};

use portfwd_common::abi::Protocol;
use serde::{Deserialize, Serialize};

use super::Refusal;

/// What becomes of the flows of a rule that is removed, replaced or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowPolicy {
    /// They go on as they are, for as long as they live.
    Keep,
    /// TCP connections go on until they end; UDP follows the new rules at once, since a stream of
    /// datagrams has no end that could be waited for.
    Drain,
    /// Their next packet follows the new rules.
    Kill,
}

/// Where a slot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody's.
    Free,
    /// Its rule has it, but takes no flow and has none.
    Parked,
    /// Its rule has it, takes no new flow, and lets those go on that it has.
    Draining,
    /// Packets find its rule.
    Linked,
    /// The rule is gone, or has another slot; flows that it began go on.
    Retired,
}

impl FlowPolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Keep, Self::Drain, Self::Kill];

    /// The word on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drain => "drain",
            Self::Kill => "kill",
        }
    }

    /// Whether flows of a protocol go on.
    pub const fn spares(self, protocol: Protocol) -> bool {
        match (self, protocol) {
            (Self::Keep, _) | (Self::Drain, Protocol::Tcp) => true,
            (Self::Drain, Protocol::Udp | Protocol::Echo) | (Self::Kill, _) => false,
        }
    }
}

impl fmt::Display for FlowPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl FromStr for FlowPolicy {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.word() == text)
            .ok_or_else(|| Refusal::UnknownFlowPolicy {
                text: text.to_owned(),
            })
    }
}

impl Standing {
    /// PORTS and LISTENS lead to it.
    pub const fn listens(self) -> bool {
        match self {
            Self::Linked => true,
            Self::Free | Self::Parked | Self::Draining | Self::Retired => false,
        }
    }

    /// Flows that name it go on.
    pub const fn holds_flows(self) -> bool {
        match self {
            Self::Linked | Self::Draining | Self::Retired => true,
            Self::Free | Self::Parked => false,
        }
    }

    /// A rule of the ruleset has it.
    pub const fn is_owned(self) -> bool {
        match self {
            Self::Linked | Self::Draining | Self::Parked => true,
            Self::Free | Self::Retired => false,
        }
    }
}
