//! What diagnosis wants to know of an interface beyond what attaching does: its state, what it is part of, its offloads.

use anyhow::{Context, Result};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{
    Requester,
    ethtool::Ethtool,
    generic,
    link::{Link, links},
};

/// An interface of the thread's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// What attaching needs to know.
    pub link: Link,
    /// Whether it carries packets.
    pub state: State,
    /// Kernel index of the bridge, bond or team that it is a port of.
    pub controller: Option<u32>,
    /// Kernel index of the interface below it (of a VLAN: the one whose tag it takes).
    pub lower: Option<u32>,
    /// What its driver can do for XDP, bits of `enum netdev_xdp_act`; `None` if the kernel does not tell.
    pub xdp_features: Option<u64>,
    /// Names of the offloads that are on, as `ethtool --show-features` has them in the kernel's spelling.
    pub offloads: Vec<String>,
}

/// Whether an interface carries packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Up,
    /// It was not set up.
    Down,
    /// It was, but the other end is not there.
    NoCarrier,
}

/// The state, controller and lower interface of a link, by its index.
type Place = (u32, State, Option<u32>, Option<u32>);

/// All interfaces, with their offloads.
pub fn devices() -> Result<Vec<Device>> {
    let features = match generic::Family::find()? {
        Some(family) => Some(family.xdp_features()?),
        None => None,
    };
    let places = places()?;
    let mut ethtool = Ethtool::open()?;
    let describe = |link: Link| {
        let (_, state, controller, lower) = *places.iter().find(|place| place.0 == link.ifindex)?;
        let xdp_features = features.as_ref().map(|features| {
            let of_link = features.iter().find(|of| of.ifindex == link.ifindex);
            of_link.map_or(0, |of| of.bits)
        });
        Some(Device {
            state,
            controller,
            lower,
            xdp_features,
            // One that has gone has none.
            offloads: ethtool
                .as_mut()
                .and_then(|ethtool| ethtool.active(link.ifindex).ok())
                .unwrap_or_default(),
            link,
        })
    };
    Ok(links()?.into_iter().filter_map(describe).collect())
}

fn places() -> Result<Vec<Place>> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let answer = requester
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .context("cannot list the interfaces")?;
    Ok(answer.iter().filter_map(place).collect())
}

fn place(message: &RouteNetlinkMessage) -> Option<Place> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    let flags = link.header.flags;
    let state = match (
        flags.contains(LinkFlags::Up),
        flags.contains(LinkFlags::LowerUp),
    ) {
        (false, _) => State::Down,
        (true, false) => State::NoCarrier,
        (true, true) => State::Up,
    };
    let (mut controller, mut lower, mut elsewhere) = (None, None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Controller(index) => controller = Some(*index),
            LinkAttribute::Link(index) => lower = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    // The index of an interface in another namespace, as that of a veth's other end, means nothing here.
    let lower = lower.filter(|_| !elsewhere);
    Some((link.header.index, state, controller, lower))
}
