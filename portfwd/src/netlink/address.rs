//! Addresses of interfaces.

use std::net::IpAddr;

use anyhow::{Context, Result};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Requester;

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Kernel index of the interface.
    pub ifindex: u32,
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network's prefix.
    pub prefix: u8,
    /// Whether connections that begin here should prefer another: deprecated, temporary or secondary.
    pub deprecated: bool,
}

/// Addresses of all interfaces of the thread's network namespace that the world can dial: not link-local, not loopback, not
/// found to be taken by another station.
pub fn addresses() -> Result<Vec<Address>> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let answer = requester
        .dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
        .context("cannot list the addresses")?;
    Ok(answer
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => Address::from_message(&address),
            _ => None,
        })
        .collect())
}

impl Address {
    fn from_message(message: &AddressMessage) -> Option<Self> {
        let flags = message.header.flags;
        let dialled = !matches!(
            message.header.scope,
            AddressScope::Link | AddressScope::Host
        );
        if !dialled || flags.contains(AddressHeaderFlags::Dadfailed) {
            return None;
        }
        // On a point-to-point link the attribute Address is the other end's; Local is only there if they differ or for IPv4.
        let mut own = None;
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => own = Some(*ip),
                AddressAttribute::Address(ip) if own.is_none() => own = Some(*ip),
                _ => {}
            }
        }
        Some(Self {
            ifindex: message.header.index,
            ip: own?,
            prefix: message.header.prefix_len,
            deprecated: flags
                .intersects(AddressHeaderFlags::Deprecated | AddressHeaderFlags::Secondary),
        })
    }
}
