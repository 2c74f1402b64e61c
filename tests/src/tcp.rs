//! TCP without a tool: sockets made inside a namespace, and an echo server.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{SockRef, Type};

use crate::address::Family;
use crate::deadline::{PATIENCE, here};
use crate::namespace::Namespace;
use crate::socket;

/// Connects from inside `namespace`, waiting no longer than the lab's patience for anything.
pub fn connect(namespace: &Namespace, endpoint: SocketAddr) -> Result<TcpStream> {
    connect_within(namespace, endpoint, here(PATIENCE))
}

/// Connects from inside `namespace`, with a limit of time.
pub fn connect_within(
    namespace: &Namespace,
    endpoint: SocketAddr,
    within: Duration,
) -> Result<TcpStream> {
    let stream = namespace
        .run(|| TcpStream::connect_timeout(&endpoint, within))?
        .with_context(|| format!("connect to {endpoint}"))?;
    stream.set_read_timeout(Some(here(PATIENCE)))?;
    stream.set_write_timeout(Some(here(PATIENCE)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends `message` and expects the same back.
pub fn exchange(stream: &mut TcpStream, message: &[u8]) -> Result<()> {
    stream.write_all(message).context("send")?;
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer).context("receive the echo")?;
    ensure!(answer == message, "the echo differs from what was sent");
    Ok(())
}

/// A TCP server that sends back what it receives.
pub struct Echo {
    listener: TcpListener,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts it on `port` of every address of one family of `namespace`.
    pub fn start(namespace: &Namespace, family: Family, port: u16) -> Result<Self> {
        let endpoint = SocketAddr::new(family.unspecified(), port);
        let socket = socket::bind(namespace, Type::STREAM, endpoint)?;
        socket.listen(1024)?;
        let listener: TcpListener = socket.into();
        let peers = Arc::default();
        let acceptor = {
            let (listener, peers) = (listener.try_clone()?, Arc::clone(&peers));
            std::thread::spawn(move || accept(&listener, &peers))
        };
        Ok(Self {
            listener,
            peers,
            acceptor: Some(acceptor),
        })
    }

    /// Who has connected, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn accept(listener: &TcpListener, peers: &Mutex<Vec<SocketAddr>>) {
    while let Ok((stream, peer)) = listener.accept() {
        peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(peer);
        std::thread::spawn(move || echo(stream));
    }
}

/// Sends back what it receives. Ends with the connection; a reset by the client is an end like any other.
pub fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 65536];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&buffer[..length])?;
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Wakes the accept with an error, which ends its thread.
        drop(SockRef::from(&self.listener).shutdown(Shutdown::Both));
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}
