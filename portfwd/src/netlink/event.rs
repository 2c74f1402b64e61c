//! Changes of interfaces, addresses, routes and neighbours, as the kernel tells them.

use std::{collections::HashMap, io, net::IpAddr, time::Duration};

use anyhow::{Context, Result};
use log::info;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_GENERIC, NETLINK_ROUTE},
};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, timeout_at},
};

use super::{generic::Family, messages};

/// Multicast groups, `enum rtnetlink_groups` of the kernel.
const GROUPS: [u32; 11] = [
    LINK,
    NEIGHBOUR,
    IPV4_ADDRESS,
    IPV4_ROUTE,
    IPV4_RULE,
    IPV6_ADDRESS,
    IPV6_ROUTE,
    IPV6_RULE,
    IPV4_SETTINGS,
    IPV6_SETTINGS,
    NEXT_HOP_OBJECT,
];
const LINK: u32 = 1;
const NEIGHBOUR: u32 = 3;
const IPV4_ADDRESS: u32 = 5;
const IPV4_ROUTE: u32 = 7;
const IPV4_RULE: u32 = 8;
const IPV6_ADDRESS: u32 = 9;
const IPV6_ROUTE: u32 = 11;
const IPV6_RULE: u32 = 19;
/// What `sysctl net.ipv4.conf` says: whether packets are forwarded (`RTNLGRP_IPV4_NETCONF`).
const IPV4_SETTINGS: u32 = 24;
const IPV6_SETTINGS: u32 = 25;
/// What routes may refer to instead of saying it (`ip nexthop`).
const NEXT_HOP_OBJECT: u32 = 32;

/// Message types, `RTM_*` of the kernel.
mod message_type {
    pub const LINKS: std::ops::RangeInclusive<u16> = 16..=19;
    pub const ADDRESSES: std::ops::RangeInclusive<u16> = 20..=23;
    pub const NEIGHBOURS: std::ops::RangeInclusive<u16> = 28..=31;
}

/// Changes come in bursts (an interface that goes up changes addresses, routes and neighbours): they are told as one.
const BURST: Duration = Duration::from_millis(5);
/// Room for a burst in the kernel, bytes.
const RECEIVE_BUFFER: i32 = 1 << 20;

/// What has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// An interface: its state, name, MTU, MAC address or what it can do for XDP; it came or went.
    pub links: bool,
    /// An address.
    pub addresses: bool,
    /// A route, routing rule, next hop, neighbour, or whether packets are forwarded.
    pub routes: bool,
}

impl Changes {
    const EVERYTHING: Self = Self {
        links: true,
        addresses: true,
        routes: true,
    };

    fn any(self) -> bool {
        self.links || self.addresses || self.routes
    }

    fn and(self, more: Self) -> Self {
        Self {
            links: self.links || more.links,
            addresses: self.addresses || more.addresses,
            routes: self.routes || more.routes,
        }
    }
}

/// The kernel's news, from the moment this is opened.
pub struct Events {
    route: AsyncFd<Socket>,
    /// Tells what interfaces can do for XDP, where the kernel can.
    netdev: Option<AsyncFd<Socket>>,
    neighbours: Neighbours,
    /// What a burst has brought so far, and when it is told.
    burst: Option<(Changes, Instant)>,
}

impl Events {
    /// Begins to listen, in the network namespace of the calling thread.
    pub fn listen() -> Result<Self> {
        let netdev = match Family::find()?.and_then(|family| family.group) {
            Some(group) => Some(subscribe(NETLINK_GENERIC, &[group])?),
            None => None,
        };
        Ok(Self {
            route: subscribe(NETLINK_ROUTE, &GROUPS)?,
            netdev,
            neighbours: Neighbours::default(),
            burst: None,
        })
    }

    /// Waits for a change, and for the burst it came with. Nothing is lost if this is dropped while it waits.
    pub async fn next(&mut self) -> io::Result<Changes> {
        loop {
            let Some((changes, deadline)) = self.burst else {
                let changes = self.receive().await?;
                self.burst = changes.any().then(|| (changes, Instant::now() + BURST));
                continue;
            };
            match timeout_at(deadline, self.receive()).await {
                Ok(more) => self.burst = Some((changes.and(more?), deadline)),
                Err(_elapsed) => {
                    self.burst = None;
                    return Ok(changes);
                }
            }
        }
    }

    async fn receive(&mut self) -> io::Result<Changes> {
        let datagram = tokio::select! {
            datagram = receive(&self.route) => datagram,
            datagram = receive_optional(self.netdev.as_ref()) => {
                return datagram.map(|_| Changes { links: true, ..Changes::default() }).or_else(lost);
            }
        };
        match datagram {
            Ok(datagram) => Ok(self.neighbours.changes(&datagram)),
            Err(error) => {
                self.neighbours = Neighbours::default();
                lost(error)
            }
        }
    }
}

/// The kernel drops news when the socket's buffer is full, and says so: then anything may have changed.
fn lost(error: io::Error) -> io::Result<Changes> {
    if error.raw_os_error() == Some(libc::ENOBUFS) {
        info!("more has changed than the kernel could tell: everything is looked at again");
        Ok(Changes::EVERYTHING)
    } else {
        Err(error)
    }
}

fn subscribe(protocol: isize, groups: &[u32]) -> Result<AsyncFd<Socket>> {
    let opening = "cannot listen to netlink";
    let mut socket = Socket::new(protocol).context(opening)?;
    socket.bind(&SocketAddr::new(0, 0)).context(opening)?;
    for group in groups {
        socket.add_membership(*group).context(opening)?;
    }
    socket.set_rx_buf_sz(RECEIVE_BUFFER).context(opening)?;
    socket.set_non_blocking(true).context(opening)?;
    // SAFETY: the socket owns its descriptor, which nothing takes out of it before the AsyncFd is dropped.
    unsafe { AsyncFd::register(socket) }.context(opening)
}

async fn receive(socket: &AsyncFd<Socket>) -> io::Result<Vec<u8>> {
    loop {
        let mut ready = socket.readable().await?;
        if let Ok(received) = ready.try_io(|socket| socket.get_ref().recv_from_full()) {
            return received.map(|(datagram, _)| datagram);
        }
    }
}

async fn receive_optional(socket: Option<&AsyncFd<Socket>>) -> io::Result<Vec<u8>> {
    match socket {
        Some(socket) => receive(socket).await,
        None => std::future::pending().await,
    }
}

/// MAC addresses of the neighbours heard of, to tell their changes from the routine of reachability: on a busy network every
/// neighbour goes from REACHABLE to STALE to PROBE and back every minute, and none of that changes a next hop.
#[derive(Debug, Default)]
struct Neighbours {
    known: HashMap<(u32, IpAddr), Vec<u8>>,
}

impl Neighbours {
    fn changes(&mut self, datagram: &[u8]) -> Changes {
        let mut changes = Changes::default();
        for message in messages(datagram) {
            let kind = u16::from_ne_bytes([message[4], message[5]]);
            if message_type::LINKS.contains(&kind) {
                changes.links = true;
            } else if message_type::ADDRESSES.contains(&kind) {
                changes.addresses = true;
            } else if message_type::NEIGHBOURS.contains(&kind) {
                changes.routes |= self.matters(message);
            } else {
                changes.routes = true;
            }
        }
        changes
    }

    /// Whether a message about a neighbour can change a next hop. One that is not understood may.
    fn matters(&mut self, message: &[u8]) -> bool {
        let Ok(message) = NetlinkMessage::deserialize(message) else {
            return true;
        };
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(neighbour)) => {
                self.appeared(&neighbour)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(neighbour)) => {
                self.forget(&neighbour)
            }
            _ => false,
        }
    }

    fn appeared(&mut self, neighbour: &NeighbourMessage) -> bool {
        let Some(key) = key(neighbour) else {
            return false;
        };
        let mac = neighbour
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(mac) => Some(mac),
                _ => None,
            });
        match (neighbour.header.state, mac) {
            (NeighbourState::Failed, _) => self.forget(neighbour),
            // Being asked for: no flow can have it as next hop yet.
            (NeighbourState::Incomplete, _) | (_, None) => false,
            (_, Some(mac)) => self.known.insert(key, mac.clone()).as_ref() != Some(mac),
        }
    }

    /// A next hop that was known is no more.
    fn forget(&mut self, neighbour: &NeighbourMessage) -> bool {
        // One that was known before this daemon listened is not in the table, but may be in flows.
        key(neighbour).is_some_and(|key| {
            self.known.remove(&key);
            true
        })
    }
}

/// IP neighbours only: bridges tell their forwarding tables over the same group.
fn key(neighbour: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    let address = neighbour
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                Some(IpAddr::V4(*address))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                Some(IpAddr::V6(*address))
            }
            _ => None,
        });
    Some((neighbour.header.ifindex, address?))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use netlink_packet_route::AddressFamily;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn neighbour(state: NeighbourState, mac: Option<[u8; 6]>) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = 7;
        message.header.state = state;
        message
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(
                Ipv4Addr::new(10, 0, 0, 1),
            )));
        message
            .attributes
            .extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())));
        message
    }

    #[test]
    fn only_changes_of_the_next_hop_matter() {
        let mut neighbours = Neighbours::default();
        for (state, mac, matters) in [
            (NeighbourState::Incomplete, None, false),
            (NeighbourState::Reachable, Some(MAC), true),
            (NeighbourState::Stale, Some(MAC), false),
            (NeighbourState::Delay, Some(MAC), false),
            (NeighbourState::Probe, Some(MAC), false),
            (NeighbourState::Reachable, Some(MAC), false),
            (NeighbourState::Stale, Some(OTHER_MAC), true),
            (NeighbourState::Failed, None, true),
            (NeighbourState::Reachable, Some(OTHER_MAC), true),
        ] {
            assert_eq!(
                neighbours.appeared(&neighbour(state, mac)),
                matters,
                "{state:?} {mac:?}"
            );
        }
        assert!(neighbours.forget(&neighbour(NeighbourState::Stale, Some(OTHER_MAC))));
    }

    #[test]
    fn a_bridges_forwarding_table_does_not_matter() {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.state = NeighbourState::Reachable;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(MAC.to_vec()));
        assert!(!Neighbours::default().appeared(&message));
    }
}
