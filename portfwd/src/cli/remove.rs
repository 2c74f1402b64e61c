//! `portfwd remove`.

use clap::Args;
use hyper::Method;

use super::output::Output;
use crate::{
    control::{
        client::Client,
        protocol::{RemoveRequest, RuleLine},
    },
    failure::Result,
    instance::Instance,
};

const AFTER_HELP: &str = "\
The next packet finds none of them; their flows end with it. If one is not found, none is removed.

Examples:
  portfwd remove web
  portfwd remove 3 4 game-server";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Ids or names, as `portfwd rules` lists them
    #[arg(value_name = "ID|NAME", required = true)]
    rules: Vec<String>,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let request = RemoveRequest {
        rules: arguments.rules.clone(),
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
