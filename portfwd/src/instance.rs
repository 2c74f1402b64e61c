//! An instance: one gateway on this machine, with pins, socket and state file of its own.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

use crate::failure::{Failure, Kind, Result};

/// Name of the instance when neither a namespace nor `--instance` is given.
const DEFAULT_NAME: &str = "default";
const MAX_NAME: usize = 64;

const PINS: &str = "/sys/fs/bpf/portfwd";
const SOCKETS: &str = "/run/portfwd";
const STATE: &str = "/var/lib/portfwd";
const CONFIG: &str = "/etc/portfwd";
const NAMESPACES: &str = "/run/netns";

/// The name of an instance, from which all its paths follow, and the network namespace it lives in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    name: String,
    netns: Option<String>,
}

impl Instance {
    /// The instance `name`; without one, that of the network namespace; without that, the default
    /// one.
    pub fn new(name: Option<&str>, netns: Option<&str>) -> Result<Self> {
        if let Some(netns) = netns {
            check("network namespace", netns)?;
        }
        let name = name.or(netns).unwrap_or(DEFAULT_NAME);
        check("instance", name)?;
        Ok(Self {
            name: name.to_owned(),
            netns: netns.map(str::to_owned),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Directory of its pins.
    pub fn pins(&self) -> PathBuf {
        Path::new(PINS).join(&self.name)
    }

    /// Socket of its daemon.
    pub fn socket(&self) -> PathBuf {
        Path::new(SOCKETS).join(format!("{}.sock", self.name))
    }

    /// File of its rules.
    pub fn state_file(&self) -> PathBuf {
        Path::new(STATE).join(format!("{}.redb", self.name))
    }

    /// Directory of its configuration.
    pub fn config(&self) -> PathBuf {
        let all = Path::new(CONFIG);
        if self.name == DEFAULT_NAME {
            all.to_owned()
        } else {
            all.join(&self.name)
        }
    }

    /// The command line that reaches this instance, for hints: `portfwd`, `portfwd -n lab`,
    /// `portfwd --instance b`.
    pub fn command(&self) -> String {
        let mut command = "portfwd".to_owned();
        if let Some(netns) = &self.netns {
            command.push_str(&format!(" -n {netns}"));
        }
        if self.name != self.netns.as_deref().unwrap_or(DEFAULT_NAME) {
            command.push_str(&format!(" --instance {}", self.name));
        }
        command
    }

    /// What goes before a command of another program to have it run in the instance's network
    /// namespace.
    pub fn prefix(&self) -> String {
        self.netns
            .as_ref()
            .map_or_else(String::new, |netns| format!("ip netns exec {netns} "))
    }

    /// The file of the instance's network namespace, if it names one.
    pub fn open_netns(&self) -> Result<Option<File>> {
        let Some(netns) = &self.netns else {
            return Ok(None);
        };
        let path = Path::new(NAMESPACES).join(netns);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Failure::new(
                Kind::NotFound,
                format!("network namespace {netns} does not exist"),
            )
            .hint("`ip netns` lists those that do")),
            Err(error) => Err(Failure::during(format!("open {}", path.display()), &error)),
        }
    }

    /// Moves the calling thread into the instance's network namespace, if it names one. Threads
    /// started from here on are in it too; mounts stay the caller's, so `/sys/fs/bpf` is the
    /// host's.
    pub fn enter_netns(&self) -> Result<()> {
        let Some(file) = self.open_netns()? else {
            return Ok(());
        };
        setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| {
            Failure::during(
                format!("enter the network namespace of {}", self.name),
                &std::io::Error::from(errno),
            )
            .hint("run it as root")
        })
    }
}

/// Names become file names: no separators, nothing hidden.
fn check(what: &str, name: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty()
        && name.len() <= MAX_NAME
        && name.chars().all(legal)
        && !name.starts_with(['.', '-'])
    {
        return Ok(());
    }
    Err(
        Failure::new(Kind::Usage, format!("{what} name {name:?} is not legal")).hint(format!(
            "letters, digits and . _ -, at most {MAX_NAME}, beginning with a letter, a digit or _"
        )),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_given_or_the_namespaces_or_default() {
        for (name, netns, expected, command) in [
            (None, None, "default", "portfwd"),
            (None, Some("lab"), "lab", "portfwd -n lab"),
            (Some("b"), Some("lab"), "b", "portfwd -n lab --instance b"),
            (Some("b"), None, "b", "portfwd --instance b"),
        ] {
            let instance = Instance::new(name, netns).unwrap();
            assert_eq!(instance.name(), expected);
            assert_eq!(instance.command(), command);
            assert_eq!(
                instance.socket(),
                Path::new(SOCKETS).join(format!("{expected}.sock"))
            );
        }
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "../etc", "a/b", "-n", "a b", &"x".repeat(65)] {
            assert_eq!(
                Instance::new(Some(name), None).unwrap_err().kind,
                Kind::Usage,
                "{name:?}"
            );
            assert_eq!(
                Instance::new(None, Some(name)).unwrap_err().kind,
                Kind::Usage,
                "{name:?}"
            );
        }
    }
}
