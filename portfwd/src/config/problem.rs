//! Mistakes in a configuration, each with its place.

use std::{fmt, path::Path};

use serde::Serialize;

use crate::failure::{Failure, Kind};

/// Where in which file; lines and columns count from 1, columns in characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file as it was named.
    pub file: String,
    /// Its line.
    pub line: usize,
    /// Its column.
    pub column: usize,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where it is.
    #[serde(flatten)]
    pub place: Place,
    /// What is wrong.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// For scripts.
    pub kind: Kind,
}

/// Why a configuration is not taken.
#[derive(Clone, Debug)]
pub struct Problems {
    /// The whole, as a command ends with it.
    pub failure: Failure,
    /// Every mistake; none if the configuration could not be read at all.
    pub list: Vec<Problem>,
}

/// A text, by lines.
#[derive(Debug)]
pub(super) struct Text<'a> {
    file: String,
    text: &'a str,
    /// Where each line begins.
    lines: Vec<usize>,
}

impl<'a> Text<'a> {
    pub(super) fn new(file: String, text: &'a str) -> Self {
        let newlines = text.match_indices('\n').map(|(newline, _)| newline + 1);
        Self {
            file,
            text,
            lines: std::iter::once(0).chain(newlines).collect(),
        }
    }

    /// The place of a byte.
    pub(super) fn place(&self, offset: usize) -> Place {
        let line = self.lines.partition_point(|start| *start <= offset);
        let start = line.checked_sub(1).and_then(|line| self.lines.get(line));
        let before = start.and_then(|start| self.text.get(*start..offset));
        Place {
            file: self.file.clone(),
            line,
            column: before.map_or(0, |before| before.chars().count()) + 1,
        }
    }
}

impl Problem {
    /// What makes no sense.
    pub(super) fn usage(place: Place, error: impl fmt::Display, hint: impl Into<String>) -> Self {
        Self::new(place, Failure::new(Kind::Usage, error).hint(hint))
    }

    /// A failure that is about a place.
    pub fn new(place: Place, failure: Failure) -> Self {
        let Failure { error, hint, kind } = failure;
        Self {
            place,
            error,
            hint,
            kind,
        }
    }
}

impl Problems {
    /// Of a configuration that has at least one.
    pub fn of(path: &Path, list: Vec<Problem>) -> Self {
        let kind = match list.split_first() {
            Some((first, rest)) if rest.iter().all(|problem| problem.kind == first.kind) => {
                first.kind
            }
            Some(_) | None => Kind::Usage,
        };
        let count = match list.len() {
            1 => "1 mistake".to_owned(),
            n => format!("{n} mistakes"),
        };
        let failure = Failure::new(kind, format!("{} has {count}", path.display()))
            .hint("nothing was changed; `portfwd check` looks again");
        Self { failure, list }
    }
}

impl From<Failure> for Problems {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            list: Vec::new(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.error)?;
        match &self.hint {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}
