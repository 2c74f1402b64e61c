//! `portfwd doctor`.

use std::io::{self, Write};

use clap::Args;
use portfwd_common::abi::Role;

use super::{
    facts::facts,
    output::{Output, Style},
};
use crate::{
    diagnose::{Diagnosis, Finding, Severity, diagnose},
    failure::{Failure, Kind, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
Reads kernel, interfaces, addresses, routes, neighbours, settings, nftables, own services, daemon and rules; changes nothing.
Works with and without a daemon. Every finding has a name that stays, what it is about, the cause, and the one command that mends it.
Exits 0 if nothing is an error (there may be warnings), 1 if something is.

Examples:
  portfwd doctor
  portfwd doctor --wan eth0 --lan eth1        before the first start: is the machine fit for it?
  portfwd -j doctor | jq '.findings[].id'";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Look at this interface too, as if it were attached as WAN
    #[arg(long, value_name = "IF", num_args = 1..)]
    wan: Vec<String>,
    /// Look at this interface too, as if it were attached as LAN
    #[arg(long, value_name = "IF", num_args = 1..)]
    lan: Vec<String>,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let named = [(Role::Wan, &arguments.wan), (Role::Lan, &arguments.lan)];
    let wanted = named
        .into_iter()
        .flat_map(|(role, names)| names.iter().map(move |name| (role, name.clone())))
        .collect();
    let diagnosis = diagnose(&facts(instance, wanted).await?);
    output.print(&diagnosis, |out, diagnosis| {
        write(out, diagnosis, output.colour())
    })?;
    match diagnosis.errors {
        0 => Ok(()),
        1 => Err(Failure::new(Kind::Failed, "1 error was found")),
        errors => Err(Failure::new(
            Kind::Failed,
            format!("{errors} errors were found"),
        )),
    }
}

fn write(out: &mut dyn Write, diagnosis: &Diagnosis, colour: bool) -> io::Result<()> {
    if diagnosis.findings.is_empty() {
        let good = Style::Good.paint("nothing is wrong", colour);
        return writeln!(out, "{good} that portfwd can see");
    }
    for finding in &diagnosis.findings {
        let Finding {
            id,
            severity,
            subject,
            cause,
            fix,
        } = finding;
        let style = match severity {
            Severity::Error => Style::Bad,
            Severity::Warning => Style::Bold,
        };
        let head = style.paint(&format!("{} {id}", severity.word()), colour);
        writeln!(out, "{head}: {subject}\n  {cause}\n  # {fix}")?;
    }
    Ok(())
}
