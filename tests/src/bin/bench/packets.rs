//! What a packet costs from end to end, on one core.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use portfwd_tests::address::Family;
use portfwd_tests::conntrack;
use portfwd_tests::pipeline::{Heading, Load, Order, PORT, Pipeline, Segment, Stream, Transport};

use crate::gateway::{self, Bench, Gateway, Room, Rules, TARGET_PORT, needs_handshake};
use crate::report::{Figure, Report, Row, Table};

/// How much and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// What to measure [default: all]
    #[arg(value_enum)]
    contests: Vec<Contest>,
    /// Rounds; each runs every contestant once
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// Frames of a measurement
    #[arg(long, default_value_t = 1_000_000)]
    frames: u32,
    /// Numbers of flows of the contest `flows`, powers of two
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1024, 131_072, 1_048_576])]
    flows: Vec<u32>,
    /// Only these gateways, and what they are compared with [default: all but the trials]
    #[arg(long, value_enum, value_delimiter = ',')]
    gateways: Vec<Gateway>,
    /// Another portfwd beside this one, in every mode that is measured
    #[arg(long, value_name = "PROGRAM")]
    beside: Vec<PathBuf>,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Contest {
    /// From one flow to a million, UDP over IPv4
    Flows,
    /// Both families, both transports, both directions
    Kinds,
    /// Frames of 60, 512 and 1514 bytes
    Sizes,
    /// A new connection with every packet
    New,
    /// One rule, 1,000, 10,000, and a range of all ports
    Rules,
    /// A connection table that is half, nine tenths and entirely full
    Fill,
    /// With light tracking, one flow and a million, there and back
    Light,
    /// With light tracking and no room for more than a few flows: translation without state
    Stateless,
}

/// One measurement of one gateway.
#[derive(Clone, Debug)]
struct Condition {
    name: String,
    stream: Stream,
    flows: u32,
    order: Order,
    begin: Begin,
}

/// When the flows of a measurement begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// Before it, and each has sent within the last second.
    Before,
    /// Before it, and each has rested for more than a second.
    Rested,
    /// With every packet of it.
    Within,
}

/// A comparison of gateways.
struct Comparison {
    name: &'static str,
    title: &'static str,
    contestants: Vec<(String, Gateway, Room)>,
    reference: Gateway,
    conditions: Vec<Condition>,
}

/// With so many flows it shows in a measurement that each of them begins with an entry that must be looked at again.
const MANY: u32 = 16_384;
/// So many flows at most begin in one measurement: all of them must find room.
const MOST_NEW: u32 = 262_144;

/// With so many times the flows that there is room for, hardly any packet is of one that has an entry.
const HARDLY_ANY: u32 = 64;

const MOST_COMMON: [Gateway; 6] = [
    Gateway::Redirect,
    Gateway::Floor,
    Gateway::Nftables,
    Gateway::Xdp,
    Gateway::XdpGeneric,
    Gateway::Tc,
];

/// Measures into a report.
pub fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let chosen: &[Contest] = if arguments.contests.is_empty() {
        Contest::value_variants()
    } else {
        &arguments.contests
    };
    for contest in chosen {
        let mut comparison = contest.comparison(arguments).among(arguments);
        let name = comparison.name;
        let table = comparison
            .measure(arguments, report)
            .with_context(|| format!("measure {name}"))?;
        report.tables.push(table);
    }
    Ok(())
}

impl Contest {
    fn comparison(self, arguments: &Arguments) -> Comparison {
        match self {
            Self::Flows => flows(arguments),
            Self::Kinds => kinds(),
            Self::Sizes => sizes(),
            Self::New => new_connections(arguments),
            Self::Rules => rules(arguments),
            Self::Fill => fill(),
            Self::Light => light(arguments),
            Self::Stateless => stateless(arguments),
        }
    }
}

fn contestants(gateways: &[Gateway], flows: u32) -> Vec<(String, Gateway, Room)> {
    let room = Room {
        flows,
        rules: Rules::One,
        build: None,
    };
    gateways
        .iter()
        .map(|gateway| (gateway.name().to_owned(), *gateway, room.clone()))
        .collect()
}

fn established(name: String, stream: Stream, flows: u32, order: Order) -> Condition {
    Condition {
        name,
        stream,
        flows,
        order,
        begin: Begin::Before,
    }
}

fn flows(arguments: &Arguments) -> Comparison {
    let conditions = arguments.flows.iter().flat_map(|&flows| {
        let (name, order) = match flows {
            1 => ("1 flow".to_owned(), Order::Sequential),
            flows => (format!("{flows} flows"), Order::Scattered),
        };
        let busy = established(name.clone(), Stream::to_gateway(PORT), flows, order);
        let rested = (flows >= MANY).then(|| Condition {
            name: format!("{name} after a rest"),
            begin: Begin::Rested,
            ..busy.clone()
        });
        [Some(busy), rested].into_iter().flatten()
    });
    let most = arguments.flows.iter().copied().max().unwrap_or(1);
    Comparison {
        name: "flows",
        title: "Established flows, UDP over IPv4, 60-byte frames, random order",
        contestants: contestants(&Gateway::ALL, most),
        reference: Gateway::Redirect,
        conditions: conditions.collect(),
    }
}

fn light(arguments: &Arguments) -> Comparison {
    let there = Stream::to_gateway(PORT);
    let ways = [("there", there), ("back", there.answered_from(TARGET_PORT))];
    let conditions = arguments.flows.iter().flat_map(|&flows| {
        ways.map(|(way, stream)| {
            established(format!("{flows} {way}"), stream, flows, Order::Scattered)
        })
    });
    let most = arguments.flows.iter().copied().max().unwrap_or(1);
    let gateways = [
        Gateway::Redirect,
        Gateway::Floor,
        Gateway::Xdp,
        Gateway::XdpLight,
    ];
    Comparison {
        name: "light",
        title: "Light tracking beside full, established flows of UDP over IPv4, 60-byte frames, random order",
        contestants: contestants(&gateways, most),
        reference: Gateway::Redirect,
        conditions: conditions.collect(),
    }
}

/// As if every flow's state had been lost, and none could be made.
fn stateless(arguments: &Arguments) -> Comparison {
    const ROOM: u32 = 1024;
    let is_many = |flows: &u32| *flows >= ROOM * HARDLY_ANY;
    let there = Stream::to_gateway(PORT);
    let ways = [("there", there), ("back", there.answered_from(TARGET_PORT))];
    let many = arguments.flows.iter().copied().filter(is_many);
    let conditions = many.flat_map(|flows| {
        ways.map(|(way, stream)| {
            established(format!("{flows} {way}"), stream, flows, Order::Scattered)
        })
    });
    Comparison {
        name: "stateless",
        title: "Light tracking with room for 2,048 flows in the connection table, UDP over IPv4, 60-byte frames, random order",
        contestants: contestants(&[Gateway::Redirect, Gateway::XdpLight, Gateway::Xdp], ROOM),
        reference: Gateway::Redirect,
        conditions: conditions.collect(),
    }
}

fn kinds() -> Comparison {
    let mut conditions = Vec::new();
    for family in Family::BOTH {
        for (word, transport) in [
            ("UDP", Transport::Udp),
            ("TCP", Transport::Tcp(Segment::CLIENT_ACK)),
        ] {
            let there = Stream::to_gateway(PORT).over(family).of(transport);
            let mut back = there.answered_from(TARGET_PORT);
            if transport != Transport::Udp {
                back = back.of(Transport::Tcp(Segment::SERVER_ACK));
            }
            for (way, stream) in [("there", there), ("back", back)] {
                let name = format!("{family} {word} {way}");
                conditions.push(established(name, stream, 1024, Order::Scattered));
            }
        }
    }
    Comparison {
        name: "kinds",
        title: "1,024 established flows, shortest frames",
        contestants: contestants(&MOST_COMMON, 8 * 1024),
        reference: Gateway::Redirect,
        conditions,
    }
}

fn sizes() -> Comparison {
    let conditions = [60, 512, 1514].map(|bytes| {
        let stream = Stream::to_gateway(PORT).in_frames(bytes);
        established(format!("{bytes} bytes"), stream, 1024, Order::Scattered)
    });
    Comparison {
        name: "sizes",
        title: "1,024 established flows, UDP over IPv4, by size of the frame",
        contestants: contestants(&MOST_COMMON, 1024),
        reference: Gateway::Redirect,
        conditions: conditions.into(),
    }
}

fn new_connections(arguments: &Arguments) -> Comparison {
    let flows = arguments.frames.next_power_of_two().min(MOST_NEW);
    let conditions = [
        ("UDP", Transport::Udp),
        ("SYN", Transport::Tcp(Segment::SYN)),
    ]
    .map(|(name, transport)| Condition {
        name: name.to_owned(),
        stream: Stream::to_gateway(PORT).of(transport),
        flows,
        order: Order::Scattered,
        begin: Begin::Within,
    });
    let gateways = [
        Gateway::Redirect,
        Gateway::Nftables,
        Gateway::Iptables,
        Gateway::Xdp,
        Gateway::Tc,
    ];
    // Room for all rounds: what is measured is the beginning of flows, not a full table.
    let room = flows
        .saturating_mul(2 * arguments.rounds as u32)
        .min(8 << 20);
    Comparison {
        name: "new",
        title: "A new connection with every packet, IPv4",
        contestants: contestants(&gateways, room),
        reference: Gateway::Nftables,
        conditions: conditions.into(),
    }
}

fn rules(arguments: &Arguments) -> Comparison {
    let with = |name: &str, rules| {
        let room = Room {
            flows: 1024,
            rules,
            build: None,
        };
        (name.to_owned(), Gateway::Xdp, room)
    };
    let stream = Stream::to_gateway(PORT);
    Comparison {
        name: "rules",
        title: "portfwd xdp by number of rules, UDP over IPv4: 1,024 flows, and a new one with every packet",
        contestants: vec![
            with("1 rule", Rules::One),
            with("1,000 rules", Rules::Among(1_000)),
            with("10,000 rules", Rules::Among(10_000)),
            with("a range of 65,535 ports", Rules::Range),
        ],
        reference: Gateway::Xdp,
        conditions: vec![
            established("established".into(), stream, 1024, Order::Scattered),
            // Only a first packet looks for its rule.
            Condition {
                name: "new".into(),
                stream,
                flows: arguments.frames.next_power_of_two().min(MOST_NEW),
                order: Order::Scattered,
                begin: Begin::Within,
            },
        ],
    }
}

fn fill() -> Comparison {
    const ENTRIES: u32 = 65_536;
    let with = |name: &str, flows| {
        let room = Room {
            flows,
            rules: Rules::One,
            build: None,
        };
        (name.to_owned(), Gateway::Xdp, room)
    };
    // The room is what is said here, twice (see `gateway::portfwd`); the flows are always as many.
    Comparison {
        name: "fill",
        title: "portfwd xdp by how full the connection table is, UDP over IPv4, 65,536 flows",
        contestants: vec![
            with("half full", ENTRIES),
            with("nine tenths full", ENTRIES / 9 * 5),
            with("entirely full", ENTRIES / 2),
            with("overfull, half of the flows without entry", ENTRIES / 4),
        ],
        reference: Gateway::Xdp,
        conditions: vec![established(
            "established".into(),
            Stream::to_gateway(PORT),
            ENTRIES,
            Order::Scattered,
        )],
    }
}

impl Comparison {
    /// Of the gateways that were asked for only, and of the builds.
    fn among(mut self, arguments: &Arguments) -> Self {
        let asked = &arguments.gateways;
        self.contestants.retain(|(_, gateway, _)| {
            *gateway == self.reference
                || asked.contains(gateway)
                || asked.is_empty() && !gateway.is_trial()
        });
        let others = arguments.beside.iter().flat_map(|path| {
            let own = self.contestants.iter();
            own.filter(|(_, gateway, _)| gateway.is_portfwd())
                .map(move |(name, gateway, room)| {
                    let file = path.file_name().unwrap_or(path.as_os_str());
                    let room = Room {
                        build: Some(path.clone()),
                        ..room.clone()
                    };
                    (format!("{name}, {}", file.display()), *gateway, room)
                })
        });
        let others: Vec<_> = others.collect();
        self.contestants.extend(others);
        self
    }

    fn measure(&mut self, arguments: &Arguments, report: &mut Report) -> Result<Table> {
        let _room = self.conntrack_room()?;
        let labs = self
            .contestants
            .iter()
            .map(|_| gateway::lab())
            .collect::<Result<Vec<_>>>()?;
        let mut benches = Vec::new();
        let mut present = Vec::new();
        for (contestant, lab) in self.contestants.drain(..).zip(&labs) {
            let (name, gateway, room) = &contestant;
            eprintln!("preparing {name} for {}", self.name);
            match Bench::new(*gateway, lab, room) {
                Ok(bench) => {
                    benches.push(bench);
                    present.push(contestant);
                }
                Err(why) if gateway.may_be_missing() => report.miss(name, &why),
                Err(error) => return Err(error.context(name.clone())),
            }
        }
        self.contestants = present;
        let mut rows: Vec<Row> = self
            .contestants
            .iter()
            .map(|(name, ..)| Row {
                name: name.clone(),
                figures: Vec::new(),
            })
            .collect();
        for condition in &self.conditions {
            let samples = self.samples(condition, &mut benches, arguments)?;
            for (row, samples) in rows.iter_mut().zip(samples) {
                row.figures.push(Figure::of(&samples));
            }
        }
        let reference = self
            .contestants
            .iter()
            .find(|(_, gateway, _)| *gateway == self.reference)
            .map(|(name, ..)| name.clone());
        Ok(Table {
            name: self.name,
            title: self.title.to_owned(),
            unit: "ns per packet",
            columns: self.conditions.iter().map(|c| c.name.clone()).collect(),
            rows,
            reference: Some(reference.context("the reference takes no part")?),
        })
    }

    /// Room for as many connections of the kernel's as of portfwd's, if any contestant has the kernel track them.
    fn conntrack_room(&self) -> Result<Option<conntrack::Room>> {
        let tracking = self
            .contestants
            .iter()
            .filter(|(_, gateway, _)| gateway.has_kernel_track());
        let most = tracking.map(|(.., room)| room.connections()).max();
        most.map(conntrack::Room::for_connections).transpose()
    }

    /// For every contestant its samples under one condition, taken in turns.
    fn samples(
        &self,
        condition: &Condition,
        benches: &mut [Bench<'_>],
        arguments: &Arguments,
    ) -> Result<Vec<Vec<(f64, f64)>>> {
        let mut samples: Vec<Vec<_>> = benches.iter().map(|_| Vec::new()).collect();
        for round in 0..=arguments.rounds {
            for (((name, gateway, _), bench), samples) in self
                .contestants
                .iter()
                .zip(benches.iter_mut())
                .zip(&mut samples)
            {
                if !gateway.carries(&condition.stream) {
                    continue;
                }
                let stream = gateway.addressed(condition.stream);
                let sample = match (condition.begin, round) {
                    // The first round begins the flows, and is not counted.
                    (Begin::Before | Begin::Rested, 0) => {
                        begin(&mut bench.pipeline, &stream, condition.flows)?;
                        continue;
                    }
                    (Begin::Before | Begin::Rested, _) => {
                        let load = Load {
                            frames: arguments.frames,
                            flows: condition.flows,
                            order: condition.order,
                            first: 0,
                        };
                        // Every flow once: while the others were measured, none of this gateway's has sent.
                        if condition.begin == Begin::Before && condition.flows >= MANY {
                            let frames = condition.flows;
                            bench.pipeline.send(&stream, Load { frames, ..load })?;
                        }
                        bench.pipeline.send(&stream, load)
                    }
                    (Begin::Within, 0) => continue,
                    (Begin::Within, round) => bench.pipeline.send(
                        &stream,
                        Load {
                            frames: arguments.frames.min(condition.flows),
                            flows: condition.flows,
                            order: condition.order,
                            first: condition.flows.wrapping_mul(round as u32),
                        },
                    ),
                };
                let sample = sample.with_context(|| format!("{name}, {}", condition.name))?;
                samples.push((sample.ns_per_frame, sample.loss));
            }
        }
        Ok(samples)
    }
}

/// So many flows begin at once: those that have not proven themselves drive each other out.
const AT_ONCE: u32 = 8_192;

/// Begins the flows of a stream, as far as its transport and direction need it.
pub fn begin(pipeline: &mut Pipeline<'_>, stream: &Stream, flows: u32) -> Result<()> {
    let there = match stream.heading {
        Heading::ToTarget => *stream,
        Heading::ToClient => Stream::to_gateway(PORT)
            .over(stream.family)
            .of(stream.transport),
    };
    let back = there.answered_from(TARGET_PORT);
    let steps = match stream.transport {
        Transport::Udp if needs_handshake(stream) => vec![there, back],
        Transport::Udp => vec![there, there],
        Transport::Tcp(_) => vec![
            there.of(Transport::Tcp(Segment::SYN)),
            back.of(Transport::Tcp(Segment::SYN_ACK)),
            there.of(Transport::Tcp(Segment::CLIENT_ACK)),
            back.of(Transport::Tcp(Segment::SERVER_ACK)),
        ],
    };
    let at_once = flows.min(AT_ONCE);
    for first in (0..flows).step_by(at_once as usize) {
        let load = Load {
            frames: at_once,
            flows: at_once,
            order: Order::Sequential,
            first,
        };
        for step in &steps {
            pipeline.send(step, load)?;
        }
    }
    Ok(())
}
