//! Everything that can happen to a gateway, with every kind of traffic going on: a table of what was lost, which must be bounded.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use portfwd_tests::Family;
use portfwd_tests::chaos::{self, Bound, Disturbance};
use portfwd_tests::daemon::Mode;

#[derive(Debug, Parser)]
struct Arguments {
    /// What happens; everything, one after the other, if it is not said.
    #[arg(value_enum)]
    disturbances: Vec<Disturbance>,
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

fn main() -> ExitCode {
    let start = Instant::now();
    match run(&Arguments::parse()) {
        Ok(()) => {
            println!("all is bounded ({:.0} s)", start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("chaos: {error:#}");
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
    let disturbances = if arguments.disturbances.is_empty() {
        &Disturbance::ALL[..]
    } else {
        &arguments.disturbances
    };
    println!("lost of all, and the longest time without an answer");
    println!("{}  may be lost", chaos::head());
    let mut rows = Vec::new();
    for disturbance in disturbances {
        let row = chaos::run(arguments.mode, family, *disturbance)?;
        let bound = match row.bound {
            Bound::Nothing => "nothing".to_owned(),
            Bound::Replacement => "a few datagrams in fragments".to_owned(),
            Bound::Outage { all, .. } => format!("what is sent in {:.2} s", all.as_secs_f64()),
            Bound::Move => "what is sent to the old address".to_owned(),
        };
        println!("{row}  {bound}");
        rows.push(row);
    }
    rows.iter().try_for_each(chaos::Row::expect_bounded)
}
