//! The interfaces the daemon was told to attach to, and those it is attached to: they come, go, come back and change.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context, Result, anyhow};
use log::{debug, error, info, warn};
use portfwd_common::abi::{self, Interface, Role, Transmission, config::OwnAddress};

use super::{description::interface, options::InterfaceOption, outage::own_addresses};
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
    ruleset::Network,
};

/// The interfaces of a daemon.
pub(super) struct Interfaces<'a> {
    wanted: &'a [InterfaceOption],
    links: Vec<Link>,
    attached: Vec<Attachment>,
    /// Why those that are not attached are not, by name.
    waiting: BTreeMap<String, String>,
    kernel: Option<Kernel>,
}

/// What a look at the interfaces came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Refreshed {
    /// Anything is other than before.
    pub changed: bool,
    /// An interface is there and could not be attached: worth another look soon.
    pub incomplete: bool,
    /// The own addresses of the WAN are others.
    pub readdressed: bool,
}

/// In the place of a mode, in `status`.
const WAITING: &str = "waiting";
const ABSENT: &str = "no such interface";

/// What attaching takes, once loaded.
struct Kernel {
    pins: Pins,
    programs: Programs,
    method: TcMethod,
}

impl Kernel {
    fn attacher(&self) -> Attacher<'_> {
        Attacher::new(&self.pins, &self.programs, self.method)
    }
}

impl<'a> Interfaces<'a> {
    /// Finds the interfaces. One that does not exist is waited for; no two may share a slot.
    pub(super) fn find(wanted: &'a [InterfaceOption]) -> Result<Self> {
        let mut interfaces = Self {
            wanted,
            links: links()?,
            attached: Vec::new(),
            waiting: BTreeMap::new(),
            kernel: None,
        };
        for option in wanted {
            if interfaces.link_of(&option.name).is_none() {
                warn!("{} does not exist: waiting for it", option.name);
                interfaces.waits(&option.name, ABSENT.to_owned());
            }
        }
        if let Some((first, second)) = collision(interfaces.chosen()) {
            return Err(collision_failure(first, second).into());
        }
        Ok(interfaces)
    }

    /// The links of the wanted interfaces that exist.
    fn chosen(&self) -> impl Iterator<Item = &Link> {
        self.wanted
            .iter()
            .filter_map(|option| self.link_of(&option.name))
    }

    fn link_of(&self, name: &str) -> Option<&Link> {
        link_of(&self.links, name)
    }

    /// Notes why an interface is not attached. True if that is news.
    fn waits(&mut self, name: &str, reason: String) -> bool {
        let before = self.waiting.insert(name.to_owned(), reason.clone());
        before.is_none_or(|before| before != reason)
    }

    /// Attaches to all interfaces that exist or to none, and lets go of those that an earlier daemon had and this one has not.
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
        let present: Vec<_> = self
            .wanted
            .iter()
            .filter(|option| link_of(&self.links, &option.name).is_some())
            .collect();
        let mut attacher = kernel.attacher();
        let result = attach(&mut attacher, &present, &self.links, tables);
        match result {
            Ok(attached) => {
                attacher.commit(&attached)?;
                kernel.programs.forget_former();
                self.attached = attached;
            }
            Err(error) => {
                drop(attacher);
                for link in self.chosen().filter(|link| !before.contains(&link.ifindex)) {
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

    /// Looks at the interfaces again: attaches to those that came, or came back under another index; forgets those that went or
    /// have another name; follows MTU and MAC address.
    pub(super) fn refresh(&mut self, tables: &mut Tables) -> Result<Refreshed> {
        self.links = links()?;
        let gone = self.take_gone()?;
        for attachment in &gone {
            info!("{} is gone", attachment.name);
            self.waits(&attachment.name, ABSENT.to_owned());
            tables.remove_interface(attachment.ifindex)?;
        }
        if let Some(kernel) = &self.kernel {
            kernel.attacher().abandon(&gone, &self.links)?;
        }
        let mut refreshed = Refreshed {
            changed: !gone.is_empty(),
            ..Refreshed::default()
        };
        for option in self.wanted {
            if self.attachment_of(&option.name).is_some() {
                continue;
            }
            if self.link_of(&option.name).is_none() {
                refreshed.changed |= self.waits(&option.name, ABSENT.to_owned());
                continue;
            }
            let attached = self.attach_one(option, tables)?;
            refreshed.changed |= attached;
            refreshed.incomplete |= !attached;
        }
        if refreshed.changed
            && let Some(kernel) = &self.kernel
        {
            kernel.attacher().commit(&self.attached)?;
        }
        refreshed.changed |= self.write_interfaces(tables)?;
        Ok(refreshed)
    }

    /// Takes out the attachments that do not hold any more: the interface is gone, is another one of the same name, somebody has
    /// detached it, or VLAN tags are hidden from it for good.
    fn take_gone(&mut self) -> Result<Vec<Attachment>> {
        let Some(kernel) = &self.kernel else {
            return Ok(Vec::new());
        };
        let attacher = kernel.attacher();
        let holds = |attachment: &Attachment| {
            let link = link_of(&self.links, &attachment.name)
                .filter(|link| link.ifindex == attachment.ifindex);
            Ok(match link {
                Some(link) => {
                    attacher.holds(attachment, link)? && attacher.sees_tags(attachment, link)
                }
                None => false,
            })
        };
        // All of them first: an error must not lose any.
        let holding = self.attached.iter().map(holds);
        let mut holding = holding.collect::<Result<Vec<_>>>()?.into_iter();
        Ok(self
            .attached
            .extract_if(.., |_| !holding.next().unwrap_or(true))
            .collect())
    }

    fn attachment_of(&self, name: &str) -> Option<&Attachment> {
        self.attached
            .iter()
            .find(|attachment| attachment.name == name)
    }

    /// Attaches to an interface that is there now. The others go on if that fails.
    fn attach_one(&mut self, option: &InterfaceOption, tables: &mut Tables) -> Result<bool> {
        let Some(link) = self.link_of(&option.name).cloned() else {
            return Ok(false);
        };
        match self.try_attach(option, &link, tables) {
            Ok(()) => {
                info!("{} is attached", option.name);
                self.waiting.remove(&option.name);
                Ok(true)
            }
            Err(error) => {
                tables.remove_interface(link.ifindex)?;
                let failure = Failure::from(error);
                // While an interface comes and goes fast, it may go while it is being attached. That is no news.
                if !links()?.iter().any(|now| now.ifindex == link.ifindex) {
                    debug!("{} has gone again: {failure}", option.name);
                    self.waits(&option.name, ABSENT.to_owned());
                } else if self.waits(&option.name, failure.error.clone()) {
                    error!("cannot attach to {}: {failure}", option.name);
                }
                Ok(false)
            }
        }
    }

    fn try_attach(
        &mut self,
        option: &InterfaceOption,
        link: &Link,
        tables: &mut Tables,
    ) -> Result<()> {
        let kernel = self.kernel.as_ref().context("nothing is loaded yet")?;
        let others = self
            .attached
            .iter()
            .filter_map(|attachment| link_of(&self.links, &attachment.name));
        if let Some((first, second)) = collision(others.chain([link])) {
            return Err(collision_failure(first, second).into());
        }
        let mut attacher = kernel.attacher();
        let attached = attach(&mut attacher, &[option], &self.links, tables)?;
        self.attached.extend(attached);
        self.attached.sort_by_key(|attachment| {
            self.wanted
                .iter()
                .position(|option| option.name == attachment.name)
        });
        attacher.commit(&self.attached)
    }

    /// Brings INTERFACES and EGRESS up to date. True if that changed anything.
    fn write_interfaces(&self, tables: &mut Tables) -> Result<bool> {
        let (addresses, transmitters) = (addresses()?, Transmitters::list(&self.links)?);
        let mut changed = false;
        for attachment in &self.attached {
            if let Some(link) = self.link_of(&attachment.name) {
                let takes = transmitters.takes(link, &self.attached);
                changed |=
                    tables.write_interface(&interface(link, attachment.role, takes, &addresses))?;
            }
        }
        Ok(changed)
    }

    /// Brings ADDRESSES up to date; the own addresses of the WAN interfaces if any address changed, or at the first time.
    pub(super) fn write_addresses(&self, tables: &mut Tables) -> Result<Option<Vec<IpAddr>>> {
        let role = |ifindex: u32| {
            let is_it = |option: &&InterfaceOption| {
                self.link_of(&option.name)
                    .is_some_and(|link| link.ifindex == ifindex)
            };
            self.wanted.iter().find(is_it).map(|option| option.role)
        };
        let (all, before) = (addresses()?, tables.addresses()?);
        let is_wan = |ifindex: u32| role(ifindex).is_some_and(Role::is_wan);
        let wan = own_addresses(&all, is_wan, &before);
        let address =
            |is_wan| move |(ip, ifindex): (IpAddr, u32)| (ip, OwnAddress { is_wan, ifindex });
        // An address on two interfaces is one address, the WAN's if one of them is.
        let lan = all
            .iter()
            .filter(|address| role(address.ifindex) == Some(Role::Lan));
        let mut own: BTreeMap<IpAddr, OwnAddress> = lan
            .map(|own| (own.ip, own.ifindex))
            .map(address(0))
            .collect();
        own.extend(wan.into_iter().map(address(1)));
        let own: Vec<_> = own.into_iter().collect();
        let changed = tables.replace_addresses(&own)?;
        let is_first = self.kernel.is_none();
        let is_wan = |(ip, own): (IpAddr, OwnAddress)| (own.is_wan != 0).then_some(ip);
        Ok((changed || is_first).then(|| own.into_iter().filter_map(is_wan).collect()))
    }

    /// For `status`: every interface that is wanted, in the order of the command line.
    pub(super) fn reports(&self) -> Vec<InterfaceReport> {
        let report = |option: &InterfaceOption| {
            let (mode, reason) = match self.attachment_of(&option.name) {
                Some(attachment) => (attachment.mode.word(), Some(&attachment.reason)),
                None => (WAITING, self.waiting.get(&option.name)),
            };
            InterfaceReport {
                name: option.name.clone(),
                role: role_word(option.role).to_owned(),
                mode: mode.to_owned(),
                reason: reason.cloned().unwrap_or_default(),
            }
        };
        self.wanted.iter().map(report).collect()
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

/// The networks that the gateway has addresses in, whatever portfwd is attached to.
pub(super) fn networks() -> Result<Vec<Network>> {
    let network = |own: &Address| Network::of(own.ip, own.prefix);
    Ok(addresses()?.iter().filter_map(network).collect())
}

/// Attaches to interfaces. The datapath ignores packets of interfaces it does not know, so each is made known first.
fn attach(
    attacher: &mut Attacher<'_>,
    wanted: &[&InterfaceOption],
    links: &[Link],
    tables: &mut Tables,
) -> Result<Vec<Attachment>> {
    let (addresses, transmitters) = (addresses()?, Transmitters::list(links)?);
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
        let native = transmitters.native(link).unwrap_or(Transmission::Scattered);
        let before = known
            .iter()
            .find(|interface| interface.ifindex == link.ifindex)
            .map_or(Transmission::Nothing, Interface::transmission);
        let takes = native.min(before);
        tables.write_interface(&interface(link, *role, takes, &addresses))?;
        attached.push(attacher.attach(link, *role, *mode, &transmitters)?);
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
        Role::Both => "wan+lan",
    }
}
