//! `portfwd status`, and what a bare `portfwd` does.

use std::io::{self, Write};

use super::{
    output::{Align, Output, Style, Table, seconds},
    source::{Remains, ask},
};
use crate::{
    control::protocol::StatusReport,
    failure::{Failure, Kind, Result},
    instance::Instance,
};

pub const AFTER_HELP: &str = "\
Exits 0 if the daemon runs and is ready, 3 if it does not run; what it left attached is shown all the same.

Examples:
  portfwd status
  portfwd -j status | jq .interfaces";

pub async fn run(instance: &Instance, output: Output) -> Result<()> {
    let status: StatusReport = ask(instance, "/v1/status", Remains::status).await?;
    output.print(&status, |out, status| write(out, status, output.colour()))?;
    match status.daemon {
        Some(_) => Ok(()),
        None => Err(Failure::new(
            Kind::NotRunning,
            format!("no daemon runs for instance {}", instance.name()),
        )
        .hint("`portfwd run --wan IF --lan IF` starts it; what it left goes on forwarding")),
    }
}

fn write(out: &mut dyn Write, status: &StatusReport, colour: bool) -> io::Result<()> {
    let daemon = match status.daemon {
        Some(daemon) => {
            let running = Style::Good.paint("running", colour);
            format!(
                "{running}, pid {}, for {}",
                daemon.pid,
                seconds(daemon.uptime_s as f64)
            )
        }
        None => Style::Bad.paint("not running", colour),
    };
    writeln!(out, "instance  {}", status.instance)?;
    writeln!(out, "version   {}", status.version)?;
    writeln!(out, "daemon    {daemon}")?;
    writeln!(
        out,
        "flows     {} of {}",
        status.flows.entries, status.flows.capacity
    )?;
    writeln!(
        out,
        "half-open {} of {}",
        status.half_open.entries, status.half_open.capacity
    )?;
    writeln!(out)?;
    if status.interfaces.is_empty() {
        return writeln!(out, "not attached to any interface");
    }
    let mut table = Table::new([
        ("INTERFACE", Align::Left),
        ("ROLE", Align::Left),
        ("MODE", Align::Left),
        ("REASON", Align::Left),
    ]);
    for interface in &status.interfaces {
        table.row([
            interface.name.clone(),
            interface.role.clone(),
            interface.mode.clone(),
            interface.reason.clone(),
        ]);
    }
    table.write(out, colour)
}
