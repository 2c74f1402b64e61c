//! Dials a forward again and again from few client ports, while the daemon sweeps: every connection must be answered.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::short_connections::{Answerer, dial};
use portfwd_tests::{Family, LabOptions};

#[derive(Debug, Parser)]
struct Arguments {
    /// Connections, in all.
    #[arg(long, default_value_t = 1_200_000)]
    count: u64,
    #[arg(long, value_enum, default_value = "tc")]
    mode: Mode,
    #[arg(long, value_enum, default_value = "4")]
    ip: Version,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Version {
    #[value(name = "4")]
    V4,
    #[value(name = "6")]
    V6,
}

/// The port that clients dial, and the one that it leads to.
const LISTEN: u16 = 8080;
const TARGET: u16 = 80;
/// Ports that the clients dial from: 1,024.
const PORTS: Range<u16> = 30_000..31_024;
/// Parts of the run, after each of which a line is printed.
const PARTS: u64 = 20;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("connections: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and BPF need root; run it again with sudo"
    );
    let family = match arguments.ip {
        Version::V4 => Family::V4,
        Version::V6 => Family::V6,
    };
    let lab = LabOptions::for_mode(arguments.mode).build()?;
    let daemon = DaemonOptions::new(arguments.mode).start(&lab.gateway)?;
    let server = SERVER.endpoint(family, TARGET);
    daemon.add("short", "tcp", &LISTEN.to_string(), &server.to_string())?;
    let _answerer = Answerer::start(&lab.server, server)?;
    let address = CLIENT.endpoint(family, 0).ip();
    let dialled = GATEWAY_WAN.endpoint(family, LISTEN);
    let (mut answered, start) = (0, Instant::now());
    for part in 1..=PARTS {
        let until = arguments.count * part / PARTS;
        let tally = dial(&lab.client, (address, PORTS), dialled, until - answered)?;
        ensure!(
            tally.failed == 0,
            "{} of {} connections failed: {}",
            tally.failed,
            tally.failed + tally.answered,
            tally.failures.join("; ")
        );
        answered += tally.answered;
        println!(
            "{answered:>9} answered, {:.0} a second, {} flows in the table",
            answered as f64 / start.elapsed().as_secs_f64(),
            daemon.flows()?.len()
        );
    }
    let drops = daemon.drops()?;
    ensure!(drops.is_empty(), "portfwd dropped packets: {drops:?}");
    println!(
        "no connection of {answered} failed; {} flows were established",
        daemon.events()?["flow_proven"]
    );
    Ok(())
}
