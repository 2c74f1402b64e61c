//! The traffic that goes on, every kind of it as questions and answers, and what was not answered.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::address::{DualStack, Family, GATEWAY_LAN, GATEWAY_WAN, SERVER};
use crate::deadline::{PATIENCE, here, wait_until};
use crate::lab::Lab;
use crate::namespace::Namespace;
use crate::{tcp, udp};

/// Where everything is sent back, listen and target port.
pub(super) const ECHO: u16 = 8_080;
/// Where nobody is, so that the server answers with an ICMP error.
pub(super) const CLOSED: u16 = 8_081;

/// Where everything is sent back to the gateway, which stands for the client there.
pub(super) const HIDDEN: u16 = 8_082;

/// The server's second address, to which rules are swapped.
pub(super) const SECOND: DualStack = DualStack::new(2, 22);

/// How long a datagram is waited for.
const PROMPTLY: Duration = Duration::from_millis(500);
/// Questions of each kind before and after a disturbance.
const QUESTIONS: u64 = 30;
/// Connections that say nothing while things happen.
const IDLE: usize = 32;
/// Data of a datagram that takes three fragments, and of a question of the bulk connection, bytes.
const FRAGMENTED: usize = 4_000;
const BULK: usize = 256 << 10;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Connections that were silent while things happened.
    IdleTcp,
    /// A connection that carries as much as it can, both ways.
    BulkTcp,
    /// A connection for each question.
    ShortTcp,
    /// Datagrams of one flow, without a pause.
    UdpStream,
    /// A datagram from a new port for each question.
    Dns,
    /// Datagrams in fragments, both ways.
    Fragments,
    /// Datagrams that are answered by an ICMP error.
    Icmp,
    /// Datagrams of one flow through a rule with masquerade.
    Masquerade,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::IdleTcp,
        Self::BulkTcp,
        Self::ShortTcp,
        Self::UdpStream,
        Self::Dns,
        Self::Fragments,
        Self::Icmp,
        Self::Masquerade,
    ];

    /// Its name in the matrix.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::IdleTcp => "idle TCP",
            Self::BulkTcp => "bulk TCP",
            Self::ShortTcp => "short TCP",
            Self::UdpStream => "UDP stream",
            Self::Dns => "DNS",
            Self::Fragments => "fragments",
            Self::Icmp => "ICMP",
            Self::Masquerade => "masquerade",
        }
    }

    /// Whether its questions are asked on connections that live on: one that breaks is lost.
    pub(super) const fn is_one_connection(self) -> bool {
        match self {
            Self::IdleTcp | Self::BulkTcp => true,
            // A client whose SYN is answered by an ICMP error gives up.
            Self::ShortTcp
            | Self::UdpStream
            | Self::Dns
            | Self::Fragments
            | Self::Icmp
            | Self::Masquerade => false,
        }
    }

    /// Whether it asks while things happen.
    const fn asks(self) -> bool {
        !matches!(self, Self::IdleTcp)
    }

    /// Whether it goes on by another address once it is told of one: nothing of it lives longer than a question.
    pub(super) const fn can_move(self) -> bool {
        self.asks() && !self.is_one_connection()
    }

    /// How long a question that is not answered lasts at least, until the next.
    pub(super) const fn least(self) -> Duration {
        match self {
            Self::UdpStream | Self::Dns | Self::Fragments | Self::Masquerade => PROMPTLY,
            // An ICMP error ends it at once.
            Self::IdleTcp | Self::BulkTcp | Self::ShortTcp | Self::Icmp => self.pace(),
        }
    }

    /// How long it lasts at most.
    pub(super) fn most(self) -> Duration {
        match self {
            Self::UdpStream | Self::Dns | Self::Fragments | Self::Icmp | Self::Masquerade => {
                PROMPTLY
            }
            Self::IdleTcp | Self::BulkTcp | Self::ShortTcp => here(PATIENCE),
        }
    }

    /// Between two questions.
    const fn pace(self) -> Duration {
        Duration::from_millis(match self {
            Self::IdleTcp => 0,
            Self::UdpStream => 1,
            Self::BulkTcp | Self::ShortTcp | Self::Dns | Self::Fragments | Self::Masquerade => 5,
            // The kernel sends no more than a certain number of errors a second.
            Self::Icmp => 20,
        })
    }
}

/// What came of a kind's questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Questions that were answered.
    pub answered: u64,
    /// Questions that were not.
    pub lost: u64,
    /// The longest time from one answer to the next.
    pub longest: Duration,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            answered,
            lost,
            longest,
        } = self;
        write!(
            f,
            "{lost}/{} {:.2}s",
            lost + answered,
            longest.as_secs_f64()
        )
    }
}

/// Everything that goes on.
pub(super) struct Load {
    idle: Vec<TcpStream>,
    askers: Vec<(Kind, Asker)>,
    dialled: Arc<Mutex<DualStack>>,
    hidden: [udp::Echo; 2],
    gateway: IpAddr,
    _servers: (tcp::Echo, [udp::Echo; 2]),
}

impl Load {
    /// Starts these kinds.
    pub(super) fn start(lab: &Lab, family: Family, kinds: &[Kind]) -> Result<Self> {
        // Every datagram to a closed port is answered.
        lab.server.sysctl("net/ipv4/icmp_ratelimit", "0")?;
        lab.server.sysctl("net/ipv6/icmp/ratelimit", "0")?;
        // A socket of any address would answer from the first one.
        let echo = |server: DualStack, port| {
            udp::Echo::start_on(&lab.server, server.endpoint(family, port))
        };
        let servers = (
            tcp::Echo::start(&lab.server, family, ECHO)?,
            [echo(SERVER, ECHO)?, echo(SECOND, ECHO)?],
        );
        let hidden = [echo(SERVER, HIDDEN)?, echo(SECOND, HIDDEN)?];
        let echo = GATEWAY_WAN.endpoint(family, ECHO);
        let idle = if kinds.contains(&Kind::IdleTcp) {
            IDLE
        } else {
            0
        };
        let idle = (0..idle)
            .map(|_| tcp::connect(&lab.client, echo))
            .collect::<Result<Vec<_>>>()?;
        let mut load = Self {
            idle,
            askers: Vec::new(),
            dialled: Arc::new(Mutex::new(GATEWAY_WAN)),
            hidden,
            gateway: GATEWAY_LAN.of(family),
            _servers: servers,
        };
        load.ask_idle()?;
        for kind in kinds.iter().copied().filter(|kind| kind.asks()) {
            let asker = Asker::start(kind, &lab.client, family, Arc::clone(&load.dialled))?;
            load.askers.push((kind, asker));
        }
        Ok(load)
    }

    /// Has the next question of every kind asked by another address.
    pub(super) fn dial(&self, address: DualStack) {
        *lock(&self.dialled) = address;
    }

    /// Each of the idle connections carries something.
    fn ask_idle(&mut self) -> Result<()> {
        for stream in &mut self.idle {
            tcp::exchange(stream, b"still there?")?;
        }
        Ok(())
    }

    /// Waits until every kind that asks all the time has had more answers.
    pub(super) fn wait_for_more(&self) -> Result<()> {
        let goals: Vec<_> = self
            .askers
            .iter()
            .map(|(_, asker)| asker.tally().answered + QUESTIONS)
            .collect();
        for ((kind, asker), goal) in self.askers.iter().zip(goals) {
            wait_until("answers", 2 * PATIENCE, || {
                ensure!(!asker.thread.is_finished(), "it has broken off");
                Ok(asker.tally().answered >= goal)
            })
            .with_context(|| format!("{kind:?}: {}", asker.tally()))?;
        }
        Ok(())
    }

    /// Ends it, and says what came of it.
    pub(super) fn finish(self) -> Result<Vec<(Kind, Tally)>> {
        let Self {
            mut idle,
            askers,
            hidden,
            gateway,
            ..
        } = self;
        let mut tallies = Vec::new();
        let mut tally = Tally::default();
        for stream in &mut idle {
            let began = Instant::now();
            match tcp::exchange(stream, b"still there?") {
                Ok(()) => tally.answered += 1,
                Err(_) => tally.lost += 1,
            }
            tally.longest = tally.longest.max(began.elapsed());
        }
        if !idle.is_empty() {
            tallies.push((Kind::IdleTcp, tally));
        }
        for (kind, asker) in askers {
            tallies.push((kind, asker.finish()?));
        }
        for client in hidden.iter().flat_map(udp::Echo::peers) {
            ensure!(client.ip() == gateway, "the server has seen {client}");
        }
        Ok(tallies)
    }
}

/// One question, and its answer or why there is none. It is asked on a thread inside the client's namespace.
type Question = Box<dyn FnMut(u64) -> Result<()>>;

/// What a kind asks all the time.
fn question(kind: Kind, listen: Listen) -> Result<Question> {
    let Listen {
        echo,
        closed,
        hidden,
    } = listen;
    Ok(match kind {
        Kind::IdleTcp => bail!("idle connections ask nothing"),
        Kind::BulkTcp => {
            let mut stream = dial(echo)?;
            let data: Vec<u8> = (0..BULK).map(|at| at as u8).collect();
            Box::new(move |_| bulk(&mut stream, &data))
        }
        Kind::ShortTcp => {
            Box::new(move |number| tcp::exchange(&mut dial(echo)?, &number.to_be_bytes()))
        }
        Kind::UdpStream => {
            let socket = datagrams(echo)?;
            Box::new(move |number| ask(&socket, &[], number))
        }
        Kind::Masquerade => {
            let socket = datagrams(hidden)?;
            Box::new(move |number| ask(&socket, &[], number))
        }
        Kind::Dns => Box::new(move |number| ask(&datagrams(echo)?, b"where is it?", number)),
        Kind::Fragments => {
            let socket = datagrams(echo)?;
            Box::new(move |number| ask(&socket, &[0x5a; FRAGMENTED], number))
        }
        Kind::Icmp => {
            let socket = datagrams(closed)?;
            Box::new(move |_| knock(&socket))
        }
    })
}

fn dial(endpoint: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&endpoint, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(here(PATIENCE)))?;
    stream.set_write_timeout(Some(here(PATIENCE)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn datagrams(endpoint: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(Family::of(endpoint.ip()).unspecified(), 0))?;
    socket.set_read_timeout(Some(PROMPTLY))?;
    socket.connect(endpoint)?;
    Ok(socket)
}

/// Sends data and takes it back as it comes: more than fits into all buffers on the way.
fn bulk(stream: &mut TcpStream, data: &[u8]) -> Result<()> {
    let mut writer = stream.try_clone()?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || writer.write_all(data));
        let mut answer = vec![0; data.len()];
        stream.read_exact(&mut answer).context("receive")?;
        match sender.join() {
            Ok(sent) => sent.context("send")?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        ensure!(answer == data, "what came back is something else");
        Ok(())
    })
}

/// Sends a number and takes it back. What is late, an answer or an error about an earlier question, is none to this one.
fn ask(socket: &UdpSocket, rest: &[u8], number: u64) -> Result<()> {
    let datagram = [&number.to_be_bytes()[..], rest].concat();
    // An error that was reported about an earlier question.
    if socket.send(&datagram).is_err() {
        socket.send(&datagram).context("send")?;
    }
    let deadline = Instant::now() + PROMPTLY;
    let mut answer = vec![0; datagram.len() + 1];
    while Instant::now() < deadline {
        if let Ok((length, _)) = udp::receive(socket, &mut answer)
            && answer[..length] == datagram
        {
            return Ok(());
        }
    }
    bail!("no answer to {number}")
}

/// Sends something to a closed port and is told so.
fn knock(socket: &UdpSocket) -> Result<()> {
    drop(socket.send(b"anybody there?"));
    let reported = udp::reported_error(socket)?;
    ensure!(
        reported.kind() == ErrorKind::ConnectionRefused,
        "{reported}"
    );
    Ok(())
}

/// What the client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listen {
    echo: SocketAddr,
    closed: SocketAddr,
    hidden: SocketAddr,
}

impl Listen {
    fn at(address: DualStack, family: Family) -> Self {
        Self {
            echo: address.endpoint(family, ECHO),
            closed: address.endpoint(family, CLOSED),
            hidden: address.endpoint(family, HIDDEN),
        }
    }
}

/// A kind of traffic at work.
struct Asker {
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    thread: JoinHandle<Result<()>>,
}

/// What has come of its questions so far.
struct Book {
    tally: Tally,
    last: Instant,
}

impl Asker {
    fn start(
        kind: Kind,
        client: &Namespace,
        family: Family,
        dialled: Arc<Mutex<DualStack>>,
    ) -> Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let book = Arc::new(Mutex::new(Book {
            tally: Tally::default(),
            last: Instant::now(),
        }));
        let thread = {
            let (stop, book) = (Arc::clone(&stop), Arc::clone(&book));
            client.spawn(move || {
                let mut listen = Listen::at(*lock(&dialled), family);
                let mut asked = question(kind, listen)?;
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let now = Listen::at(*lock(&dialled), family);
                    if now != listen {
                        listen = now;
                        asked = question(kind, listen)?;
                    }
                    let answer = asked(number);
                    lock(&book).note(answer.is_ok());
                    if answer.is_err() && kind.is_one_connection() {
                        return answer;
                    }
                    std::thread::sleep(kind.pace());
                }
                Ok(())
            })?
        };
        Ok(Self { stop, book, thread })
    }

    fn tally(&self) -> Tally {
        lock(&self.book).tally
    }

    fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(ended) => ended?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok(lock(&self.book).tally)
    }
}

impl Book {
    fn note(&mut self, is_answered: bool) {
        if !is_answered {
            self.tally.lost += 1;
            return;
        }
        self.tally.answered += 1;
        self.tally.longest = self.tally.longest.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
