//! How words of the command line go on, for shells: the words of this machine and of its rules. What cannot be had, because
//! no daemon runs or because the user may not ask it, is left out.

use std::{env, ffi::OsString, fs, iter, time::Duration};

use clap_complete::CompletionCandidate;
use tokio::time::timeout;

use crate::{
    control::{client::Client, protocol::RuleReport},
    failure::Result,
    instance::Instance,
};

/// A user who waits for a completion does not wait longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Names of rules, and ids of those that have none.
pub fn rules() -> Vec<CompletionCandidate> {
    let rules = instance(env::args_os()).and_then(|instance| {
        let mut rules = Vec::new();
        super::block_on(async {
            let asked = timeout(PATIENCE, async {
                let mut client = Client::connect(&instance).await?;
                client.get::<Vec<RuleReport>>("/v1/rules").await
            });
            if let Ok(answer) = asked.await {
                rules = answer?;
            }
            Ok(())
        })?;
        Ok(rules)
    });
    rules
        .unwrap_or_default()
        .into_iter()
        .map(|rule| {
            let what = format!("{} {} -> {}", rule.proto, rule.listen, rule.target);
            let word = rule.name.unwrap_or_else(|| rule.id.to_string());
            CompletionCandidate::new(word).help(Some(what.into()))
        })
        .collect()
}

/// Interfaces of this machine.
pub fn interfaces() -> Vec<CompletionCandidate> {
    names("/sys/class/net")
}

/// Named network namespaces.
pub fn namespaces() -> Vec<CompletionCandidate> {
    names("/run/netns")
}

fn names(directory: &str) -> Vec<CompletionCandidate> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    names.sort();
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// The instance that a command line is about, as far as it is written.
fn instance(words: impl Iterator<Item = OsString>) -> Result<Instance> {
    let words: Vec<_> = words
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let value = |options: [&str; 2]| {
        let following = words.iter().skip(1).chain(iter::once(&words[0]));
        words.iter().zip(following).find_map(|(word, next)| {
            let [short, long] = options;
            if word == short || word == long {
                return Some(next.as_str());
            }
            word.strip_prefix(long)?.strip_prefix('=')
        })
    };
    Instance::new(
        value(["--instance", "--instance"]),
        value(["-n", "--netns"]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instance_is_the_one_that_the_line_names_so_far() {
        for (line, expected) in [
            ("portfwd -- portfwd remove", "default"),
            ("portfwd -- portfwd -n lab remove", "lab"),
            ("portfwd -- portfwd remove --netns=lab", "lab"),
            ("portfwd -- portfwd remove --instance b -n lab", "b"),
        ] {
            let words = line.split(' ').map(OsString::from);
            assert_eq!(instance(words).unwrap().name(), expected, "{line}");
        }
    }
}
