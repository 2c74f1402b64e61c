//! Short connections from few ports: every one dials, asks, is answered and ends, and its 5-tuple is dialled again soon.
//!
//! The server closes first, so that it, not the client, waits out the end (TIME-WAIT) while the client dials the same 5-tuple
//! again, which RFC 9293 section 3.6.1 allows.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::thread::JoinHandle;

use anyhow::Result;
use socket2::{Domain, SockRef, Socket, Type};

use crate::deadline::{PATIENCE, here, wait_for};
use crate::namespace::Namespace;
use crate::socket;

/// Clients that dial at the same time; each has ports of its own.
const CLIENTS: u16 = 4;
/// Failures that are told; the rest are counted.
const TOLD: usize = 10;

/// A server that answers one question a connection, and then closes it.
pub struct Answerer {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Answerer {
    /// Starts it on `endpoint` in `namespace`.
    pub fn start(namespace: &Namespace, endpoint: SocketAddr) -> Result<Self> {
        let socket = socket::bind(namespace, Type::STREAM, endpoint)?;
        socket.listen(1024)?;
        let listener: TcpListener = socket.into();
        let thread = {
            let listener = listener.try_clone()?;
            std::thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    // What goes wrong here the client sees and counts.
                    drop(answer(stream));
                }
            })
        };
        Ok(Self {
            listener,
            thread: Some(thread),
        })
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        // Wakes the accept with an error, which ends its thread.
        drop(SockRef::from(&self.listener).shutdown(Shutdown::Both));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(here(PATIENCE)))?;
    let mut question = [0; 8];
    stream.read_exact(&mut question)?;
    stream.write_all(&question)
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Connections that were answered rightly and ended.
    pub answered: u64,
    /// Those that were not.
    pub failed: u64,
    /// The first of the failures.
    pub failures: Vec<String>,
}

/// Has clients in `namespace` dial `endpoint`, `connections` times in all, from the ports of `from` in turn.
///
/// # Errors
/// When the namespace cannot be entered; failures of connections are counted.
pub fn dial(
    namespace: &Namespace,
    from: (std::net::IpAddr, Range<u16>),
    endpoint: SocketAddr,
    connections: u64,
) -> Result<Tally> {
    let (address, ports) = from;
    let share = (ports.end - ports.start) / CLIENTS;
    let each = connections.div_ceil(u64::from(CLIENTS));
    let tallies = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let first = ports.start + client * share;
                scope.spawn(move || {
                    namespace.run(|| {
                        let mut tally = Tally::default();
                        for (number, port) in (0..each).zip((first..first + share).cycle()) {
                            tally.note(port, ask(SocketAddr::new(address, port), endpoint, number));
                        }
                        tally
                    })
                })
            })
            .collect();
        clients
            .into_iter()
            .map(|client| {
                client
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    let mut all = Tally::default();
    for tally in tallies {
        all.answered += tally.answered;
        all.failed += tally.failed;
        all.failures.extend(tally.failures);
    }
    Ok(all)
}

impl Tally {
    fn note(&mut self, port: u16, outcome: io::Result<()>) {
        match outcome {
            Ok(()) => self.answered += 1,
            Err(error) => {
                self.failed += 1;
                if self.failures.len() < TOLD {
                    self.failures.push(format!("from port {port}: {error}"));
                }
            }
        }
    }
}

/// Connects, as soon as the client's own stack has done with what came before from the same port: on a busy machine it may take its
/// time to forget that. Nothing has been sent until then.
fn connect_when_free(socket: &Socket, endpoint: SocketAddr) -> io::Result<()> {
    let connected = wait_for("a port of the client's", PATIENCE, || {
        match socket.connect_timeout(&endpoint.into(), PATIENCE) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(None),
            outcome => Ok(Some(outcome)),
        }
    });
    connected.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// One connection: a number is sent and must come back, and then nothing more.
fn ask(own: SocketAddr, endpoint: SocketAddr, number: u64) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(endpoint), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&own.into())?;
    socket.set_read_timeout(Some(here(PATIENCE)))?;
    // The end waits until the server has acknowledged it: only then is the port free for the next one.
    socket.set_linger(Some(PATIENCE))?;
    connect_when_free(&socket, endpoint)?;
    let mut stream = TcpStream::from(socket);
    let question = number.to_be_bytes();
    stream.write_all(&question)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer == question {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "{number} was answered by {answer:?}"
        )))
    }
}
