//! `portfwd diff`.

use std::path::PathBuf;

use clap::Args;

use super::{
    configuration::{compare, path, tell, warn, write},
    output::Output,
};
use crate::{
    config::{Config, Problems},
    control::protocol::ApplyRequest,
    failure::Result,
    instance::Instance,
};

const AFTER_HELP: &str = "\
What `portfwd apply` would change: - goes, + comes. Without a daemon it is compared with the rules that the last one left.

Examples:
  portfwd diff
  portfwd diff ./portfwd.toml
  portfwd -j diff | jq '.added | length'";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// File or directory of the configuration
    #[arg(value_name = "PATH")]
    path: Option<PathBuf>,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let path = path(instance, arguments.path.as_deref());
    let told = |problems: Problems| tell(problems, output);
    let config = Config::read(&path).map_err(told)?;
    let request = ApplyRequest {
        rules: config.words(),
        ..ApplyRequest::default()
    };
    let applied = compare(instance, &request).await?;
    config.refused(&path, &applied).map_err(told)?;
    warn(&applied);
    output.print(&applied, |out, applied| {
        write(out, applied, output.colour())
    })
}
