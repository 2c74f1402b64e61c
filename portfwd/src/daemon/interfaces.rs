//! The interfaces the daemon was told to attach to, and those it is attached to: they go, come back and change.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Result, anyhow};
use log::{error, info};
use portfwd_common::{
    abi::{self, LinkLayer, Role},
    net::{Ipv4, Ipv6},
};

use super::options::InterfaceOption;
use crate::{
    bpf::{
        Attachment, Pins, Tables,
        attach::Attacher,
        load::Programs,
        mode::{TcMethod, collision},
        xdp_features::Transmitters,
    },
    control::protocol::InterfaceReport,
    failure::{Failure, Kind},
    netlink::{
        address::{Address, addresses},
        link::{Link, links},
    },
};

/// The interfaces of a daemon.
pub(super) struct Interfaces<'a> {
    wanted: &'a [InterfaceOption],
    links: Vec<Link>,
    attached: Vec<Attachment>,
    kernel: Option<Kernel>,
}

/// What attaching takes, once loaded.
struct Kernel {
    pins: Pins,
    programs: Programs,
    method: TcMethod,
}

impl<'a> Interfaces<'a> {
    /// Finds the interfaces; each must exist, and no two may share a slot.
    pub(super) fn find(wanted: &'a [InterfaceOption]) -> Result<Self> {
        let links = links()?;
        for option in wanted {
            if link_of(&links, &option.name).is_none() {
                let failure = Failure::new(
                    Kind::NotFound,
                    format!("interface {} does not exist", option.name),
                );
                return Err(failure.hint("`ip -brief link` lists those that do").into());
            }
        }
        let chosen = wanted
            .iter()
            .filter_map(|option| link_of(&links, &option.name));
        if let Some((first, second)) = collision(chosen) {
            return Err(collision_failure(first, second).into());
        }
        Ok(Self {
            wanted,
            links,
            attached: Vec::new(),
            kernel: None,
        })
    }

    /// Attaches to all interfaces or to none, and lets go of those that an earlier daemon had and this one has not.
    pub(super) fn attach_all(
        &mut self,
        pins: Pins,
        programs: Programs,
        tables: &mut Tables,
    ) -> Result<()> {
        let kernel = self.kernel.insert(Kernel {
            pins,
            programs,
            method: TcMethod::of_kernel(),
        });
        let before: Vec<u32> = tables
            .interfaces()?
            .iter()
            .map(|interface| interface.ifindex)
            .collect();
        let mut attacher = Attacher::new(&kernel.pins, &kernel.programs, kernel.method);
        let result = attach(&mut attacher, self.wanted, &self.links, tables);
        match result {
            Ok(attached) => {
                attacher.commit(&attached)?;
                self.attached = attached;
            }
            Err(error) => {
                drop(attacher);
                let chosen = self
                    .wanted
                    .iter()
                    .filter_map(|option| link_of(&self.links, &option.name));
                for link in chosen.filter(|link| !before.contains(&link.ifindex)) {
                    tables.remove_interface(link.ifindex)?;
                }
                return Err(error);
            }
        }
        for ifindex in before.iter().filter(|ifindex| {
            !self
                .attached
                .iter()
                .any(|attachment| attachment.ifindex == **ifindex)
        }) {
            tables.remove_interface(*ifindex)?;
        }
        self.write_interfaces(tables)?;
        Ok(())
    }

    /// Looks at the interfaces again: attaches to those that came back, forgets those that went, follows MTU and MAC address.
    /// True if anything changed.
    pub(super) fn refresh(&mut self, tables: &mut Tables) -> Result<bool> {
        self.links = links()?;
        let is_there = |attachment: &Attachment| {
            self.links
                .iter()
                .any(|link| link.ifindex == attachment.ifindex && link.name == attachment.name)
        };
        let (there, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.attached)
            .into_iter()
            .partition(is_there);
        self.attached = there;
        for attachment in &gone {
            info!("{} is gone", attachment.name);
            tables.remove_interface(attachment.ifindex)?;
        }
        let mut changed = !gone.is_empty();
        for option in self.wanted {
            if !self
                .attached
                .iter()
                .any(|attachment| attachment.name == option.name)
            {
                changed |= self.attach_again(option, tables);
            }
        }
        if changed && let Some(kernel) = &self.kernel {
            Attacher::new(&kernel.pins, &kernel.programs, kernel.method).commit(&self.attached)?;
        }
        changed |= self.write_interfaces(tables)?;
        Ok(changed)
    }

    /// Attaches to an interface that has come back. The others go on if that fails.
    fn attach_again(&mut self, option: &InterfaceOption, tables: &mut Tables) -> bool {
        let (Some(kernel), Some(link)) = (&self.kernel, link_of(&self.links, &option.name)) else {
            return false;
        };
        let others = self
            .attached
            .iter()
            .filter_map(|attachment| link_of(&self.links, &attachment.name));
        if let Some((first, second)) = collision(others.chain([link])) {
            error!("{}", collision_failure(first, second));
            return false;
        }
        let mut attacher = Attacher::new(&kernel.pins, &kernel.programs, kernel.method);
        match attach(
            &mut attacher,
            std::slice::from_ref(option),
            &self.links,
            tables,
        ) {
            Ok(attached) => {
                self.attached.extend(attached);
                self.attached.sort_by_key(|attachment| {
                    self.wanted
                        .iter()
                        .position(|option| option.name == attachment.name)
                });
                match attacher.commit(&self.attached) {
                    Ok(()) => info!("{} is back", option.name),
                    Err(error) => error!("{}: {error:#}", option.name),
                }
                true
            }
            Err(error) => {
                error!(
                    "cannot attach to {} again: {}",
                    option.name,
                    Failure::from(error)
                );
                false
            }
        }
    }

    /// Brings INTERFACES and EGRESS up to date. True if that changed anything.
    fn write_interfaces(&self, tables: &mut Tables) -> Result<bool> {
        let (addresses, transmitters) = (addresses()?, Transmitters::list()?);
        let mut changed = false;
        for attachment in &self.attached {
            if let Some(link) = link_of(&self.links, &attachment.name) {
                let takes_xdp = transmitters.takes(link, &self.attached);
                changed |= tables.write_interface(&interface(
                    link,
                    attachment.role,
                    takes_xdp,
                    &addresses,
                ))?;
            }
        }
        Ok(changed)
    }

    /// Brings ADDRESSES up to date; the own addresses of the WAN interfaces if they changed, or at the first time.
    pub(super) fn write_addresses(&self, tables: &mut Tables) -> Result<Option<Vec<IpAddr>>> {
        let is_wan = |ifindex: u32| {
            self.wanted
                .iter()
                .filter(|option| option.role == Role::Wan)
                .any(|option| {
                    link_of(&self.links, &option.name).is_some_and(|link| link.ifindex == ifindex)
                })
        };
        // An address on two interfaces is one address.
        let own: BTreeMap<IpAddr, u32> = addresses()?
            .iter()
            .filter(|address| is_wan(address.ifindex))
            .map(|address| (address.ip, address.ifindex))
            .collect();
        let own: Vec<_> = own.into_iter().collect();
        let changed = tables.replace_addresses(&own)?;
        let is_first = self.kernel.is_none();
        Ok((changed || is_first).then(|| own.into_iter().map(|(ip, _)| ip).collect()))
    }

    /// For `status`.
    pub(super) fn reports(&self) -> Vec<InterfaceReport> {
        let report = |attachment: &Attachment| InterfaceReport {
            name: attachment.name.clone(),
            role: role_word(attachment.role).to_owned(),
            mode: attachment.mode.word().to_owned(),
            reason: attachment.reason.clone(),
        };
        self.attached.iter().map(report).collect()
    }

    /// One line for the log.
    pub(super) fn summary(&self) -> String {
        let words: Vec<_> = self
            .reports()
            .into_iter()
            .map(|of| format!("{} {} {} ({})", of.role, of.name, of.mode, of.reason))
            .collect();
        words.join("; ")
    }
}

/// Attaches to interfaces. The datapath ignores packets of interfaces it does not know, so each is made known first.
fn attach(
    attacher: &mut Attacher<'_>,
    wanted: &[InterfaceOption],
    links: &[Link],
    tables: &mut Tables,
) -> Result<Vec<Attachment>> {
    let (addresses, transmitters) = (addresses()?, Transmitters::list()?);
    let known = tables.interfaces()?;
    let find =
        |name: &str| link_of(links, name).ok_or_else(|| anyhow!("interface {name} has gone"));
    for InterfaceOption {
        name,
        role: _,
        mode,
    } in wanted
    {
        attacher.check(find(name)?, *mode)?;
    }
    let mut attached = Vec::new();
    for InterfaceOption { name, role, mode } in wanted {
        let link = find(name)?;
        // What it takes from XDP is known when all are attached. Until then what an earlier daemon found holds, as long as it
        // is right in every mode.
        let takes_xdp = transmitters.is_native(link).unwrap_or(true)
            && known
                .iter()
                .any(|interface| interface.ifindex == link.ifindex && interface.takes_xdp());
        tables.write_interface(&interface(link, *role, takes_xdp, &addresses))?;
        attached.push(attacher.attach(link, *role, *mode)?);
    }
    Ok(attached)
}

fn link_of<'l>(links: &'l [Link], name: &str) -> Option<&'l Link> {
    links.iter().find(|link| link.name == name)
}

fn collision_failure(first: &Link, second: &Link) -> Failure {
    let error = format!(
        "{} (index {}) and {} (index {}) share a slot of the interface table: their indexes differ by a multiple of {}",
        first.name,
        first.ifindex,
        second.name,
        second.ifindex,
        abi::config::INTERFACE_SLOTS,
    );
    Failure::new(Kind::Failed, error).hint(format!(
        "delete and recreate {}, which gives it another index",
        second.name
    ))
}

const fn role_word(role: Role) -> &'static str {
    match role {
        Role::Wan => "wan",
        Role::Lan => "lan",
    }
}

fn interface(link: &Link, role: Role, takes_xdp: bool, addresses: &[Address]) -> abi::Interface {
    let mut flags = 0;
    if role == Role::Wan {
        flags |= abi::Interface::ROLE_WAN;
    }
    if link.layer == LinkLayer::Raw {
        flags |= abi::Interface::RAW;
    }
    if takes_xdp {
        flags |= abi::Interface::XDP_TRANSMIT;
    }
    let mut own: Vec<_> = addresses
        .iter()
        .filter(|address| address.ifindex == link.ifindex)
        .collect();
    own.sort_by_key(|address| address.deprecated);
    let ipv4 = own.iter().find_map(|address| match address.ip {
        IpAddr::V4(ip) => Some(Ipv4::from(ip)),
        IpAddr::V6(_) => None,
    });
    let ipv6 = own.iter().find_map(|address| match address.ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(Ipv6::from(ip)),
    });
    abi::Interface {
        ifindex: link.ifindex,
        mtu: link.mtu,
        mac: bytemuck::cast(link.mac),
        flags,
        ipv4: ipv4.unwrap_or_default(),
        ipv6: ipv6.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::options::AttachMode;

    #[test]
    fn an_interface_is_described_with_its_preferred_addresses() {
        let link = Link {
            ifindex: 7,
            name: "wan0".into(),
            layer: LinkLayer::Ethernet,
            kind: None,
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1492,
            xdp: None,
        };
        let address = |ifindex, ip: &str, deprecated| Address {
            ifindex,
            ip: ip.parse().unwrap(),
            deprecated,
        };
        let addresses = [
            address(6, "192.0.2.9", false),
            address(7, "2001:db8::1", true),
            address(7, "192.0.2.1", false),
            address(7, "192.0.2.2", false),
            address(7, "2001:db8::2", false),
        ];
        let described = interface(&link, Role::Wan, true, &addresses);
        assert_eq!(
            described.address::<Ipv4>(),
            Some(Ipv4::from(
                "192.0.2.1".parse::<std::net::Ipv4Addr>().unwrap()
            ))
        );
        assert_eq!(
            described.address::<Ipv6>(),
            Some(Ipv6::from(
                "2001:db8::2".parse::<std::net::Ipv6Addr>().unwrap()
            ))
        );
        assert_eq!(
            (described.role(), described.link(), described.takes_xdp()),
            (Role::Wan, LinkLayer::Ethernet, true)
        );
        assert_eq!(bytemuck::bytes_of(&described.mac), [2, 0, 0, 0, 0, 9]);
        let lan = interface(&link, Role::Lan, false, &[]);
        assert_eq!(
            (lan.role(), lan.takes_xdp(), lan.address::<Ipv4>()),
            (Role::Lan, false, None)
        );
    }

    #[test]
    fn an_interface_that_does_not_exist_is_refused() {
        let wanted = [InterfaceOption {
            name: "nosuch0".into(),
            role: Role::Wan,
            mode: AttachMode::Auto,
        }];
        let error = Interfaces::find(&wanted).err().map(Failure::from).unwrap();
        assert_eq!(
            (error.kind, error.error.as_str()),
            (Kind::NotFound, "interface nosuch0 does not exist")
        );
    }
}
