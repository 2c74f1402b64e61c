//! The kernel's answer to "which way": what `ip route get` prints.

use std::{io, net::IpAddr};

use anyhow::{Context, Result};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteType, RouteVia,
    },
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Requester;

/// The way to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Out of an interface.
    Out(Hop),
    /// The destination is this machine, or everybody on a link of its.
    Local,
    /// There is none, or it refuses: the kernel's words.
    None(String),
}

/// The next hop of a [`Route`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Kernel index of the interface it goes out by.
    pub ifindex: u32,
    /// The router it goes to; `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// MTU of the route, bytes, if it has one of its own.
    pub mtu: Option<u32>,
    /// Whether a router advertised it (IPv6).
    pub advertised: bool,
}

impl Hop {
    /// Whose MAC address the frames go to.
    pub fn neighbour(&self, destination: IpAddr) -> IpAddr {
        self.gateway.unwrap_or(destination)
    }
}

/// Asks the kernel for routes of the thread's network namespace.
pub struct Routes(Requester);

impl Routes {
    /// Opens a socket.
    pub fn open() -> Result<Self> {
        Ok(Self(Requester::open(NETLINK_ROUTE)?))
    }

    /// The way of a packet that this machine sends.
    pub fn to(&mut self, destination: IpAddr) -> Result<Route> {
        self.ask(destination, Vec::new())
    }

    /// The way of a packet that comes in by an interface and is to be forwarded, with all that the kernel checks about it:
    /// that forwarding is on, and that the source is not spoofed.
    pub fn forwarded(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        ingress: u32,
    ) -> Result<Route> {
        self.ask(
            destination,
            vec![
                RouteAttribute::Source(source.into()),
                RouteAttribute::Iif(ingress),
            ],
        )
    }

    fn ask(&mut self, destination: IpAddr, mut attributes: Vec<RouteAttribute>) -> Result<Route> {
        let (family, bits) = match destination {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        attributes.push(RouteAttribute::Destination(destination.into()));
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family,
            destination_prefix_length: bits,
            source_prefix_length: if attributes.len() > 1 { bits } else { 0 },
            ..RouteHeader::default()
        };
        message.attributes = attributes;
        match self.0.request(RouteNetlinkMessage::GetRoute(message), 0) {
            Ok(answer) => Ok(answer
                .iter()
                .find_map(route)
                .unwrap_or_else(|| Route::None("the kernel gave no route".to_owned()))),
            // The kernel tells by the error number why there is no way.
            Err(error) => match error.downcast_ref::<io::Error>() {
                Some(refusal) if refusal.raw_os_error().is_some() => {
                    Ok(Route::None(refusal_words(refusal)))
                }
                Some(_) | None => Err(error).context("cannot ask for a route"),
            },
        }
    }
}

fn refusal_words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH) => "no route to it".to_owned(),
        Some(libc::EHOSTUNREACH) => "unreachable".to_owned(),
        Some(libc::EXDEV) => "the reverse path filter takes its source for spoofed".to_owned(),
        Some(libc::EACCES) => "a route prohibits it".to_owned(),
        // What `blackhole` routes answer.
        Some(libc::EINVAL) => "a route discards it".to_owned(),
        Some(_) | None => error.to_string(),
    }
}

fn route(message: &RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = message else {
        return None;
    };
    match message.header.kind {
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast => {
            return Some(Route::Local);
        }
        RouteType::BlackHole => return Some(Route::None("a route discards it".to_owned())),
        RouteType::Unreachable => return Some(Route::None("unreachable".to_owned())),
        RouteType::Prohibit => return Some(Route::None("a route prohibits it".to_owned())),
        _ => {}
    }
    let mut hop = Hop {
        ifindex: 0,
        gateway: None,
        mtu: None,
        advertised: message.header.protocol == RouteProtocol::Ra,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => hop.ifindex = *ifindex,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => hop.gateway = Some((*ip).into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => hop.gateway = Some((*ip).into()),
            // A route of IPv4 over an IPv6 router.
            RouteAttribute::Via(RouteVia::Inet(ip)) => hop.gateway = Some((*ip).into()),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => hop.gateway = Some((*ip).into()),
            RouteAttribute::Metrics(metrics) => {
                hop.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (hop.ifindex != 0).then_some(Route::Out(hop))
}
