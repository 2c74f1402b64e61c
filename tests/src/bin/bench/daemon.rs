//! What the daemon takes: time, processor and memory.

use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use clap::Args;
use nix::time::{ClockId, clock_gettime};
use portfwd::bpf::{Pins, Tables};
use portfwd_common::abi::{Config, Ticks, names};
use portfwd_tests::address::SERVER;
use portfwd_tests::control::Raw;
use portfwd_tests::daemon::{Daemon, DaemonOptions};
use portfwd_tests::pipeline::{PORT, Pipeline, Stream};
use portfwd_tests::start_times::StartTimes;
use portfwd_tests::{Lab, Mode};

use crate::gateway::{self, TARGET_PORT, others_than_forwarded, rule};
use crate::packets;
use crate::report::{Figure, Row, Table};

/// How much and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Rounds; each starts the daemon twice and applies three configurations
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Rules
    #[arg(long, default_value_t = 10_000)]
    rules: u32,
    /// Rules that are added one by one to those
    #[arg(long, default_value_t = 200)]
    adds: u32,
    /// Flows in the table, a power of two, after none and 8,192
    #[arg(long, default_value_t = 1 << 20)]
    flows: u32,
    /// Seconds that the daemon is watched while nobody asks for anything
    #[arg(long, default_value_t = 12)]
    seconds: u64,
    /// Another portfwd beside this one
    #[arg(long, value_name = "PROGRAM")]
    beside: Vec<PathBuf>,
}

/// So many flows are few.
const FEW: u32 = 8_192;
/// The longest that an answer of the control socket takes.
const PATIENCE: Duration = Duration::from_secs(10);
const MEBIBYTE: f64 = (1 << 20) as f64;

/// A daemon, and what it had to say for itself.
struct Contestant {
    name: String,
    build: Option<PathBuf>,
}

/// Figures of the daemons, a row for each, or several.
#[derive(Default)]
struct Rows {
    times: Vec<Row>,
    memory: Vec<Row>,
    processor: Vec<Row>,
    waits: Vec<Row>,
    sweep: Vec<Row>,
    connection: Vec<Row>,
}

/// Measures.
pub fn run(arguments: &Arguments) -> Result<Vec<Table>> {
    let mut contestants = vec![Contestant {
        name: "portfwd".to_owned(),
        build: None,
    }];
    contestants.extend(arguments.beside.iter().map(|path| Contestant {
        name: format!("portfwd, {}", path.display()),
        build: Some(path.clone()),
    }));
    let mut rows = Rows::default();
    for contestant in &contestants {
        eprintln!("measuring the daemon of {}", contestant.name);
        rows.times
            .push(times(contestant, arguments).context("time starts and changes")?);
        watch(contestant, arguments, &mut rows).context("watch it")?;
    }
    Ok(rows.tables(arguments))
}

/// Figures of single values.
fn alone(value: f64) -> Option<Figure> {
    Figure::of(&[(value, 0.0)])
}

fn milliseconds(times: &[Duration]) -> Vec<(f64, f64)> {
    times
        .iter()
        .map(|time| (time.as_secs_f64() * 1e3, 0.0))
        .collect()
}

/// Starts, changes of many rules, additions of one.
fn times(contestant: &Contestant, arguments: &Arguments) -> Result<Row> {
    let mut row = Row::new(&contestant.name);
    let starts = StartTimes::measure(Mode::Tc, arguments.rounds, contestant.build.as_deref())?;
    for times in [&starts.forwarding, &starts.again] {
        row.figures.push(Figure::of(&milliseconds(times)));
    }

    let rules = others_than_forwarded(arguments.rules);
    let changed = rules.replacen("10.2.0.10:80", "10.2.0.10:81", 1);
    let (mut all, mut one, mut none) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        // One of its own each time: places of rules that are gone come free with the sweep, and there are 32,767.
        let lab = Lab::for_mode(Mode::Tc)?;
        let daemon = start(contestant, &lab, FEW)?;
        all.push(timed(|| gateway::apply(&daemon, &rules))?);
        one.push(timed(|| gateway::apply(&daemon, &changed))?);
        none.push(timed(|| gateway::apply(&daemon, ""))?);
    }
    for times in [&all, &one, &none] {
        row.figures.push(Figure::of(&milliseconds(times)));
    }

    let lab = Lab::for_mode(Mode::Tc)?;
    let daemon = start(contestant, &lab, FEW)?;
    gateway::apply(&daemon, &rules)?;
    let mut by_command = Vec::new();
    let mut by_request = Vec::new();
    for port in (1000..).take(arguments.adds as usize) {
        let (port, target) = (u16::to_string(&port), SERVER.v4.to_string());
        by_command.push(timed(|| daemon.ok(&["add", "udp", &port, &target]))?);
        by_request.push(timed(|| add(&daemon, &port, &target))?);
    }
    for mut times in [by_command, by_request] {
        row.figures.push(Figure::of(&milliseconds(&times)));
        times.sort_unstable();
        let late = times.get(times.len() * 99 / 100);
        let late = late.context("nothing was added")?;
        row.figures.push(alone(late.as_secs_f64() * 1e3));
    }
    Ok(row)
}

const TIMES: [&str; 9] = [
    "first start, to the first answer",
    "restart, until ready",
    "apply of all rules",
    "apply of one change among them",
    "removal of all",
    "add beside them, command",
    "add, command, 99th percentile",
    "add, request",
    "add, request, 99th percentile",
];

fn start(contestant: &Contestant, lab: &Lab, flows: u32) -> Result<Daemon> {
    let mut options = DaemonOptions::new(Mode::Tc);
    options.max_flows = Some(flows);
    options.log_at_end = false;
    options.start_as(&lab.gateway, contestant.build.as_deref())
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed())
}

/// What `portfwd add` asks the daemon for, without a process of its own.
fn add(daemon: &Daemon, port: &str, target: &str) -> Result<()> {
    let body = serde_json::json!({ "proto": "tcp", "listen": port, "target": target }).to_string();
    let mut client = Raw::connect(&daemon.socket())?;
    let request = format!(
        "POST /v1/rules HTTP/1.1\r\nhost: portfwd\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    client.say(request.as_bytes())?;
    let answer = client.answer(PATIENCE)?;
    ensure!(
        answer.status == 201,
        "{}: {}",
        answer.status,
        answer.text().trim()
    );
    Ok(())
}

/// A daemon that nobody asks for anything, with more and more to look after.
fn watch(contestant: &Contestant, arguments: &Arguments, rows: &mut Rows) -> Result<()> {
    let lab = gateway::lab()?;
    for end in [lab.wan_end(), lab.lan_end()] {
        end.turn_gro_on()?;
    }
    let mut daemon = start(contestant, &lab, arguments.flows)?;
    let mut watched = Watched::new(&contestant.name, arguments.seconds);
    // Its first sweep is in the first look, and gives back what the start has left.
    watched.look(&daemon)?;
    watched.look(&daemon)?;
    let forward = rule(
        "udp",
        &PORT.to_string(),
        &format!("{}:{TARGET_PORT}", SERVER.v4),
    );
    gateway::apply(
        &daemon,
        &(others_than_forwarded(arguments.rules) + &forward),
    )?;
    watched.look(&daemon)?;
    let mut pipeline = Pipeline::new(&lab)?;
    let tables = Tables::open_pinned(&daemon.pins())?;
    for flows in [FEW, arguments.flows] {
        packets::begin(&mut pipeline, &Stream::to_gateway(PORT), flows)?;
        let found = tables.flow_entries()?;
        ensure!(
            found == u64::from(flows),
            "{found} of {flows} flows are established"
        );
        watched.look(&daemon)?;
    }
    rows.connection
        .push(memory_of_connections(contestant, &daemon)?);
    watched.into_rows(rows);

    // The daemon's own sweeps are not to be in the way.
    daemon.stop()?;
    rows.sweep.push(sweeps(contestant, arguments, &daemon)?);
    Ok(())
}

/// What a daemon had at every look.
struct Watched {
    seconds: u64,
    memory: [Row; 4],
    processor: Row,
    waits: Row,
}

impl Watched {
    fn new(name: &str, seconds: u64) -> Self {
        Self {
            seconds,
            memory: [
                Row::new(&format!("{name}, resident")),
                Row::new(&format!("{name}, of its own")),
                Row::new(&format!("{name}, of files")),
                Row::new(&format!("{name}, peak so far")),
            ],
            processor: Row::new(name),
            waits: Row::new(name),
        }
    }

    /// Watches for a while; what the daemon has to do about a change it does in this time.
    fn look(&mut self, daemon: &Daemon) -> Result<()> {
        let before = daemon.activity()?;
        thread::sleep(Duration::from_secs(self.seconds));
        let after = daemon.activity()?;
        let memory = daemon.memory()?;
        let seconds = self.seconds as f64;
        let time = after.time.saturating_sub(before.time);
        self.processor
            .figures
            .push(alone(time.as_secs_f64() * 1e3 / seconds));
        let waits = after.waits.saturating_sub(before.waits);
        self.waits.figures.push(alone(waits as f64 / seconds));
        let amounts = [memory.now, memory.anonymous, memory.file, memory.peak];
        for (row, bytes) in self.memory.iter_mut().zip(amounts) {
            row.figures.push(alone(bytes as f64 / MEBIBYTE));
        }
        Ok(())
    }

    fn into_rows(self, rows: &mut Rows) {
        rows.memory.extend(self.memory);
        rows.processor.push(self.processor);
        rows.waits.push(self.waits);
    }
}

/// Kernel memory of a connection, by what the kernel says of the whole table, which has all of it from the beginning.
fn memory_of_connections(contestant: &Contestant, daemon: &Daemon) -> Result<Row> {
    let mut row = Row::new(&contestant.name);
    let directory = Pins::new(&daemon.pins()).maps();
    for name in [names::FLOWS_V4, names::FLOWS_V6] {
        let path = directory.join(name);
        let map = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
        let connections = map.info()?.max_entries() / 2;
        let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
        let told = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let bytes = told
            .lines()
            .find_map(|line| line.strip_prefix("memlock:"))
            .with_context(|| format!("{path} does not say how much memory {name} takes"))?;
        let bytes: u64 = bytes.trim().parse()?;
        row.figures
            .push(alone(bytes as f64 / f64::from(connections)));
    }
    Ok(row)
}

/// The daemon's sweep by this process, on one thread: processor time of it, in milliseconds.
fn sweeps(contestant: &Contestant, arguments: &Arguments, daemon: &Daemon) -> Result<Row> {
    let mut row = Row::new(&contestant.name);
    let flows = u64::from(arguments.flows);
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        let mut sweeper = daemon.sweeper()?;
        for times in [&mut first, &mut again] {
            let before = processor_time()?;
            let swept = sweeper.sweep()?;
            times.push(processor_time()?.saturating_sub(before));
            ensure!(
                swept.entries == 2 * flows && swept.expired == 0,
                "{flows} flows, but {swept:?}"
            );
        }
    }
    let mut tables = Tables::open_pinned(&daemon.pins())?;
    let config = tables.config()?;
    tables.write_config(&Config {
        udp: Ticks(1),
        ..config
    })?;
    let mut sweeper = daemon.sweeper()?;
    let before = processor_time()?;
    let swept = sweeper.sweep()?;
    let last = processor_time()?.saturating_sub(before);
    ensure!(swept.expired == flows, "{flows} flows, but {swept:?}");
    for times in [&first, &again, &vec![last]] {
        row.figures.push(Figure::of(&milliseconds(times)));
    }
    Ok(row)
}

/// Processor time of this thread.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

impl Rows {
    fn tables(self, arguments: &Arguments) -> Vec<Table> {
        let stages = || {
            vec![
                "a start".to_owned(),
                "nothing".to_owned(),
                format!("{} rules", arguments.rules),
                format!("{FEW} flows"),
                format!("{} flows", arguments.flows),
            ]
        };
        let flows = arguments.flows;
        let table = |name, title: String, unit, columns: Vec<String>, rows| Table {
            name,
            title,
            unit,
            columns,
            rows,
            reference: None,
        };
        vec![
            table(
                "daemon",
                format!("The daemon, TC, {} rules", arguments.rules),
                "milliseconds",
                TIMES.map(str::to_owned).into(),
                self.times,
            ),
            table(
                "daemon-memory",
                format!(
                    "Physical memory of the daemon, {} s after",
                    arguments.seconds
                ),
                "MiB",
                stages(),
                self.memory,
            ),
            table(
                "daemon-processor",
                "Processor time of the daemon with nobody asking, its sweeps included".to_owned(),
                "milliseconds per second",
                stages(),
                self.processor,
            ),
            table(
                "daemon-waits",
                "How often it is woken up meanwhile".to_owned(),
                "per second",
                stages(),
                self.waits,
            ),
            table(
                "sweep",
                format!("A sweep of {flows} flows"),
                "milliseconds of processor time",
                [
                    "of flows that are new to it",
                    "again",
                    "of flows that have expired",
                ]
                .map(str::to_owned)
                .into(),
                self.sweep,
            ),
            table(
                "connection",
                "Kernel memory of a connection, both directions".to_owned(),
                "bytes",
                ["IPv4", "IPv6"].map(str::to_owned).into(),
                self.connection,
            ),
        ]
    }
}
