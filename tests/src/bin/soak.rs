//! Starts the daemon again and again under load, and looks whether anything is lost or left.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use portfwd_tests::daemon::{Mode, binary};
use portfwd_tests::soak::Soak;
use portfwd_tests::start_times::StartTimes;

/// What is repeated.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// The daemon is ended (killed and asked to end by turns) and started again.
    Restarts,
    /// The same, and another build is started each time: up, down, up, …
    Upgrades,
    /// The daemon is started from nothing and after it was killed, without load, and timed.
    Starts,
}

#[derive(Debug, Parser)]
struct Arguments {
    what: What,
    #[arg(long, default_value_t = 1000)]
    count: usize,
    #[arg(long, default_value_t = 10_000)]
    flows: usize,
    #[arg(long, value_enum, default_value = "tc")]
    mode: Mode,
    /// The other build, for upgrades.
    #[arg(long, required_if_eq("what", "upgrades"))]
    other: Option<PathBuf>,
}

fn main() -> ExitCode {
    let start = Instant::now();
    match run(&Arguments::parse()) {
        Ok(outcome) => {
            println!("{outcome} ({:.0} s)", start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<&'static str> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and BPF need root; run it again with sudo"
    );
    let own = binary()?;
    let binaries: Vec<_> = match arguments.what {
        What::Starts => {
            let times = StartTimes::measure(arguments.mode, arguments.count, None)?;
            println!("until ready, ms: median (least - most)");
            println!("first start  {}", spread(times.first));
            println!("forwarding   {}", spread(times.forwarding));
            println!("restart      {}", spread(times.again));
            return Ok("measured");
        }
        What::Restarts => vec![own.as_path()],
        What::Upgrades => std::iter::once(own.as_path())
            .chain(arguments.other.as_deref())
            .collect(),
    };
    let mut soak = Soak::start(arguments.mode, arguments.flows, &binaries)?;
    let mut longest = Duration::ZERO;
    let mut tags = std::collections::BTreeSet::new();
    for number in 1..=arguments.count {
        let began = Instant::now();
        soak.again()?;
        longest = longest.max(began.elapsed());
        tags.insert(soak.program_tags()?);
        if number.is_multiple_of((arguments.count / 20).max(1)) {
            println!("{number:>5}  {}", soak.possessions()?);
        }
    }
    ensure!(
        tags.len() == binaries.len(),
        "{} builds had {} different programs",
        binaries.len(),
        tags.len()
    );
    let report = soak.finish()?;
    println!("{} starts, the longest {longest:.1?}", report.starts);
    println!(
        "{} datagrams of the stream and {} of the {} flows went there and back, {} TCP segments were translated",
        report.stream, report.population, arguments.flows, report.segments
    );
    println!("before  {}", report.possessions.0);
    println!("after   {}", report.possessions.1);
    Ok("nothing lost, nothing left")
}

fn spread(mut times: Vec<Duration>) -> String {
    times.sort();
    let (Some(least), Some(most)) = (times.first(), times.last()) else {
        return "none".to_owned();
    };
    let ms = |time: &Duration| time.as_millis();
    let median = &times[times.len() / 2];
    format!("{} ({} - {})", ms(median), ms(least), ms(most))
}
