//! The benchmark runs: what it measures nobody judges here.

use std::process::Command;

use anyhow::{Result, ensure};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::process::output_within;

/// Seen once the programs knew of frames in several buffers: the generator, which did not, was not allowed to call them.
#[test]
fn the_hot_path_can_be_measured_by_itself() -> Result<()> {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bench"));
    let output = output_within(
        bench.args(["program", "--rounds", "1", "--runs", "1000"]),
        6 * PATIENCE,
    )?;
    let text = String::from_utf8(output.stdout)?;
    let errors = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{text}\n{errors}");
    for shown in ["floor", "portfwd xdp", "portfwd_tc4"] {
        ensure!(text.contains(shown), "no {shown:?} in\n{text}");
    }
    Ok(())
}
