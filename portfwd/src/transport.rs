//! What programs dial: connections and datagrams. Echo, which rules forward too, is answered by no socket.

use portfwd_common::abi::Protocol;

use crate::ruleset::RuleProtocol;

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// `None` for echo.
    pub const fn of(protocol: Protocol) -> Option<Self> {
        match protocol {
            Protocol::Tcp => Some(Self::Tcp),
            Protocol::Udp => Some(Self::Udp),
            Protocol::Echo => None,
        }
    }

    /// As the datapath knows it.
    pub const fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
        }
    }
}

impl From<Transport> for RuleProtocol {
    fn from(transport: Transport) -> Self {
        transport.protocol().into()
    }
}
