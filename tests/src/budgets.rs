//! What each program may cost: the verifier's work, and stack.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// Instructions that the verifier looks at before it gives up on any program (`BPF_COMPLEXITY_LIMIT_INSNS`).
pub const LIMIT: u32 = 1_000_000;

/// What a program may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Instructions that the verifier looks at.
    pub instructions: u32,
    /// Stack in use at a time, bytes.
    pub stack: u64,
}

/// The budgets of `portfwd-ebpf/budgets.txt`, by program.
///
/// # Errors
/// When a line is not a name and two numbers.
pub fn budgets() -> Result<BTreeMap<String, Budget>> {
    const BUDGETS: &str = include_str!("../../portfwd-ebpf/budgets.txt");
    BUDGETS
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| budget(line).with_context(|| format!("{line:?} is no budget")))
        .collect()
}

fn budget(line: &str) -> Result<(String, Budget)> {
    let mut words = line.split_whitespace();
    let name = words.next().context("no name")?;
    let budget = Budget {
        instructions: words.next().context("no instructions")?.parse()?,
        stack: words.next().context("no stack")?.parse()?,
    };
    Ok((name.to_owned(), budget))
}
