//! portfwd beside its references, interleaved in one run.
//!
//! Absolute figures are those of this machine at this moment; the ratios are what to look at.

mod cores;
mod daemon;
mod gateway;
mod packets;
mod ports;
mod program;
mod report;
mod sockets;
mod targets;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use self::report::Report;

/// Measure portfwd beside a bare redirect, the floor, plain forwarding and nftables, in network namespaces of its own
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  bench all --report docs/benchmarks                 everything, and what it says about the targets
  bench packets                                      what a packet costs, every contest
  bench packets flows --flows 1,1024 --rounds 15     one of them, more often
  bench packets flows --beside ./portfwd-before      this build and another, side by side
  bench program                                      the hot path without the way to it
  bench --report docs/benchmarks packets             with report.txt, report.json and charts
  bench sockets                                      bulk TCP and small requests
  bench daemon                                       starts, changes of rules, sweeps, memory
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
    /// Everything that a target is about, a quarter of an hour with 5 rounds, and which targets are met
    All {
        /// Rounds of every contest
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// What a forwarded packet costs on one core, generator and sink included
    Packets(packets::Arguments),
    /// What a second core adds that carries the other direction
    Cores(cores::Arguments),
    /// What the ports of one 65,535-port range cost, first to last
    Ports(ports::Arguments),
    /// What a run of the XDP program takes by itself
    Program(program::Arguments),
    /// What the daemon takes: starts, changes of rules, sweeps, memory
    Daemon(daemon::Arguments),
    /// What TCP sockets get through the gateway, all offloads on
    Sockets(sockets::Arguments),
}

/// What `all` is, as one would type it. What takes longest comes last.
const ALL: [&[&str]; 7] = [
    &["program"],
    &["cores"],
    &["daemon"],
    &["sockets", "--seconds", "1"],
    &[
        "packets", "kinds", "sizes", "rules", "fill", "new", "--frames", "500000",
    ],
    &[
        "packets",
        "light",
        "stateless",
        "--flows",
        "1,1048576",
        "--frames",
        "200000",
    ],
    &["packets", "flows", "--frames", "400000"],
];

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
    let mut report = Report::new(arguments.contest.rounds());
    arguments.contest.measure(&mut report)?;
    report.judge();
    println!("{report}");
    if let Some(folder) = &arguments.report {
        report.write(folder)?;
    }
    ensure!(report.failed.is_empty(), "{}", report.failed.join("; "));
    Ok(())
}

impl Contest {
    fn rounds(&self) -> usize {
        match self {
            Self::All { rounds } => *rounds,
            Self::Packets(contest) => contest.rounds,
            Self::Cores(contest) => contest.rounds,
            Self::Ports(contest) => contest.rounds,
            Self::Program(contest) => contest.rounds,
            Self::Daemon(contest) => contest.rounds,
            Self::Sockets(contest) => contest.rounds,
        }
    }

    fn measure(&self, report: &mut Report) -> Result<()> {
        match self {
            Self::All { rounds } => {
                let rounds = rounds.to_string();
                for words in ALL {
                    eprintln!("bench {}", words.join(" "));
                    let line = ["bench"].iter().chain(words).copied();
                    let line = line.chain(["--rounds", rounds.as_str()]);
                    let arguments = Arguments::try_parse_from(line)?;
                    // What has been measured is worth a report all the same.
                    if let Err(error) = arguments.contest.measure(report) {
                        report.fail(words[0], &error);
                    }
                }
            }
            Self::Packets(contest) => packets::run(contest, report)?,
            Self::Cores(contest) => report.tables.push(cores::run(contest)?),
            Self::Ports(contest) => report.tables.push(ports::run(contest)?),
            Self::Program(contest) => report.tables.extend(program::run(contest)?),
            Self::Daemon(contest) => report.tables.extend(daemon::run(contest)?),
            Self::Sockets(contest) => sockets::run(contest, report)?,
        }
        Ok(())
    }
}
