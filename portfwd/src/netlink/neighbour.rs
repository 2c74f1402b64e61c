//! What the kernel knows of the machines on its links: what `ip neigh` prints.

use std::net::IpAddr;

use anyhow::{Context, Result};
use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Requester;

/// A machine on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Kernel index of the interface.
    pub ifindex: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Whether it answers.
    pub state: Resolution,
    /// Its MAC address, if it is known.
    pub mac: Option<[u8; 6]>,
}

/// How far the kernel has come in finding a neighbour's MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Known.
    Known,
    /// Being asked for.
    Asking,
    /// It did not answer.
    Failed,
}

/// The neighbours of the thread's network namespace that the kernel has dealt with.
pub fn neighbours() -> Result<Vec<Neighbour>> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let answer = requester
        .dump(RouteNetlinkMessage::GetNeighbour(
            NeighbourMessage::default(),
        ))
        .context("cannot list the neighbours")?;
    Ok(answer
        .iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Neighbour::from_message(neighbour),
            _ => None,
        })
        .collect())
}

impl Neighbour {
    fn from_message(message: &NeighbourMessage) -> Option<Self> {
        let state = match message.header.state {
            NeighbourState::Failed => Resolution::Failed,
            NeighbourState::Incomplete => Resolution::Asking,
            NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp => Resolution::Known,
            _ => return None,
        };
        let (mut ip, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    ip = Some(IpAddr::V4(*v4));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    ip = Some(IpAddr::V6(*v6));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = bytes.as_slice().try_into().ok();
                }
                _ => {}
            }
        }
        Some(Self {
            ifindex: message.header.ifindex,
            ip: ip?,
            state,
            mac,
        })
    }
}
