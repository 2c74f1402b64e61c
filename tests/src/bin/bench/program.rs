//! The hot path by itself: what a run of an XDP program takes, on frames that nobody sends.

use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::programs::ProgramInfo;
use clap::Args;
use portfwd_tests::address::Family;
use portfwd_tests::pipeline::{Load, Order, PORT, Segment, Stream, Transport};
use portfwd_tests::stack;

use crate::gateway::{self, Bench, Gateway, Room, Rules};
use crate::packets;
use crate::report::{Figure, Row, Table};

/// How much and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Rounds; each runs every program once
    #[arg(long, default_value_t = 15)]
    pub rounds: usize,
    /// Runs of a measurement
    #[arg(long, default_value_t = 2_000_000)]
    runs: u32,
    /// Flows, a power of two
    #[arg(long, default_value_t = 1024)]
    flows: u32,
    /// Another portfwd beside this one
    #[arg(long, value_name = "PROGRAM")]
    beside: Vec<PathBuf>,
}

/// Measures: what a run takes, and how large the programs are.
pub fn run(arguments: &Arguments) -> Result<[Table; 3]> {
    let room = Room {
        flows: arguments.flows,
        rules: Rules::One,
        build: None,
    };
    let mut contestants = [Gateway::Redirect, Gateway::Floor, Gateway::Xdp]
        .map(|gateway| (gateway.name().to_owned(), gateway, room.clone()))
        .to_vec();
    contestants.extend(arguments.beside.iter().map(|path| {
        let build = Some(path.clone());
        let name = format!("portfwd xdp, {}", path.display());
        (
            name,
            Gateway::Xdp,
            Room {
                build,
                ..room.clone()
            },
        )
    }));
    let labs = contestants
        .iter()
        .map(|_| gateway::lab())
        .collect::<Result<Vec<_>>>()?;
    let mut benches = contestants
        .iter()
        .zip(&labs)
        .map(|((name, gateway, room), lab)| {
            Bench::new(*gateway, lab, room).with_context(|| name.clone())
        })
        .collect::<Result<Vec<_>>>()?;

    let streams = streams();
    let mut rows: Vec<Row> = contestants
        .iter()
        .map(|(name, ..)| Row::new(name))
        .collect();
    for (_, stream) in &streams {
        for (row, samples) in
            rows.iter_mut()
                .zip(samples(stream, &contestants, &mut benches, arguments)?)
        {
            row.figures.push(Figure::of(&samples));
        }
    }
    let times = Table {
        name: "program",
        title: format!(
            "A run of the program on frames of {} established flows",
            arguments.flows
        ),
        unit: "ns per run, writing the frame included",
        columns: streams.iter().map(|(name, _)| name.clone()).collect(),
        rows,
        reference: Some(Gateway::Floor.name().to_owned()),
    };
    let (hot, all) = (sizes(&contestants, &benches)?, all_programs(&benches)?);
    Ok([times, hot, all])
}

fn streams() -> Vec<(String, Stream)> {
    let mut streams = Vec::new();
    for family in Family::BOTH {
        for (word, transport) in [
            ("UDP", Transport::Udp),
            ("TCP", Transport::Tcp(Segment::CLIENT_ACK)),
        ] {
            let stream = Stream::to_gateway(PORT).over(family).of(transport);
            streams.push((format!("{family} {word}"), stream));
        }
    }
    streams
}

fn samples(
    stream: &Stream,
    contestants: &[(String, Gateway, Room)],
    benches: &mut [Bench<'_>],
    arguments: &Arguments,
) -> Result<Vec<Vec<(f64, f64)>>> {
    let load = Load {
        frames: arguments.runs,
        flows: arguments.flows,
        order: Order::Scattered,
        first: 0,
    };
    let mut samples: Vec<Vec<_>> = benches.iter().map(|_| Vec::new()).collect();
    for round in 0..=arguments.rounds {
        for (((name, gateway, _), bench), samples) in
            contestants.iter().zip(&mut *benches).zip(&mut samples)
        {
            if !gateway.carries(stream) {
                continue;
            }
            // The first round begins the flows, and is not counted.
            if round == 0 {
                packets::begin(&mut bench.pipeline, stream, arguments.flows)?;
                continue;
            }
            let program = bench.wan_program()?.fd()?;
            let time = bench
                .pipeline
                .try_out(&program, stream, load)
                .with_context(|| name.clone())?;
            samples.push((time, 0.0));
        }
    }
    Ok(samples)
}

fn sizes(contestants: &[(String, Gateway, Room)], benches: &[Bench<'_>]) -> Result<Table> {
    let mut rows = Vec::new();
    for ((name, ..), bench) in contestants.iter().zip(benches) {
        rows.push(row(name, &bench.wan_program()?)?);
    }
    Ok(Table {
        name: "sizes-of-programs",
        title: "How large the programs of the hot path are".to_owned(),
        unit: UNIT,
        columns: COLUMNS.map(str::to_owned).into(),
        rows,
        reference: Some(Gateway::Floor.name().to_owned()),
    })
}

/// Every program of this build, those of slow paths and those that the daemon calls included.
fn all_programs(benches: &[Bench<'_>]) -> Result<Table> {
    let daemon = benches.iter().find_map(|bench| bench.daemon());
    let mut rows = Vec::new();
    for (name, id) in daemon.context("no portfwd takes part")?.program_ids()? {
        rows.push(row(&name, &gateway::program(id)?)?);
    }
    Ok(Table {
        name: "programs",
        title: "How large all programs of portfwd are".to_owned(),
        unit: UNIT,
        columns: COLUMNS.map(str::to_owned).into(),
        rows,
        reference: None,
    })
}

const UNIT: &str = "instructions, bytes";
const COLUMNS: [&str; 3] = [
    "verified instructions",
    "bytes of machine code",
    "bytes of stack",
];

fn row(name: &str, program: &ProgramInfo) -> Result<Row> {
    let mut row = Row::new(name);
    let sizes = [
        program.verified_instruction_count().map(f64::from),
        Some(f64::from(program.size_jitted())),
        Some(stack::of(program.id())? as f64),
    ];
    for size in sizes {
        row.figures
            .push(size.and_then(|size| Figure::of(&[(size, 0.0)])));
    }
    Ok(row)
}
