//! Bulk TCP through the gateway: not translated at all, by portfwd in TC, by nftables.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::DaemonOptions;
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::{Daemon, Lab, LabOptions, Mode, nftables};

use crate::report::{Figure, Row, Table};

const PORT: u16 = 5201;

/// How long and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Rounds; each runs every contestant once
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of a measurement
    #[arg(long, default_value_t = 2)]
    seconds: u64,
}

/// A gateway between two sockets. The fields keep it working.
struct Contestant<'lab> {
    name: &'static str,
    lab: &'lab Lab,
    dialled: SocketAddr,
    _server: iperf::Server,
    _daemon: Option<Daemon>,
}

/// Measures.
pub fn run(arguments: &Arguments) -> Result<Table> {
    let labs = (0..3)
        .map(|_| LabOptions::default().build())
        .collect::<Result<Vec<_>>>()?;
    let contestants = [routing(&labs[0])?, portfwd(&labs[1])?, nftables(&labs[2])?];
    let mut rows = contestants.each_ref().map(|contestant| Row {
        name: contestant.name.to_owned(),
        figures: Vec::new(),
    });
    let directions = [Direction::Upload, Direction::Download];
    for direction in directions {
        let mut samples: Vec<Vec<_>> = contestants.iter().map(|_| Vec::new()).collect();
        for _ in 0..arguments.rounds {
            for (contestant, samples) in contestants.iter().zip(&mut samples) {
                let duration = Duration::from_secs(arguments.seconds);
                let report = iperf::transfer(
                    &contestant.lab.client,
                    contestant.dialled,
                    direction,
                    duration,
                )
                .with_context(|| contestant.name)?;
                samples.push((report.bits_per_second / 1e9, 0.0));
            }
        }
        for (row, samples) in rows.iter_mut().zip(&samples) {
            row.figures.push(Figure::of(samples));
        }
    }
    Ok(Table {
        name: "sockets",
        title: format!(
            "iperf3 through the gateway, {} s each, all offloads on",
            arguments.seconds
        ),
        unit: "Gbit/s",
        columns: directions.map(|direction| format!("{direction:?}")).into(),
        rows: rows.into(),
        reference: contestants[0].name.to_owned(),
    })
}

fn routing(lab: &Lab) -> Result<Contestant<'_>> {
    lab.client.ip(&format!(
        "route add {}/32 via {}",
        SERVER.v4, GATEWAY_WAN.v4
    ))?;
    contestant("plain routing", lab, (SERVER.v4, PORT).into(), None)
}

fn portfwd(lab: &Lab) -> Result<Contestant<'_>> {
    let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    daemon.ok(&["add", "tcp", &PORT.to_string(), &SERVER.v4.to_string()])?;
    contestant(
        "portfwd tc",
        lab,
        (GATEWAY_WAN.v4, PORT).into(),
        Some(daemon),
    )
}

fn nftables(lab: &Lab) -> Result<Contestant<'_>> {
    let forward = nftables::Forward {
        listen: (GATEWAY_WAN.v4, PORT).into(),
        target: (SERVER.v4, PORT).into(),
    };
    nftables::forward(&lab.gateway, &[forward])?;
    contestant("nftables DNAT", lab, (GATEWAY_WAN.v4, PORT).into(), None)
}

fn contestant<'lab>(
    name: &'static str,
    lab: &'lab Lab,
    dialled: SocketAddr,
    daemon: Option<Daemon>,
) -> Result<Contestant<'lab>> {
    Ok(Contestant {
        name,
        lab,
        dialled,
        _server: iperf::Server::start(&lab.server, PORT)?,
        _daemon: daemon,
    })
}
