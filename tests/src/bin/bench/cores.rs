//! Two directions of the same flows on two cores: whether they write to each other's cache lines.

use std::thread;

use anyhow::{Result, anyhow};
use clap::Args;
use portfwd_tests::pipeline::{Load, Order, PORT, Pipeline, Stream};

use crate::gateway::{self, Bench, Gateway, Room, Rules, TARGET_PORT};
use crate::report::{Figure, Row, Table};

/// How much and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Rounds; each runs every gateway alone in both directions, and on two cores
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// Frames of a measurement and direction
    #[arg(long, default_value_t = 1_000_000)]
    frames: u32,
    /// Flows, a power of two
    #[arg(long, default_value_t = 1024)]
    flows: u32,
}

const GATEWAYS: [Gateway; 2] = [Gateway::Redirect, Gateway::Xdp];

/// Measures.
pub fn run(arguments: &Arguments) -> Result<Table> {
    let there = Stream::to_gateway(PORT);
    let back = there.answered_from(TARGET_PORT);
    let load = Load {
        frames: arguments.frames,
        flows: arguments.flows,
        order: Order::Scattered,
        first: 0,
    };
    let mut rows = Vec::new();
    for gateway in GATEWAYS {
        let lab = gateway::lab()?;
        let room = Room {
            flows: arguments.flows,
            rules: Rules::One,
            build: None,
        };
        let mut bench = Bench::new(gateway, &lab, &room)?;
        let mut other = Pipeline::new(&lab)?.on_core(1);
        let frames = arguments.flows;
        for _ in 0..2 {
            bench.pipeline.send(&there, Load { frames, ..load })?;
            other.send(&back, Load { frames, ..load })?;
        }
        let (mut one, mut both) = (Vec::new(), Vec::new());
        for _ in 0..arguments.rounds {
            let forth = bench.pipeline.send(&there, load)?;
            let home = other.send(&back, load)?;
            let nanoseconds = (forth.ns_per_frame + home.ns_per_frame) / 2.0;
            one.push((1e3 / nanoseconds, forth.loss.max(home.loss)));

            let (forth, home) = thread::scope(|scope| {
                let home = scope.spawn(|| other.send(&back, load));
                let forth = bench.pipeline.send(&there, load);
                (forth, home.join())
            });
            let (forth, home) = (forth?, home.map_err(|_| anyhow!("a generator panicked"))??);
            // The slower one's time, in which both have sent all that they were to send.
            let nanoseconds = forth.ns_per_frame.max(home.ns_per_frame);
            both.push((2e3 / nanoseconds, forth.loss.max(home.loss)));
        }
        for (cores, samples) in [("one core", &one), ("two cores", &both)] {
            rows.push(Row {
                name: format!("{}, {cores}", gateway.name()),
                figures: vec![Figure::of(samples)],
            });
        }
    }
    Ok(Table {
        name: "cores",
        title: format!(
            "Both directions of {} flows, UDP over IPv4, 60-byte frames",
            arguments.flows
        ),
        unit: "million packets per second",
        columns: vec!["both directions".to_owned()],
        rows,
        reference: Some("portfwd xdp, one core".to_owned()),
    })
}
