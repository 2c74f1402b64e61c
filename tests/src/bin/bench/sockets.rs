//! Sockets through the gateway, bulk and small requests: not translated at all, by portfwd in TC, by nftables.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::DaemonOptions;
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::wrk::{self, Connections};
use portfwd_tests::{Daemon, Lab, LabOptions, Mode, nftables};

use crate::report::{Figure, Row, Table};

const PORT: u16 = 5201;
const WEB_PORT: u16 = 8080;
/// What is asked for: small enough for one segment.
const PAGE: (&str, &[u8]) = ("small", &[b'x'; 128]);

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
    dialled: IpAddr,
    _server: iperf::Server,
    _web_server: Nginx,
    _daemon: Option<Daemon>,
}

/// Measures: throughput, requests and their latency.
pub fn run(arguments: &Arguments) -> Result<[Table; 3]> {
    let labs = (0..3)
        .map(|_| LabOptions::default().build())
        .collect::<Result<Vec<_>>>()?;
    let contestants = [routing(&labs[0])?, portfwd(&labs[1])?, nftables(&labs[2])?];
    let [requests, latency] = small_requests(&contestants, arguments)?;
    Ok([throughput(&contestants, arguments)?, requests, latency])
}

fn throughput(contestants: &[Contestant<'_>], arguments: &Arguments) -> Result<Table> {
    let mut rows = rows(contestants);
    let directions = [Direction::Upload, Direction::Download];
    for direction in directions {
        let mut samples: Vec<Vec<_>> = contestants.iter().map(|_| Vec::new()).collect();
        for _ in 0..arguments.rounds {
            for (contestant, samples) in contestants.iter().zip(&mut samples) {
                let duration = Duration::from_secs(arguments.seconds);
                let report = iperf::transfer(
                    &contestant.lab.client,
                    (contestant.dialled, PORT).into(),
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
        rows,
        reference: contestants[0].name.to_owned(),
    })
}

fn small_requests(contestants: &[Contestant<'_>], arguments: &Arguments) -> Result<[Table; 2]> {
    let (mut rates, mut latencies) = (rows(contestants), rows(contestants));
    let kinds = [
        (Connections::Kept, "kept connections"),
        (Connections::New, "a connection each"),
    ];
    for (connections, _) in kinds {
        let mut reports: Vec<Vec<_>> = contestants.iter().map(|_| Vec::new()).collect();
        for _ in 0..arguments.rounds {
            for (contestant, reports) in contestants.iter().zip(&mut reports) {
                let url = format!("http://{}:{WEB_PORT}/{}", contestant.dialled, PAGE.0);
                let duration = Duration::from_secs(arguments.seconds);
                let report = wrk::run(&contestant.lab.client, &url, connections, duration)
                    .with_context(|| contestant.name)?;
                reports.push(report);
            }
        }
        for ((rate, latency), reports) in rates.iter_mut().zip(&mut latencies).zip(&reports) {
            let figure = |value: fn(&wrk::Report) -> f64| {
                let samples: Vec<_> = reports.iter().map(|report| (value(report), 0.0)).collect();
                Figure::of(&samples)
            };
            rate.figures
                .push(figure(|report| report.requests_per_second));
            latency.figures.push(figure(|report| report.median_us));
            latency.figures.push(figure(|report| report.p99_us));
        }
    }
    let reference = contestants[0].name.to_owned();
    Ok([
        Table {
            name: "requests",
            title: format!(
                "wrk, 32 clients, answers of {} bytes, {} s each, all offloads on",
                PAGE.1.len(),
                arguments.seconds
            ),
            unit: "requests per second",
            columns: kinds.map(|(_, name)| name.to_owned()).into(),
            rows: rates,
            reference: reference.clone(),
        },
        Table {
            name: "latency",
            title: "The same, time to the answer".to_owned(),
            unit: "microseconds",
            columns: kinds
                .iter()
                .flat_map(|(_, name)| {
                    [
                        format!("{name}, median"),
                        format!("{name}, 99th percentile"),
                    ]
                })
                .collect(),
            rows: latencies,
            reference,
        },
    ])
}

fn rows(contestants: &[Contestant<'_>]) -> Vec<Row> {
    contestants
        .iter()
        .map(|contestant| Row::new(contestant.name))
        .collect()
}

fn routing(lab: &Lab) -> Result<Contestant<'_>> {
    lab.client.ip(&format!(
        "route add {}/32 via {}",
        SERVER.v4, GATEWAY_WAN.v4
    ))?;
    contestant("plain routing", lab, SERVER.v4.into(), None)
}

fn portfwd(lab: &Lab) -> Result<Contestant<'_>> {
    let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
    for port in [PORT, WEB_PORT] {
        daemon.ok(&["add", "tcp", &port.to_string(), &SERVER.v4.to_string()])?;
    }
    contestant("portfwd tc", lab, GATEWAY_WAN.v4.into(), Some(daemon))
}

fn nftables(lab: &Lab) -> Result<Contestant<'_>> {
    let forwards = [PORT, WEB_PORT].map(|port| nftables::Forward {
        listen: (GATEWAY_WAN.v4, port).into(),
        target: (SERVER.v4, port).into(),
    });
    nftables::forward(&lab.gateway, &forwards)?;
    contestant("nftables DNAT", lab, GATEWAY_WAN.v4.into(), None)
}

fn contestant<'lab>(
    name: &'static str,
    lab: &'lab Lab,
    dialled: IpAddr,
    daemon: Option<Daemon>,
) -> Result<Contestant<'lab>> {
    Ok(Contestant {
        name,
        lab,
        dialled,
        _server: iperf::Server::start(&lab.server, PORT)?,
        _web_server: Nginx::start(&lab.server, WEB_PORT, &[PAGE])?,
        _daemon: daemon,
    })
}
