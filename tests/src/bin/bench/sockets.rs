//! Sockets through the gateway, bulk and small requests: not translated at all, by portfwd in TC, by nftables.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::DaemonOptions;
use portfwd_tests::haproxy::Haproxy;
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::process;
use portfwd_tests::wrk::{self, Connections};
use portfwd_tests::{Daemon, Lab, LabOptions, Mode, nftables};

use crate::report::{Figure, Report, Row, Table};

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
    _keeper: Keeper,
}

/// What keeps a gateway at work, if not the kernel alone.
enum Keeper {
    Kernel,
    Portfwd { _daemon: Box<Daemon> },
    Haproxy { _relay: Haproxy },
}

/// Measures: throughput and what it takes of the processors, requests and their latency.
pub fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let labs = (0..4)
        .map(|_| LabOptions::default().build())
        .collect::<Result<Vec<_>>>()?;
    let mut contestants = vec![routing(&labs[0])?, portfwd(&labs[1])?, nftables(&labs[2])?];
    match haproxy(&labs[3]) {
        Ok(contestant) => contestants.push(contestant),
        Err(why) => report.miss(HAPROXY, &why),
    }
    report.tables.extend(throughput(&contestants, arguments)?);
    report
        .tables
        .extend(small_requests(&contestants, arguments)?);
    Ok(())
}

fn throughput(contestants: &[Contestant<'_>], arguments: &Arguments) -> Result<[Table; 2]> {
    let (mut rates, mut costs) = (rows(contestants), rows(contestants));
    let directions = [Direction::Upload, Direction::Download];
    for direction in directions {
        let mut samples: Vec<(Vec<_>, Vec<_>)> =
            contestants.iter().map(|_| Default::default()).collect();
        for _ in 0..arguments.rounds {
            for (contestant, (rates, costs)) in contestants.iter().zip(&mut samples) {
                let duration = Duration::from_secs(arguments.seconds);
                let before = busy_time()?;
                let report = iperf::transfer(
                    &contestant.lab.client,
                    (contestant.dialled, PORT).into(),
                    direction,
                    duration,
                )
                .with_context(|| contestant.name)?;
                let busy = busy_time()?.saturating_sub(before);
                let gigabits = report.bits_per_second * duration.as_secs_f64() / 1e9;
                rates.push((report.bits_per_second / 1e9, 0.0));
                costs.push((busy.as_secs_f64() * 1e3 / gigabits, 0.0));
            }
        }
        let rows = rates.iter_mut().zip(&mut costs);
        for ((rate, cost), (rates, costs)) in rows.zip(&samples) {
            rate.figures.push(Figure::of(rates));
            cost.figures.push(Figure::of(costs));
        }
    }
    let columns: Vec<_> = directions.map(|direction| format!("{direction:?}")).into();
    let reference = Some(contestants[0].name.to_owned());
    Ok([
        Table {
            name: "sockets",
            title: format!(
                "iperf3 through the gateway, {} s each, all offloads on",
                arguments.seconds
            ),
            unit: "Gbit/s",
            columns: columns.clone(),
            rows: rates,
            reference: reference.clone(),
        },
        Table {
            name: "processor",
            title: "What all processors together take for it, client and server included"
                .to_owned(),
            unit: "milliseconds per Gbit",
            columns,
            rows: costs,
            reference,
        },
    ])
}

/// How long all processors together have been busy since the machine was started (proc_stat(5)).
fn busy_time() -> Result<Duration> {
    const USER: usize = 1;
    const IDLE: usize = 4;
    const WAITING: usize = 5;
    const SOFTIRQ: usize = 7;
    let text = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let words = line.split_whitespace().enumerate();
    // What is stolen, or given to guests, is not this machine's, or counted already.
    let busy =
        words.filter(|(at, _)| (USER..=SOFTIRQ).contains(at) && ![IDLE, WAITING].contains(at));
    let ticks = busy
        .map(|(_, word)| word.parse::<u64>())
        .sum::<Result<u64, _>>()
        .context("/proc/stat has a word that is no number")?;
    process::of_ticks(ticks)
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
            reference: Some(reference.clone()),
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
            reference: Some(reference),
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
    contestant("plain routing", lab, SERVER.v4.into(), |_| {
        Ok(Keeper::Kernel)
    })
}

fn portfwd(lab: &Lab) -> Result<Contestant<'_>> {
    contestant("portfwd tc", lab, GATEWAY_WAN.v4.into(), |lab| {
        let daemon = DaemonOptions::new(Mode::Tc).start(&lab.gateway)?;
        for port in [PORT, WEB_PORT] {
            daemon.ok(&["add", "tcp", &port.to_string(), &SERVER.v4.to_string()])?;
        }
        Ok(Keeper::Portfwd {
            _daemon: Box::new(daemon),
        })
    })
}

fn nftables(lab: &Lab) -> Result<Contestant<'_>> {
    contestant("nftables DNAT", lab, GATEWAY_WAN.v4.into(), |lab| {
        nftables::forward(&lab.gateway, &forwards())?;
        Ok(Keeper::Kernel)
    })
}

const HAPROXY: &str = "HAProxy relay";

fn haproxy(lab: &Lab) -> Result<Contestant<'_>> {
    contestant(HAPROXY, lab, GATEWAY_WAN.v4.into(), |lab| {
        let relay = Haproxy::start(&lab.gateway, &forwards())?;
        Ok(Keeper::Haproxy { _relay: relay })
    })
}

/// The web server's comes last: it minds no connection that says nothing.
fn forwards() -> [nftables::Forward; 2] {
    [PORT, WEB_PORT].map(|port| nftables::Forward {
        listen: (GATEWAY_WAN.v4, port).into(),
        target: (SERVER.v4, port).into(),
    })
}

fn contestant<'lab>(
    name: &'static str,
    lab: &'lab Lab,
    dialled: IpAddr,
    keep: impl FnOnce(&'lab Lab) -> Result<Keeper>,
) -> Result<Contestant<'lab>> {
    Ok(Contestant {
        name,
        lab,
        dialled,
        _server: iperf::Server::start(&lab.server, PORT)?,
        _web_server: Nginx::start(&lab.server, WEB_PORT, &[PAGE])?,
        _keeper: keep(lab)?,
    })
}
