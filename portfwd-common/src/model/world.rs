//! A gateway's surroundings, the same for the model and for a lab of real interfaces.
//!
//! ```text
//! client ── upstream router ── WAN         gateway  LAN ── target, second target, LAN router
//!                                                   NARROW (no XDP transmit, MTU 1400) ── narrow target
//!                                                   TUNNEL (no link header) ── tunnel target
//!                                                   ELSEWHERE (no program) ── far target
//! client ── router ────────────── ARM (both sides) ── target, neighbour
//! tunnel client ──────────────── WAN_TUNNEL (no link header)
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    Maps,
    frame::{Mac, mac_words},
};
use crate::{
    abi::Interface,
    datapath::Route,
    net::{Ipv4, Ipv6},
};

/// Backends are behind it, but no link header is before a packet.
pub const TUNNEL: u32 = 12;
/// Clients are behind it, but no link header is before a packet.
pub const WAN_TUNNEL: u32 = 13;
/// Towards the clients.
pub const WAN: u32 = 14;
/// Towards the backends.
pub const LAN: u32 = 15;
/// The same, but takes no frames from XDP, and none above [`NARROW_MTU`].
pub const NARROW: u32 = 16;
/// Clients and backends are behind it.
pub const ARM: u32 = 17;
/// An interface that portfwd is not attached to.
pub const ELSEWHERE: u32 = 19;

/// MTU of most interfaces and routes, bytes.
pub const MTU: u32 = 1500;
/// MTU of [`NARROW`] and of the tunnels, bytes.
pub const NARROW_MTU: u32 = 1400;
/// MTU of the route to [`World::slow_target`], bytes.
pub const SLOW_MTU: u32 = 1300;

/// Own MAC address of [`WAN`].
pub const WAN_MAC: Mac = [2, 0, 0, 0, 0, WAN as u8];
/// Own MAC address of [`LAN`].
pub const LAN_MAC: Mac = [2, 0, 0, 0, 0, LAN as u8];
/// Own MAC address of [`NARROW`].
pub const NARROW_MAC: Mac = [2, 0, 0, 0, 0, NARROW as u8];
/// Own MAC address of [`ARM`].
pub const ARM_MAC: Mac = [2, 0, 0, 0, 0, ARM as u8];
/// The router that the clients are behind.
pub const UPSTREAM_MAC: Mac = [2, 0xaa, 0, 0, 0, 1];
/// Every backend whose MAC address is known.
pub const BACKEND_MAC: Mac = [2, 0xbb, 0, 0, 0, 1];

/// Who is where, in one family. Networks are a /24 or a /64 each, and their third byte or word is in the comments.
#[derive(Clone, Copy, Debug)]
pub struct World {
    /// A client (101).
    pub client: IpAddr,
    /// Another client (101).
    pub second_client: IpAddr,
    /// A client behind [`WAN_TUNNEL`] (107).
    pub tunnel_client: IpAddr,
    /// The gateway's first WAN address (3).
    pub listen: IpAddr,
    /// The gateway's second WAN address (3).
    pub second_listen: IpAddr,
    /// The router that clients are behind (3).
    pub upstream: IpAddr,
    /// The gateway's LAN address (4).
    pub lan_address: IpAddr,
    /// A backend (4).
    pub target: IpAddr,
    /// Another backend (4).
    pub second_target: IpAddr,
    /// A backend whose MAC address is not known (4).
    pub silent_target: IpAddr,
    /// A backend behind a route with an MTU of [`SLOW_MTU`] (4).
    pub slow_target: IpAddr,
    /// A backend behind [`NARROW`] (5).
    pub narrow_target: IpAddr,
    /// A backend behind [`TUNNEL`] (6).
    pub tunnel_target: IpAddr,
    /// A backend behind [`ELSEWHERE`] (9).
    pub far_target: IpAddr,
    /// The gateway's address on [`ARM`] (8).
    pub arm_listen: IpAddr,
    /// A backend on [`ARM`] (8).
    pub arm_target: IpAddr,
    /// A client in the network of [`ARM`] (8).
    pub arm_neighbour: IpAddr,
    /// A client behind the router of [`ARM`] (108).
    pub arm_client: IpAddr,
    /// An address without route (99).
    pub lost_target: IpAddr,
    /// A router on the way to the backends (4).
    pub lan_router: IpAddr,
    /// A router on the way to the clients (102).
    pub wan_router: IpAddr,
}

impl World {
    /// Over IPv4: `10.NETWORK.0.HOST`.
    pub fn v4() -> Self {
        Self::of(|network, host| Ipv4Addr::new(10, network, 0, host).into())
    }

    /// Over IPv6: `2001:db8:NETWORK::HOST`.
    pub fn v6() -> Self {
        Self::of(|network, host| {
            let (network, host) = (u16::from(network), u16::from(host));
            Ipv6Addr::new(0x2001, 0xdb8, network, 0, 0, 0, 0, host).into()
        })
    }

    /// Over either family.
    pub fn both() -> [Self; 2] {
        [Self::v4(), Self::v6()]
    }

    fn of(address: impl Fn(u8, u8) -> IpAddr) -> Self {
        Self {
            client: address(101, 7),
            second_client: address(101, 8),
            tunnel_client: address(107, 7),
            listen: address(3, 1),
            second_listen: address(3, 2),
            upstream: address(3, 254),
            lan_address: address(4, 1),
            target: address(4, 10),
            second_target: address(4, 11),
            silent_target: address(4, 66),
            slow_target: address(4, 13),
            narrow_target: address(5, 10),
            tunnel_target: address(6, 10),
            far_target: address(9, 10),
            arm_listen: address(8, 1),
            arm_target: address(8, 10),
            arm_neighbour: address(8, 11),
            arm_client: address(108, 7),
            lost_target: address(99, 10),
            lan_router: address(4, 254),
            wan_router: address(102, 1),
        }
    }

    /// Bits of an address.
    pub const fn bits(&self) -> u32 {
        match self.client {
            IpAddr::V4(_) => Ipv4Addr::BITS,
            IpAddr::V6(_) => Ipv6Addr::BITS,
        }
    }

    /// Whether this is the IPv4 one.
    pub const fn is_v4(&self) -> bool {
        self.client.is_ipv4()
    }

    /// Bits of a network's prefix.
    pub const fn network_bits(&self) -> u32 {
        match self.client {
            IpAddr::V4(_) => 24,
            IpAddr::V6(_) => 64,
        }
    }

    /// Our own address in the network of a host, host 1 by convention.
    pub fn beside(host: IpAddr) -> IpAddr {
        in_network_of(host, 1)
    }

    /// The network of a host: its first address.
    pub fn network(host: IpAddr) -> IpAddr {
        in_network_of(host, 0)
    }

    /// The routes of this family, as the kernel of such a gateway answers: first bits of an address, how many, and the answer.
    pub fn routes(&self) -> Vec<(IpAddr, u32, Route)> {
        let via = |ifindex, next_hop, mtu| Route::Via {
            ifindex,
            next_hop: mac_words(next_hop),
            mtu,
        };
        let (wan, lan) = (via(WAN, UPSTREAM_MAC, MTU), via(LAN, BACKEND_MAC, MTU));
        let arm = via(ARM, BACKEND_MAC, MTU);
        let mut routes = Vec::new();
        for (remote, route) in [
            (self.client, wan),
            (self.wan_router, wan),
            (self.arm_client, via(ARM, UPSTREAM_MAC, MTU)),
        ] {
            routes.push((Self::network(remote), self.network_bits(), route));
        }
        for (neighbour, ifindex) in [
            (self.upstream, WAN),
            (self.target, LAN),
            (self.narrow_target, NARROW),
            (self.tunnel_target, TUNNEL),
            (self.tunnel_client, WAN_TUNNEL),
            (self.far_target, ELSEWHERE),
            (self.arm_target, ARM),
        ] {
            let network = Self::network(neighbour);
            routes.push((network, self.network_bits(), Route::Unresolved { ifindex }));
            // Ours, and the broadcast address or that of all routers.
            let special = match self.client {
                IpAddr::V4(_) => in_network_of(neighbour, 255),
                IpAddr::V6(_) => network,
            };
            let own = [Self::beside(neighbour), special];
            routes.extend(own.map(|own| (own, self.bits(), Route::Refused)));
        }
        let hosts = [
            (self.second_listen, Route::Refused),
            (self.upstream, wan),
            (self.target, lan),
            (self.second_target, lan),
            (self.lan_router, lan),
            (self.slow_target, via(LAN, BACKEND_MAC, SLOW_MTU)),
            (self.narrow_target, via(NARROW, BACKEND_MAC, NARROW_MTU)),
            (self.far_target, via(ELSEWHERE, BACKEND_MAC, MTU)),
            (self.arm_target, arm),
            (self.arm_neighbour, arm),
        ];
        routes.extend(hosts.map(|(host, route)| (host, self.bits(), route)));
        routes
    }
}

/// Another address in the network of a host.
fn in_network_of(host: IpAddr, number: u8) -> IpAddr {
    match host {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            Ipv4Addr::new(a, b, c, number).into()
        }
        IpAddr::V6(v6) => {
            let network = v6.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(network | u128::from(number)).into()
        }
    }
}

/// The attached interfaces, as the daemon writes them.
pub fn interfaces() -> [Interface; 6] {
    let (v4, v6) = (World::v4(), World::v6());
    let interface = |ifindex, mtu, mac, flags| Interface {
        ifindex,
        mtu,
        mac: mac_words(mac),
        flags,
        ipv4: ipv4(v4.listen),
        ipv6: Ipv6::from(v6.listen),
        ipv4_prefix: 24,
        ipv6_prefix: 64,
        padding: 0,
    };
    let (wan, raw, transmit) = (Interface::ROLE_WAN, Interface::RAW, Interface::XDP_TRANSMIT);
    let scatter = transmit | Interface::XDP_SCATTER;
    [
        interface(TUNNEL, NARROW_MTU, [0; 6], raw),
        interface(WAN_TUNNEL, NARROW_MTU, [0; 6], raw | wan),
        interface(WAN, MTU, WAN_MAC, wan | scatter),
        Interface {
            ipv4: ipv4(v4.lan_address),
            ipv6: Ipv6::from(v6.lan_address),
            ..interface(LAN, MTU, LAN_MAC, scatter)
        },
        interface(NARROW, NARROW_MTU, NARROW_MAC, 0),
        Interface {
            ipv4: ipv4(v4.arm_listen),
            ipv6: Ipv6::from(v6.arm_listen),
            ..interface(ARM, MTU, ARM_MAC, wan | transmit | Interface::ROLE_BOTH)
        },
    ]
}

/// Puts interfaces, addresses and routes of both families into the model's maps.
pub fn furnish(maps: &mut Maps) {
    for interface in interfaces() {
        maps.set_interface(interface);
    }
    for world in World::both() {
        for address in [world.listen, world.second_listen, world.arm_listen] {
            maps.add_address(address);
            maps.add_pools(address);
        }
        maps.add_lan_address(world.lan_address);
        maps.add_pools(world.lan_address);
        for (network, length, route) in world.routes() {
            maps.set_route(network, length, route);
        }
    }
}

/// An endpoint.
pub const fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

fn ipv4(address: IpAddr) -> Ipv4 {
    match address {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(_) => Ipv4::default(),
    }
}
