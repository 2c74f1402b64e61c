//! Every program stays within its budget of verified instructions and of stack.

use anyhow::{Context, Result, ensure};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use portfwd_tests::budgets::{self, Budget, LIMIT};
use portfwd_tests::stack;

fn load(program: &mut Program) -> Result<(), ProgramError> {
    if let Program::Xdp(program) = program {
        program.load()
    } else if let Program::SchedClassifier(program) = program {
        program.load()
    } else {
        Err(ProgramError::UnexpectedProgramType)
    }
}

/// The object with small tables and without messages, as `portfwd run` loads it but for the sizes.
fn object() -> Result<Ebpf> {
    Ok(EbpfLoader::new()
        .map_max_entries("FLOWS_V4", 16)
        .map_max_entries("FLOWS_V6", 16)
        .map_max_entries("OPENING_V4", 1024)
        .map_max_entries("OPENING_V6", 1024)
        .map_max_entries("COUNTERS", 16)
        .override_global("AYA_LOG_LEVEL", &0_u8, true)
        .load(portfwd::bpf::OBJECT)?)
}

/// A budget so many times what a program takes is one that nobody has looked at. Not less: what one kernel's verifier takes can be half
/// of what another's does.
const ROOM: u32 = 3;

#[test]
fn every_program_loads_within_its_budget_and_every_budget_has_a_program() -> Result<()> {
    let mut left = budgets::budgets()?;
    let mut object = object()?;
    let mut wrong = Vec::new();
    for (name, program) in object.programs_mut() {
        load(program).with_context(|| format!("load {name}"))?;
        let info = program.info()?;
        let verified = info
            .verified_instruction_count()
            .context("the kernel does not tell")?;
        let Budget {
            instructions: budget,
            stack: most,
        } = left
            .remove(name)
            .with_context(|| format!("{name} has no budget"))?;
        let in_use = stack::of(info.id())?;
        println!("{name}: {verified} of {budget}, {in_use} of {most} bytes of stack");
        if in_use > most {
            wrong.push(format!(
                "{name} has {in_use} bytes of stack in use, its budget is {most}"
            ));
        }
        if verified > budget {
            wrong.push(format!(
                "{name} takes {verified} verified instructions, its budget is {budget}"
            ));
        } else if verified < budget / ROOM {
            wrong.push(format!(
                "{name} takes only {verified} verified instructions: lower its budget of {budget}"
            ));
        }
    }
    // A fifth of the kernel's limits is left, whatever a later kernel's verifier makes of it.
    for (name, budget) in budgets::budgets()? {
        ensure!(
            budget.instructions <= LIMIT / 5 * 4 && budget.stack <= stack::LIMIT / 5 * 4,
            "{name}: {budget:?}"
        );
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(left.is_empty(), "budgets without a program: {left:?}");
    Ok(())
}
