//! The model's world in real interfaces: two network namespaces, the gateway's and one for everybody else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use portfwd_common::model::{
    frame::Mac,
    world::{
        ARM, ARM_MAC, BACKEND_MAC, ELSEWHERE, LAN, LAN_MAC, NARROW, NARROW_MAC, NARROW_MTU,
        SLOW_MTU, TUNNEL, UPSTREAM_MAC, WAN, WAN_MAC, WAN_TUNNEL, World,
    },
};
use portfwd_tests::{Namespace, link::End};

use crate::tunnel::Tunnel;

/// Interfaces, addresses, routes and neighbours as [`World`] has them.
pub struct Surroundings {
    gateway: Namespace,
    _neighbours: Namespace,
    _tunnels: [Tunnel; 2],
}

impl Surroundings {
    /// Makes all of it.
    pub fn new() -> Result<Self> {
        let (gateway, neighbours) = (Namespace::new("gateway")?, Namespace::new("neighbours")?);
        for (key, value) in [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
        ] {
            gateway.sysctl(key, value)?;
        }
        let tunnels = gateway.run(|| -> Result<_> {
            Ok([
                Tunnel::new("tun0", TUNNEL)?,
                Tunnel::new("tun1", WAN_TUNNEL)?,
            ])
        })??;
        let elsewhere_mac = [2, 0, 0, 0, 0, ELSEWHERE as u8];
        for (name, index, mac) in [
            ("wan0", WAN, WAN_MAC),
            ("lan0", LAN, LAN_MAC),
            ("narrow0", NARROW, NARROW_MAC),
            ("arm0", ARM, ARM_MAC),
            ("far0", ELSEWHERE, elsewhere_mac),
        ] {
            gateway.ip(&format!(
                "link add name {name} index {index} address {} type veth peer name {name} netns {}\n\
                 link set {name} up\n",
                text(mac),
                neighbours.name(),
            ))?;
            neighbours.ip(&format!("link set {name} up\n"))?;
        }
        gateway.ip(&format!(
            "link set narrow0 mtu {NARROW_MTU}\n\
             link set tun0 mtu {NARROW_MTU} up\nlink set tun1 mtu {NARROW_MTU} up\n"
        ))?;
        for world in World::both() {
            gateway.ip(&lines(&world))?;
        }
        // Only a veth with NAPI has the receive queue that a test run of XDP names.
        for interface in ["wan0", "lan0", "narrow0", "arm0"] {
            let namespace = &gateway;
            End {
                namespace,
                interface,
            }
            .turn_gro_on()?;
        }
        Ok(Self {
            gateway,
            _neighbours: neighbours,
            _tunnels: tunnels,
        })
    }

    /// Runs `work` in the gateway's namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.gateway.run(work)
    }
}

/// What `ip` has to be told of one family.
fn lines(world: &World) -> String {
    let prefix = world.network_bits();
    let nodad = if world.is_v4() { "" } else { " nodad" };
    let mut lines = String::new();
    for (interface, address) in [
        ("wan0", world.listen),
        ("wan0", world.second_listen),
        ("lan0", world.lan_address),
        ("narrow0", World::beside(world.narrow_target)),
        ("far0", World::beside(world.far_target)),
        ("arm0", world.arm_listen),
        ("tun0", World::beside(world.tunnel_target)),
        ("tun1", World::beside(world.tunnel_client)),
    ] {
        lines += &format!("addr add {address}/{prefix} dev {interface}{nodad}\n");
    }
    for (interface, address, mac) in [
        ("wan0", world.upstream, UPSTREAM_MAC),
        ("lan0", world.target, BACKEND_MAC),
        ("lan0", world.second_target, BACKEND_MAC),
        ("lan0", world.slow_target, BACKEND_MAC),
        ("lan0", world.lan_router, BACKEND_MAC),
        ("narrow0", world.narrow_target, BACKEND_MAC),
        ("far0", world.far_target, BACKEND_MAC),
        ("arm0", world.arm_target, BACKEND_MAC),
        ("arm0", world.arm_neighbour, BACKEND_MAC),
        ("arm0", arm_router(world), UPSTREAM_MAC),
    ] {
        lines += &format!(
            "neigh add {address} lladdr {} dev {interface} nud permanent\n",
            text(mac)
        );
    }
    for behind in [world.client, world.wan_router] {
        lines += &format!(
            "route add {}/{prefix} via {}\n",
            World::network(behind),
            world.upstream
        );
    }
    lines += &format!(
        "route add {}/{prefix} via {}\n",
        World::network(world.arm_client),
        arm_router(world)
    );
    // An IPv4 route's MTU counts for forwarded packets only if it is locked.
    lines
        + &format!(
            "route add {} dev lan0 mtu lock {SLOW_MTU}\n",
            world.slow_target
        )
}

/// The router that the clients of the only arm are behind.
fn arm_router(world: &World) -> IpAddr {
    match World::network(world.arm_listen) {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() | 254).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() | 254).into(),
    }
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
