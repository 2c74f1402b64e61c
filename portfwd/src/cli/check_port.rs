//! `portfwd check-port`.

use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
};

use clap::Args;
use tokio::net::{TcpListener, lookup_host};

use super::{
    explain::protocol,
    facts::facts,
    output::{Output, Style},
};
use crate::{
    check_port::{Port, Report, State, check, helper},
    failure::{Failure, Kind, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
Without a helper the path is walked from inside: rule, packet, neighbour, target, answer; the target is dialled from the gateway.
With --helper another machine, on which `portfwd check-port --serve ADDR:PORT` runs, dials the port from outside.
The helper dials only the address that asks it. Exits 0 if the port answers, as far as could be looked, and 1 if not.

Examples:
  portfwd check-port tcp 8080
  portfwd check-port udp 27015 --listen 203.0.113.5
  portfwd check-port tcp 8080 --helper outside.example:7373
  portfwd check-port --serve [::]:7373                     on the other machine; needs no root";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// tcp or udp
    #[arg(value_name = "PROTO", required_unless_present = "serve")]
    proto: Option<String>,
    /// The published port
    #[arg(value_name = "PORT", required_unless_present = "serve")]
    port: Option<u16>,
    /// The address that is dialled [default: the rule's, or the WAN's first]
    #[arg(long, value_name = "ADDR", conflicts_with = "serve")]
    listen: Option<IpAddr>,
    /// Another machine that dials the port from outside
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "serve")]
    helper: Option<String>,
    /// Be that other machine
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "proto")]
    serve: Option<SocketAddr>,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    if let Some(address) = arguments.serve {
        instance.enter_netns()?;
        return serve(address).await;
    }
    let question = question(arguments).await?;
    let facts = facts(instance, Vec::new()).await?;
    let report = check(instance, &facts, &question).await?;
    output.print(&report, |out, report| write(out, report, output.colour()))?;
    if report.answers {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Failed,
        format!("{} {} does not answer", report.proto, report.port),
    ))
}

async fn question(arguments: &Arguments) -> Result<Port> {
    let protocol = protocol(arguments.proto.as_deref().unwrap_or_default())?;
    let port = arguments.port.unwrap_or_default();
    if port == 0 {
        return Err(Failure::new(Kind::Usage, "port 0 is none").hint("1 to 65535"));
    }
    let helper = match &arguments.helper {
        Some(name) => Some(resolve(name).await?),
        None => None,
    };
    Ok(Port {
        protocol,
        port,
        listen: arguments.listen,
        helper,
    })
}

async fn resolve(name: &str) -> Result<SocketAddr> {
    let failed = |why: &dyn std::fmt::Display| {
        Failure::new(Kind::Usage, format!("helper {name:?}: {why}")).hint("HOST:PORT")
    };
    let mut found = lookup_host(name).await.map_err(|error| failed(&error))?;
    found.next().ok_or_else(|| failed(&"it has no address"))
}

async fn serve(address: SocketAddr) -> Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| Failure::during(format!("listen on {address}"), &error))?;
    log::info!("ready to dial back whoever asks on {address}");
    Ok(helper::serve(listener).await?)
}

fn write(out: &mut dyn Write, report: &Report, colour: bool) -> io::Result<()> {
    let word = |state| match state {
        State::Good => Style::Good.paint("ok  ", colour),
        State::Bad => Style::Bad.paint("FAIL", colour),
        State::Unknown => Style::Bold.paint("?   ", colour),
    };
    for check in &report.checks {
        writeln!(out, "{} {}", report.proto, check.listen)?;
        for step in &check.inside {
            writeln!(
                out,
                "  {} {:<9}  {}",
                word(step.state),
                step.step,
                step.detail
            )?;
        }
        match &check.outside {
            Some(outside) => writeln!(
                out,
                "  {} outside    {} (helper {})",
                word(outside.state),
                outside.detail,
                outside.helper
            )?,
            None => writeln!(
                out,
                "  {} outside    not asked: --helper",
                word(State::Unknown)
            )?,
        }
    }
    Ok(())
}
