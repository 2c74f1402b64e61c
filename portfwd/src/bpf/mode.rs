//! Which programs go where on an interface, and why.
//!
//! | mode                 | XDP           | TC ingress        | TC egress, WAN only |
//! |----------------------|---------------|-------------------|---------------------|
//! | `xdp`, `xdp-generic` | `portfwd_xdp` | `portfwd_tc_slow` | `portfwd_tc_out`    |
//! | `tc`                 | —             | `portfwd_tc`      | `portfwd_tc_out`    |
//! | `tc`, no Ethernet    | —             | `portfwd_tc_raw`  | `portfwd_out_raw`   |

use aya::util::KernelVersion;
use portfwd_common::abi::{LinkLayer, Role, config::interface_slot, names};

use super::syscall::AttachType;
use crate::{
    daemon::options::AttachMode,
    netlink::link::{Link, XdpMode},
};

/// How an interface is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Native XDP, in the driver.
    Xdp,
    /// Generic XDP, in the stack.
    XdpGeneric,
    /// TC.
    Tc,
}

/// A place in the path of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before the stack has made a packet of the frame.
    Xdp,
    /// TC, packets that come in.
    Ingress,
    /// TC, packets that go out.
    Egress,
}

/// What attaches to TC on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMethod {
    /// Links, from kernel 6.6 on.
    Tcx,
    /// Filters through netlink.
    Clsact,
}

impl Mode {
    /// The word in `status` and on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp-generic",
            Self::Tc => "tc",
        }
    }

    /// Flag of a link, `XDP_FLAGS_*` of the kernel.
    pub(super) const fn flags(self) -> u32 {
        match self {
            Self::XdpGeneric => 1 << 1,
            Self::Xdp => 1 << 2,
            Self::Tc => 0,
        }
    }

    /// What the kernel calls it; `None` for TC.
    pub(super) const fn xdp_mode(self) -> Option<XdpMode> {
        match self {
            Self::Xdp => Some(XdpMode::Native),
            Self::XdpGeneric => Some(XdpMode::Generic),
            Self::Tc => None,
        }
    }

    /// The hooks that it attaches to.
    pub fn hooks(self, role: Role, layer: LinkLayer) -> Vec<Hook> {
        let programs = self.programs(role, layer);
        programs.into_iter().map(|(hook, _)| hook).collect()
    }

    /// Programs by hook. TC comes first, so that what XDP leaves is never lost.
    pub(super) fn programs(self, role: Role, layer: LinkLayer) -> Vec<(Hook, &'static str)> {
        let out = match layer {
            LinkLayer::Ethernet => names::PROGRAM_TC_OUT,
            LinkLayer::Raw => names::PROGRAM_TC_OUT_RAW,
        };
        let mut programs = match role {
            Role::Wan | Role::Both => vec![(Hook::Egress, out)],
            Role::Lan => vec![],
        };
        match (self, layer) {
            (Self::Xdp | Self::XdpGeneric, _) => {
                programs.extend([
                    (Hook::Ingress, names::PROGRAM_TC_SLOW),
                    (Hook::Xdp, names::PROGRAM_XDP),
                ]);
            }
            (Self::Tc, LinkLayer::Ethernet) => programs.push((Hook::Ingress, names::PROGRAM_TC)),
            (Self::Tc, LinkLayer::Raw) => programs.push((Hook::Ingress, names::PROGRAM_TC_RAW)),
        }
        programs
    }
}

impl Hook {
    const ALL: [Self; 3] = [Self::Xdp, Self::Ingress, Self::Egress];

    /// The word in the names of pins.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// Inverse of [`Hook::word`].
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.word() == word)
    }

    pub(super) const fn attach_type(self) -> AttachType {
        match self {
            Self::Xdp => AttachType::Xdp,
            Self::Ingress => AttachType::TcxIngress,
            Self::Egress => AttachType::TcxEgress,
        }
    }
}

impl TcMethod {
    /// The best that the running kernel has.
    pub fn of_kernel() -> Self {
        /// First kernel with TCX, as `LINUX_VERSION_CODE` has it.
        const TCX: u32 = 6 << 16 | 6 << 8;
        match KernelVersion::current() {
            Ok(kernel) if kernel.code() >= TCX => Self::Tcx,
            Ok(_) | Err(_) => Self::Clsact,
        }
    }
}

/// The mode to try first, and why.
pub fn chosen(link: &Link, wanted: AttachMode) -> (Mode, String) {
    let forced = |mode| (mode, "forced".to_owned());
    match wanted {
        AttachMode::Auto => natural(link),
        AttachMode::Xdp => forced(Mode::Xdp),
        AttachMode::XdpGeneric => forced(Mode::XdpGeneric),
        AttachMode::Tc => forced(Mode::Tc),
    }
}

/// What `auto` takes for an interface, and why.
fn natural(link: &Link) -> (Mode, String) {
    match (link.layer, &link.kind) {
        (LinkLayer::Raw, _) => (Mode::Tc, "no Ethernet header: only TC can".to_owned()),
        (LinkLayer::Ethernet, Some(kind)) => (
            Mode::Tc,
            format!("virtual device ({kind}): TC handles unfinished checksums and super-packets"),
        ),
        (LinkLayer::Ethernet, None) => (Mode::Xdp, "network card: the driver takes XDP".to_owned()),
    }
}

/// The interfaces of two names that would share a slot of the datapath's tables.
pub fn collision<'a>(links: impl IntoIterator<Item = &'a Link>) -> Option<(&'a Link, &'a Link)> {
    let mut seen: Vec<&Link> = Vec::new();
    for link in links {
        if let Some(other) = seen
            .iter()
            .find(|other| interface_slot(other.ifindex) == interface_slot(link.ifindex))
        {
            return Some((other, link));
        }
        seen.push(link);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, layer: LinkLayer, kind: Option<&str>) -> Link {
        let name = format!("if{ifindex}");
        Link {
            ifindex,
            name,
            layer,
            kind: kind.map(str::to_owned),
            mac: [0; 6],
            mtu: 1500,
            xdp: None,
        }
    }

    #[test]
    fn auto_takes_xdp_only_on_network_cards() {
        for (layer, kind, mode) in [
            (LinkLayer::Ethernet, None, Mode::Xdp),
            (LinkLayer::Ethernet, Some("veth"), Mode::Tc),
            (LinkLayer::Ethernet, Some("bridge"), Mode::Tc),
            (LinkLayer::Raw, Some("tun"), Mode::Tc),
            (LinkLayer::Raw, None, Mode::Tc),
        ] {
            assert_eq!(natural(&link(1, layer, kind)).0, mode, "{layer:?} {kind:?}");
        }
    }

    #[test]
    fn interfaces_that_share_a_slot_are_found() {
        let make = |ifindex| link(ifindex, LinkLayer::Ethernet, None);
        let links = [make(2), make(3), make(2 + 4096)];
        assert_eq!(collision(&links), Some((&links[0], &links[2])));
        assert_eq!(collision(&links[..2]), None);
    }
}
