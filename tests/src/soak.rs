//! Starting the daemon again and again under load, and what must not come of it.
//!
//! The load is an iperf3 transfer, a numbered stream of 1,000 datagrams a second, and flows that each send a datagram every
//! few seconds. Nothing may be lost: every datagram comes back, every TCP segment that was sent was translated, no flow
//! begins anew. Nothing may be left: kernel objects, pins, descriptors and memory of the daemon are what they were.

use std::fmt;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, setrlimit};

use crate::address::{Family, GATEWAY_WAN, SERVER};
use crate::daemon::{Daemon, DaemonOptions, Mode};
use crate::deadline::{PATIENCE, here, wait_until};
use crate::iperf;
use crate::kernel_objects::KernelObjects;
use crate::lab::{Lab, LabOptions};
use crate::namespace::Namespace;
use crate::{snmp, udp};

/// Listen and target port of the transfer, the stream and the many flows.
const BULK: (u16, u16) = (5201, 5201);
const STREAM: (u16, u16) = (8081, 81);
const FLOWS: (u16, u16) = (8082, 82);
/// Datagrams of the stream, per second.
const RATE: u32 = 1000;
/// Between two datagrams of the many flows.
const PACE: Duration = Duration::from_micros(400);
/// What the daemon's memory may differ by between two starts of the same binary: allocators are not exact.
const RSS_TOLERANCE_KIB: u64 = 8 << 10;

/// A lab under load, with a daemon that can be started again.
pub struct Soak {
    /// Goes before the lab.
    daemon: Daemon,
    lab: Lab,
    load: Load,
    /// Of a daemon that has just been started, by turns.
    before: Vec<Possessions>,
    flows_created: u64,
    starts: usize,
    /// Which start of the soak was the first to be counted.
    first: usize,
    binaries: Vec<PathBuf>,
}

/// The traffic.
struct Load {
    _servers: (iperf::Server, udp::Echo, udp::Echo),
    transfer: iperf::Endless,
    stream: udp::Stream,
    population: Population,
}

/// What the daemon and its instance have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Possessions {
    /// In the kernel and in bpffs.
    pub objects: KernelObjects,
    /// Open descriptors of the daemon.
    pub descriptors: usize,
    /// Resident memory of the daemon, KiB.
    pub rss_kib: u64,
    /// What of it is the daemon's own, and not pages of files that it has mapped: its program above all.
    pub anonymous_kib: u64,
    /// Size of the state file, bytes. It breathes: a transaction writes beside what it replaces.
    pub state_bytes: u64,
}

/// What a soak came to.
#[derive(Debug)]
pub struct Report {
    /// How often the daemon was started again.
    pub starts: usize,
    /// Datagrams of the stream, all of which came back.
    pub stream: u64,
    /// Datagrams of the many flows, likewise.
    pub population: u64,
    /// TCP segments of both directions, all of which were translated.
    pub segments: u64,
    /// At the beginning and at the end.
    pub possessions: (Possessions, Possessions),
}

impl Soak {
    /// Builds the lab and starts daemon and load. `binaries` take turns, the first one begins.
    pub fn start(mode: Mode, flows: usize, binaries: &[&Path]) -> Result<Self> {
        let lab = LabOptions::for_mode(mode).build()?;
        for end in [
            lab.client_end(),
            lab.server_end(),
            lab.wan_end(),
            lab.lan_end(),
        ] {
            end.queue_instead_of_dropping()?;
        }
        let mut options = DaemonOptions::new(mode);
        options.log_at_end = false;
        let daemon = options.start_as(&lab.gateway, binaries.first().copied())?;
        for (name, proto, (from, to)) in [
            ("bulk", "tcp", BULK),
            ("stream", "udp", STREAM),
            ("flows", "udp", FLOWS),
        ] {
            let target = SERVER.endpoint(Family::V4, to).to_string();
            daemon.add(name, proto, &from.to_string(), &target)?;
        }
        let load = Load::start(&lab, flows)?;
        let mut soak = Self {
            before: Vec::new(),
            flows_created: 0,
            starts: 0,
            first: 0,
            binaries: binaries.iter().map(|path| (*path).to_owned()).collect(),
            daemon,
            lab,
            load,
        };
        soak.flows_created = soak.created()?;
        // Daemons that have just been started: what one has is what every later one of its build may have.
        for _ in 0..soak.turns() {
            soak.again()?;
            soak.before.push(Possessions::of(&soak.daemon)?);
        }
        // The turns go on: each start that is counted follows one of another build.
        soak.first = soak.starts;
        Ok(soak)
    }

    /// After so many starts it is the same build's turn again.
    fn turns(&self) -> usize {
        self.binaries.len().max(1)
    }

    /// Ends the daemon, killed and asked to end by turns, and starts the next binary.
    pub fn again(&mut self) -> Result<()> {
        if self.starts.is_multiple_of(2) {
            self.daemon.kill9()?;
        } else {
            self.daemon.stop()?;
        }
        self.starts += 1;
        if !self.binaries.is_empty() {
            let next = &self.binaries[self.starts % self.turns()];
            self.daemon.use_binary(next);
        }
        self.daemon.start()?;
        self.load.check()
    }

    /// What the daemon has now.
    pub fn possessions(&self) -> Result<Possessions> {
        Possessions::of(&self.daemon)
    }

    /// The tags of the programs, which tell builds apart.
    pub fn program_tags(&self) -> Result<Vec<String>> {
        self.daemon.program_tags()
    }

    /// Ends the load, and fails if anything was lost or left.
    pub fn finish(self) -> Result<Report> {
        let Self {
            daemon,
            lab,
            load,
            mut before,
            flows_created,
            starts,
            first,
            binaries,
        } = self;
        let starts = starts - first;
        // The first of `before` is the second build's.
        let own = (starts + before.len() - 1) % binaries.len().max(1);
        let before = before.swap_remove(own);
        let created = daemon.events()?.remove("flow_created").unwrap_or_default();
        ensure!(
            created == flows_created,
            "{} flows began anew",
            created - flows_created
        );
        let (stream, population) = load.finish()?;
        for (name, count) in [("stream", stream), ("flows", population)] {
            let rule = daemon.rule(name)?;
            ensure!(
                (rule.to_target.packets, rule.to_client.packets) == (count, count),
                "{count} datagrams of {name} went both ways, and these were counted: {rule:?}"
            );
        }
        let segments = expect_every_segment_translated(&daemon, &lab)?;
        let drops = daemon.drops()?;
        ensure!(drops.is_empty(), "portfwd dropped packets: {drops:?}");
        let after = before.expect_no_more(&daemon)?;
        Ok(Report {
            starts,
            stream,
            population,
            segments,
            possessions: (before, after),
        })
    }

    fn created(&self) -> Result<u64> {
        Ok(self
            .daemon
            .events()?
            .remove("flow_created")
            .unwrap_or_default())
    }
}

/// What the kernels of client and server sent over TCP, portfwd has counted, to the segment.
fn expect_every_segment_translated(daemon: &Daemon, lab: &Lab) -> Result<u64> {
    let counts = || -> Result<_> {
        let rule = daemon.rule("bulk")?;
        let sent = (
            snmp::tcp_segments_sent(&lab.client)?,
            snmp::tcp_segments_sent(&lab.server)?,
        );
        Ok(((rule.to_target.packets, rule.to_client.packets), sent))
    };
    let equal = wait_until("the last segments to be counted", PATIENCE, || {
        let (counted, sent) = counts()?;
        Ok(counted == sent)
    });
    equal.with_context(|| format!("counted and sent: {:?}", counts()))?;
    let ((to_target, to_client), _) = counts()?;
    Ok(to_target + to_client)
}

impl Load {
    fn start(lab: &Lab, flows: usize) -> Result<Self> {
        let dialled = |(port, _): (u16, u16)| GATEWAY_WAN.endpoint(Family::V4, port);
        let servers = (
            iperf::Server::start(&lab.server, BULK.1)?,
            udp::Echo::start(&lab.server, Family::V4, STREAM.1)?,
            udp::Echo::start(&lab.server, Family::V4, FLOWS.1)?,
        );
        let load = Self {
            _servers: servers,
            population: Population::start(&lab.client, dialled(FLOWS), flows)?,
            transfer: iperf::Endless::start(&lab.client, dialled(BULK))?,
            stream: udp::Stream::start(&lab.client, dialled(STREAM), RATE)?,
        };
        load.stream.wait_for_more(u64::from(RATE))?;
        load.transfer.wait_for_intervals(2)?;
        Ok(load)
    }

    /// Fails as soon as something is wrong, so that nobody waits for the end of it.
    fn check(&self) -> Result<()> {
        self.population.check()?;
        self.transfer.check()
    }

    /// Datagrams of the stream and of the many flows.
    fn finish(self) -> Result<(u64, u64)> {
        self.transfer.finish()?;
        let population = self.population.finish()?;
        Ok((self.stream.finish()?, population))
    }
}

impl Possessions {
    fn of(daemon: &Daemon) -> Result<Self> {
        let pid = daemon.pid().context("the daemon is not running")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = |field: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            let number = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
            Ok(number
                .with_context(|| format!("no {field}"))?
                .trim()
                .parse()?)
        };
        Ok(Self {
            objects: KernelObjects::of(&daemon.pins())?,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            rss_kib: kib("VmRSS:")?,
            anonymous_kib: kib("RssAnon:")?,
            state_bytes: fs::metadata(daemon.state_file())?.len(),
        })
    }

    /// Waits until the daemon has no more than this. The kernel frees programs and maps some time after the last user.
    fn expect_no_more(&self, daemon: &Daemon) -> Result<Self> {
        let fits = |now: &Self| {
            now.objects == self.objects
                // Every program is pinned. More would be an earlier start's that somebody holds.
                && now.objects.programs <= now.objects.pinned_programs()
                && now.descriptors <= self.descriptors
                && now.rss_kib <= self.rss_kib + RSS_TOLERANCE_KIB
                && now.state_bytes <= 2 * self.state_bytes
        };
        let freed = wait_until("everything of former starts to go", PATIENCE, || {
            Ok(fits(&Self::of(daemon)?))
        });
        let now = Self::of(daemon)?;
        freed.with_context(|| format!("{self}, then {now}"))?;
        Ok(now)
    }
}

impl fmt::Display for Possessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let KernelObjects {
            programs,
            maps,
            links,
            pins,
        } = &self.objects;
        write!(
            f,
            "{programs} programs, {maps} maps, {links} links, {} pins, {} descriptors, {} KiB resident ({} of its own), state file of {} KiB",
            pins.len(),
            self.descriptors,
            self.rss_kib,
            self.anonymous_kib,
            self.state_bytes >> 10
        )
    }
}

/// Many UDP flows, each with a socket of its own; all are talked to round and round.
struct Population {
    stop: Arc<AtomicBool>,
    talker: JoinHandle<Result<u64>>,
}

impl Population {
    /// Opens `count` flows to an echo, and has every one answered once.
    fn start(namespace: &Namespace, endpoint: SocketAddr, count: usize) -> Result<Self> {
        let descriptors = 4096 + count as u64;
        setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)
            .context("allow a socket for each flow")?;
        let sockets = namespace.run(|| -> Result<Vec<UdpSocket>> {
            let any = SocketAddr::new(Family::of(endpoint.ip()).unspecified(), 0);
            let open = |_| -> Result<UdpSocket> {
                let socket = UdpSocket::bind(any)?;
                socket.connect(endpoint)?;
                socket.set_read_timeout(Some(here(PATIENCE)))?;
                Ok(socket)
            };
            (0..count).map(open).collect()
        })??;
        let mut sent = 0;
        for (number, socket) in sockets.iter().enumerate() {
            talk(number, socket)?;
            hear(number, socket)?;
            sent += 1;
        }
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let talker = std::thread::spawn(move || rounds(&sockets, sent, &stopped));
        Ok(Self { stop, talker })
    }

    fn check(&self) -> Result<()> {
        ensure!(
            !self.talker.is_finished(),
            "one of the flows has broken off"
        );
        Ok(())
    }

    /// How many datagrams were sent, each of which came back.
    fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        match self.talker.join() {
            Ok(sent) => sent,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn talk(number: usize, socket: &UdpSocket) -> Result<()> {
    let sent = socket.send(&number.to_be_bytes());
    sent.map(drop)
        .with_context(|| format!("send on flow {number}"))
}

fn hear(number: usize, socket: &UdpSocket) -> Result<()> {
    let mut answer = [0; 16];
    let length = socket.recv(&mut answer);
    let length = length.with_context(|| format!("no answer on flow {number}"))?;
    ensure!(
        answer[..length] == number.to_be_bytes(),
        "flow {number} has another's answer"
    );
    Ok(())
}

/// Sends on every flow in turn; the answer is looked at when the turn comes again, and at the end.
fn rounds(sockets: &[UdpSocket], mut sent: u64, stop: &AtomicBool) -> Result<u64> {
    let mut asked = vec![false; sockets.len()];
    let mut due = Instant::now();
    for number in (0..sockets.len()).cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        if asked[number] {
            hear(number, &sockets[number])?;
        }
        talk(number, &sockets[number])?;
        asked[number] = true;
        sent += 1;
        due += PACE;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    for (number, socket) in sockets.iter().enumerate().filter(|(n, _)| asked[*n]) {
        hear(number, socket)?;
    }
    Ok(sent)
}
