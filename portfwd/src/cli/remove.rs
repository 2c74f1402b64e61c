//! `portfwd remove`.

use clap::Args;
use clap_complete::ArgValueCandidates;
use hyper::Method;

use super::{complete, output::Output};
use crate::{
    control::{
        client::Client,
        protocol::{RemoveRequest, RuleLine},
    },
    failure::Result,
    instance::Instance,
    ruleset::{FlowPolicy, Refusal},
};

const AFTER_HELP: &str = "\
The next packet finds none of them. If one is not found, none is removed. POLICY says what becomes of their flows:
  keep   they go on for as long as they live
  drain  TCP connections go on until they end, UDP ends with its next packet
  kill   all end with their next packet (the default, unless the rule says otherwise)

Examples:
  portfwd remove web
  portfwd remove web --flows drain
  portfwd remove 3 4 game-server
  portfwd remove --tag shop";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Ids or names, as `portfwd rules` lists them
    #[arg(value_name = "ID|NAME", required_unless_present = "tags", add = ArgValueCandidates::new(complete::rules))]
    rules: Vec<String>,
    /// All rules that bear this tag; may be given several times
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// What becomes of their flows: keep, drain or kill
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    flows: Option<FlowPolicy>,
}

/// Reads a policy for flows.
pub fn policy(text: &str) -> Result<FlowPolicy, String> {
    text.parse()
        .map_err(|refusal: Refusal| format!("{refusal}: {}", refusal.hint()))
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let request = RemoveRequest {
        rules: arguments.rules.clone(),
        tags: arguments.tags.clone(),
        flows: arguments.flows,
    };
    let removed: Vec<RuleLine> = Client::connect(instance)
        .await?
        .call(Method::DELETE, "/v1/rules", &request)
        .await?;
    output.print(&removed, |out, removed| {
        for rule in removed {
            writeln!(out, "removed {}: {rule}", rule.id)?;
        }
        Ok(())
    })
}
