//! The configuration: `portfwd.toml` and `conf.d/*.toml`, read whole, with every mistake in its
//! place.
//!
//! The keys of `[gateway]` are the fields of [`GatewayWords`], those of `[[rule]]` the fields of
//! [`RuleWords`]: what the command line takes, a file takes, and the schema is derived from the same
//! types.

mod document;
mod problem;
pub mod schema;
mod trust;
mod write;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use self::trust::{Choice, Reader};
pub use self::{
    document::{Document, PlacedRule},
    problem::{Place, Problem, Problems},
    write::to_toml,
};
use crate::{
    control::protocol::{Applied, RefusedRule},
    daemon::words::GatewayWords,
    failure::{Failure, Kind, Result},
    instance::Instance,
    ruleset::{RuleSpec, RuleWords, Ruleset},
};

/// Name of the main file in a directory of the configuration.
const MAIN: &str = "portfwd.toml";
/// Directory beside it, whose files are read in the order of their names.
const MORE: &str = "conf.d";
/// A file that is longer is none of ours: 32,768 rules take some 4 MiB.
const MAX_FILE: u64 = 16 << 20;

/// A configuration without mistakes in itself.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// `[gateway]`.
    pub gateway: GatewayWords,
    gateway_at: Option<Place>,
    /// `[[rule]]`, in order.
    pub rules: Vec<PlacedRule>,
}

impl Config {
    /// Reads a file alone, or a directory: its `portfwd.toml` and `conf.d/*.toml`. All mistakes are
    /// in the error.
    pub fn read(path: &Path) -> Result<Self, Problems> {
        let (choice, files) = files(path)?;
        let mut problems = Vec::new();
        let mut config = Self::default();
        for file in files {
            let text = read_file(&file, choice)?;
            let mut found = Vec::new();
            let Document { gateway, rules } = Document::parse(&text, &file, &mut found);
            found.sort_by_key(|problem| (problem.place.line, problem.place.column));
            problems.append(&mut found);
            if let Some((words, place)) = gateway {
                match &config.gateway_at {
                    Some(first) => problems.push(Problem::usage(
                        place,
                        format!("[gateway] is in {first} already"),
                        "settings of the gateway are in one file",
                    )),
                    None => {
                        config.gateway = words;
                        config.gateway_at = Some(place);
                    }
                }
            }
            config.rules.extend(rules);
        }
        conflicts(&config.rules, &mut problems);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(Problems::of(path, problems))
        }
    }

    /// Whether a daemon could be started with the settings, if there are any.
    pub fn check_gateway(&self, instance: &Instance, path: &Path) -> Result<(), Problems> {
        let Some(place) = &self.gateway_at else {
            return Ok(());
        };
        match self.gateway.options(instance.clone()) {
            Ok(_) => Ok(()),
            Err(failure) => {
                let problem = Problem::new(place.clone(), failure);
                Err(Problems::of(path, vec![problem]))
            }
        }
    }

    /// Mistakes among what was refused of it.
    pub fn refused(&self, path: &Path, applied: &Applied) -> Result<(), Problems> {
        let problem = |refused: &RefusedRule| {
            let rule = self.rules.get(refused.index)?;
            Some(rule.failed(&refused.key, refused.failure.clone()))
        };
        let problems: Vec<_> = applied.refused.iter().filter_map(problem).collect();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Problems::of(path, problems))
        }
    }

    /// The rules in words.
    pub fn words(&self) -> Vec<RuleWords> {
        self.rules.iter().map(|rule| rule.words.clone()).collect()
    }
}

/// Rules that are in each other's way, or have one name.
fn conflicts(rules: &[PlacedRule], problems: &mut Vec<Problem>) {
    let mut ruleset = Ruleset::default();
    let place = |id: u32| {
        let index = usize::try_from(id).ok()?.checked_sub(1)?;
        Some(rules.get(index)?.place())
    };
    for (id, rule) in (1..).zip(rules) {
        // What makes no sense in itself has been told.
        let Ok(spec) = RuleSpec::on_paper(&rule.words) else {
            continue;
        };
        let refusal = match ruleset.check(&spec, &[]) {
            Ok(()) => {
                ruleset.insert(id, spec);
                continue;
            }
            Err(refusal) => refusal,
        };
        let other = refusal.other_rule().and_then(place);
        problems.push(match other {
            Some(other) => {
                let failure = Failure::new(refusal.kind(), refusal.among(other));
                rule.failed(refusal.key(), failure)
            }
            None => rule.problem(&refusal),
        });
    }
}

/// The files of a configuration, in the order in which they are read, and how they were chosen.
fn files(path: &Path) -> Result<(Choice, Vec<PathBuf>)> {
    let failed = |path: &Path, error: &io::Error| {
        if error.kind() == io::ErrorKind::NotFound {
            let missing = format!("there is no configuration at {}", path.display());
            return Failure::new(Kind::NotFound, missing)
                .hint("`portfwd config sample` prints one with every key");
        }
        Failure::during(format!("read {}", path.display()), error)
    };
    let metadata = fs::metadata(path).map_err(|error| failed(path, &error))?;
    if !metadata.is_dir() {
        return Ok((Choice::Named, vec![path.to_owned()]));
    }
    // Who may write to a directory may put another file in.
    Reader::this().check(path, &metadata, Choice::Found)?;
    let main = path.join(MAIN);
    let mut files = Vec::new();
    if main.exists() {
        files.push(main.clone());
    }
    let more = path.join(MORE);
    match fs::read_dir(&more) {
        Ok(entries) => {
            let metadata = fs::metadata(&more).map_err(|error| failed(&more, &error))?;
            Reader::this().check(&more, &metadata, Choice::Found)?;
            let mut found = Vec::new();
            for entry in entries {
                let entry = entry.map_err(|error| failed(&more, &error))?.path();
                let is_hidden = entry
                    .file_name()
                    .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
                if !is_hidden
                    && entry
                        .extension()
                        .is_some_and(|extension| extension == "toml")
                {
                    found.push(entry);
                }
            }
            found.sort();
            files.extend(found);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&more, &error)),
    }
    if files.is_empty() {
        return Err(failed(&main, &io::ErrorKind::NotFound.into()));
    }
    Ok((Choice::Found, files))
}

fn read_file(path: &Path, choice: Choice) -> Result<String> {
    let doing = || format!("read {}", path.display());
    let file = File::open(path).map_err(|error| Failure::during(doing(), &error))?;
    // Of what is open, not of what has the name by then.
    let metadata = file
        .metadata()
        .map_err(|error| Failure::during(doing(), &error))?;
    Reader::this().check(path, &metadata, choice)?;
    let mut text = String::new();
    let length = file
        .take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(|error| {
            if error.kind() == io::ErrorKind::InvalidData {
                return Failure::new(Kind::Usage, format!("{} is not UTF-8", path.display()))
                    .hint("a configuration is a text file in TOML");
            }
            Failure::during(doing(), &error)
        })?;
    if length as u64 > MAX_FILE {
        return Err(Failure::new(
            Kind::Usage,
            format!("{} is longer than {} MiB", path.display(), MAX_FILE >> 20),
        )
        .hint("is it the right file?"));
    }
    Ok(text)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
