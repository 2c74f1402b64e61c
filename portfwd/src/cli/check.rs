//! `portfwd check`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{
    configuration::{compare, path, tell, try_on_paper, warn},
    output::Output,
};
use crate::{
    config::{Config, Problems},
    control::protocol::ApplyRequest,
    failure::{Kind, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
PATH is a file, or a directory of which portfwd.toml and conf.d/*.toml are read; without it, /etc/portfwd. Every mistake is told,
each with file, line and column. Nothing is changed. With a daemon, also what only the running gateway can tell is checked.

Examples:
  portfwd check
  portfwd check ./portfwd.toml
  portfwd -j check | jq '.problems[].error'";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// File or directory of the configuration
    #[arg(value_name = "PATH")]
    path: Option<PathBuf>,
}

/// What is printed if there is nothing wrong.
#[derive(Serialize)]
struct Checked {
    rules: usize,
    problems: [(); 0],
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let path = path(instance, arguments.path.as_deref());
    let told = |problems: Problems| tell(problems, output);
    let config = Config::read(&path).map_err(told)?;
    config.check_gateway(instance, &path).map_err(told)?;
    let request = ApplyRequest {
        rules: config.words(),
        ..ApplyRequest::default()
    };
    let tried = try_on_paper(&request, None, config.gateway.max_ports)?;
    config.refused(&path, &tried).map_err(told)?;
    let applied = match compare(instance, &request).await {
        Ok(applied) => {
            config.refused(&path, &applied).map_err(told)?;
            applied
        }
        // Whoever may not ask the daemon, or read what it left, may still check a file.
        Err(failure) if failure.kind == Kind::Permission => tried,
        Err(failure) => return Err(failure),
    };
    warn(&applied);
    let checked = Checked {
        rules: config.rules.len(),
        problems: [],
    };
    output.print(&checked, |out, checked| {
        writeln!(
            out,
            "{}: {} rules, no mistakes",
            path.display(),
            checked.rules
        )
    })
}
