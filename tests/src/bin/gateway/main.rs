//! portfwd in a virtual machine, on network cards, with clients and servers of this one at both sides.

mod configuration;
mod report;
mod traffic;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;

use configuration::Configuration;
use report::Report;

#[derive(Debug, Parser)]
struct Arguments {
    /// The machine's kernel
    #[arg(long)]
    linux: String,
    /// What boots the machine
    #[arg(last = true, required = true)]
    machine: Vec<OsString>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and network cards need root; run it again with sudo"
    );
    report::clean_up_on_interrupt()?;
    let start = Instant::now();
    let mut report = Report::new(&arguments.linux);
    for configuration in Configuration::ALL {
        // What is wrong with one set of cards says nothing of the next.
        configuration.run(&arguments.machine, &mut report)?;
    }
    let checks = report.finish()?;
    let seconds = start.elapsed().as_secs_f32();
    println!("all of {checks} checks passed ({seconds:.0} s)");
    Ok(())
}
