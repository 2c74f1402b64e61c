//! One file: TOML into words, with the place of every mistake and of every rule.

use std::{collections::BTreeMap, ops::Range, path::Path};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    problem::{Place, Problem, Text},
    schema::keys,
};
use crate::{
    daemon::words::GatewayWords,
    failure::Failure,
    ruleset::{Refusal, RuleSpec, RuleWords},
};

/// What a file says.
#[derive(Debug, Default)]
pub struct Document {
    /// `[gateway]`, and where it is.
    pub gateway: Option<(GatewayWords, Place)>,
    /// `[[rule]]`, those that make sense in themselves.
    pub rules: Vec<PlacedRule>,
}

/// A rule of a file.
#[derive(Clone, Debug)]
pub struct PlacedRule {
    /// What it says.
    pub words: RuleWords,
    /// Where it begins.
    place: Place,
    /// Where its keys are.
    keys: BTreeMap<String, Place>,
}

impl PlacedRule {
    /// A refusal, where the key is that it is about.
    pub fn problem(&self, refusal: &Refusal) -> Problem {
        let place = self.keys.get(refusal.key()).unwrap_or(&self.place);
        Problem::new(place.clone(), Failure::from(refusal.clone()))
    }

    /// Where it begins.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// A failure that is about a key; about the rule as a whole if it has no such key.
    pub fn failed(&self, key: &str, failure: Failure) -> Problem {
        let place = self.keys.get(key).unwrap_or(&self.place);
        Problem::new(place.clone(), failure)
    }
}

/// A text while it is taken apart.
struct Reader<'a> {
    text: Text<'a>,
    problems: &'a mut Vec<Problem>,
}

impl Document {
    /// Reads a text, of which `file` is the name; mistakes go to `problems`.
    pub fn parse(text: &str, file: &Path, problems: &mut Vec<Problem>) -> Self {
        let (root, errors) = DeTable::parse_recoverable(text);
        let mut reader = Reader {
            text: Text::new(file.display().to_string(), text),
            problems,
        };
        if !errors.is_empty() {
            // What is left of the rest may be anything.
            for error in errors {
                let span = error.span().unwrap_or_default();
                reader.report(&span, error.message(), "see https://toml.io for the syntax");
            }
            return Self::default();
        }
        let mut document = Self::default();
        for (key, value) in root.into_inner() {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("gateway", DeValue::Table(_)) => {
                    let place = reader.place(&key.span());
                    let words = reader.table("[gateway]", &keys::<GatewayWords>(), value).1;
                    document.gateway = words.map(|words| (words, place));
                }
                ("rule", DeValue::Array(_)) => document.rules = reader.rules(value),
                ("gateway", _) => {
                    reader.report(&key.span(), "gateway is no table", "write [gateway]");
                }
                ("rule", _) => {
                    reader.report(&key.span(), "rule is no list of tables", "write [[rule]]");
                }
                (unknown, _) => {
                    reader.unknown(&key.span(), unknown, &["gateway", "rule"], "a file");
                }
            }
        }
        document
    }
}

impl Reader<'_> {
    fn place(&self, span: &Range<usize>) -> Place {
        self.text.place(span.start)
    }

    fn report(&mut self, span: &Range<usize>, error: &str, hint: &str) {
        let place = self.place(span);
        self.problems.push(Problem::usage(place, error, hint));
    }

    fn unknown(&mut self, span: &Range<usize>, key: &str, known: &[&str], of: &str) {
        let nearest = known
            .iter()
            .map(|known| (strsim::damerau_levenshtein(key, known), *known))
            .min()
            .filter(|(distance, known)| *distance <= 1 + known.len() / 3);
        let hint = match nearest {
            Some((_, known)) => format!("did you mean {known}?"),
            None => format!("{of} has {}", known.join(", ")),
        };
        self.report(span, &format!("{of} has no key {key:?}"), &hint);
    }

    fn rules(&mut self, value: Spanned<DeValue<'_>>) -> Vec<PlacedRule> {
        let DeValue::Array(tables) = value.into_inner() else {
            return Vec::new();
        };
        let mut rules = Vec::new();
        let known = keys::<RuleWords>();
        for table in tables {
            let place = self.place(&table.span());
            if !table.get_ref().is_table() {
                self.report(&table.span(), "a rule is no table", "write [[rule]]");
                continue;
            }
            let (keys, words) = self.table::<RuleWords>("[[rule]]", &known, table);
            let Some(words) = words else { continue };
            let rule = PlacedRule { words, place, keys };
            match RuleSpec::check(&rule.words) {
                Ok(()) => rules.push(rule),
                Err(refusal) => self.problems.push(rule.problem(&refusal)),
            }
        }
        rules
    }

    /// Reads a table whose keys are the fields of a type, as many mistakes as there are: what is
    /// wrong is reported and left out, until the rest can be read or nothing more can be told.
    fn table<T: DeserializeOwned>(
        &mut self,
        name: &str,
        known: &[String],
        value: Spanned<DeValue<'_>>,
    ) -> (BTreeMap<String, Place>, Option<T>) {
        let span = value.span();
        let DeValue::Table(table) = value.into_inner() else {
            return (BTreeMap::new(), None);
        };
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let mut places = BTreeMap::new();
        let mut fields = DeTable::new();
        let mut left_out = Vec::new();
        for (key, value) in table {
            let text = key.get_ref().to_string();
            if known.contains(&text.as_str()) {
                places.insert(text, self.place(&key.span()));
                fields.insert(key, as_text(value));
            } else {
                self.unknown(&key.span(), &text, &known, name);
                left_out.push(text);
            }
        }
        loop {
            let whole = toml::Deserializer::from(Spanned::new(span.clone(), fields.clone()));
            let error = match T::deserialize(whole) {
                Ok(read) if left_out.is_empty() => return (places, Some(read)),
                Ok(_) => return (places, None),
                Err(error) => error,
            };
            let at = error.span().unwrap_or_else(|| span.clone());
            let culprit = fields.iter().find_map(|(key, value)| {
                let within = value.span().start <= at.start && at.end <= value.span().end;
                within.then(|| key.clone())
            });
            match culprit {
                Some(key) => {
                    let text = key.get_ref().to_string();
                    let message = format!("{text}: {}", error.message());
                    self.report(
                        &at,
                        &message,
                        &format!("`portfwd config sample` shows {text}"),
                    );
                    fields.remove(&key);
                    left_out.push(text);
                }
                None => {
                    // A key that is missing because it was wrong has been reported.
                    let is_known = |key: &String| error.message().contains(&format!("`{key}`"));
                    if !left_out.iter().any(is_known) {
                        let message = format!("{name}: {}", error.message());
                        self.report(
                            &(span.start..span.start),
                            &message,
                            "`portfwd config sample` shows one with every key",
                        );
                    }
                    return (places, None);
                }
            }
        }
    }
}

/// A date stands for its text: TOML has a type for it, the command line has not.
fn as_text(value: Spanned<DeValue<'_>>) -> Spanned<DeValue<'_>> {
    let span = value.span();
    match value.get_ref().as_datetime().map(ToString::to_string) {
        Some(date) => Spanned::new(span, DeValue::String(date.into())),
        None => value,
    }
}
