//! Steps of a task: each says its name, what it runs and how long it took.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};

/// Runs a command as a step of its own. It gets no input: nothing here may ask a question.
///
/// # Errors
/// When the command fails; the message has the command line, to repeat it by hand.
pub fn run(name: &str, command: &mut Command) -> Result<()> {
    let line = command_line(command);
    run_as(name, &line, command)
}

/// Like [`run`], for a command that is better told by the command line `line` than by its own.
///
/// # Errors
/// When the command fails.
pub fn run_as(name: &str, line: &str, command: &mut Command) -> Result<()> {
    eprintln!("==> {name}: {line}");
    let start = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {line}"))?;
    let seconds = start.elapsed().as_secs_f64();
    if !status.success() {
        bail!("{name} failed after {seconds:.1} s ({status}): {line}");
    }
    eprintln!("    {name}: ok, {seconds:.1} s");
    Ok(())
}

fn command_line(command: &Command) -> String {
    // By name, as one types it: the path of cargo itself says nothing to the reader.
    let program = command.get_program();
    let program = Path::new(program).file_name().unwrap_or(program);
    std::iter::once(program)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
