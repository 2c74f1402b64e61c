//! Programs on interfaces, as links that are pinned.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use aya::programs::loaded_programs;
use log::{debug, warn};
use portfwd_common::abi::{LinkLayer, Role};

use super::{
    clsact,
    load::Programs,
    mode::{Hook, Mode, TcMethod, chosen},
    pins::{Pins, other_instances, remove_link, remove_pin},
    syscall::{
        self, AttachType, attached_programs, create_link, link_info, open_pin, program_id,
        update_link,
    },
    vlan_tags::{self, Hidden},
    xdp_features::{Obstacle, Transmitters},
};
use crate::{
    daemon::options::AttachMode,
    failure::{Failure, Kind},
    netlink::link::{Link, XdpMode, links, xdp_refusal},
};

/// An attached interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Kernel name.
    pub name: String,
    /// Kernel index.
    pub ifindex: u32,
    /// Which side of the gateway it is.
    pub role: Role,
    /// How it is attached.
    pub mode: Mode,
    /// Why so.
    pub reason: String,
}

/// What a failed start takes back.
enum Undo {
    /// A link that is new.
    Remove(PathBuf),
    /// A link that had another program.
    Restore { path: PathBuf, program: OwnedFd },
    /// A filter that is new.
    Detach(Link, Hook),
    /// A filter that had another program.
    Reattach {
        link: Link,
        hook: Hook,
        program: OwnedFd,
        name: String,
    },
    /// Offloads that are off so that XDP sees VLAN tags.
    TurnOn {
        ifindex: u32,
        offloads: Vec<&'static str>,
    },
    /// An XDP link that had to go because another mode was asked for.
    Recreate {
        path: PathBuf,
        ifindex: u32,
        program: OwnedFd,
        flags: u32,
    },
}

/// Attaches interfaces, all or none: what is not [`Attacher::commit`]ted is taken back.
pub struct Attacher<'a> {
    pins: &'a Pins,
    programs: &'a Programs,
    method: TcMethod,
    undo: Vec<Undo>,
}

impl<'a> Attacher<'a> {
    /// Nothing is attached yet.
    pub fn new(pins: &'a Pins, programs: &'a Programs, method: TcMethod) -> Self {
        Self {
            pins,
            programs,
            method,
            undo: Vec::new(),
        }
    }

    /// Refuses an interface on which another owner or instance is in the way. Changes nothing.
    pub fn check(&self, link: &Link, wanted: AttachMode) -> Result<()> {
        if chosen(link, wanted).0 != Mode::Tc {
            self.check_xdp(link)?;
        }
        self.check_tc(link)
    }

    /// Attaches an interface that was [`Attacher::check`]ed, or replaces the programs in the links that are pinned for it.
    pub fn attach(
        &mut self,
        link: &Link,
        role: Role,
        wanted: AttachMode,
        transmitters: &Transmitters,
    ) -> Result<Attachment> {
        let (mode, reason) = chosen(link, wanted);
        let may_choose = wanted == AttachMode::Auto && mode == Mode::Xdp;
        let result = match transmitters.obstacle(link).filter(|_| mode == Mode::Xdp) {
            Some(obstacle) if may_choose || obstacle == Obstacle::DropsRedirected => {
                Err(AttachError::Useless(obstacle))
            }
            // Whoever forces it may know more, and the kernel refuses it where the driver has none.
            Some(_) | None => self.attach_as(link, role, mode),
        };
        let (mode, reason) = match result {
            Ok(()) => (mode, reason),
            Err(AttachError::Useless(obstacle)) if may_choose => {
                self.fall_back_to_tc(link, role, obstacle.to_string())?
            }
            Err(AttachError::Refused(error, said)) if may_choose => {
                let said = said.map_or_else(String::new, |said| format!(": {said}"));
                let reason = format!("the driver refuses native XDP: {error}{said}");
                self.fall_back_to_tc(link, role, reason)?
            }
            Err(AttachError::TagsHidden(hidden)) if may_choose => {
                self.fall_back_to_tc(link, role, hidden.to_string())?
            }
            Err(error) => return Err(error.describe(link)),
        };
        let reason = match mode {
            Mode::Xdp | Mode::XdpGeneric => {
                with_offloads(reason, &vlan_tags::kept_off(self.pins, link.ifindex)?)
            }
            Mode::Tc => reason,
        };
        let reason = match transmitters.shortage(link).filter(|_| mode == Mode::Xdp) {
            Some(shortage) => format!("{reason}; {shortage}"),
            None => reason,
        };
        Ok(Attachment {
            name: link.name.clone(),
            ifindex: link.ifindex,
            role,
            mode,
            reason,
        })
    }

    fn fall_back_to_tc(
        &mut self,
        link: &Link,
        role: Role,
        reason: String,
    ) -> Result<(Mode, String)> {
        self.attach_as(link, role, Mode::Tc)
            .map_err(|error| error.describe(link))?;
        Ok((Mode::Tc, reason))
    }

    /// Whether XDP sees the VLAN tags of frames, or does again: somebody may have turned on what hides them.
    pub fn sees_tags(&self, attachment: &Attachment, link: &Link) -> bool {
        if attachment.mode == Mode::Tc {
            return true;
        }
        match vlan_tags::show(self.pins, link) {
            Ok(Ok(_)) => true,
            Ok(Err(hidden)) => {
                warn!("{}: {hidden}", link.name);
                false
            }
            // It may be going right now, which comes as a change of its own.
            Err(error) => {
                debug!("{}: {error:#}", link.name);
                true
            }
        }
    }

    /// Whether everything of an attachment to `link` is in its place still.
    pub fn holds(&self, attachment: &Attachment, link: &Link) -> Result<bool> {
        for (hook, _) in attachment.mode.programs(attachment.role, link.layer) {
            let is_there = if hook == Hook::Xdp || self.method == TcMethod::Tcx {
                match open_pin(&self.pins.link(&link.name, hook))? {
                    Some(pinned) => link_info(&pinned)?.ifindex == link.ifindex,
                    None => false,
                }
            } else {
                clsact::is_attached(link, hook)?
            };
            if !is_there {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes what is left of attachments that do not hold any more off interfaces that have another name now. What is pinned
    /// [`Attacher::commit`] finds by its path; filters stay with the interface.
    pub fn abandon(&self, gone: &[Attachment], links: &[Link]) -> Result<()> {
        if self.method == TcMethod::Tcx {
            return Ok(());
        }
        for attachment in gone {
            let is_renamed =
                |link: &&Link| link.ifindex == attachment.ifindex && link.name != attachment.name;
            if let Some(link) = links.iter().find(is_renamed) {
                clsact::detach(link, Hook::Ingress)?;
                clsact::detach(link, Hook::Egress)?;
            }
        }
        Ok(())
    }

    /// Keeps what is attached, and removes links of interfaces and hooks that are not in `keep`.
    pub fn commit(mut self, keep: &[Attachment]) -> Result<()> {
        self.undo.clear();
        let links = links()?;
        for (name, hook) in self.pins.linked()? {
            let kept = keep.iter().find(|attachment| attachment.name == name);
            let is_used = kept.is_some_and(|attachment| {
                let layer = links
                    .iter()
                    .find(|link| link.name == name)
                    .map_or(LinkLayer::Ethernet, |link| link.layer);
                attachment
                    .mode
                    .programs(attachment.role, layer)
                    .iter()
                    .any(|(used, _)| *used == hook)
                    && (hook == Hook::Xdp || self.method == TcMethod::Tcx)
            });
            if !is_used {
                remove_link(&self.pins.link(&name, hook))?;
            }
        }
        for name in clsact::marked(self.pins)? {
            let Some(link) = links.iter().find(|link| link.name == name) else {
                continue;
            };
            match keep.iter().find(|attachment| attachment.name == name) {
                Some(attachment)
                    if self.method == TcMethod::Clsact && attachment.role == Role::Lan =>
                {
                    clsact::detach(link, Hook::Egress)?;
                }
                Some(_) if self.method == TcMethod::Clsact => {}
                Some(_) | None => clsact::remove(self.pins, link)?,
            }
        }
        // After the links: XDP must not run without it.
        vlan_tags::restore_unused(self.pins, keep)
    }

    /// Refuses an interface that has another owner's XDP program.
    fn check_xdp(&self, link: &Link) -> Result<()> {
        let Some(xdp) = link.xdp else { return Ok(()) };
        let own = open_pin(&self.pins.link(&link.name, Hook::Xdp))?;
        if let Some(own) = own
            && link_info(&own)?.program == xdp.program
        {
            return Ok(());
        }
        let error = format!(
            "{} has the XDP program {} (id {}) of another owner, which portfwd does not replace",
            link.name,
            program_name(xdp.program),
            xdp.program,
        );
        let hint = format!(
            "`bpftool net show dev {0}` shows it; detach it, or attach behind it with {0}=tc",
            link.name
        );
        Err(Failure::new(Kind::Conflict, error).hint(hint).into())
    }

    /// Refuses an interface that another instance has.
    fn check_tc(&self, link: &Link) -> Result<()> {
        if self.method == TcMethod::Clsact {
            return Ok(());
        }
        let attached = attached_programs(link.ifindex, AttachType::TcxIngress)
            .with_context(|| format!("cannot list the TC programs of {}", link.name))?;
        if attached.is_empty() {
            return Ok(());
        }
        for (instance, pin) in other_instances(self.pins, Hook::Ingress)? {
            // Of an instance that is being detached right now, nothing is left.
            let Some(other) = open_pin(&pin)? else {
                continue;
            };
            let other = link_info(&other)?;
            if other.ifindex == link.ifindex && attached.contains(&other.program) {
                let error = format!(
                    "{} is attached by another instance of portfwd ({instance})",
                    link.name
                );
                return Err(Failure::new(Kind::Conflict, error)
                    .hint(format!(
                        "`portfwd --instance {instance} detach` takes that off"
                    ))
                    .into());
            }
        }
        Ok(())
    }

    fn attach_as(
        &mut self,
        link: &Link,
        role: Role,
        mode: Mode,
    ) -> std::result::Result<(), AttachError> {
        if mode != Mode::Tc && link.layer == LinkLayer::Raw {
            let error = format!(
                "{} has no Ethernet header: XDP cannot forward to or from it",
                link.name
            );
            let failure =
                Failure::new(Kind::Failed, error).hint(format!("attach it with {}=tc", link.name));
            return Err(AttachError::Failed(failure.into()));
        }
        for (hook, program) in mode.programs(role, link.layer) {
            if hook == Hook::Xdp {
                self.show_tags(link)?;
            }
            if hook == Hook::Xdp || self.method == TcMethod::Tcx {
                self.attach_link(link, hook, program, mode)?;
            } else {
                let own = self.programs.fd(program)?;
                if clsact::runs(link, hook, program_id(own)?)? {
                    continue;
                }
                let former = clsact::attach(self.pins, link, hook, own, program, self.programs)?;
                let link = link.clone();
                match former {
                    None => self.undo.push(Undo::Detach(link, hook)),
                    Some(clsact::Former { program, name }) => {
                        self.push_undo(&link.name, program, |program| Undo::Reattach {
                            link: link.clone(),
                            hook,
                            program,
                            name,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn show_tags(&mut self, link: &Link) -> std::result::Result<(), AttachError> {
        let offloads = vlan_tags::show(self.pins, link)?.map_err(AttachError::TagsHidden)?;
        let ifindex = link.ifindex;
        self.undo.push(Undo::TurnOn { ifindex, offloads });
        Ok(())
    }

    /// Remembers how to put a former program back. One that could not be opened is not put back: the new one, which has the same
    /// tables, stays.
    fn push_undo(
        &mut self,
        interface: &str,
        former: Option<OwnedFd>,
        undo: impl FnOnce(OwnedFd) -> Undo,
    ) {
        match former {
            Some(program) => self.undo.push(undo(program)),
            None => {
                debug!("{interface}: the former program cannot be opened without CAP_SYS_ADMIN");
            }
        }
    }

    fn attach_link(
        &mut self,
        link: &Link,
        hook: Hook,
        program: &str,
        mode: Mode,
    ) -> std::result::Result<(), AttachError> {
        let path = self.pins.link(&link.name, hook);
        let program = self.programs.fd(program)?;
        if let Some(pinned) = open_pin(&path)? {
            let info = link_info(&pinned)?;
            let same_mode = hook != Hook::Xdp || link.xdp.map(|xdp| xdp.mode) == mode.xdp_mode();
            if info.ifindex == link.ifindex && same_mode {
                if info.program == program_id(program)? {
                    return Ok(());
                }
                let former = self.programs.by_id(info.program)?;
                update_link(pinned.as_fd(), program.as_fd())?;
                self.push_undo(&link.name, former, |program| Undo::Restore {
                    path,
                    program,
                });
                debug!("{}: replaced the {} program", link.name, hook.word());
                return Ok(());
            }
            // Of an interface of this name that is gone, or in another mode, which a link cannot change.
            if info.ifindex == link.ifindex {
                let flags = if link.xdp.is_some_and(|xdp| xdp.mode == XdpMode::Generic) {
                    Mode::XdpGeneric
                } else {
                    Mode::Xdp
                }
                .flags();
                let former = self.programs.by_id(info.program)?;
                self.push_undo(&link.name, former, |program| Undo::Recreate {
                    path: path.clone(),
                    ifindex: link.ifindex,
                    program,
                    flags,
                });
            }
            remove_link(&path)?;
        }
        let flags = if hook == Hook::Xdp { mode.flags() } else { 0 };
        let created = create_link(program.as_fd(), link.ifindex, hook.attach_type(), flags)
            .map_err(|error| {
                let said = match hook {
                    Hook::Xdp => said_about(link, program, flags),
                    Hook::Ingress | Hook::Egress => None,
                };
                AttachError::Refused(error, said)
            })?;
        syscall::pin(created.as_fd(), &path)?;
        self.undo.push(Undo::Remove(path));
        Ok(())
    }
}

impl Drop for Attacher<'_> {
    fn drop(&mut self) {
        for undo in self.undo.drain(..).rev() {
            let undone = match undo {
                Undo::Remove(path) => remove_link(&path),
                Undo::Restore { path, program } => restore(&path, &program),
                Undo::Detach(link, hook) => clsact::detach(&link, hook),
                Undo::Reattach {
                    link,
                    hook,
                    program,
                    name,
                } => {
                    clsact::attach(self.pins, &link, hook, &program, &name, self.programs).map(drop)
                }
                Undo::TurnOn { ifindex, offloads } => {
                    vlan_tags::restore(self.pins, ifindex, &offloads)
                }
                Undo::Recreate {
                    path,
                    ifindex,
                    program,
                    flags,
                } => recreate(&path, ifindex, &program, flags),
            };
            if let Err(error) = undone {
                warn!("cannot take an attachment back: {error:#}");
            }
        }
    }
}

fn restore(path: &Path, program: &OwnedFd) -> Result<()> {
    let link = open_pin(path)?.with_context(|| format!("{} has gone", path.display()))?;
    Ok(update_link(link.as_fd(), program.as_fd())?)
}

fn recreate(path: &Path, ifindex: u32, program: &OwnedFd, flags: u32) -> Result<()> {
    remove_pin(path)?;
    let link = create_link(program.as_fd(), ifindex, AttachType::Xdp, flags)?;
    Ok(syscall::pin(link.as_fd(), path)?)
}

/// Why an attachment failed.
enum AttachError {
    /// The kernel does not take the program on this interface in this mode.
    Refused(io::Error, Option<String>),
    /// XDP would not see VLAN tags.
    TagsHidden(Hidden),
    /// XDP would be of no use.
    Useless(Obstacle),
    /// Anything else.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for AttachError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<io::Error> for AttachError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl AttachError {
    fn describe(self, link: &Link) -> anyhow::Error {
        match self {
            Self::Failed(error) => error.context(format!("cannot attach to {}", link.name)),
            Self::Useless(obstacle) => {
                let error = format!("cannot attach to {}: {obstacle}", link.name);
                let hint = format!("attach it with {}=tc, or leave the mode to auto", link.name);
                Failure::new(Kind::Failed, error).hint(hint).into()
            }
            Self::TagsHidden(hidden) => {
                let error = format!("cannot attach to {}: {hidden}", link.name);
                let hint = format!("attach it with {}=tc, or leave the mode to auto", link.name);
                Failure::new(Kind::Failed, error).hint(hint).into()
            }
            Self::Refused(error, said) => {
                let hint = format!(
                    "attach it with {0}=tc, or leave the mode to auto; `bpftool net show dev {0}` shows what is there",
                    link.name
                );
                let doing = format!("the kernel refuses to attach to {}", link.name);
                let mut failure = Failure::during(doing, &error).hint(hint);
                if let Some(said) = said {
                    failure.error = format!("{}: {said}", failure.error);
                }
                failure.into()
            }
        }
    }
}

/// What the driver says about the XDP program that it has refused, if that can be had.
fn said_about(link: &Link, program: &OwnedFd, flags: u32) -> Option<String> {
    xdp_refusal(link.ifindex, program.as_fd(), flags).unwrap_or_else(|error| {
        debug!("{}: {error:#}", link.name);
        None
    })
}

/// Why an interface is attached as it is, and what was changed on it for that.
fn with_offloads(reason: String, kept_off: &[&str]) -> String {
    if kept_off.is_empty() {
        reason
    } else {
        format!("{reason}; turned off {}", kept_off.join(", "))
    }
}

/// Name of a loaded program, for messages.
fn program_name(id: u32) -> String {
    loaded_programs()
        .filter_map(std::result::Result::ok)
        .find(|program| program.id() == id)
        .and_then(|program| program.name_as_str().map(str::to_owned))
        .unwrap_or_else(|| "without name".to_owned())
}
