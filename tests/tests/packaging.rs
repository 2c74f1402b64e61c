//! What the package brings beside the program, as far as that can be told without installing it.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portfwd_tests::daemon::binary;
use portfwd_tests::process::run;
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
