//! TC before kernel 6.6: filters on the clsact qdisc, through netlink. They cannot be pinned, but stay without a process to
//! hold them; a fixed priority and handle say which are ours, and a directory in the pins on which interfaces.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the enums of netlink grow with the kernel; what is not asked for is skipped"
)]

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use anyhow::{Context, Result};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{
    load::Programs,
    mode::Hook,
    pins::{Pins, decode, entries},
};
use crate::{
    failure::{Failure, Kind},
    netlink::{
        Requester,
        link::{Link, links},
    },
};

/// Behind what others put first, in front of what they append.
const PRIORITY: u16 = 32_512;
const HANDLE: u32 = 0x7f_0001;
/// All ethertypes, wire order.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
const KIND: &str = "clsact";
const CLSACT_PARENT: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0xfff1,
};
const CLSACT_HANDLE: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};
/// All our programs begin so.
const PROGRAM_PREFIX: &str = "portfwd_";
/// Directory in the mark of an interface: the qdisc is ours too.
const QDISC_MARK: &str = "qdisc";

/// A program of ours that another one has replaced.
pub(super) struct Former {
    /// The program; `None` if it could not be opened.
    pub program: Option<OwnedFd>,
    /// Its name.
    pub name: String,
}

/// A filter at our priority and handle.
struct Found {
    name: String,
    program: u32,
}

/// Attaches a program, or replaces ours, which is returned (`programs` may know it); every packet meets the one or the other.
pub(super) fn attach(
    pins: &Pins,
    link: &Link,
    hook: Hook,
    program: &impl AsFd,
    name: &str,
    programs: &Programs,
) -> Result<Option<Former>> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let mark = pins.clsact_of(&link.name);
    if add_qdisc(&mut requester, link)? {
        fs::create_dir_all(mark.join(QDISC_MARK))
            .with_context(|| format!("cannot make {}", mark.display()))?;
    }
    fs::create_dir_all(&mark).with_context(|| format!("cannot make {}", mark.display()))?;
    let former = match find(&mut requester, link.ifindex, hook)? {
        Some(found) if found.is_ours() => Some(Former {
            program: programs.by_id(found.program)?,
            name: found.name,
        }),
        Some(Found { name: owner, .. }) => {
            let error = format!(
                "{}: TC filter {owner} of another owner has the priority {PRIORITY} and handle of portfwd",
                link.name
            );
            let hint = format!(
                "`tc filter show dev {} {}` shows it",
                link.name,
                hook.word()
            );
            return Err(Failure::new(Kind::Conflict, error).hint(hint).into());
        }
        None => None,
    };
    let mut message = filter(link.ifindex, hook);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(
            program.as_fd().as_raw_fd().cast_unsigned(),
        )),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    let existing = if former.is_some() {
        NLM_F_REPLACE
    } else {
        NLM_F_EXCL
    };
    let flags = NLM_F_CREATE | existing;
    requester
        .request(RouteNetlinkMessage::NewTrafficFilter(message), flags)
        .with_context(|| format!("cannot attach {name} to {} by clsact", link.name))?;
    Ok(former)
}

/// Detaches ours from a hook, if it is there.
pub(super) fn detach(link: &Link, hook: Hook) -> Result<()> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    match find(&mut requester, link.ifindex, hook)? {
        Some(found) if found.is_ours() => requester
            .request(
                RouteNetlinkMessage::DelTrafficFilter(filter(link.ifindex, hook)),
                0,
            )
            .map(drop)
            .with_context(|| format!("cannot detach {} from {}", found.name, link.name)),
        Some(_) | None => Ok(()),
    }
}

/// Whether ours is on a hook.
pub(super) fn is_attached(link: &Link, hook: Hook) -> Result<bool> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    Ok(find(&mut requester, link.ifindex, hook)?.is_some_and(|found| found.is_ours()))
}

/// Interfaces that have or had filters of this instance, as marked.
pub(super) fn marked(pins: &Pins) -> Result<Vec<String>> {
    Ok(entries(&pins.clsact())?
        .iter()
        .map(|name| decode(name))
        .collect())
}

/// Whether ours is on a hook with a program of this number.
pub(super) fn runs(link: &Link, hook: Hook, program: u32) -> Result<bool> {
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let found = find(&mut requester, link.ifindex, hook)?;
    Ok(found.is_some_and(|found| found.is_ours() && found.program == program))
}

/// Takes everything of this instance off an interface: the filters, and the qdisc if it is ours and nobody else uses it.
pub(super) fn remove(pins: &Pins, link: &Link) -> Result<()> {
    let hooks = [Hook::Ingress, Hook::Egress];
    for hook in hooks {
        detach(link, hook)?;
    }
    let mark = pins.clsact_of(&link.name);
    let mut requester = Requester::open(NETLINK_ROUTE)?;
    let mut used = false;
    for hook in hooks {
        used |= !filters(&mut requester, link.ifindex, hook)?.is_empty();
    }
    if mark.join(QDISC_MARK).exists() && !used {
        match requester.request(RouteNetlinkMessage::DelQueueDiscipline(qdisc(link)), 0) {
            Err(error) if errno(&error) != Some(libc::ENOENT) => {
                return Err(error)
                    .with_context(|| format!("cannot remove the clsact qdisc of {}", link.name));
            }
            Ok(_) | Err(_) => {}
        }
    }
    fs::remove_dir_all(&mark).with_context(|| format!("cannot remove {}", mark.display()))
}

/// Takes everything of this instance off all interfaces.
pub(super) fn remove_all(pins: &Pins) -> Result<()> {
    let marked = marked(pins)?;
    if marked.is_empty() {
        return Ok(());
    }
    for link in links()?.iter().filter(|link| marked.contains(&link.name)) {
        remove(pins, link)?;
    }
    Ok(())
}

/// Adds the clsact qdisc; false if there is one.
fn add_qdisc(requester: &mut Requester, link: &Link) -> Result<bool> {
    match requester.request(
        RouteNetlinkMessage::NewQueueDiscipline(qdisc(link)),
        NLM_F_CREATE | NLM_F_EXCL,
    ) {
        Ok(_) => Ok(true),
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(false),
        Err(error) => {
            Err(error).with_context(|| format!("cannot add the clsact qdisc to {}", link.name))
        }
    }
}

fn qdisc(link: &Link) -> TcMessage {
    let mut message = TcMessage::with_index(link.ifindex.cast_signed());
    message.header.parent = CLSACT_PARENT;
    message.header.handle = CLSACT_HANDLE;
    message.attributes.push(TcAttribute::Kind(KIND.to_owned()));
    message
}

/// Our filter on a hook, without its program.
fn filter(ifindex: u32, hook: Hook) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = parent(hook);
    message.header.handle = TcHandle::from(HANDLE);
    message.header.info = u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL);
    message
        .attributes
        .push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    message
}

fn parent(hook: Hook) -> TcHandle {
    let minor = match hook {
        Hook::Egress => TcHandle::MIN_EGRESS,
        // XDP has no qdisc; it never comes here.
        Hook::Ingress | Hook::Xdp => TcHandle::MIN_INGRESS,
    };
    TcHandle {
        major: 0xffff,
        minor,
    }
}

impl Found {
    fn is_ours(&self) -> bool {
        self.name.starts_with(PROGRAM_PREFIX)
    }
}

/// The filter at our priority and handle.
fn find(requester: &mut Requester, ifindex: u32, hook: Hook) -> Result<Option<Found>> {
    let ours = |message: &TcMessage| {
        message.header.info >> 16 == u32::from(PRIORITY)
            && u32::from(message.header.handle) == HANDLE
    };
    Ok(filters(requester, ifindex, hook)?
        .iter()
        .find(|message| ours(message))
        .map(found))
}

fn filters(requester: &mut Requester, ifindex: u32, hook: Hook) -> Result<Vec<TcMessage>> {
    let mut ask = TcMessage::with_index(ifindex.cast_signed());
    ask.header.parent = parent(hook);
    let answer = match requester.dump(RouteNetlinkMessage::GetTrafficFilter(ask)) {
        // No clsact qdisc.
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL)) => Vec::new(),
        other => other.context("cannot list the TC filters")?,
    };
    Ok(answer
        .into_iter()
        .filter_map(|message| match message {
            // The head of a chain is listed too, without handle.
            RouteNetlinkMessage::NewTrafficFilter(filter)
                if u32::from(filter.header.handle) != 0 =>
            {
                Some(filter)
            }
            _ => None,
        })
        .collect())
}

fn found(message: &TcMessage) -> Found {
    let mut found = Found {
        name: "without name".to_owned(),
        program: 0,
    };
    let options = message
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            TcAttribute::Options(options) => options.as_slice(),
            _ => &[],
        });
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => found.name.clone_from(name),
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => found.program = *id,
            _ => {}
        }
    }
    found
}

fn errno(error: &anyhow::Error) -> Option<i32> {
    error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error)
}
