//! portfwd beside its references, interleaved in one run.
//!
//! Absolute figures are those of this machine at this moment; the ratios are what to look at.

mod cores;
mod gateway;
mod packets;
mod ports;
mod program;
mod report;
mod sockets;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use self::report::Report;

/// Measure portfwd beside a bare redirect, the floor, plain forwarding and nftables, in network namespaces of its own
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  bench packets                                      what a packet costs, every contest
  bench packets flows --flows 1,1024 --rounds 15     one of them, more often
  bench packets flows --beside ./portfwd-before      this build and another, side by side
  bench program                                      the hot path without the way to it
  bench --report docs/benchmarks packets             with report.txt, report.json and charts
  bench sockets                                      bulk TCP and small requests
  bench cores                                        two directions on two cores")]
struct Arguments {
    /// Write report.txt, report.json and a chart for each table into this folder
    #[arg(long, global = true, value_name = "FOLDER")]
    report: Option<PathBuf>,
    #[command(subcommand)]
    contest: Contest,
}

#[derive(Debug, Subcommand)]
enum Contest {
    /// What a forwarded packet costs on one core, generator and sink included
    Packets(packets::Arguments),
    /// What a second core adds that carries the other direction
    Cores(cores::Arguments),
    /// What the ports of one 65,535-port range cost, first to last
    Ports(ports::Arguments),
    /// What a run of the XDP program takes by itself
    Program(program::Arguments),
    /// What TCP sockets get through the gateway, all offloads on
    Sockets(sockets::Arguments),
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let report = match &arguments.contest {
        Contest::Packets(contest) => {
            let mut report = Report::new(contest.rounds);
            packets::run(contest, &mut report)?;
            report
        }
        Contest::Cores(contest) => {
            let mut report = Report::new(contest.rounds);
            report.tables.push(cores::run(contest)?);
            println!("{report}");
            report
        }
        Contest::Ports(contest) => {
            let mut report = Report::new(contest.rounds);
            report.tables.push(ports::run(contest)?);
            println!("{report}");
            report
        }
        Contest::Program(contest) => {
            let mut report = Report::new(contest.rounds);
            report.tables.extend(program::run(contest)?);
            println!("{report}");
            report
        }
        Contest::Sockets(contest) => {
            let mut report = Report::new(contest.rounds);
            report.tables.extend(sockets::run(contest)?);
            println!("{report}");
            report
        }
    };
    match &arguments.report {
        Some(folder) => report.write(folder),
        None => Ok(()),
    }
}
