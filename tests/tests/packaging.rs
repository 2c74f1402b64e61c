//! What the package brings beside the program, as far as that can be told without installing it.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portfwd_tests::daemon::binary;
use portfwd_tests::process::{run, run_for_text};
use portfwd_tests::unit;

/// `systemd-analyze security` calls 3.0 the end of "OK"; in tenths.
const EXPOSURE: &str = "30";

#[test]
fn the_unit_is_confined() -> Result<()> {
    let mut analyze = Command::new("systemd-analyze");
    analyze
        .args(["security", "--offline=true", "--no-pager"])
        .arg(format!("--threshold={EXPOSURE}"))
        .arg(unit::PATH);
    run(&mut analyze).map(drop)
}

#[test]
fn the_unit_is_well_formed() -> Result<()> {
    // With a program that is there already.
    let source = fs::read_to_string(unit::PATH).context("read the unit")?;
    let binary = binary()?.canonicalize()?;
    let text = source.replace("/usr/bin/portfwd", &binary.display().to_string());
    ensure!(text != source, "the unit does not start /usr/bin/portfwd");
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("portfwd.service");
    fs::write(&path, text)?;
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).arg(&path);
    let output = run(&mut verify)?;
    let warnings = String::from_utf8(output.stderr)?;
    ensure!(!warnings.contains("portfwd"), "{warnings}");
    Ok(())
}

#[test]
fn every_command_has_a_manual_page_that_says_what_its_help_says() -> Result<()> {
    let directory = tempfile::tempdir()?;
    run(Command::new(env!("CARGO_BIN_EXE_man_pages")).arg(directory.path()))?;
    let mut portfwd = portfwd::cli::command();
    portfwd.build();
    let commands: Vec<_> = portfwd
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .chain([&portfwd])
        .collect();
    ensure!(commands.len() > 5, "only {} commands", commands.len());
    for command in commands {
        let name = command.get_display_name().unwrap_or("portfwd");
        let path = directory.path().join(format!("{name}.1"));
        run(Command::new("mandoc")
            .args(["-T", "lint", "-W", "error"])
            .arg(&path))?;
        let page = run_for_text(
            Command::new("mandoc")
                .args(["-T", "ascii", "-O", "width=200"])
                .arg(&path),
        )?;
        // Bold letters are printed twice, one over the other.
        let mut plain = String::new();
        for letter in page.chars() {
            if letter == '\u{8}' {
                plain.pop();
            } else {
                plain.push(letter);
            }
        }
        let options = command
            .get_arguments()
            .filter_map(clap::Arg::get_long)
            .map(|long| format!("--{long}"));
        let examples = command
            .get_after_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let examples = examples
            .lines()
            .filter(|line| line.starts_with("  portfwd"))
            .map(|line| line.trim().to_string())
            .collect::<Vec<_>>();
        for expected in options.chain(examples) {
            ensure!(plain.contains(&expected), "{name}.1 lacks {expected:?}");
        }
    }
    Ok(())
}
