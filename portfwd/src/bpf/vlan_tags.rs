//! Cards take VLAN tags off the frames that they receive and hand them over beside the frame, where XDP does not see them: it would
//! take a frame of any VLAN for an untagged one. So a card is told to leave the tags where they are before XDP gets its frames,
//! and told otherwise when XDP has gone again. TC sees a tag in either place.
//!
//! This holds for generic XDP as for native: it runs before the kernel takes a tag off itself, but after the card. It does not hold for
//! a veth, which passes on what its other end has beside the frame, whatever it is told; `auto` takes TC there.

use std::{fmt, fs};

use anyhow::{Context, Result};
use log::{debug, info, warn};

use super::{
    attach::Attachment,
    mode::Mode,
    pins::{Pins, entries},
};
use crate::netlink::{
    ethtool::Ethtool,
    link::{Link, links},
};

/// The offloads that take tags off: of customers' VLANs (0x8100) and of providers' (0x88a8).
pub const OFFLOADS: [&str; 2] = ["rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"];

/// Offloads that stay on, and hide tags from XDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hidden(Vec<&'static str>);

impl fmt::Display for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "its driver takes VLAN tags off before XDP sees them, and does not let that be turned off ({})",
            self.0.join(", ")
        )
    }
}

/// Which of the offloads an interface has on; none where the kernel was built without telling.
fn active(ethtool: &mut Ethtool, link: &Link) -> Result<Vec<&'static str>> {
    let active = ethtool
        .active(link.ifindex)
        .with_context(|| format!("cannot ask for the offloads of {}", link.name))?;
    Ok(OFFLOADS
        .into_iter()
        .filter(|offload| active.iter().any(|name| name == offload))
        .collect())
}

/// Has an interface leave tags in frames, and remembers what that takes in the pins, by the index: a name may become another
/// interface's. Returns what was turned off now; what cannot be is [`Hidden`], and nothing is turned off then.
pub(super) fn show(
    pins: &Pins,
    link: &Link,
) -> Result<std::result::Result<Vec<&'static str>, Hidden>> {
    let Some(mut ethtool) = Ethtool::open()? else {
        debug!("the kernel does not tell of offloads");
        return Ok(Ok(Vec::new()));
    };
    let on = active(&mut ethtool, link)?;
    let before = kept_off(pins, link.ifindex)?;
    for offload in &on {
        // First, so that whatever happens to this process it is turned on again.
        let mark = pins.offloads_of(link.ifindex).join(offload);
        fs::create_dir_all(&mark).with_context(|| format!("cannot make {}", mark.display()))?;
        if let Err(error) = ethtool.want(link.ifindex, offload, false) {
            debug!("{}: {error:#}", link.name);
        }
    }
    let still = active(&mut ethtool, link)?;
    if still.is_empty() {
        if !on.is_empty() {
            info!(
                "{} leaves VLAN tags in frames, for XDP to see them: turned off {}",
                link.name,
                on.join(", ")
            );
        }
        return Ok(Ok(on));
    }
    let turned_off = on.iter().filter(|offload| !before.contains(*offload));
    restore(pins, link.ifindex, &turned_off.copied().collect::<Vec<_>>())?;
    Ok(Err(Hidden(still)))
}

/// Which offloads are off because of this instance.
pub(super) fn kept_off(pins: &Pins, ifindex: u32) -> Result<Vec<&'static str>> {
    let marks = entries(&pins.offloads_of(ifindex))?;
    Ok(OFFLOADS
        .into_iter()
        .filter(|offload| marks.iter().any(|mark| mark == offload))
        .collect())
}

/// Turns offloads on again and forgets them. An interface that has gone has none.
pub(super) fn restore(pins: &Pins, ifindex: u32, offloads: &[&'static str]) -> Result<()> {
    if offloads.is_empty() {
        return Ok(());
    }
    let links = links()?;
    if let Some(link) = links.iter().find(|link| link.ifindex == ifindex)
        && let Err(error) = turn_on(link, offloads)
    {
        // What else there is to do must not be left because of this.
        warn!("{}: {error:#}", link.name);
    }
    let directory = pins.offloads_of(ifindex);
    for offload in offloads {
        let mark = directory.join(offload);
        if mark.exists() {
            fs::remove_dir(&mark).with_context(|| format!("cannot remove {}", mark.display()))?;
        }
    }
    if directory.exists() && entries(&directory)?.is_empty() {
        fs::remove_dir(&directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    Ok(())
}

fn turn_on(link: &Link, offloads: &[&'static str]) -> Result<()> {
    let Some(mut ethtool) = Ethtool::open()? else {
        return Ok(());
    };
    let on = active(&mut ethtool, link)?;
    for offload in offloads.iter().filter(|offload| !on.contains(*offload)) {
        ethtool.want(link.ifindex, offload, true)?;
        info!("{}: turned {offload} on again", link.name);
    }
    Ok(())
}

/// Turns everything on again that no attachment of XDP keeps off.
pub(super) fn restore_unused(pins: &Pins, attached: &[Attachment]) -> Result<()> {
    for mark in entries(&pins.offloads())? {
        let Ok(ifindex) = mark.parse() else {
            continue;
        };
        let is_xdp = |of: &Attachment| match of.mode {
            Mode::Xdp | Mode::XdpGeneric => of.ifindex == ifindex,
            Mode::Tc => false,
        };
        if !attached.iter().any(is_xdp) {
            restore(pins, ifindex, &kept_off(pins, ifindex)?)?;
        }
    }
    Ok(())
}
