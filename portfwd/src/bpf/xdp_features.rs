//! Which interfaces take frames that XDP redirects to them (`ndo_xdp_xmit`).
//!
//! A veth takes them only while its other end has an XDP program or GRO on, so this changes while the daemon runs.

use anyhow::Result;
use portfwd_common::abi::LinkLayer;

use super::attach::{Attachment, Mode};
use crate::netlink::{
    generic::{Family, XdpFeatures},
    link::Link,
};

/// `NETDEV_XDP_ACT_NDO_XMIT` of the kernel.
const TRANSMIT: u64 = 1 << 2;

/// What the kernel says about all interfaces, at one moment.
pub enum Transmitters {
    /// As listed.
    Known(Vec<XdpFeatures>),
    /// A kernel before 6.3 does not tell.
    Unknown,
}

impl Transmitters {
    /// Asks the kernel about the thread's network namespace.
    pub fn list() -> Result<Self> {
        Ok(match Family::find()? {
            Some(family) => Self::Known(family.xdp_features()?),
            None => Self::Unknown,
        })
    }

    /// Whether XDP may redirect to an attached interface.
    pub fn takes(&self, link: &Link, attachment: &Attachment) -> bool {
        if link.layer != LinkLayer::Ethernet {
            return false;
        }
        match self {
            Self::Known(features) => features
                .iter()
                .any(|of| of.ifindex == link.ifindex && of.bits & TRANSMIT != 0),
            // Drivers with native XDP transmit nearly all, once they have a program themselves.
            Self::Unknown => attachment.mode == Mode::Xdp,
        }
    }
}
