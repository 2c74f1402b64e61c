//! UDP without a tool: sockets made inside a namespace, an echo, a counting sink, a paced stream.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::Type;

use crate::address::Family;
use crate::deadline::{PATIENCE, here, wait_until};
use crate::namespace::Namespace;
use crate::socket;

/// How often a server thread looks whether it is to end.
const STOP_POLL: Duration = Duration::from_millis(50);

/// Receive buffer of the lab's sockets, in bytes: a busy machine must not lose what a test counts.
const RECEIVE_BUFFER: usize = 64 << 20;

/// Binds a socket inside `namespace`.
pub fn bind(namespace: &Namespace, endpoint: SocketAddr) -> Result<UdpSocket> {
    let socket: UdpSocket = socket::bind(namespace, Type::DGRAM, endpoint)?.into();
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    Ok(socket)
}

/// A socket inside `namespace` that is connected to `endpoint` and waits for answers no longer than
/// the lab's patience. ICMP errors about it become errors of its calls.
pub fn connect(namespace: &Namespace, endpoint: SocketAddr) -> Result<UdpSocket> {
    let any = SocketAddr::new(Family::of(endpoint.ip()).unspecified(), 0);
    let socket = bind(namespace, any)?;
    socket.set_read_timeout(Some(here(PATIENCE)))?;
    socket
        .connect(endpoint)
        .with_context(|| format!("connect a UDP socket to {endpoint}"))?;
    Ok(socket)
}

/// Closes a socket and waits until its port is closed.
///
/// A process that another test starts holds all descriptors of this one between fork and exec, and
/// with them the port.
pub fn close(namespace: &Namespace, socket: UdpSocket) -> Result<()> {
    let local = socket.local_addr()?;
    drop(socket);
    let file = match Family::of(local.ip()) {
        Family::V4 => "udp",
        Family::V6 => "udp6",
    };
    let port = format!(":{:04X} ", local.port());
    wait_until("the port to be closed", PATIENCE, || {
        // `/proc/net` is that of the process; a thread that changed namespace has its own.
        let path = format!("/proc/thread-self/net/{file}");
        let sockets = namespace.run(|| std::fs::read_to_string(path))??;
        Ok(!sockets.contains(&port))
    })
}

/// Receives a datagram. A call that is interrupted begins anew; std sees to that for streams alone.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return received,
        }
    }
}

/// The error that is reported to a connected socket about what it has sent; fails when it gets an answer instead.
pub fn reported_error(socket: &UdpSocket) -> Result<io::Error> {
    receive(socket, &mut [0; 32])
        .err()
        .context("somebody answered")
}

/// Sends `message` on a connected socket and expects the same back.
pub fn exchange(socket: &UdpSocket, message: &[u8]) -> Result<()> {
    socket.send(message).context("send")?;
    let mut answer = vec![0; message.len() + 1];
    let (length, _) = receive(socket, &mut answer).context("receive the echo")?;
    ensure!(
        answer[..length] == *message,
        "the echo differs from what was sent"
    );
    Ok(())
}

/// Gives the socket's datagrams so many hops to live, and has errors about them reported.
pub fn limit_hops(socket: &UdpSocket, family: Family, hops: u8) -> Result<()> {
    match family {
        Family::V4 => socket.set_ttl(hops.into())?,
        Family::V6 => setsockopt(socket, sockopt::Ipv6Ttl, &hops.into())?,
    }
    report_soft_errors(socket, family)
}

/// Has ICMP errors reported that may be over in a moment, and not only those that are for good.
pub fn report_soft_errors(socket: &UdpSocket, family: Family) -> Result<()> {
    match family {
        Family::V4 => setsockopt(socket, sockopt::Ipv4RecvErr, &true)?,
        Family::V6 => setsockopt(socket, sockopt::Ipv6RecvErr, &true)?,
    }
    Ok(())
}

/// A server thread that handles each datagram; ended on drop.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(
        socket: UdpSocket,
        mut handle: impl FnMut(&UdpSocket, &[u8], SocketAddr) + Send + 'static,
    ) -> Result<Self> {
        socket.set_read_timeout(Some(STOP_POLL))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                    handle(&socket, &buffer[..length], peer);
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A UDP server that sends every datagram back to where it came from.
pub struct Echo {
    _server: Server,
    peers: Arc<Mutex<BTreeSet<SocketAddr>>>,
    received: Arc<AtomicU64>,
}

impl Echo {
    /// Starts it on `port` of every address of one family of `namespace`.
    pub fn start(namespace: &Namespace, family: Family, port: u16) -> Result<Self> {
        Self::start_on(namespace, SocketAddr::new(family.unspecified(), port))
    }

    /// Starts it on one endpoint, which is then also the source of every answer.
    pub fn start_on(namespace: &Namespace, endpoint: SocketAddr) -> Result<Self> {
        let socket = bind(namespace, endpoint)?;
        let peers: Arc<Mutex<BTreeSet<SocketAddr>>> = Arc::default();
        let seen = Arc::clone(&peers);
        let received = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&received);
        let server = Server::start(socket, move |socket, datagram, peer| {
            counter.fetch_add(1, Ordering::Relaxed);
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(peer);
            // An ICMP error about an earlier answer may be reported here; the client's count tells.
            drop(socket.send_to(datagram, peer));
        })?;
        Ok(Self {
            _server: server,
            peers,
            received,
        })
    }

    /// How many datagrams have come.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Who has sent anything.
    pub fn peers(&self) -> BTreeSet<SocketAddr> {
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A UDP server that answers everything with its own name.
pub struct Named {
    _server: Server,
}

impl Named {
    /// Starts it on `port` of every address of one family of `namespace`.
    pub fn start(
        namespace: &Namespace,
        family: Family,
        port: u16,
        name: &'static str,
    ) -> Result<Self> {
        let socket = bind(namespace, SocketAddr::new(family.unspecified(), port))?;
        let server = Server::start(socket, move |socket, _, peer| {
            drop(socket.send_to(name.as_bytes(), peer));
        })?;
        Ok(Self { _server: server })
    }
}

/// Who answers behind `endpoint` to somebody who was never there before.
pub fn ask_name(namespace: &Namespace, endpoint: SocketAddr) -> Result<String> {
    ask_name_from(namespace, 0, endpoint)
}

/// The same from a certain port.
pub fn ask_name_from(namespace: &Namespace, port: u16, endpoint: SocketAddr) -> Result<String> {
    let any = SocketAddr::new(Family::of(endpoint.ip()).unspecified(), port);
    let socket = bind(namespace, any)?;
    socket.set_read_timeout(Some(here(PATIENCE)))?;
    socket.connect(endpoint)?;
    socket.send(b"who are you?").context("send")?;
    let mut answer = [0; 32];
    let (length, _) = receive(&socket, &mut answer)
        .with_context(|| format!("nobody answered behind {endpoint}"))?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// A UDP server that only counts.
pub struct Sink {
    _server: Server,
    received: Arc<AtomicU64>,
}

impl Sink {
    /// Starts it on `port` of every address of one family of `namespace`.
    pub fn start(namespace: &Namespace, family: Family, port: u16) -> Result<Self> {
        let socket = bind(namespace, SocketAddr::new(family.unspecified(), port))?;
        let received = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&received);
        let server = Server::start(socket, move |_, _, _| {
            counter.fetch_add(1, Ordering::Relaxed);
        })?;
        Ok(Self {
            _server: server,
            received,
        })
    }

    /// Datagrams received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until `count` datagrams have been received.
    pub fn wait_for(&self, count: u64) -> Result<()> {
        wait_until("datagrams at the sink", PATIENCE, || {
            Ok(self.received() >= count)
        })
        .with_context(|| format!("{} of {count} arrived", self.received()))
    }
}

/// Numbered datagrams at a steady rate to an echo, and which of them came back.
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<Result<()>>,
    returned: Arc<Mutex<BTreeSet<u64>>>,
    receiver: Server,
}

impl Stream {
    /// Starts sending `rate` datagrams a second to `endpoint`, an echo, from inside `namespace`.
    pub fn start(namespace: &Namespace, endpoint: SocketAddr, rate: u32) -> Result<Self> {
        let socket = connect(namespace, endpoint)?;
        let returned: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
        let numbers = Arc::clone(&returned);
        let receiver = Server::start(socket.try_clone()?, move |_, datagram, _| {
            if let Ok(number) = <[u8; 8]>::try_from(datagram) {
                numbers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(u64::from_be_bytes(number));
            }
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let sender = {
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            std::thread::spawn(move || send_paced(&socket, rate, &stop, &sent))
        };
        Ok(Self {
            stop,
            sent,
            sender,
            returned,
            receiver,
        })
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until `count` more datagrams have been sent.
    pub fn wait_for_more(&self, count: u64) -> Result<()> {
        let goal = self.sent() + count;
        wait_until("the stream to go on", Duration::from_secs(60), || {
            ensure!(!self.sender.is_finished(), "the stream broke off");
            Ok(self.sent() >= goal)
        })
    }

    /// Stops sending, waits for what is on its way, and fails when a datagram did not come back.
    /// Returns how many there were.
    pub fn finish(self) -> Result<u64> {
        let (sent, missing) = self.end()?;
        if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
            bail!(
                "{} of {sent} datagrams did not come back, numbers {first} to {last}",
                missing.len()
            );
        }
        Ok(sent)
    }

    /// The same, but returns the first and last number of every run of datagrams that did not come back.
    pub fn finish_with_gaps(self) -> Result<Vec<(u64, u64)>> {
        Ok(self.finish_with_sent_and_gaps()?.1)
    }

    /// The same, and how many were sent.
    pub fn finish_with_sent_and_gaps(self) -> Result<(u64, Vec<(u64, u64)>)> {
        let (sent, missing) = self.end()?;
        let mut gaps: Vec<(u64, u64)> = Vec::new();
        for number in missing {
            match gaps.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                Some(_) | None => gaps.push((number, number)),
            }
        }
        Ok((sent, gaps))
    }

    /// Stops sending and waits for what is on its way: how many were sent, and which are missing.
    fn end(self) -> Result<(u64, Vec<u64>)> {
        self.stop.store(true, Ordering::Relaxed);
        match self.sender.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let sent = self.sent.load(Ordering::Relaxed);
        let count = || {
            self.returned
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .len() as u64
        };
        // Those that are missing then are missing for good.
        drop(wait_until(
            "the last echoes",
            Duration::from_secs(2),
            || Ok(count() == sent),
        ));
        drop(self.receiver);
        let returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = (0..sent).filter(|n| !returned.contains(n)).collect();
        Ok((sent, missing))
    }
}

/// Sends on a fixed schedule: one that is late is made up for, so that the rate is kept.
fn send_paced(socket: &UdpSocket, rate: u32, stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    let interval = Duration::from_secs(1) / rate;
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let number = sent.load(Ordering::Relaxed);
        socket
            .send(&number.to_be_bytes())
            .with_context(|| format!("send datagram {number}"))?;
        sent.store(number + 1, Ordering::Relaxed);
        due += interval;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Sends `count` datagrams of `payload` on a connected socket as fast as it takes them.
pub fn send_many(socket: &UdpSocket, payload: &[u8], count: u64) -> io::Result<()> {
    for _ in 0..count {
        socket.send(payload)?;
    }
    Ok(())
}
