//! The interfaces: state, mode, MTU, offloads, what lies above and below.

use portfwd_common::abi::Role;

use super::{
    Check, Facts, Finding, Side,
    instance::{run_command, run_command_with},
};
use crate::{
    bpf::vlan_tags::OFFLOADS,
    netlink::device::{Device, State},
};

pub(super) const CHECKS: &[Check] = &[
    gone,
    state,
    ports_of_bridges,
    mtu,
    mode,
    headroom,
    merged_packets,
    hidden_tags,
    vlans,
    foreign_programs,
];

/// Largest MTU at which a frame of one page leaves the 256 bytes of headroom that XDP wants before it and the buffer's own
/// end behind it (4,096 - 256 - 320 - 14).
const XDP_MTU: u32 = 3_506;
/// `NETDEV_XDP_ACT_BASIC` of the kernel.
const XDP_BASIC: u64 = 1;
/// `NETDEV_XDP_ACT_RX_SG` of the kernel: frames in several buffers.
const XDP_SCATTER: u64 = 1 << 5;

fn gone(facts: &Facts) -> Vec<Finding> {
    let missing = facts
        .sides
        .iter()
        .filter(|side| facts.device(&side.name).is_none());
    missing
        .map(|side| {
            Finding::error(
                "interface-gone",
                &side.name,
                "portfwd is to forward by it, and it does not exist",
            )
            .fix(format!("{}ip -brief link", facts.prefix))
        })
        .collect()
}

/// A finding for every attached interface that exists and of which `judge` has one.
fn each(facts: &Facts, judge: impl Fn(&Side, &Device) -> Option<Finding>) -> Vec<Finding> {
    facts
        .sides
        .iter()
        .filter_map(|side| judge(side, facts.device(&side.name)?))
        .collect()
}

fn state(facts: &Facts) -> Vec<Finding> {
    each(facts, |side, device| match device.state {
        State::Up => None,
        State::Down => Some(
            Finding::error("interface-down", &side.name, "it is down")
                .fix(format!("{}ip link set {} up", facts.prefix, side.name)),
        ),
        State::NoCarrier => Some(
            Finding::error(
                "interface-no-carrier",
                &side.name,
                "it is up, but nothing is connected to it (no carrier)",
            )
            .fix(format!("{}ethtool {}", facts.prefix, side.name)),
        ),
    })
}

fn ports_of_bridges(facts: &Facts) -> Vec<Finding> {
    each(facts, |side, device| {
        let controller = facts.device_at(device.controller?)?;
        let kind = controller.link.kind.as_deref().unwrap_or("device");
        let name = &controller.link.name;
        let mut corrected = facts.clone();
        corrected
            .sides
            .iter_mut()
            .filter(|other| other.name == side.name)
            .for_each(|other| other.name.clone_from(name));
        Some(
            Finding::error(
                "port-of-a-bridge",
                &side.name,
                format!("it is a port of the {kind} {name}, which has the addresses: attach to {name} instead"),
            )
            .fix(run_command(&corrected)),
        )
    })
}

fn mtu(facts: &Facts) -> Vec<Finding> {
    let smallest = |role| {
        facts
            .sides_of(role)
            .filter_map(|side| Some((facts.device(&side.name)?.link.mtu, side)))
            .min_by_key(|(mtu, _)| *mtu)
    };
    let (Some((wan, wan_side)), Some((lan, side))) = (smallest(Role::Wan), smallest(Role::Lan))
    else {
        return Vec::new();
    };
    if lan >= wan {
        return Vec::new();
    }
    let finding = Finding::warning(
        "lan-mtu-smaller",
        &side.name,
        format!(
            "its MTU is {lan}, that of {} is {wan}: large packets of clients take the slow way through the stack",
            wan_side.name
        ),
    );
    vec![finding.fix(format!(
        "{}ip link set {} mtu {wan}",
        facts.prefix, side.name
    ))]
}

fn mode(facts: &Facts) -> Vec<Finding> {
    each(facts, |side, device| {
        let mode = side.mode.as_deref()?;
        let to = |word| run_command_with(facts, |other| (other.name == side.name).then_some(word));
        match (&device.link.kind, mode) {
            (Some(kind), "xdp" | "xdp-generic") => Some(
                Finding::warning(
                    "xdp-on-virtual-device",
                    &side.name,
                    format!("a {kind} carries unfinished checksums, super-packets and VLAN tags beside the frame, which XDP cannot handle"),
                )
                .fix(to("tc")),
            ),
            (None, "xdp-generic") if device.xdp_features.is_some_and(|bits| bits & XDP_BASIC != 0) => {
                Some(
                    Finding::warning(
                        "xdp-generic",
                        &side.name,
                        "XDP runs in the stack, though the driver could run it itself, which is faster",
                    )
                    .fix(to("xdp")),
                )
            }
            (_, _) => None,
        }
    })
}

/// Frames that need several buffers, where the driver gives XDP one, or the programs know of one because generic XDP is wanted, too.
fn headroom(facts: &Facts) -> Vec<Finding> {
    let is_generic = |side: &Side| side.mode.as_deref() == Some("xdp-generic");
    let any_generic = facts.sides.iter().any(is_generic);
    each(facts, |side, device| {
        let lacks_buffers = device
            .xdp_features
            .is_some_and(|bits| bits & XDP_SCATTER == 0);
        let is_too_large = side.mode.as_deref() == Some("xdp")
            && device.link.mtu > XDP_MTU
            && (any_generic || lacks_buffers);
        is_too_large.then(|| {
            Finding::warning(
                "xdp-headroom",
                &side.name,
                format!(
                    "a frame of MTU {} leaves no headroom for XDP in one page ({XDP_MTU} would): larger ones are not seen",
                    device.link.mtu
                ),
            )
            .fix(format!(
                "{}ip link set {} mtu {XDP_MTU}",
                facts.prefix, side.name
            ))
        })
    })
}

/// An offload that makes one packet of several before portfwd sees them, and that nothing takes apart again.
///
/// The other one, `rx-gro-hw`, is none: what it merges TC can take apart, and for XDP drivers turn it off themselves, though a
/// virtio card goes on showing it as on and refuses to have it turned off.
fn merged_packets(facts: &Facts) -> Vec<Finding> {
    each(facts, |side, device| {
        let is_on = |name: &str| device.offloads.iter().any(|offload| offload == name);
        is_on("rx-lro").then(|| {
            Finding::error(
                "receive-offload",
                &side.name,
                "large receive offload merges packets before portfwd sees them, and they cannot be forwarded as they came",
            )
            .fix(format!("{}ethtool -K {} lro off", facts.prefix, side.name))
        })
    })
}

/// A card that takes tags off before XDP. The daemon has cards leave them in the frames, but somebody may have turned that on since.
fn hidden_tags(facts: &Facts) -> Vec<Finding> {
    each(facts, |side, device| {
        let is_xdp = matches!(side.mode.as_deref(), Some("xdp" | "xdp-generic"));
        let hides = |offload: &String| OFFLOADS.contains(&offload.as_str());
        let offload = device.offloads.iter().find(|offload| hides(offload))?;
        let name = &side.name;
        is_xdp.then(|| {
            Finding::error(
                "vlan-tags-hidden",
                name,
                format!("it takes VLAN tags off before XDP sees them ({offload}): packets of every VLAN look untagged"),
            )
            .fix(format!("{}ethtool -K {name} {offload} off", facts.prefix))
        })
    })
}

fn vlans(facts: &Facts) -> Vec<Finding> {
    each(facts, |side, device| {
        let above = facts.devices.iter().find(|other| {
            other.link.kind.as_deref() == Some("vlan") && other.lower == Some(device.link.ifindex)
        })?;
        if facts
            .sides
            .iter()
            .any(|other| other.name == above.link.name)
        {
            return None;
        }
        let (name, vlan) = (&side.name, &above.link.name);
        Some(
            Finding::warning(
                "vlan-not-attached",
                vlan,
                format!("tagged packets of {name} belong to it, and portfwd is not attached to it: they are not forwarded"),
            )
            .fix(format!(
                "{} --{} {vlan}",
                run_command(facts),
                match side.role {
                    Role::Wan | Role::Both => "wan",
                    Role::Lan => "lan",
                }
            )),
        )
    })
}

/// Programs of others that see the packets first.
fn foreign_programs(facts: &Facts) -> Vec<Finding> {
    let mut findings = each(facts, |side, device| {
        let xdp = device.link.xdp?;
        (side.mode.as_deref() == Some("tc")).then(|| {
            Finding::warning(
                "foreign-xdp",
                &side.name,
                format!(
                    "an XDP program of another owner (id {}) sees its packets first",
                    xdp.program
                ),
            )
            .fix(format!(
                "{}bpftool net show dev {}",
                facts.prefix, side.name
            ))
        })
    });
    findings.extend(each(facts, |side, _| {
        let programs = &side.programs_before;
        (!programs.is_empty()).then(|| {
            Finding::warning(
                "foreign-tc",
                &side.name,
                format!(
                    "TC programs of another owner see its packets first: {}",
                    programs.join(", ")
                ),
            )
            .fix(format!(
                "{}bpftool net show dev {}",
                facts.prefix, side.name
            ))
        })
    }));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{device, expect, fixes, healthy},
        netlink::link::{AttachedXdp, XdpMode},
    };

    #[test]
    fn every_fault_of_an_interface_is_named() {
        expect("interface-gone", |facts| {
            facts.sides[0].name = "nosuch0".into();
        });
        expect("interface-down", |facts| {
            facts.devices[0].state = State::Down;
        });
        expect("interface-no-carrier", |facts| {
            facts.devices[1].state = State::NoCarrier;
        });
        expect("port-of-a-bridge", |facts| {
            facts.devices[1].controller = Some(9);
            facts.devices.push(device(9, "br0", Some("bridge")));
        });
        expect("lan-mtu-smaller", |facts| {
            facts.devices[1].link.mtu = 1400;
            facts.instance.known_interfaces[1].mtu = 1400;
        });
        expect("xdp-headroom", |facts| {
            facts.sides[0].mode = Some("xdp".into());
            facts.devices[0].link.mtu = 9000;
            facts.devices[1].link.mtu = 9000;
            facts.instance.known_interfaces[0].mtu = 9000;
            facts.instance.known_interfaces[1].mtu = 9000;
            facts.instance.links = crate::diagnose::sample::links("xdp", "tc");
        });
        // A driver that gives XDP frames in several buffers.
        let mut jumbo = healthy();
        jumbo.sides[0].mode = Some("xdp".into());
        for (device, known) in [(0, 0), (1, 1)] {
            jumbo.devices[device].link.mtu = 9000;
            jumbo.instance.known_interfaces[known].mtu = 9000;
        }
        jumbo.instance.links = crate::diagnose::sample::links("xdp", "tc");
        jumbo.devices[0].xdp_features = Some(XDP_BASIC | XDP_SCATTER);
        assert_eq!(headroom(&jumbo), []);
        expect("receive-offload", |facts| {
            facts.devices[0].offloads.push("rx-lro".into());
        });
        expect("foreign-tc", |facts| {
            facts.sides[0]
                .programs_before
                .push("cil_from_netdev".into());
        });
        expect("foreign-xdp", |facts| {
            facts.devices[0].link.xdp = Some(AttachedXdp {
                mode: XdpMode::Native,
                program: 7,
            });
        });
    }

    /// A virtio card with native XDP shows it as on, though it is off, and would refuse to have it turned off.
    #[test]
    fn a_receive_offload_that_drivers_turn_off_for_xdp_is_no_fault() {
        let fixes = fixes(|facts| {
            facts.sides[0].mode = Some("xdp".into());
            facts.instance.links = crate::diagnose::sample::links("xdp", "tc");
            facts.devices[0].offloads.push("rx-gro-hw".into());
        });
        assert_eq!(fixes, [""; 0]);
    }

    #[test]
    fn modes_that_do_not_fit_the_device_are_named() {
        let generic = |facts: &mut Facts| {
            facts.sides[0].mode = Some("xdp-generic".into());
            facts.instance.links = crate::diagnose::sample::links("xdp-generic", "tc");
        };
        expect("xdp-on-virtual-device", |facts| {
            generic(facts);
            facts.devices[0].link.kind = Some("veth".into());
        });
        expect("xdp-generic", |facts| {
            generic(facts);
            facts.devices[0].xdp_features = Some(XDP_BASIC);
        });
    }

    #[test]
    fn tagged_packets_are_pointed_at_their_own_interface() {
        let vlan = |facts: &mut Facts| {
            let mut vlan = device(9, "wan0.7", Some("vlan"));
            vlan.lower = Some(facts.devices[0].link.ifindex);
            facts.devices.push(vlan);
        };
        expect("vlan-not-attached", vlan);
        expect("vlan-tags-hidden", |facts| {
            facts.sides[0].mode = Some("xdp".into());
            facts.instance.links = crate::diagnose::sample::links("xdp", "tc");
            facts.devices[0].offloads.push("rx-vlan-hw-parse".into());
        });
        assert_eq!(
            fixes(vlan),
            ["portfwd run --wan wan0 --lan lan0 --wan wan0.7"]
        );
    }
}
