//! What an instance has in the kernel, told apart from what others have: the programs that use one of its maps, those
//! programs' maps, the links that hold one of those programs, and what is pinned.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::MapInfo;
use aya::programs::{loaded_links, loaded_programs};

/// Counts of kernel objects, and the paths of the pins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelObjects {
    /// Loaded programs.
    pub programs: usize,
    /// Maps.
    pub maps: usize,
    /// Links.
    pub links: usize,
    /// Pins of all kinds.
    pub pins: BTreeSet<PathBuf>,
}

impl KernelObjects {
    /// Those of the instance that is pinned in `directory`.
    pub fn of(directory: &Path) -> Result<Self> {
        let mut pins = BTreeSet::new();
        list(directory, &mut pins)?;
        let is_map = |path: &&PathBuf| path.parent().is_some_and(|parent| parent.ends_with("maps"));
        let mut maps = BTreeSet::new();
        for path in pins.iter().filter(is_map) {
            let info =
                MapInfo::from_pin(path).with_context(|| format!("open {}", path.display()))?;
            maps.insert(info.id());
        }
        let (mut programs, mut used) = (BTreeSet::new(), maps.clone());
        // Others load and unload at the same time: what has gone between listing and looking is none of ours.
        for program in loaded_programs().filter_map(Result::ok) {
            let Ok(Some(ids)) = program.map_ids() else {
                continue;
            };
            if ids.iter().any(|id| maps.contains(id)) {
                programs.insert(program.id());
                used.extend(ids);
            }
        }
        let links = loaded_links()
            .filter_map(Result::ok)
            .filter(|link| programs.contains(&link.program_id()));
        Ok(Self {
            programs: programs.len(),
            maps: used.len(),
            links: links.count(),
            pins,
        })
    }
}

impl KernelObjects {
    /// Pinned programs: all that an instance needs, whether a daemon runs or not.
    pub fn pinned_programs(&self) -> usize {
        let is_program = |path: &&PathBuf| {
            path.parent()
                .is_some_and(|parent| parent.ends_with("programs"))
        };
        self.pins.iter().filter(is_program).count()
    }

    /// What is there beyond `other`, and what is missing, in words.
    pub fn difference(&self, other: &Self) -> String {
        let names = |these: &BTreeSet<PathBuf>, those: &BTreeSet<PathBuf>| {
            let names: Vec<_> = these
                .difference(those)
                .map(|path| path.display().to_string())
                .collect();
            names.join(", ")
        };
        format!(
            "{} programs, {} maps, {} links instead of {}, {} and {}; more pins: {}; fewer: {}",
            self.programs,
            self.maps,
            self.links,
            other.programs,
            other.maps,
            other.links,
            names(&self.pins, &other.pins),
            names(&other.pins, &self.pins)
        )
    }
}

fn list(directory: &Path, pins: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list(&entry.path(), pins)?;
        } else {
            pins.insert(entry.path());
        }
    }
    Ok(())
}
