//! How much stack a program takes, read from its instructions as the kernel has them.

use std::collections::BTreeMap;
use std::process::Command;

use crate::process::run_for_text;
use anyhow::{Context, Result, ensure};

/// The most that a program may have in use (`MAX_BPF_STACK`), bytes.
pub const LIMIT: u64 = 512;
/// Kernels before 6.8 round the frame of a function up to this, in bytes; later ones to half of it, where programs are compiled to
/// machine code (`round_up_stack_depth`).
const ROUNDED: u64 = 32;

/// A function of a program.
#[derive(Debug, Default)]
struct Function {
    /// Bytes below its frame pointer.
    frame: u64,
    /// Numbers of the first instructions of those that it calls, or has called.
    callees: Vec<i64>,
}

/// The most bytes of stack that a loaded program can have in use, with all functions that call each other, on any kernel.
///
/// # Errors
/// If bpftool cannot show the program.
pub fn of(program: u32) -> Result<u64> {
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["prog", "dump", "xlated", "id", &program.to_string()]);
    depth(&run_for_text(&mut bpftool)?)
}

fn depth(dump: &str) -> Result<u64> {
    let mut functions: BTreeMap<i64, Function> = BTreeMap::new();
    let mut begins = true;
    let mut copied = None;
    for line in dump.lines() {
        let Some((number, instruction)) = numbered(line) else {
            begins |= line.ends_with("):");
            continue;
        };
        if begins {
            functions.insert(number, Function::default());
            begins = false;
        }
        let mut last = functions.last_entry().context("no function begins")?;
        let function = last.get_mut();
        let below = below_frame(instruction, copied);
        function.frame = function.frame.max(below.unwrap_or(0));
        // As in `r2 = r10`, `r2 += -64`.
        copied = instruction
            .split_once(" = r10")
            .filter(|(_, rest)| rest.is_empty())
            .map(|(register, _)| register);
        if let Some(distance) = called(instruction) {
            function.callees.push(number + 1 + distance);
        }
    }
    let first = *functions.keys().next().context("an empty program")?;
    deepest(&functions, first, 0)
}

/// The number and the text of a line like `  52: (85) call pc+798#…`.
fn numbered(line: &str) -> Option<(i64, &str)> {
    let (number, rest) = line.trim_start().split_once(": (")?;
    let (_, instruction) = rest.split_once(") ")?;
    Some((number.parse().ok()?, instruction))
}

/// How far below the frame pointer an instruction reaches: in `*(u64 *)(r10 -64) = r1`, or one that moves a copy of it.
fn below_frame(instruction: &str, copied: Option<&str>) -> Option<u64> {
    let direct = instruction
        .split_once("(r10 -")
        .and_then(|(_, rest)| rest.split_once(')'))
        .map(|(distance, _)| distance);
    let moved = || {
        let (register, distance) = instruction.split_once(" += -")?;
        (Some(register) == copied).then_some(distance)
    };
    direct.or_else(moved)?.parse().ok()
}

/// How far away the function is that an instruction calls, or hands to a helper.
fn called(instruction: &str) -> Option<i64> {
    let (_, rest) = instruction
        .split_once("call pc")
        .or_else(|| instruction.split_once("subprog["))?;
    let digits = rest.trim_start_matches('+');
    let end = digits
        .find(|c: char| !c.is_ascii_digit() && c != '-')
        .unwrap_or(digits.len());
    digits[..end].parse().ok()
}

fn deepest(functions: &BTreeMap<i64, Function>, first: i64, level: u32) -> Result<u64> {
    // The verifier allows eight.
    ensure!(level <= 8, "functions that call each other without end");
    let function = functions
        .get(&first)
        .with_context(|| format!("no function begins at {first}"))?;
    let mut below = 0;
    for callee in &function.callees {
        below = below.max(deepest(functions, *callee, level + 1)?);
    }
    Ok(function.frame.max(1).next_multiple_of(ROUNDED) + below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_functions_that_call_each_other_add_up() {
        let dump = "\
u32 one(struct xdp_md * ctx):
; let work = 1;
   0: (7b) *(u64 *)(r10 -20) = r1
   1: (85) call pc+2#bpf_prog_0_two
   2: (85) call pc+4#bpf_prog_0_three
   3: (95) exit
u32 two(void * work):
   4: (bf) r2 = r10
   5: (07) r2 += -100
   6: (95) exit
u32 three(void * work):
   7: (bf) r2 = r1
   8: (07) r2 += -400
   9: (95) exit
";
        assert_eq!(depth(dump).unwrap(), 32 + 128);
    }
}
