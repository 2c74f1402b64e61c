//! One daemon per instance.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use crate::{
    failure::{Failure, Kind},
    instance::Instance,
};

/// Held while the daemon runs. The kernel lets it go when the process ends, however it ends; the file stays.
pub(super) struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Refused while another daemon runs.
    pub(super) fn take(instance: &Instance) -> Result<Self> {
        let path = instance.socket().with_extension("lock");
        let locking = || format!("cannot lock {}", path.display());
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(locking)?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((file, Errno::EWOULDBLOCK)) => return Err(is_running(instance, file).into()),
            Err((_, errno)) => return Err(errno).with_context(locking),
        };
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .with_context(locking)?;
        Ok(Self { _file: file })
    }
}

fn is_running(instance: &Instance, mut file: File) -> Failure {
    let mut pid = String::new();
    // The process id is a courtesy: without it the message says the rest.
    let by = match file.read_to_string(&mut pid) {
        Ok(_) if !pid.trim().is_empty() => format!(" (pid {})", pid.trim()),
        Ok(_) | Err(_) => String::new(),
    };
    Failure::new(
        Kind::Conflict,
        format!(
            "a daemon of instance {} is running already{by}",
            instance.name()
        ),
    )
    .hint(format!(
        "`{} status` shows it; --instance names another",
        instance.command()
    ))
}
