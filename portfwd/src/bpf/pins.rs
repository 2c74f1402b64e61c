//! Where everything of an instance is in bpffs:
//!
//! ```text
//! /sys/fs/bpf/portfwd/INSTANCE/v8/maps/PORTS           maps by their names
//!                                 programs/portfwd_tc  programs by their names
//!                                 links/wan0-xdp       links by interface and hook
//!                                 clsact/wan0          a directory: the clsact qdisc there is ours (kernels before 6.6)
//!                                 offloads/3/rx-vlan-hw-parse  a directory: we turned that off on the interface of this index
//!                                 seals/9f8a…          a directory: which object all that comes from (see `seal`)
//! ```
//!
//! The directory behind the instance carries the version of the layouts in the maps.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use portfwd_common::abi::ABI_VERSION;

use super::{
    clsact,
    mode::Hook,
    syscall::{detach_link, open_pin},
    vlan_tags,
};

/// The pins of one instance, of this program's version.
#[derive(Clone, Debug)]
pub struct Pins {
    instance: PathBuf,
}

impl Pins {
    /// The pins of the instance in `directory`.
    pub fn new(directory: &Path) -> Self {
        Self {
            instance: encoded_last(directory),
        }
    }

    /// Directory of all versions' pins.
    pub fn instance(&self) -> &Path {
        &self.instance
    }

    /// Directory of this version's pins.
    pub fn version(&self) -> PathBuf {
        self.instance.join(format!("v{ABI_VERSION}"))
    }

    /// Directory of the maps.
    pub fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    /// Directory of the programs.
    pub fn programs(&self) -> PathBuf {
        self.version().join("programs")
    }

    /// Where a program is pinned.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// Directory of the links.
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// Where the link of an interface and hook is pinned.
    pub fn link(&self, interface: &str, hook: Hook) -> PathBuf {
        self.links()
            .join(format!("{}-{}", encode(interface), hook.word()))
    }

    /// Marks of the clsact qdiscs that are ours.
    pub fn clsact(&self) -> PathBuf {
        self.version().join("clsact")
    }

    /// The mark of an interface whose clsact qdisc is ours.
    pub fn clsact_of(&self, interface: &str) -> PathBuf {
        self.clsact().join(encode(interface))
    }

    /// Marks of the offloads that we turned off.
    pub fn offloads(&self) -> PathBuf {
        self.version().join("offloads")
    }

    /// The marks of an interface, by its index: directories named after the offloads.
    pub fn offloads_of(&self, ifindex: u32) -> PathBuf {
        self.offloads().join(ifindex.to_string())
    }

    /// Where it says which object the programs come from.
    pub fn seals(&self) -> PathBuf {
        self.version().join("seals")
    }

    /// Whether anything of this version is pinned.
    pub fn exist(&self) -> bool {
        self.version().exists()
    }

    /// Makes the directories.
    pub fn create(&self) -> Result<()> {
        for directory in [
            self.maps(),
            self.programs(),
            self.links(),
            self.clsact(),
            self.offloads(),
            self.seals(),
        ] {
            fs::create_dir_all(&directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        Ok(())
    }

    /// Versions other than this program's that are pinned.
    pub fn other_versions(&self) -> Result<Vec<String>> {
        let own = format!("v{ABI_VERSION}");
        Ok(entries(&self.instance)?
            .into_iter()
            .filter(|name| *name != own)
            .collect())
    }

    /// Interfaces and hooks that have a pinned link.
    pub fn linked(&self) -> Result<Vec<(String, Hook)>> {
        let parse = |entry: String| {
            let (interface, hook) = entry.rsplit_once('-')?;
            Some((decode(interface), Hook::from_word(hook)?))
        };
        Ok(entries(&self.links())?
            .into_iter()
            .filter_map(parse)
            .collect())
    }
}

/// Detaches and removes everything of the instance whose pins are in `directory`, of whatever version, and nothing else. The
/// calling thread must be in the instance's network namespace. False if there was nothing.
pub fn remove_instance(directory: &Path) -> Result<bool> {
    let pins = Pins::new(directory);
    if !pins.instance.exists() {
        return Ok(false);
    }
    clsact::remove_all(&pins)?;
    for version in entries(&pins.instance)? {
        let links = pins.instance.join(version).join("links");
        for link in entries(&links)? {
            remove_link(&links.join(link))?;
        }
    }
    vlan_tags::restore_unused(&pins, &[])?;
    fs::remove_dir_all(&pins.instance)
        .with_context(|| format!("cannot remove {}", pins.instance.display()))?;
    Ok(true)
}

/// The pinned links of a hook of other instances, with the instance's name.
pub(super) fn other_instances(own: &Pins, hook: Hook) -> Result<Vec<(String, PathBuf)>> {
    let Some(all) = own.instance.parent() else {
        return Ok(Vec::new());
    };
    let suffix = format!("-{}", hook.word());
    let mut found = Vec::new();
    for name in entries(all)? {
        let instance = all.join(&name);
        if instance == own.instance {
            continue;
        }
        for version in entries(&instance)? {
            let links = instance.join(version).join("links");
            let of_hook = entries(&links)?
                .into_iter()
                .filter(|link| link.ends_with(&suffix));
            found.extend(of_hook.map(|link| (decode(&name), links.join(link))));
        }
    }
    Ok(found)
}

/// Detaches what a pinned link attaches, at once, and removes the pin.
pub(super) fn remove_link(path: &Path) -> Result<()> {
    let removing = || format!("cannot detach {}", path.display());
    if let Some(link) = open_pin(path).with_context(removing)? {
        // Removing the pin detaches too, but some time later.
        match detach_link(link.as_fd()) {
            // The interface is gone, and what was attached with it.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            other => other.with_context(removing)?,
        }
    }
    remove_pin(path)
}

/// Removes a pin, if there is one.
pub(super) fn remove_pin(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Names in a directory, sorted; none if there is no such directory.
pub(super) fn entries(directory: &Path) -> Result<Vec<String>> {
    let reading = || format!("cannot read {}", directory.display());
    let found = match fs::read_dir(directory) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(reading),
    };
    let mut names = Vec::new();
    for entry in found {
        let Ok(name) = entry.with_context(reading)?.file_name().into_string() else {
            bail!("{} holds a name that is not portfwd's", directory.display());
        };
        names.push(name);
    }
    names.sort();
    Ok(names)
}

/// bpffs has no dots in names; interfaces (`eth0.7`) and instances may have them.
pub(super) fn encode(name: &str) -> String {
    name.replace('%', "%25").replace('.', "%2e")
}

/// Inverse of [`encode`].
pub(super) fn decode(name: &str) -> String {
    name.replace("%2e", ".").replace("%25", "%")
}

fn encoded_last(directory: &Path) -> PathBuf {
    match directory.file_name().and_then(|name| name.to_str()) {
        Some(name) => directory.with_file_name(encode(name)),
        None => directory.to_path_buf(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_dots_and_dashes_survive_the_file_system() {
        let pins = Pins::new(Path::new("/sys/fs/bpf/portfwd/lab.1"));
        let path = pins.link("br-lan.%2e7", Hook::Ingress);
        assert_eq!(
            path,
            Path::new("/sys/fs/bpf/portfwd/lab%2e1/v8/links/br-lan%2e%252e7-ingress")
        );
        assert_eq!(decode("br-lan%2e%252e7"), "br-lan.%2e7");
    }
}
