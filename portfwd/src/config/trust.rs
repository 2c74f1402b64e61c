//! Whose word a configuration is: who may write to it decides where traffic goes.

use std::{
    fmt,
    fs::Metadata,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use nix::unistd::{getegid, geteuid};

use crate::failure::{Failure, Kind, Result};

const ROOT: u32 = 0;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// Who reads a configuration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    /// Effective user.
    user: u32,
    /// Effective group.
    group: u32,
}

/// Who may write to a file or directory.
#[derive(Clone, Copy, Debug)]
struct Access {
    owner: u32,
    group: u32,
    /// Of `stat(2)`.
    mode: u32,
}

/// Somebody who may and should not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Everybody,
    Group(u32),
    Owner(u32),
}

/// How a file came to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Somebody has named it, and answers for its owner: `sudo portfwd apply FILE` is about a file of one's own.
    Named,
    /// It was there, in a directory of the configuration.
    Found,
}

impl Reader {
    /// This process.
    pub(super) fn this() -> Self {
        Self {
            user: geteuid().as_raw(),
            group: getegid().as_raw(),
        }
    }

    /// Refuses a file or directory that somebody may write to who is neither root nor the reader. What is neither, a pipe or
    /// terminal, is whose it is.
    pub(super) fn check(self, path: &Path, metadata: &Metadata, choice: Choice) -> Result<()> {
        if !metadata.is_file() && !metadata.is_dir() {
            return Ok(());
        }
        let Some(writer) = self.writer(&Access::of(metadata), choice) else {
            return Ok(());
        };
        let path = path.display();
        let error = format!("{writer} may write to {path}, and so decide where traffic goes");
        let command = match writer {
            Writer::Everybody => "chmod o-w",
            Writer::Group(_) => "chmod g-w",
            Writer::Owner(_) => "chown root",
        };
        Err(Failure::new(Kind::Permission, error).hint(format!("`{command} {path}`")))
    }

    /// Who may write to it that should not.
    const fn writer(self, access: &Access, choice: Choice) -> Option<Writer> {
        if access.mode & OTHERS_WRITE != 0 {
            return Some(Writer::Everybody);
        }
        if access.mode & GROUP_WRITES != 0 && access.group != ROOT && access.group != self.group {
            return Some(Writer::Group(access.group));
        }
        match choice {
            Choice::Found if access.owner != ROOT && access.owner != self.user => {
                Some(Writer::Owner(access.owner))
            }
            Choice::Found | Choice::Named => None,
        }
    }
}

impl Access {
    fn of(metadata: &Metadata) -> Self {
        Self {
            owner: metadata.uid(),
            group: metadata.gid(),
            mode: metadata.permissions().mode(),
        }
    }
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everybody => f.write_str("everybody"),
            Self::Group(group) => write!(f, "group {group}"),
            Self::Owner(owner) => write!(f, "user {owner}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: u32 = 1_000;
    const STRANGER: u32 = 2_000;

    /// Who may write to what has that owner, group and mode, and should not.
    fn writer(user: u32, (owner, group, mode): (u32, u32, u32), choice: Choice) -> Option<Writer> {
        let access = Access { owner, group, mode };
        Reader { user, group: user }.writer(&access, choice)
    }

    #[test]
    fn only_root_and_the_reader_decide_where_traffic_goes() {
        for (user, access, expected) in [
            (ROOT, (ROOT, ROOT, 0o644), None),
            (ROOT, (ROOT, ROOT, 0o664), None),
            (ROOT, (ROOT, ROOT, 0o646), Some(Writer::Everybody)),
            (ROOT, (ROOT, ROOT, 0o666), Some(Writer::Everybody)),
            (ROOT, (ROOT, STRANGER, 0o644), None),
            (ROOT, (ROOT, STRANGER, 0o664), Some(Writer::Group(STRANGER))),
            (ROOT, (STRANGER, ROOT, 0o600), Some(Writer::Owner(STRANGER))),
            // Somebody tries a file of his own, with the umask of a group of his own, and one of the machine.
            (USER, (USER, USER, 0o664), None),
            (USER, (ROOT, ROOT, 0o644), None),
            (USER, (USER, STRANGER, 0o664), Some(Writer::Group(STRANGER))),
            (USER, (STRANGER, USER, 0o644), Some(Writer::Owner(STRANGER))),
        ] {
            assert_eq!(
                writer(user, access, Choice::Found),
                expected,
                "{user} reads {access:?}"
            );
        }
    }

    #[test]
    fn whoever_names_a_file_answers_for_its_owner_but_not_for_everybody() {
        let named = |access| writer(ROOT, access, Choice::Named);
        assert_eq!(named((USER, USER, 0o644)), None);
        assert_eq!(named((USER, USER, 0o664)), Some(Writer::Group(USER)));
        assert_eq!(named((USER, USER, 0o666)), Some(Writer::Everybody));
    }
}
