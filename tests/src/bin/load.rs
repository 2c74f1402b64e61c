//! Loads every program of a kernel object, and tells what the verifier of the running kernel makes of each: `cargo xtask vm` runs
//! this on other kernels.

use std::{env, process::ExitCode};

use anyhow::{Context, Result, ensure};
use aya::{
    EbpfLoader,
    programs::{Program, ProgramError},
};
use portfwd_tests::budgets::budgets;

/// How much of the verifier's log is printed: its end has the message and what led to it.
const LOG_LINES: usize = 20;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("error: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

/// Loads the programs of the object whose path is the first argument.
///
/// # Errors
/// When a map cannot be made, or a program is refused.
fn run() -> Result<()> {
    let path = env::args_os()
        .nth(1)
        .context("usage: load OBJECT; `cargo xtask build-ebpf` prints the path of one")?;
    let mut object = EbpfLoader::new()
        .map_max_entries("FLOWS_V4", 16)
        .map_max_entries("FLOWS_V6", 16)
        .map_max_entries("COUNTERS", 16)
        .override_global("AYA_LOG_LEVEL", &0_u8, true)
        .load_file(&path)
        .with_context(|| format!("cannot load {}", path.display()))?;
    let budgets = budgets()?;
    let (mut refused, mut greedy) = (Vec::new(), Vec::new());
    for (name, program) in object.programs_mut() {
        if let Err(cause) = load(program) {
            println!("{name:<16} refused: {}", end_of(&cause));
            refused.push(name.to_owned());
            continue;
        }
        let budget = budgets
            .get(name)
            .with_context(|| format!("{name} has no budget"))?
            .instructions;
        match program.info()?.verified_instruction_count() {
            Some(verified) => {
                println!("{name:<16} {verified:>7} of {budget:>7}");
                if verified > budget {
                    greedy.push(name.to_owned());
                }
            }
            None => println!("{name:<16} loaded"),
        }
    }
    ensure!(
        greedy.is_empty(),
        "this kernel's verifier takes more than the budgets for {}",
        greedy.join(", ")
    );
    ensure!(
        refused.is_empty(),
        "this kernel refuses {}",
        refused.join(", ")
    );
    Ok(())
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    if let Program::Xdp(program) = program {
        program.load()
    } else if let Program::SchedClassifier(program) = program {
        program.load()
    } else {
        Err(ProgramError::UnexpectedProgramType)
    }
}

fn end_of(cause: &ProgramError) -> String {
    let text = cause.to_string();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
