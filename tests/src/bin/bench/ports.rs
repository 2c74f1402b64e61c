//! A rule of all 65,535 ports: what a packet to each of them costs, established or the first of its flow.

use anyhow::Result;
use clap::Args;
use portfwd_tests::address::SERVER;
use portfwd_tests::daemon::DaemonOptions;
use portfwd_tests::pipeline::{Order, Pipeline};
use portfwd_tests::{LabOptions, Mode, Offloads};

use crate::report::{Figure, Row, Table};

const PORTS: [u16; 4] = [1, 5_000, 40_000, 65_535];

/// How much and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Rounds; each runs every port once
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// Frames of a measurement
    #[arg(long, default_value_t = 400_000)]
    frames: u32,
    /// Flows, a power of two
    #[arg(long, default_value_t = 1024)]
    flows: u32,
}

/// Measures.
pub fn run(arguments: &Arguments) -> Result<Table> {
    let lab = LabOptions::default().offloads(Offloads::Off).build()?;
    let daemon = DaemonOptions::new(Mode::Xdp).start(&lab.gateway)?;
    daemon.ok(&["add", "udp", "1-65535", &SERVER.v4.to_string()])?;
    let mut pipeline = Pipeline::new(&lab)?;
    let mut samples = PORTS.map(|_| Vec::new());
    for port in PORTS {
        pipeline.run_to(port, arguments.flows, arguments.flows, Order::Sequential)?;
    }
    for _ in 0..arguments.rounds {
        for (port, samples) in PORTS.into_iter().zip(&mut samples) {
            let sample =
                pipeline.run_to(port, arguments.frames, arguments.flows, Order::Scattered)?;
            samples.push((sample.ns_per_frame, sample.loss));
        }
    }
    let rows = PORTS.iter().zip(&samples).map(|(port, samples)| Row {
        name: format!("port {port}"),
        figures: vec![Figure::of(samples)],
    });
    Ok(Table {
        name: "ports",
        title: "portfwd xdp, a rule of the ports 1-65535, UDP over IPv4".to_owned(),
        unit: "ns per packet",
        columns: vec![format!("{} flows", arguments.flows)],
        rows: rows.collect(),
        reference: Some("port 1".to_owned()),
    })
}
