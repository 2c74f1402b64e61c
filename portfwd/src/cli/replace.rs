//! `portfwd replace`.

use clap::Args;
use clap_complete::ArgValueCandidates;
use hyper::Method;

use super::{add::RuleArguments, complete, output::Output};
use crate::{
    control::{client::Client, protocol::Replaced},
    failure::{Failure, Kind, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
The rule keeps its number, and its name unless it is given another; all else is as said here. A packet finds the old rule or the new
one, never none. What becomes of flows that the old rule began is what --flows says; without it they drain: TCP connections
go on to the old target until they end, UDP goes to the new one at once.
The counters of a rule that forwards differently begin at zero.

Examples:
  portfwd replace web tcp 8080 10.0.0.3:80                 another server
  portfwd replace 3 udp 5000-5099 10.0.0.4 --flows keep    old flows stay where they are
  portfwd replace web tcp 443 10.0.0.3 --name secure";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Id or name, as `portfwd rules` lists them
    #[arg(value_name = "ID|NAME", add = ArgValueCandidates::new(complete::rules))]
    selector: String,
    #[command(flatten)]
    rule: RuleArguments,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let words = arguments.rule.words()?;
    let selector = &arguments.selector;
    // It becomes part of a path.
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if selector.is_empty() || !selector.chars().all(is_plain) {
        return Err(Failure::new(
            Kind::NotFound,
            format!("no rule has the id or name {selector:?}"),
        )
        .hint("`portfwd rules` lists them"));
    }
    let replaced: Replaced = Client::connect(instance)
        .await?
        .call(Method::PUT, &format!("/v1/rules/{selector}"), &words)
        .await?;
    for warning in &replaced.warnings {
        eprintln!("portfwd: warning: {warning}");
    }
    output.print(&replaced, |out, replaced| {
        writeln!(out, "replaced {}: {}", replaced.rule.id, replaced.before)?;
        writeln!(out, "     now {}: {}", replaced.rule.id, replaced.rule)
    })
}
