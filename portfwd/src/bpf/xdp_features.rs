//! Which interfaces take frames that XDP redirects to them.
//!
//! Native XDP needs a driver that can (`ndo_xdp_xmit`), and a veth can only while its other end has an XDP program or GRO on:
//! this changes while the daemon runs. Generic XDP sends through the stack and needs nothing.

use anyhow::Result;
use portfwd_common::abi::{LinkLayer, Transmission};

use super::{attach::Attachment, mode::Mode};
use crate::netlink::{
    generic::{Family, XdpFeatures},
    link::Link,
};

/// `NETDEV_XDP_ACT_NDO_XMIT` of the kernel.
const TRANSMIT: u64 = 1 << 2;
/// `NETDEV_XDP_ACT_NDO_XMIT_SG` of the kernel: frames in several buffers, too.
const SCATTER: u64 = 1 << 6;

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

    /// What XDP on the `attached` interfaces may redirect to one of them.
    pub fn takes(&self, link: &Link, attached: &[Attachment]) -> Transmission {
        let mode = |mode| attached.iter().any(|attachment| attachment.mode == mode);
        if link.layer != LinkLayer::Ethernet {
            return Transmission::Nothing;
        }
        if !mode(Mode::Xdp) && mode(Mode::XdpGeneric) {
            return Transmission::Scattered;
        }
        self.native(link).unwrap_or_else(|| {
            // Drivers with native XDP transmit nearly all, once they have a program themselves.
            let native = |of: &Attachment| of.ifindex == link.ifindex && of.mode == Mode::Xdp;
            if attached.iter().any(native) {
                Transmission::Whole
            } else {
                Transmission::Nothing
            }
        })
    }

    /// What native XDP may redirect to an interface, if the kernel tells.
    pub fn native(&self, link: &Link) -> Option<Transmission> {
        let Self::Known(features) = self else {
            return None;
        };
        let of = features.iter().find(|of| of.ifindex == link.ifindex);
        let bits = of.map_or(0, |of| of.bits);
        Some(match (bits & TRANSMIT != 0, bits & SCATTER != 0) {
            (false, _) => Transmission::Nothing,
            (true, false) => Transmission::Whole,
            (true, true) => Transmission::Scattered,
        })
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
        use Transmission::{Nothing, Scattered, Whole};
        let link = |ifindex, layer| Link {
            ifindex,
            name: format!("if{ifindex}"),
            layer,
            kind: None,
            mac: [0; 6],
            mtu: 1500,
            xdp: None,
        };
        let [able, unable, scatters] = [1, 2, 4].map(|ifindex| link(ifindex, LinkLayer::Ethernet));
        let raw = link(3, LinkLayer::Raw);
        let known = Transmitters::Known(vec![
            XdpFeatures {
                ifindex: 1,
                bits: 7,
            },
            XdpFeatures {
                ifindex: 2,
                bits: 3 | SCATTER,
            },
            XdpFeatures {
                ifindex: 4,
                bits: 7 | SCATTER,
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
            (&known, &native, [Whole, Nothing, Nothing, Scattered]),
            (&known, &generic, [Scattered, Scattered, Nothing, Scattered]),
            (&known, &mixed, [Whole, Nothing, Nothing, Scattered]),
            (
                &Transmitters::Unknown,
                &native,
                [Whole, Nothing, Nothing, Nothing],
            ),
            (
                &Transmitters::Unknown,
                &generic,
                [Scattered, Scattered, Nothing, Scattered],
            ),
        ] {
            let takes =
                [&able, &unable, &raw, &scatters].map(|link| transmitters.takes(link, attached));
            assert_eq!(takes, expected, "{attached:?}");
        }
    }
}
