//! Every counter of a reason has its line in the operator's manual.

use std::collections::BTreeMap;

use portfwd_common::datapath::verdict::{DropReason, Event, PassReason};

const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// First and second cell of the rows of the table under a heading.
fn table(heading: &str) -> BTreeMap<&'static str, &'static str> {
    let section = OPERATIONS
        .split("\n## ")
        .find(|section| section.lines().next() == Some(heading))
        .unwrap_or_else(|| panic!("docs/operations.md has no heading {heading:?}"));
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let (Some(name), Some(second)) = (cells.next(), cells.next()) else {
            panic!("{line:?} is no row");
        };
        assert!(
            cells.clone().any(|cell| !cell.is_empty()),
            "{name} has an empty line"
        );
        assert_eq!(rows.insert(name.trim_matches('`'), second), None, "{name}");
    }
    rows
}

/// Names that are in one of two lists and not in the other.
fn expect_same<'a>(heading: &str, names: impl Iterator<Item = &'a str>) {
    let mut documented: Vec<_> = table(heading).into_keys().collect();
    let mut names: Vec<_> = names.collect();
    documented.sort_unstable();
    names.sort_unstable();
    assert_eq!(documented, names, "docs/operations.md, {heading:?}");
}

#[test]
fn every_reason_and_event_has_its_line_in_the_manual_and_nothing_else_has() {
    let passes = PassReason::ALL.iter().map(|reason| reason.name());
    expect_same("Why packets are passed", passes);
    let drops = DropReason::ALL.iter().map(|reason| reason.name());
    expect_same("Why packets are dropped", drops);
    expect_same("Events", Event::ALL.iter().map(|event| event.name()));
}

/// The datapath's messages in the log give the number only.
#[test]
fn every_drop_reason_has_its_number_in_the_manual() {
    let numbers = table("Why packets are dropped");
    for reason in DropReason::ALL {
        let number = reason.index().to_string();
        assert_eq!(numbers.get(reason.name()), Some(&number.as_str()));
    }
}

#[test]
fn every_finding_of_doctor_has_its_line_and_severity_in_the_manual() {
    let names = crate::diagnose::NAMES;
    expect_same("What doctor finds", names.iter().map(|(name, _)| *name));
    let severities = table("What doctor finds");
    for (name, severity) in names {
        assert_eq!(severities.get(name), Some(&severity.word()), "{name}");
    }
}
