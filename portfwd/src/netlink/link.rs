//! Interfaces.

use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use anyhow::{Context, Result};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, XdpAttached},
};
use netlink_sys::protocols::NETLINK_ROUTE;
use portfwd_common::abi::LinkLayer;

use super::Requester;

/// An interface of the thread's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Kernel index.
    pub ifindex: u32,
    /// Kernel name.
    pub name: String,
    /// What precedes the IP header.
    pub layer: LinkLayer,
    /// What kind of virtual device it is (`veth`, `bridge`); `None` for network cards.
    pub kind: Option<String>,
    /// Own MAC address; zero if it has none.
    pub mac: [u8; 6],
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// The XDP program on it.
    pub xdp: Option<AttachedXdp>,
}

/// An XDP program on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedXdp {
    /// Where it runs.
    pub mode: XdpMode,
    /// Number of the program.
    pub program: u32,
}

/// Where an XDP program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
    /// In the network card.
    Offloaded,
}

/// All interfaces of the thread's network namespace.
pub fn links() -> Result<Vec<Link>> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let answer = requester
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .context("cannot list the interfaces")?;
    Ok(answer
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Link::from_message(link),
            _ => None,
        })
        .collect())
}

impl Link {
    fn from_message(message: LinkMessage) -> Option<Self> {
        let mut link = Self {
            ifindex: message.header.index,
            name: String::new(),
            layer: match message.header.link_layer_type {
                LinkLayerType::Ether | LinkLayerType::Loopback => LinkLayer::Ethernet,
                _ => LinkLayer::Raw,
            },
            kind: None,
            mac: [0; 6],
            mtu: 0,
            xdp: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(mac) => link.mac = mac.try_into().unwrap_or_default(),
                LinkAttribute::LinkInfo(info) => link.kind = kind(&info),
                LinkAttribute::Xdp(xdp) => link.xdp = attached_xdp(&xdp),
                _ => {}
            }
        }
        (!link.name.is_empty()).then_some(link)
    }
}

/// What the kernel or a driver says about an XDP program that it has just refused in a mode, `XDP_FLAGS_*` of the kernel. A link,
/// by which programs are attached, gives an error number alone. So the program is offered once more in the old way; should it be
/// taken, it is taken off again.
pub fn xdp_refusal(ifindex: u32, program: BorrowedFd<'_>, mode: u32) -> Result<Option<String>> {
    const ONLY_IF_NONE: u32 = 1;
    let set = |fd: RawFd, flags: u32| {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        message.attributes.push(LinkAttribute::Xdp(vec![
            LinkXdp::Fd(fd),
            LinkXdp::Flags(flags),
        ]));
        RouteNetlinkMessage::SetLink(message)
    };
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let refused = requester.refusal(set(program.as_raw_fd(), mode | ONLY_IF_NONE))?;
    if refused.is_none() {
        requester.request(set(-1, mode), 0)?;
    }
    Ok(refused.filter(|words| !words.is_empty()))
}

fn kind(info: &[LinkInfo]) -> Option<String> {
    info.iter().find_map(|part| match part {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    })
}

fn attached_xdp(attributes: &[LinkXdp]) -> Option<AttachedXdp> {
    let mut mode = None;
    let mut program = None;
    for attribute in attributes {
        match attribute {
            LinkXdp::Attached(XdpAttached::Driver | XdpAttached::Multiple) => {
                mode = Some(XdpMode::Native);
            }
            LinkXdp::Attached(XdpAttached::SocketBuffer) => mode = Some(XdpMode::Generic),
            LinkXdp::Attached(XdpAttached::Hardware) => mode = Some(XdpMode::Offloaded),
            LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) => program = Some(*id),
            LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) if program.is_none() => {
                program = Some(*id);
            }
            _ => {}
        }
    }
    Some(AttachedXdp {
        mode: mode?,
        program: program?,
    })
}
