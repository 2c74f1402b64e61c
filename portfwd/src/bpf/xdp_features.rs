//! Which interfaces take frames that XDP redirects to them, and which give XDP frames that it may redirect.
//!
//! Native XDP needs a driver that can (`ndo_xdp_xmit`), and a veth can only while its other end has an XDP program or GRO on:
//! this changes while the daemon runs. Generic XDP sends through the stack and needs nothing. What is redirected to a driver that
//! cannot, or by a driver that does not know how, is lost without a word.
//!
//! Kernels before 6.3 do not tell. What is known of the drivers that those kernels have stands in for them, and what is not known is
//! TC's (`docs/design/0026-drivers-that-do-not-tell.md`).

use std::fmt;

use anyhow::{Result, anyhow};
use aya::util::online_cpus;
use portfwd_common::abi::{LinkLayer, Transmission};

use super::{attach::Attachment, mode::Mode};
use crate::netlink::{
    driver::Drivers,
    ethtool::Ethtool,
    generic::{Family, XdpFeatures},
    link::Link,
};

/// `NETDEV_XDP_ACT_BASIC` of the kernel: native XDP.
const BASIC: u64 = 1;
/// `NETDEV_XDP_ACT_REDIRECT` of the kernel.
const REDIRECT: u64 = 1 << 1;
/// `NETDEV_XDP_ACT_NDO_XMIT` of the kernel.
const TRANSMIT: u64 = 1 << 2;
/// `NETDEV_XDP_ACT_NDO_XMIT_SG` of the kernel: frames in several buffers, too.
const SCATTER: u64 = 1 << 6;

/// Drivers of Linux 6.1 whose native XDP redirects, and that transmit what is redirected to them while they have a program
/// themselves.
const TRANSMITTING: [&str; 22] = [
    "atlantic",
    "bnxt_en",
    "ena",
    "fsl_dpaa2_eth",
    "fsl_enetc",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "mana",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "qede",
    "sfc",
    "sfc_siena",
    "st_gmac",
    "st_xgmac",
    "vif",
    "virtio_net",
];
/// Those that redirect and transmit nothing.
const REDIRECTING: [&str; 1] = ["mlx4_en"];
/// Those that take a redirect for an action that does not exist, and drop the frame.
const NOT_REDIRECTING: [&str; 3] = ["ixgbevf", "nfp", "nicvf"];
/// Drivers, of whatever kernel, that transmit on the queue with the number of the CPU, and lose the frame if there is none.
const QUEUE_PER_CPU: [&str; 2] = ["i40e", "mlx5_core"];

/// What is known about all interfaces, at one moment.
#[derive(Default)]
pub struct Transmitters {
    /// What the kernel says; `None` before 6.3.
    told: Option<Vec<XdpFeatures>>,
    cards: Vec<Card>,
    /// How many queues the CPU with the highest number wants.
    cpus: u32,
}

/// A network card.
struct Card {
    ifindex: u32,
    driver: String,
    /// Queues that receive and send, if its driver wants one for each CPU and tells.
    queues: Option<u32>,
}

/// Why native XDP would not do on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The driver has none.
    Absent,
    /// The driver drops what XDP redirects.
    DropsRedirected,
    /// Neither the kernel nor this program knows what a driver of this name does.
    Unknown(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("its driver has no native XDP"),
            Self::DropsRedirected => f.write_str("its driver drops what native XDP redirects"),
            Self::Unknown(driver) => write!(
                f,
                "whether its driver ({driver}) redirects is not known, and this kernel does not tell (6.3 does)"
            ),
        }
    }
}

impl Transmitters {
    /// Asks the kernel about the thread's network namespace.
    pub fn list(links: &[Link]) -> Result<Self> {
        let told = match Family::find()? {
            Some(family) => Some(family.xdp_features()?),
            None => None,
        };
        let drivers = Drivers::open()?;
        let mut ethtool = Ethtool::open()?;
        let card = |link: &Link| {
            let driver = drivers.name(&link.name).unwrap_or_default();
            let queues = ethtool
                .as_mut()
                .filter(|_| QUEUE_PER_CPU.contains(&driver.as_str()))
                .and_then(|ethtool| ethtool.queues(link.ifindex));
            Card {
                ifindex: link.ifindex,
                driver,
                queues,
            }
        };
        let is_card = |link: &&Link| link.kind.is_none() && link.layer == LinkLayer::Ethernet;
        let cards = links.iter().filter(is_card).map(card).collect();
        let online = online_cpus()
            .map_err(|(path, error)| anyhow!(error).context(format!("cannot read {path}")))?;
        Ok(Self {
            told,
            cards,
            cpus: online.iter().max().map_or(0, |highest| highest + 1),
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
            // Without a program they have no queues for it.
            let native = |of: &Attachment| of.ifindex == link.ifindex && of.mode == Mode::Xdp;
            let transmits = TRANSMITTING.contains(&self.driver(link));
            if transmits && attached.iter().any(native) {
                Transmission::Whole
            } else {
                Transmission::Nothing
            }
        })
    }

    /// What native XDP may redirect to an interface, if the kernel tells.
    pub fn native(&self, link: &Link) -> Option<Transmission> {
        if self.shortage(link).is_some() {
            return Some(Transmission::Nothing);
        }
        let bits = self.bits(link)?;
        Some(match (bits & TRANSMIT != 0, bits & SCATTER != 0) {
            (false, _) => Transmission::Nothing,
            (true, false) => Transmission::Whole,
            (true, true) => Transmission::Scattered,
        })
    }

    /// Why native XDP would not do on an interface.
    pub fn obstacle(&self, link: &Link) -> Option<Obstacle> {
        if let Some(bits) = self.bits(link) {
            return match (bits & BASIC != 0, bits & REDIRECT != 0) {
                (false, _) => Some(Obstacle::Absent),
                (true, false) => Some(Obstacle::DropsRedirected),
                (true, true) => None,
            };
        }
        let driver = self.driver(link);
        if NOT_REDIRECTING.contains(&driver) {
            Some(Obstacle::DropsRedirected)
        } else if TRANSMITTING.contains(&driver) || REDIRECTING.contains(&driver) {
            None
        } else {
            Some(Obstacle::Unknown(driver.to_owned()))
        }
    }

    /// Why XDP sends nothing to an interface whose driver could take it.
    pub fn shortage(&self, link: &Link) -> Option<String> {
        let card = self.card(link)?;
        let queues = card.queues.filter(|queues| *queues < self.cpus)?;
        let cpus = self.cpus;
        Some(format!(
            "TC sends what leaves by it: {} wants a queue for each of {cpus} CPUs, and it has {queues}",
            card.driver
        ))
    }

    fn bits(&self, link: &Link) -> Option<u64> {
        let features = self.told.as_ref()?;
        let of = features.iter().find(|of| of.ifindex == link.ifindex);
        Some(of.map_or(0, |of| of.bits))
    }

    fn card(&self, link: &Link) -> Option<&Card> {
        self.cards.iter().find(|card| card.ifindex == link.ifindex)
    }

    fn driver(&self, link: &Link) -> &str {
        self.card(link).map_or("", |card| &card.driver)
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

    fn link(ifindex: u32, layer: LinkLayer) -> Link {
        Link {
            ifindex,
            name: format!("if{ifindex}"),
            layer,
            kind: None,
            mac: [0; 6],
            mtu: 1500,
            xdp: None,
        }
    }

    fn card(ifindex: u32, driver: &str, queues: Option<u32>) -> Card {
        Card {
            ifindex,
            driver: driver.to_owned(),
            queues,
        }
    }

    fn told(bits: &[(u32, u64)]) -> Transmitters {
        let features = |&(ifindex, bits): &(u32, u64)| XdpFeatures { ifindex, bits };
        Transmitters {
            told: Some(bits.iter().map(features).collect()),
            ..Transmitters::default()
        }
    }

    #[test]
    fn native_xdp_needs_a_driver_that_transmits_and_generic_does_not() {
        use Transmission::{Nothing, Scattered, Whole};
        let [able, unable, scatters] = [1, 2, 4].map(|ifindex| link(ifindex, LinkLayer::Ethernet));
        let raw = link(3, LinkLayer::Raw);
        let known = told(&[(1, 7), (2, 3 | SCATTER), (4, 7 | SCATTER), (3, 7)]);
        let unknown = Transmitters {
            cards: vec![card(1, "virtio_net", None)],
            ..Transmitters::default()
        };
        let native = [attachment(1, Mode::Xdp), attachment(2, Mode::Tc)];
        let generic = [attachment(1, Mode::XdpGeneric), attachment(2, Mode::Tc)];
        let mixed = [attachment(1, Mode::XdpGeneric), attachment(2, Mode::Xdp)];
        for (transmitters, attached, expected) in [
            (&known, &native, [Whole, Nothing, Nothing, Scattered]),
            (&known, &generic, [Scattered, Scattered, Nothing, Scattered]),
            (&known, &mixed, [Whole, Nothing, Nothing, Scattered]),
            (&unknown, &native, [Whole, Nothing, Nothing, Nothing]),
            // A card without a program, and a veth, of which nobody knows what its other end takes.
            (&unknown, &mixed, [Nothing, Nothing, Nothing, Nothing]),
            (
                &unknown,
                &generic,
                [Scattered, Scattered, Nothing, Scattered],
            ),
        ] {
            let takes =
                [&able, &unable, &raw, &scatters].map(|link| transmitters.takes(link, attached));
            assert_eq!(takes, expected, "{attached:?}");
        }
    }

    #[test]
    fn drivers_of_kernels_that_do_not_tell_are_known_by_name() {
        let interface = link(1, LinkLayer::Ethernet);
        let attached = [attachment(1, Mode::Xdp)];
        for (driver, obstacle, takes) in [
            ("virtio_net", None, Transmission::Whole),
            ("mlx4_en", None, Transmission::Nothing),
            (
                "ixgbevf",
                Some(Obstacle::DropsRedirected),
                Transmission::Nothing,
            ),
            (
                "e1000e",
                Some(Obstacle::Unknown("e1000e".into())),
                Transmission::Nothing,
            ),
        ] {
            let transmitters = Transmitters {
                cards: vec![card(1, driver, None)],
                ..Transmitters::default()
            };
            assert_eq!(transmitters.obstacle(&interface), obstacle, "{driver}");
            assert_eq!(transmitters.takes(&interface, &attached), takes, "{driver}");
        }
    }

    #[test]
    fn what_the_kernel_tells_goes_before_what_is_known() {
        let interface = link(1, LinkLayer::Ethernet);
        for (bits, obstacle) in [
            (BASIC | REDIRECT, None),
            (BASIC, Some(Obstacle::DropsRedirected)),
            (0, Some(Obstacle::Absent)),
        ] {
            let mut transmitters = told(&[(1, bits)]);
            transmitters.cards = vec![card(1, "ixgbevf", None)];
            assert_eq!(transmitters.obstacle(&interface), obstacle, "{bits}");
        }
    }

    #[test]
    fn a_driver_that_wants_a_queue_for_each_cpu_takes_nothing_with_fewer() {
        let interface = link(1, LinkLayer::Ethernet);
        let attached = [attachment(1, Mode::Xdp)];
        for (queues, cpus, takes) in [
            (Some(8), 8, Transmission::Whole),
            (Some(8), 9, Transmission::Nothing),
            (None, 9, Transmission::Whole),
        ] {
            for told in [
                None,
                Some(vec![XdpFeatures {
                    ifindex: 1,
                    bits: 7,
                }]),
            ] {
                let transmitters = Transmitters {
                    told,
                    cards: vec![card(1, "mlx5_core", queues)],
                    cpus,
                };
                assert_eq!(
                    transmitters.takes(&interface, &attached),
                    takes,
                    "{queues:?} {cpus}"
                );
                assert_eq!(
                    transmitters.shortage(&interface).is_some(),
                    takes == Transmission::Nothing
                );
            }
        }
    }
}
