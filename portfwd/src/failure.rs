//! What a command ends with when it does not succeed: one line, a hint, and an exit code.

use std::{fmt, io, path::Path, process::ExitCode};

use serde::{Deserialize, Serialize};

/// The kinds of failure that a script can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Something went wrong that is none of the others.
    Failed,
    /// The arguments make no sense.
    Usage,
    /// No daemon runs for this instance.
    NotRunning,
    /// The caller may not do this.
    Permission,
    /// Nothing has that id or name.
    NotFound,
    /// Another rule or name is in the way.
    Conflict,
}

/// A failure as users see it, on the terminal and over HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What could not be done, and why: one line.
    pub error: String,
    /// What to do about it, best a command to type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// For scripts.
    pub kind: Kind,
}

/// The result of everything a user can ask for.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Kind {
    /// The process's exit code.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotRunning => 3,
            Self::Permission => 4,
            Self::NotFound => 5,
            Self::Conflict => 6,
        }
    }
}

impl From<Kind> for ExitCode {
    fn from(kind: Kind) -> Self {
        Self::from(kind.exit_code())
    }
}

impl Failure {
    /// A failure without hint.
    pub fn new(kind: Kind, error: impl fmt::Display) -> Self {
        Self {
            error: one_line(&error.to_string()),
            hint: None,
            kind,
        }
    }

    /// The same failure with a hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// What to do about an error that a file or directory causes, if that can be told.
    pub fn advice(path: &Path, error: &io::Error) -> Option<String> {
        use io::ErrorKind;
        let path = path.display();
        let advice = [
            (
                &[ErrorKind::StorageFull, ErrorKind::QuotaExceeded][..],
                format!("`df {path}` shows what is left of the disk"),
            ),
            (
                &[ErrorKind::ReadOnlyFilesystem],
                format!("`findmnt --target {path}` shows how it is mounted"),
            ),
            (
                &[ErrorKind::PermissionDenied],
                format!("be root; `ls -ld {path}` shows whose it is"),
            ),
            (
                &[ErrorKind::AlreadyExists, ErrorKind::NotADirectory],
                format!("`ls -ld {path}` shows what is in the place of a directory"),
            ),
        ];
        advice
            .into_iter()
            .find_map(|(kinds, advice)| kinds.contains(&error.kind()).then_some(advice))
    }

    /// From an error of the system or a library, with what was being done.
    pub fn during(doing: impl fmt::Display, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = format!("{doing}: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Many errors print their cause themselves.
            if !text.ends_with(&cause_text) {
                text = format!("{text}: {cause_text}");
            }
            source = cause.source();
        }
        Self::new(kind_of(error), text)
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Permission errors, wherever they are in the chain, have an exit code of their own.
fn kind_of(error: &(dyn std::error::Error + 'static)) -> Kind {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
        {
            return Kind::Permission;
        }
        cause = error.source();
    }
    Kind::Failed
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => Self::new(kind_of(error.as_ref()), format!("{error:#}")),
        }
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)?;
        match &self.hint {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn permission_is_seen_through_every_wrapping() {
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let wrapped = Err::<(), _>(denied)
            .context("open the pins")
            .context("list rules")
            .unwrap_err();
        let failure = Failure::from(wrapped);
        assert_eq!(failure.kind, Kind::Permission);
        assert_eq!(
            failure.error,
            "list rules: open the pins: permission denied"
        );
    }

    #[test]
    fn a_failure_survives_anyhow_and_json() {
        let failure = Failure::new(Kind::Conflict, "taken\nby another").hint("portfwd remove 3");
        assert_eq!(Failure::from(anyhow::Error::new(failure.clone())), failure);
        let json = serde_json::to_value(&failure).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"error": "taken by another", "hint": "portfwd remove 3", "kind": "conflict"})
        );
        assert_eq!(serde_json::from_value::<Failure>(json).unwrap(), failure);
        assert_eq!(
            failure.to_string(),
            "taken by another (hint: portfwd remove 3)"
        );
    }
}
