//! What a flood of forged SYNs costs an established transfer, and who is let in meanwhile: portfwd beside the kernel's own NAT.

use std::fmt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::pipeline::{Load, Order, Pipeline, Segment, Stream, Transport};
use portfwd_tests::{Family, Lab, LabOptions, Offloads, iperf, nftables, tcp};

#[derive(Debug, Parser)]
struct Arguments {
    /// Forged SYNs, each of a flow of its own, in each round
    #[arg(long, default_value_t = 1_000_000)]
    count: u32,
    /// SYNs a second
    #[arg(long, default_value_t = 100_000)]
    rate: u32,
    /// Rounds, of each gateway in turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// What the transfer is to move in a second, as iperf3 reads it
    #[arg(long, default_value = "300M")]
    transfer: String,
}

/// The port that is flooded: it leads to a host that says nothing, so that what is measured is the gateway, not the answers.
const FLOODED: u16 = 5000;
/// The port of the transfer, and the one that connections are dialled to meanwhile.
const TRANSFER: u16 = 5201;
const DIALLED: u16 = 8080;
/// Frames of a step, a power of two.
const STEP: u32 = 4_096;
/// From one connection to the next.
const BETWEEN: Duration = Duration::from_millis(100);
/// What a transfer must keep of its goodput.
const KEPT: f64 = 0.95;

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gateway {
    Xdp,
    Tc,
    Nftables,
}

impl fmt::Display for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Xdp => "portfwd xdp",
            Self::Tc => "portfwd tc",
            Self::Nftables => "nftables DNAT",
        })
    }
}

/// What a round of one gateway came to.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Goodput with the flood, divided by goodput without.
    kept: f64,
    /// Connections that were dialled during the flood, and how many of them were answered at once.
    dialled: u32,
    answered: u32,
    /// SYNs a second that the generator came to.
    rate: f64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flood: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and BPF need root; run it again with sudo"
    );
    println!(
        "{} forged SYNs, {} a second, beside a transfer of {}bit/s",
        arguments.count, arguments.rate, arguments.transfer
    );
    let mut broken = Vec::new();
    for gateway in [Gateway::Xdp, Gateway::Tc, Gateway::Nftables] {
        let mut rounds = (0..arguments.rounds)
            .map(|_| round(gateway, arguments).with_context(|| gateway.to_string()))
            .collect::<Result<Vec<_>>>()?;
        rounds.sort_by(|one, other| one.kept.total_cmp(&other.kept));
        let (least, most) = (rounds[0].kept, rounds[rounds.len() - 1].kept);
        let median = rounds[rounds.len() / 2];
        println!(
            "{gateway:<14} keeps {:.1} % of its goodput ({:.1} - {:.1}) at {:.0} SYNs a second; {} of {} new connections answered at once",
            100.0 * median.kept,
            100.0 * least,
            100.0 * most,
            median.rate,
            median.answered,
            median.dialled,
        );
        let is_ours = gateway != Gateway::Nftables;
        if is_ours && (median.kept < KEPT || median.answered < median.dialled) {
            broken.push(gateway.to_string());
        }
    }
    ensure!(
        broken.is_empty(),
        "lost more than {:.0} % of the transfer, or a new connection: {}",
        100.0 * (1.0 - KEPT),
        broken.join(", ")
    );
    Ok(())
}

fn round(gateway: Gateway, arguments: &Arguments) -> Result<Round> {
    let lab = LabOptions::default().offloads(Offloads::Off).build()?;
    for end in [lab.wan_end(), lab.lan_end()] {
        end.turn_gro_on()?;
    }
    let _daemon = forward(gateway, &lab)?;
    let _server = iperf::Server::start(&lab.server, TRANSFER)?;
    let _echo = tcp::Echo::start(&lab.server, Family::V4, DIALLED)?;
    let length = Duration::from_secs_f64(
        (f64::from(arguments.count) / f64::from(arguments.rate)).ceil() + 1.0,
    );
    let transfer = || {
        iperf::Client::start_at(
            &lab.client,
            GATEWAY_WAN.endpoint(Family::V4, TRANSFER),
            iperf::Direction::Download,
            length,
            &arguments.transfer,
        )
    };
    let quiet = transfer()?.finish()?.bits_per_second;
    let flooded = transfer()?;
    let begun = Instant::now();
    let is_over = AtomicBool::new(false);
    let (dialled, answered) = std::thread::scope(|scope| -> Result<(u32, u32)> {
        let dialler = scope.spawn(|| dial(&lab, &is_over));
        let poured = pour(&lab, arguments, begun);
        is_over.store(true, Ordering::Relaxed);
        let counted = dialler
            .join()
            .map_err(|_| anyhow::anyhow!("the dialler has failed"))?;
        poured.map(|()| counted)
    })?;
    let rate = f64::from(arguments.count) / begun.elapsed().as_secs_f64();
    Ok(Round {
        kept: flooded.finish()?.bits_per_second / quiet,
        dialled,
        answered,
        rate,
    })
}

/// Sends the flood.
fn pour(lab: &Lab, arguments: &Arguments, begun: Instant) -> Result<()> {
    let mut pipeline = Pipeline::new(lab)?;
    let flood = Stream::to_gateway(FLOODED).of(Transport::Tcp(Segment::SYN));
    for step in 0..arguments.count.div_ceil(STEP) {
        let due = f64::from(step * STEP) / f64::from(arguments.rate);
        sleep(Duration::from_secs_f64(due).saturating_sub(begun.elapsed()));
        pipeline.pour(
            &flood,
            Load {
                frames: STEP,
                flows: STEP,
                order: Order::Sequential,
                first: step * STEP,
            },
        )?;
    }
    Ok(())
}

/// Dials again and again. Returns how often, and how many connections were answered before a lost SYN would have been sent again.
fn dial(lab: &Lab, is_over: &AtomicBool) -> (u32, u32) {
    let listen = GATEWAY_WAN.endpoint(Family::V4, DIALLED);
    let (mut dialled, mut answered) = (0, 0);
    while !is_over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let exchanged = tcp::connect(&lab.client, listen)
            .and_then(|mut stream| tcp::exchange(&mut stream, b"somebody real"));
        dialled += 1;
        answered += u32::from(exchanged.is_ok() && begun.elapsed() < Duration::from_secs(1));
        sleep(BETWEEN);
    }
    (dialled, answered)
}

/// Has a gateway forward all three ports. What is returned keeps it at it.
fn forward(gateway: Gateway, lab: &Lab) -> Result<Option<Daemon>> {
    let silent = "10.2.0.77";
    let mac = lab
        .server_end()
        .mac()?
        .map(|byte| format!("{byte:02x}"))
        .join(":");
    lab.gateway.ip(&format!(
        "neigh replace {silent} lladdr {mac} dev {} nud permanent\n",
        lab.lan_end().interface
    ))?;
    let forwards = [
        (FLOODED, format!("{silent}:80")),
        (TRANSFER, SERVER.endpoint(Family::V4, TRANSFER).to_string()),
        (DIALLED, SERVER.endpoint(Family::V4, DIALLED).to_string()),
    ];
    let mode = match gateway {
        Gateway::Xdp => Mode::Xdp,
        Gateway::Tc => Mode::Tc,
        Gateway::Nftables => {
            let forwards = forwards
                .iter()
                .map(|(port, target)| {
                    Ok(nftables::Forward {
                        listen: GATEWAY_WAN.endpoint(Family::V4, *port),
                        target: target.parse()?,
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            nftables::forward(&lab.gateway, &forwards)?;
            return Ok(None);
        }
    };
    let daemon = DaemonOptions {
        log_at_end: false,
        ..DaemonOptions::new(mode)
    }
    .start(&lab.gateway)?;
    for (port, target) in &forwards {
        let name = format!("port-{port}");
        daemon.add(&name, "tcp", &port.to_string(), target)?;
    }
    Ok(Some(daemon))
}
