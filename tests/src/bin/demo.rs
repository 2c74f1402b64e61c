//! The main job, seen in a few seconds: a client, a gateway and a server on this machine, portfwd
//! in the gateway, real traffic through it.

use std::fmt::Display;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::iperf::{self, Direction};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::{Family, Lab, curl, snmp, tcp, udp};

/// What the client dials, and what the server serves: the web, UDP echo, bulk transfer.
const WEB: (u16, u16) = (8080, 80);
const ECHO: (u16, u16) = (5353, 53);
const BULK: (u16, u16) = (5201, 5201);

/// Size of the file that is fetched, in bytes.
const FILE: usize = 10 << 20;

/// Datagrams echoed over each family.
const DATAGRAMS: u32 = 1000;

/// Set by the first Ctrl-C: the step at hand is the last, and everything is taken down.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let start = Instant::now();
    match run() {
        Ok(()) => {
            println!(
                "\nEverything worked and is taken down again ({:.1} s).",
                start.elapsed().as_secs_f32()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!();
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and BPF need root; run it again with sudo"
    );
    clean_up_on_interrupt()?;
    println!(
        "Three machines as network namespaces, joined by veth pairs; portfwd works in the gateway."
    );
    println!();
    println!(
        "  client {:<12} wan0 {:<10} lan0",
        CLIENT.v4, GATEWAY_WAN.v4
    );
    println!(
        "     c0 ─────────────── gateway ─────────────── s0 server {}",
        SERVER.v4
    );
    println!();
    println!("The client has no route to the server: only a translation makes it answer.");
    let content = curl::varied_content(FILE);
    show("Native XDP", Mode::Xdp, &content, Ending::Silent)?;
    show("TC, with all offloads", Mode::Tc, &content, Ending::Tables)
}

/// Lets SIGINT and SIGTERM end the demo between two steps, so that nothing is left behind.
fn clean_up_on_interrupt() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block()?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// What a mode's part ends with.
enum Ending {
    /// Nothing: the next mode follows.
    Silent,
    /// Rules, flows and counters, then what doctor and explain say, as portfwd prints them.
    Tables,
}

fn show(title: &str, mode: Mode, content: &[u8], ending: Ending) -> Result<()> {
    println!("\n{title}");
    let lab = step("build client, gateway and server", || {
        Ok((Lab::for_mode(mode)?, "ready"))
    })?;
    let servers = step("start nginx, a UDP echo and iperf3 on the server", || {
        Ok((Servers::start(&lab, content)?, "listening"))
    })?;
    let daemon = step(
        &format!("portfwd run --wan wan0 --lan lan0 --mode {}", mode.word()),
        || {
            let options = DaemonOptions {
                log_at_end: false,
                ..DaemonOptions::new(mode)
            };
            Ok((options.start(&lab.gateway)?, "attached"))
        },
    )?;
    add_rules(&daemon)?;
    fetch_from_the_web_server(&lab, &servers, content)?;
    let echoed = echo_datagrams(&lab)?;
    let connections = keep_connections_open(&lab)?;
    transfer_in_bulk(&lab)?;
    step("ask the three kernels for malformed packets", || {
        snmp::expect_no_malformed(&[&lab.client, &lab.gateway, &lab.server])?;
        Ok(((), "none"))
    })?;
    match ending {
        Ending::Silent => {}
        Ending::Tables => {
            print_tables(&daemon)?;
            step("give the gateway a public address and a way out", || {
                make_public(&lab)?;
                Ok(((), "done"))
            })?;
            expect_clean_doctor(&daemon)?;
            explain_a_packet(&daemon)?;
        }
    }
    drop((echoed, connections));
    Ok(())
}

/// What runs on the server.
struct Servers {
    nginx: Nginx,
    _echoes: [udp::Echo; 2],
    _iperf: iperf::Server,
}

impl Servers {
    fn start(lab: &Lab, content: &[u8]) -> Result<Self> {
        Ok(Self {
            nginx: Nginx::start(&lab.server, WEB.1, &[("file", content)])?,
            _echoes: [
                udp::Echo::start(&lab.server, Family::V4, ECHO.1)?,
                udp::Echo::start(&lab.server, Family::V6, ECHO.1)?,
            ],
            _iperf: iperf::Server::start(&lab.server, BULK.1)?,
        })
    }
}

fn add_rules(daemon: &Daemon) -> Result<()> {
    for (name, proto, (listen, target)) in [
        ("web", "tcp", WEB),
        ("echo", "udp", ECHO),
        ("bulk", "tcp", BULK),
    ] {
        for (family, suffix) in [(Family::V4, ""), (Family::V6, "6")] {
            let arguments = [
                "add",
                proto,
                &listen.to_string(),
                &SERVER.endpoint(family, target).to_string(),
                "--name",
                &format!("{name}{suffix}"),
            ];
            step(&format!("portfwd {}", arguments.join(" ")), || {
                daemon.ok(&arguments)?;
                Ok(((), "added"))
            })?;
        }
    }
    Ok(())
}

fn fetch_from_the_web_server(lab: &Lab, servers: &Servers, content: &[u8]) -> Result<()> {
    let expected = curl::sha256(content)?;
    for family in Family::BOTH {
        let url = curl::url(GATEWAY_WAN.endpoint(family, WEB.0), "file");
        step(&format!("curl {url}"), || {
            let arrived = curl::fetch_sha256(&lab.client, &url, Duration::from_secs(10))?;
            ensure!(arrived == expected, "the file arrived damaged");
            let client = CLIENT.of(family).to_string();
            let access = servers
                .nginx
                .wait_for_access(|access| access.client == client)
                .context("nginx did not see the client's address")?;
            let size = content.len() >> 20;
            Ok((
                (),
                format!("{size} MiB unchanged, nginx saw {}", access.client),
            ))
        })?;
    }
    Ok(())
}

/// Returns the sockets, so that their flows stay in use.
fn echo_datagrams(lab: &Lab) -> Result<Vec<std::net::UdpSocket>> {
    Family::BOTH
        .into_iter()
        .map(|family| {
            let endpoint = GATEWAY_WAN.endpoint(family, ECHO.0);
            step(&format!("echo datagrams off {endpoint}"), || {
                let socket = udp::connect(&lab.client, endpoint)?;
                for number in 0..DATAGRAMS {
                    udp::exchange(&socket, &number.to_be_bytes())?;
                }
                Ok((socket, format!("{DATAGRAMS} of {DATAGRAMS} came back")))
            })
        })
        .collect()
}

/// Returns the connections: the flows that are shown are live ones.
fn keep_connections_open(lab: &Lab) -> Result<Vec<std::net::TcpStream>> {
    step("leave a web connection open over each family", || {
        let connections: Result<Vec<_>> = Family::BOTH
            .into_iter()
            .map(|family| tcp::connect(&lab.client, GATEWAY_WAN.endpoint(family, WEB.0)))
            .collect();
        Ok((connections?, "open"))
    })
}

fn transfer_in_bulk(lab: &Lab) -> Result<()> {
    let endpoint = GATEWAY_WAN.endpoint(Family::V4, BULK.0);
    for (direction, arrow) in [(Direction::Upload, "up"), (Direction::Download, "down")] {
        step(&format!("iperf3 {arrow} through {endpoint}"), || {
            let second = Duration::from_secs(1);
            let report = iperf::transfer(&lab.client, endpoint, direction, second)?;
            Ok(((), format!("{:.1} Gbit/s", report.bits_per_second / 1e9)))
        })?;
    }
    Ok(())
}

fn print_tables(daemon: &Daemon) -> Result<()> {
    for noun in ["rules", "flows", "counters", "status"] {
        println!("\n$ portfwd {noun}");
        print!("{}", daemon.ok(&[noun])?);
    }
    Ok(())
}

/// A gateway as it should be: doctor would rightly say of the lab's own that the internet cannot reach it.
fn make_public(lab: &Lab) -> Result<()> {
    lab.gateway.ip("addr add 203.0.113.1/24 dev wan0\n\
                    route add default dev wan0\n\
                    route add ::/0 dev wan0\n")
}

/// Shows what doctor says of the gateway, which is not to be anything.
fn expect_clean_doctor(daemon: &Daemon) -> Result<()> {
    println!("\n$ portfwd doctor");
    let said = daemon.ok(&["doctor"])?;
    print!("{said}");
    let diagnosis = daemon.json(&["doctor"])?;
    let findings = diagnosis["findings"].as_array();
    ensure!(
        findings.is_some_and(Vec::is_empty),
        "doctor finds something wrong with the gateway"
    );
    Ok(())
}

/// Shows what would become of a packet of a new client.
fn explain_a_packet(daemon: &Daemon) -> Result<()> {
    const NEW_PORT: u16 = 40_000;
    let client = CLIENT.endpoint(Family::V4, NEW_PORT).to_string();
    let listen = GATEWAY_WAN.endpoint(Family::V4, WEB.0).to_string();
    println!("\n$ portfwd explain tcp {client} {listen}");
    print!("{}", daemon.ok(&["explain", "tcp", &client, &listen])?);
    Ok(())
}

/// Says what is being done, does it, and says what came of it and how long it took.
fn step<T, R: Display>(what: &str, work: impl FnOnce() -> Result<(T, R)>) -> Result<T> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted; everything is taken down");
    }
    print!("  {what:<62} ");
    stdout().flush()?;
    let start = Instant::now();
    let (value, outcome) = work()?;
    println!("{outcome} ({:.2} s)", start.elapsed().as_secs_f32());
    Ok(value)
}
