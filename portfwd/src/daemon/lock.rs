//! One daemon per instance.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
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

/// Held while the daemon runs, and while everything is detached. The kernel lets it go when the
/// process ends, however it ends; the file stays.
pub(crate) struct Lock {
    file: Flock<File>,
    path: PathBuf,
}

impl Lock {
    /// Refused while another daemon runs.
    pub(crate) fn take(instance: &Instance) -> Result<Self> {
        let path = instance.socket().with_extension("lock");
        let locking = || format!("cannot lock {}", path.display());
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(|error| {
                refused(
                    &format!("cannot make {}", directory.display()),
                    directory,
                    &error,
                )
            })?;
        }
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|error| refused(&locking(), &path, &error))?;
            let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((file, Errno::EWOULDBLOCK)) => return Err(is_running(instance, file).into()),
                Err((_, errno)) => return Err(errno).with_context(locking),
            };
            // Whoever held it may have removed the file since it was opened: then this lock is
            // not the one that others see.
            if !is_at(&file, &path).with_context(locking)? {
                continue;
            }
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()))
                .with_context(locking)?;
            return Ok(Self { file, path });
        }
    }

    /// Removes the file and lets go.
    pub(crate) fn remove(self) -> Result<()> {
        fs::remove_file(&self.path)
            .with_context(|| format!("cannot remove {}", self.path.display()))?;
        drop(self.file);
        Ok(())
    }
}

fn refused(doing: &str, path: &Path, error: &io::Error) -> Failure {
    let failure = Failure::during(doing, error);
    Failure {
        hint: Failure::advice(path, error),
        ..failure
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
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
