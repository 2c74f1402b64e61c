//! What the commands about a configuration have in common: reading it, trying it, telling what is
//! wrong with it and what it changes.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use hyper::Method;
use portfwd_common::abi::DEFAULT_MAX_PORTS;
use serde::Serialize;

use super::output::{Output, Style};
use crate::{
    config::{Problem, Problems},
    control::{
        apply::Comparison,
        client::Client,
        protocol::{Applied, ApplyRequest},
    },
    failure::{Failure, Kind, Result},
    instance::Instance,
    ruleset::{Engine, lease::Now},
    state::State,
};

/// What `--json` prints of mistakes.
#[derive(Serialize)]
struct Mistakes<'a> {
    problems: &'a [Problem],
}

/// The path that was named, or that of the instance.
pub fn path(instance: &Instance, named: Option<&Path>) -> PathBuf {
    named.map_or_else(|| instance.config(), Path::to_owned)
}

/// Tells every mistake, then fails with how many there are.
pub fn tell(problems: Problems, output: Output) -> Failure {
    let Problems { failure, list } = problems;
    if list.is_empty() {
        return failure;
    }
    let printed = output.print(&Mistakes { problems: &list }, |_, _| Ok(()));
    if !output.is_json() {
        for problem in &list {
            eprintln!("portfwd: {problem}");
        }
    }
    printed.err().unwrap_or(failure)
}

/// What applying would change: by the daemon's word, or without one by what it left.
pub async fn compare(instance: &Instance, request: &ApplyRequest) -> Result<Applied> {
    let request = ApplyRequest {
        dry_run: true,
        ..request.clone()
    };
    match Client::connect(instance).await {
        Ok(mut client) => client.call(Method::POST, "/v1/apply", &request).await,
        Err(failure) if failure.kind == Kind::NotRunning => {
            let state = State::read_copy(&instance.state_file())?;
            try_on_paper(&request, state.as_ref(), None)
        }
        Err(failure) => Err(failure),
    }
}

/// The same without looking at anything that runs.
pub fn try_on_paper(
    request: &ApplyRequest,
    state: Option<&State>,
    max_ports: Option<u32>,
) -> Result<Applied> {
    let now = Now::read()?;
    let max_ports = max_ports.unwrap_or(DEFAULT_MAX_PORTS);
    let mut engine = Engine::on_paper(state, now, max_ports, Vec::new())?;
    let file_rules = state.map_or_else(|| Ok(Default::default()), State::file_rules)?;
    match Comparison::of(request, &engine, &file_rules, now) {
        Ok(comparison) => {
            let before = engine.ruleset().len();
            comparison.outcome(engine.try_change(comparison.edits(), now), before)
        }
        Err(refused) => Ok(Applied {
            refused,
            ..Applied::default()
        }),
    }
}

/// A line for every rule that changes.
pub fn write(out: &mut dyn Write, applied: &Applied, colour: bool) -> io::Result<()> {
    for rule in &applied.removed {
        let sign = Style::Bad.paint("-", colour);
        writeln!(out, "{sign} {}: {rule}", rule.id)?;
    }
    for rule in &applied.replaced {
        let (minus, plus) = (
            Style::Bad.paint("-", colour),
            Style::Good.paint("+", colour),
        );
        writeln!(out, "{minus} {}: {}", rule.before.id, rule.before)?;
        writeln!(out, "{plus} {}: {}", rule.after.id, rule.after)?;
    }
    for rule in &applied.added {
        let sign = Style::Good.paint("+", colour);
        writeln!(out, "{sign} {}: {rule}", rule.id)?;
    }
    writeln!(
        out,
        "{} added, {} replaced, {} removed, {} as they were",
        applied.added.len(),
        applied.replaced.len(),
        applied.removed.len(),
        applied.unchanged
    )
}

/// Lines for people, beside what is printed.
pub fn warn(applied: &Applied) {
    for warning in &applied.warnings {
        eprintln!("portfwd: warning: {warning}");
    }
}
