//! What each program may cost the verifier.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// Instructions that the verifier looks at before it gives up on any program (`BPF_COMPLEXITY_LIMIT_INSNS`).
pub const LIMIT: u32 = 1_000_000;

/// The budgets of `portfwd-ebpf/budgets.txt`, in verified instructions, by program.
///
/// # Errors
/// When a line has no number.
pub fn budgets() -> Result<BTreeMap<String, u32>> {
    const BUDGETS: &str = include_str!("../../portfwd-ebpf/budgets.txt");
    BUDGETS
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, limit) = line
                .split_once(' ')
                .with_context(|| format!("budget {line:?} has no number"))?;
            Ok((name.to_owned(), limit.trim().parse()?))
        })
        .collect()
}
