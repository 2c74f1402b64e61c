//! Addresses of the lab, each host with one of either family.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, for tests that do the same over each.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The address that means "any" when a socket is bound to it.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// The family of `address`.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One host's address in either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DualStack {
    /// The IPv4 address; its network is a /24.
    pub v4: Ipv4Addr,
    /// The IPv6 address; its network is a /64.
    pub v6: Ipv6Addr,
}

impl DualStack {
    /// Host `host` of the lab's network `network`: `10.NETWORK.0.HOST` and `2001:db8:NETWORK::HOST`.
    pub const fn new(network: u8, host: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(10, network, 0, host),
            v6: Ipv6Addr::new(0x2001, 0xdb8, network as u16, 0, 0, 0, 0, host as u16),
        }
    }

    /// The address of one family.
    pub fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// The endpoint of one family at `port`.
    pub fn endpoint(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.of(family), port)
    }
}

/// The client, `c0`.
pub const CLIENT: DualStack = DualStack::new(1, 2);
/// The gateway's WAN side, `wan0`.
pub const GATEWAY_WAN: DualStack = DualStack::new(1, 1);
/// The gateway's LAN side, `lan0`.
pub const GATEWAY_LAN: DualStack = DualStack::new(2, 1);
/// The server, `s0`, when it is on the LAN itself.
pub const SERVER: DualStack = DualStack::new(2, 2);
/// The router on the LAN, `r0`, when there is one between gateway and server.
pub const ROUTER_LAN: DualStack = DualStack::new(2, 254);
/// The router's other side, `r1`.
pub const ROUTER_FAR: DualStack = DualStack::new(3, 1);
/// The server, `s0`, when it is behind the router.
pub const SERVER_BEHIND_ROUTER: DualStack = DualStack::new(3, 2);
/// The gateway's side of the second LAN, `lan1`.
pub const GATEWAY_SECOND_LAN: DualStack = DualStack::new(4, 1);
/// The server on the second LAN, `s0` in a namespace of its own.
pub const SECOND_SERVER: DualStack = DualStack::new(4, 2);
