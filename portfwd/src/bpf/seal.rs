//! The seal on an instance's pins: which object the pinned programs come from, and over which maps they were loaded.
//!
//! The kernel does not keep what a program was loaded from: its tag is a digest of the relocated instructions alone. So whoever has pinned all programs puts a seal beside them: a directory whose
//! name is a digest of the object and of the kernel's numbers of all pinned maps and programs. A number belongs to one map or
//! program for as long as that is pinned. A start that finds the seal it would put itself need not load anything.
//!
//! A seal that does not fit says nothing, so none has to be broken in time: the first program or map that is pinned over
//! another makes it wrong.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use aya::maps::MapInfo;
use portfwd_common::abi::names;
use sha2::{Digest, Sha256};

use super::{
    load::PROGRAMS,
    pins::{Pins, entries},
    syscall::{open_pin, program_id},
};

/// A digest of the object and of what is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seal(String);

impl Seal {
    /// The seal that belongs on what is pinned now, if it is what the object was loaded as; `None` unless all of it is there.
    pub(super) fn of(object: &[u8], pins: &Pins) -> Result<Option<Self>> {
        let mut digest = Sha256::new();
        digest.update(Sha256::digest(object));
        for (names, number) in [
            (&names::MAPS[..], map_number as Number),
            (&[names::EGRESS, names::XDP_SLOW], map_number),
            (&PROGRAMS, program_number),
        ] {
            for name in names {
                let Some(number) = number(pins, name)? else {
                    return Ok(None);
                };
                digest.update(name);
                digest.update([0]);
                digest.update(number.to_ne_bytes());
            }
        }
        Ok(Some(Self(format!("{:x}", digest.finalize()))))
    }

    /// Whether it is on the pins.
    pub(super) fn is_on(&self, pins: &Pins) -> bool {
        pins.seals().join(&self.0).is_dir()
    }

    /// Puts it on the pins, in the place of any other.
    pub(super) fn put_on(&self, pins: &Pins) -> Result<()> {
        let directory = pins.seals();
        break_seals(pins)?;
        let path = directory.join(&self.0);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))
    }
}

/// Takes off whatever seal there is.
pub(super) fn break_seals(pins: &Pins) -> Result<()> {
    let directory = pins.seals();
    for former in entries(&directory)? {
        let path = directory.join(former);
        fs::remove_dir(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Finds the kernel's number of what is pinned under a name.
type Number = fn(&Pins, &str) -> Result<Option<u32>>;

fn map_number(pins: &Pins, name: &str) -> Result<Option<u32>> {
    let path = pins.maps().join(name);
    if !path.exists() {
        return Ok(None);
    }
    let info = MapInfo::from_pin(&path).with_context(|| looking_at(&path))?;
    Ok(Some(info.id()))
}

fn program_number(pins: &Pins, name: &str) -> Result<Option<u32>> {
    let path = pins.program(name);
    let Some(program) = open_pin(&path).with_context(|| looking_at(&path))? else {
        return Ok(None);
    };
    let number = program_id(&program).with_context(|| looking_at(&path))?;
    Ok(Some(number))
}

fn looking_at(path: &Path) -> String {
    format!("cannot look at {}", path.display())
}
