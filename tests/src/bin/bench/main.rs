//! portfwd beside its references, interleaved in one run.
//!
//! Absolute figures are those of this machine at this moment; the ratios are what to look at.

mod packets;
mod ports;
mod sockets;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measure portfwd beside plain forwarding and nftables, in network namespaces of its own
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    contest: Contest,
}

#[derive(Debug, Subcommand)]
enum Contest {
    /// What a forwarded packet costs: 60-byte UDP over IPv4, one core, generator and sink included
    Packets(packets::Arguments),
    /// What the ports of one 65,535-port range cost, first to last
    Ports(ports::Arguments),
    /// What TCP sockets get through the gateway, all offloads on
    Sockets(sockets::Arguments),
}

fn main() -> ExitCode {
    let result = match &Arguments::parse().contest {
        Contest::Packets(arguments) => packets::run(arguments),
        Contest::Ports(arguments) => ports::run(arguments),
        Contest::Sockets(arguments) => sockets::run(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
