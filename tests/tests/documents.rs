//! The documents name tests and files that are there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

const NAT_BEHAVIOUR: &str = "docs/nat-behaviour.md";

fn root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the package is a folder of the workspace")
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// What stands between backticks in a line.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Whether `text` is like `PAR-01`: three letters or digits, two digits.
fn is_row_id(text: &str) -> bool {
    text.split_once('-').is_some_and(|(group, number)| {
        group.len() == 3
            && group
                .chars()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit())
            && number.len() == 2
            && number.chars().all(|c| c.is_ascii_digit())
    })
}

/// Checks that `FILE::NAME` is a test.
fn expect_test(named: &str) -> Result<()> {
    let (file, name) = named
        .split_once("::")
        .with_context(|| format!("{named} is not FILE::TEST"))?;
    let source = read(&root()?.join(file))?;
    let needle = format!("fn {name}(");
    let (before, _) = source
        .split_once(&needle)
        .with_context(|| format!("{file} has no function {name}"))?;
    // Between the attribute and the name are only other attributes, and for a property its comment.
    let is_test = before
        .rsplit("\n\n")
        .next()
        .is_some_and(|paragraph| paragraph.contains("#[test]") || paragraph.contains("#[rstest]"));
    ensure!(is_test, "{named} is not a test");
    Ok(())
}

/// What a line is about.
fn row_of(line: &str) -> &str {
    line.split('|').nth(1).unwrap_or_default().trim()
}

/// Sections of the document by their titles, with the lines that answer a row.
fn sections(text: &str) -> Vec<(&str, Vec<&str>)> {
    text.split("\n## ")
        .map(|section| {
            let title = section.lines().next().unwrap_or_default();
            let answers = section.lines().filter(|line| is_row_id(row_of(line)));
            (title, answers.collect())
        })
        .collect()
}

#[test]
fn every_row_that_is_claimed_is_there_once_and_names_tests_that_exist() -> Result<()> {
    let text = read(&root()?.join(NAT_BEHAVIOUR))?;
    let mut rows = BTreeSet::new();
    let claims = sections(&text)
        .into_iter()
        .filter(|(title, _)| title.starts_with("Holds"))
        .flat_map(|(_, lines)| lines);
    for line in claims {
        let id = row_of(line);
        ensure!(rows.insert(id), "row {id} is there twice");
        let tests: Vec<_> = quoted(line).filter(|name| name.contains("::")).collect();
        ensure!(!tests.is_empty(), "row {id} names no test");
        for test in tests {
            expect_test(test).with_context(|| format!("row {id}"))?;
        }
    }
    ensure!(rows.len() > 50, "only {} rows were found", rows.len());
    Ok(())
}

/// The groups that the document answers as a whole, and how many rows they have, from its own table.
fn groups(text: &str) -> Result<Vec<(&str, u32)>> {
    let mut groups = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, group, rows, _, _] = cells[..] else {
            continue;
        };
        if group.len() == 3 && rows.parse::<u32>().is_ok() {
            groups.push((group, rows.parse()?));
        }
    }
    ensure!(groups.len() == 14, "{} groups were found", groups.len());
    Ok(groups)
}

#[test]
fn every_row_of_every_group_has_one_answer() -> Result<()> {
    let text = read(&root()?.join(NAT_BEHAVIOUR))?;
    let mut missing: BTreeSet<_> = groups(&text)?
        .into_iter()
        .flat_map(|(group, rows)| (1..=rows).map(move |row| format!("{group}-{row:02}")))
        .collect();
    ensure!(missing.len() == 311, "{} rows are asked for", missing.len());
    for (section, lines) in sections(&text) {
        for line in lines {
            let id = row_of(line);
            ensure!(
                missing.remove(id) || id.starts_with("CTL-"),
                "row {id} in {section:?} is there twice, or in no group"
            );
        }
    }
    ensure!(missing.is_empty(), "no answer: {missing:?}");
    Ok(())
}

/// Rows that hold, and not only in part.
fn rows_that_hold(text: &str) -> BTreeSet<&str> {
    sections(text)
        .into_iter()
        .filter(|(title, _)| *title == "Holds")
        .flat_map(|(_, lines)| lines)
        .map(row_of)
        .collect()
}

/// Each of them names a test, as another test here sees to.
#[test]
fn most_rows_hold() -> Result<()> {
    const AT_LEAST: usize = 250;
    let text = read(&root()?.join(NAT_BEHAVIOUR))?;
    let hold = rows_that_hold(&text).len();
    ensure!(hold >= AT_LEAST, "only {hold} rows hold");
    Ok(())
}

/// A gate of the document.
struct Gate<'a> {
    number: usize,
    rows: Vec<&'a str>,
    today: &'a str,
}

impl<'a> Gate<'a> {
    /// From a line of the table, if it is one.
    fn of(line: &'a str) -> Option<Self> {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, number, rows, _, today, _] = cells[..] else {
            return None;
        };
        Some(Self {
            number: number.parse().ok()?,
            rows: rows.split(", ").collect(),
            today,
        })
    }

    /// Whether it is said to be met, and nothing is said against it.
    fn is_met(&self) -> bool {
        let has = |word| {
            let mut words = self.today.split(|c: char| !c.is_alphabetic());
            words.any(|other| other == word)
        };
        has("met") && !has("but") && !has("not")
    }
}

#[test]
fn a_gate_is_met_without_a_but_only_where_all_its_rows_hold() -> Result<()> {
    let text = read(&root()?.join(NAT_BEHAVIOUR))?;
    let (_, table) = text
        .split_once("\n## The 24 gates\n")
        .context("there are no gates")?;
    let hold = rows_that_hold(&text);
    let gates: Vec<_> = table.lines().filter_map(Gate::of).collect();
    let numbers: Vec<_> = gates.iter().map(|gate| gate.number).collect();
    ensure!(numbers == (1..=24).collect::<Vec<_>>(), "gates {numbers:?}");
    for gate in &gates {
        for row in &gate.rows {
            ensure!(
                is_row_id(row),
                "gate {} rests on {row:?}, which is no row",
                gate.number
            );
            ensure!(
                !gate.is_met() || hold.contains(row),
                "gate {} is said to be met, and {row} does not hold",
                gate.number
            );
        }
    }
    Ok(())
}

fn documents() -> Result<Vec<PathBuf>> {
    let root = root()?;
    let mut documents = Vec::new();
    for folder in [root.to_owned(), root.join("docs"), root.join("docs/design")] {
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                documents.push(path);
            }
        }
    }
    Ok(documents)
}

#[test]
fn every_link_between_documents_leads_somewhere() -> Result<()> {
    let mut links = 0;
    for document in documents()? {
        let folder = document.parent().context("a file is in a folder")?;
        for link in read(&document)?.split("](").skip(1) {
            let Some((target, _)) = link.split_once(')') else {
                bail!("a link in {} does not end", document.display());
            };
            if target.contains("://") || target.starts_with('#') {
                continue;
            }
            let file = target.split('#').next().unwrap_or_default();
            ensure!(
                folder.join(file).exists(),
                "{} links to {target}, which is not there",
                document.display()
            );
            links += 1;
        }
    }
    ensure!(links > 10, "only {links} links were found");
    Ok(())
}
