//! `portfwd apply`, `portfwd confirm` and `portfwd rollback`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use hyper::Method;

use super::{
    configuration::{compare, path, tell, warn, write},
    output::Output,
    remove::policy,
};
use crate::{
    config::{Config, Problems},
    control::{
        client::Client,
        protocol::{Applied, ApplyRequest},
    },
    failure::Result,
    instance::Instance,
    ruleset::FlowPolicy,
};

const AFTER_HELP: &str = "\
The rules become those of the configuration, all at once or not at all, by the fewest changes: a rule that is there already keeps
its number, its flows and its counters. A packet finds the old rule of its port or the new one. Rules that the configuration does
not have are removed; with --keep-others those stay that were added by hand.

With --confirm, all of it is taken back unless `portfwd confirm` comes in time, also if the daemon ends before that.

PATH is a file, or a directory of which portfwd.toml and conf.d/*.toml are read; without it, /etc/portfwd.

Examples:
  portfwd apply
  portfwd apply --dry-run
  portfwd apply ./portfwd.toml --confirm 60s
  portfwd apply --flows keep --keep-others";

pub const CONFIRM_HELP: &str = "\
Examples:
  portfwd confirm";

pub const ROLLBACK_HELP: &str = "\
The rules become what they were before `portfwd apply --confirm`. Connections that were ended meanwhile do not come back.

Examples:
  portfwd rollback";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// File or directory of the configuration
    #[arg(value_name = "PATH")]
    path: Option<PathBuf>,
    /// Only print what would change
    #[arg(long)]
    dry_run: bool,
    /// Take it back after this time (30s, 2m) unless `portfwd confirm` comes before
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "dry_run")]
    confirm: Option<u32>,
    /// Leave rules alone that were added by hand
    #[arg(long)]
    keep_others: bool,
    /// What becomes of flows of rules that change or go: keep, drain or kill [default: what the
    /// rules say, else drain]
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    flows: Option<FlowPolicy>,
}

fn seconds(text: &str) -> Result<u32, String> {
    let length = text.parse::<jiff::SignedDuration>().ok();
    let length = length.and_then(|length| Duration::try_from(length).ok());
    length
        .and_then(|length| u32::try_from(length.as_secs()).ok())
        .filter(|seconds| *seconds > 0)
        .ok_or_else(|| "a length of time, for example 60s or 5m".to_owned())
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let path = path(instance, arguments.path.as_deref());
    let told = |problems: Problems| tell(problems, output);
    let config = Config::read(&path).map_err(told)?;
    config.check_gateway(instance, &path).map_err(told)?;
    let request = ApplyRequest {
        rules: config.words(),
        flows: arguments.flows,
        keep_others: arguments.keep_others,
        dry_run: arguments.dry_run,
        confirm_s: arguments.confirm,
    };
    let applied: Applied = if arguments.dry_run {
        compare(instance, &request).await?
    } else {
        let mut client = Client::connect(instance).await?;
        client.call(Method::POST, "/v1/apply", &request).await?
    };
    config.refused(&path, &applied).map_err(told)?;
    warn(&applied);
    output.print(&applied, |out, applied| {
        write(out, applied, output.colour())?;
        match applied.confirm_s {
            Some(seconds) => writeln!(
                out,
                "taken back in {seconds} seconds; `{} confirm` keeps it",
                instance.command()
            ),
            None => Ok(()),
        }
    })
}

pub async fn confirm(instance: &Instance, output: Output) -> Result<()> {
    let mut client = Client::connect(instance).await?;
    let confirmed: () = client.call(Method::POST, "/v1/confirm", &()).await?;
    output.print(&confirmed, |out, ()| writeln!(out, "confirmed"))
}

pub async fn rollback(instance: &Instance, output: Output) -> Result<()> {
    let mut client = Client::connect(instance).await?;
    let applied: Applied = client.call(Method::POST, "/v1/rollback", &()).await?;
    output.print(&applied, |out, applied| {
        write(out, applied, output.colour())
    })
}
