//! Which interfaces take frames that XDP redirects to them.
//!
//! Native XDP needs a driver that can (`ndo_xdp_xmit`), and a veth can only while its other end has an XDP program or GRO on:
//! this changes while the daemon runs. Generic XDP sends through the stack and needs nothing.

use anyhow::Result;
use portfwd_common::abi::LinkLayer;

use super::{attach::Attachment, mode::Mode};
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

    /// Whether XDP on the `attached` interfaces may redirect to one of them.
    pub fn takes(&self, link: &Link, attached: &[Attachment]) -> bool {
        let mode = |mode| attached.iter().any(|attachment| attachment.mode == mode);
        if link.layer != LinkLayer::Ethernet {
            return false;
        }
        if !mode(Mode::Xdp) && mode(Mode::XdpGeneric) {
            return true;
        }
        self.is_native(link).unwrap_or_else(|| {
            // Drivers with native XDP transmit nearly all, once they have a program themselves.
            let native = |of: &Attachment| of.ifindex == link.ifindex && of.mode == Mode::Xdp;
            attached.iter().any(native)
        })
    }

    /// Whether native XDP may redirect to an interface, if the kernel tells.
    pub fn is_native(&self, link: &Link) -> Option<bool> {
        match self {
            Self::Known(features) => Some(
                features
                    .iter()
                    .any(|of| of.ifindex == link.ifindex && of.bits & TRANSMIT != 0),
            ),
            Self::Unknown => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use portfwd_common::abi::Role;

    use super::*;

    fn attachment(ifindex: u32, mode: Mode) -> Attachment {
        let (name, role, reason) = (format!("if{ifindex}"), Role::Lan, String::new());
        Attachment {
            name,
            ifindex,
            role,
            mode,
            reason,
        }
    }

    #[test]
    fn native_xdp_needs_a_driver_that_transmits_and_generic_does_not() {
        let link = |ifindex, layer| Link {
            ifindex,
            name: format!("if{ifindex}"),
            layer,
            kind: None,
            mac: [0; 6],
            mtu: 1500,
            xdp: None,
        };
        let (able, unable) = (link(1, LinkLayer::Ethernet), link(2, LinkLayer::Ethernet));
        let raw = link(3, LinkLayer::Raw);
        let known = Transmitters::Known(vec![
            XdpFeatures {
                ifindex: 1,
                bits: 7,
            },
            XdpFeatures {
                ifindex: 2,
                bits: 3,
            },
            XdpFeatures {
                ifindex: 3,
                bits: 7,
            },
        ]);
        let native = [attachment(1, Mode::Xdp), attachment(2, Mode::Tc)];
        let generic = [attachment(1, Mode::XdpGeneric), attachment(2, Mode::Tc)];
        let mixed = [attachment(1, Mode::XdpGeneric), attachment(2, Mode::Xdp)];
        for (transmitters, attached, expected) in [
            (&known, &native, [true, false, false]),
            (&known, &generic, [true, true, false]),
            (&known, &mixed, [true, false, false]),
            (&Transmitters::Unknown, &native, [true, false, false]),
            (&Transmitters::Unknown, &generic, [true, true, false]),
        ] {
            let takes = [&able, &unable, &raw].map(|link| transmitters.takes(link, attached));
            assert_eq!(takes, expected, "{attached:?}");
        }
    }
}
