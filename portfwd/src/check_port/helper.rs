//! Another machine that dials a port and says what came of it.
//!
//! One line each way over TCP: `portfwd-check 1 tcp 8080`, answered by `open`, `refused`, `silent` or `failed WHY`. The helper
//! only ever dials the address that the request comes from, so it is no tool against others: whoever asks has shown by the
//! connection itself that the address is theirs.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use log::{debug, info};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use crate::{ruleset::RuleProtocol, transport::Transport};

/// What the helper found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It answers.
    Open,
    /// The machine says that nothing serves it.
    Refused,
    /// Nothing came back.
    Silent,
    /// The helper could not try.
    Failed(String),
}

/// A request that the helper understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    protocol: Transport,
    port: u16,
}

const GREETING: &str = "portfwd-check 1";
/// Longest line either side takes, bytes.
const LONGEST: u64 = 128;
/// How long the helper waits for a request, and dials.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long whoever asks waits for all of it.
const WHOLE: Duration = Duration::from_secs(15);
/// Requests that are served at the same time.
const AT_ONCE: usize = 32;
const PROBE: &[u8] = b"portfwd check-port";
/// Datagrams get lost.
const PROBES: u32 = 3;

/// Asks a helper to dial a port of the address that the request leaves from: `listen`, if this machine has it.
pub async fn ask(helper: SocketAddr, protocol: Transport, listen: SocketAddr) -> Result<Answer> {
    timeout(WHOLE, exchange(helper, protocol, listen))
        .await
        .context("it did not answer in time")?
}

async fn exchange(helper: SocketAddr, protocol: Transport, listen: SocketAddr) -> Result<Answer> {
    let socket = if helper.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket
        .bind(SocketAddr::new(listen.ip(), 0))
        .with_context(|| format!("cannot ask from {}", listen.ip()))?;
    let mut stream = socket
        .connect(helper)
        .await
        .with_context(|| format!("cannot connect to {helper}"))?;
    let word = RuleProtocol::from(protocol).word();
    let request = format!("{GREETING} {word} {}\n", listen.port());
    stream.write_all(request.as_bytes()).await?;
    Answer::parse(&read_line(&mut stream).await?)
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener) -> Result<()> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let place = Arc::clone(&places).acquire_owned().await?;
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Of this one connection, or of too many open files: the next may do better.
                debug!("cannot accept: {error}");
                continue;
            }
        };
        tokio::spawn(async move {
            let answered = timeout(2 * PATIENCE, answer(stream, from.ip())).await;
            match answered {
                Ok(Ok(line)) => info!("{from}: {line}"),
                Ok(Err(error)) => debug!("{from}: {error:#}"),
                Err(_) => debug!("{from}: took too long"),
            }
            drop(place);
        });
    }
}

/// Serves one request; what was asked and found, for the log.
async fn answer(mut stream: TcpStream, from: IpAddr) -> Result<String> {
    let line = timeout(PATIENCE, read_line(&mut stream))
        .await
        .context("no request came")??;
    let answer = match Request::parse(&line) {
        Some(request) => dial(from.to_canonical(), request).await,
        None => Answer::Failed("this is no request for a port".to_owned()),
    };
    stream
        .write_all(format!("{}\n", answer.line()).as_bytes())
        .await?;
    Ok(format!("{}: {}", line.trim(), answer.line()))
}

async fn dial(to: IpAddr, request: Request) -> Answer {
    let endpoint = SocketAddr::new(to, request.port);
    let dialled = match request.protocol {
        Transport::Tcp => timeout(PATIENCE, TcpStream::connect(endpoint))
            .await
            .map(|connected| connected.map(drop)),
        Transport::Udp => timeout(PATIENCE, probe(endpoint)).await,
    };
    match dialled {
        Ok(Ok(())) => Answer::Open,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Answer::Refused,
        Ok(Err(error)) => Answer::Failed(error.to_string()),
        Err(_) => Answer::Silent,
    }
}

async fn probe(endpoint: SocketAddr) -> io::Result<()> {
    let any = if endpoint.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(endpoint).await?;
    let mut answer = [0; 1];
    for _ in 0..PROBES {
        socket.send(PROBE).await?;
        if let Ok(received) = timeout(PATIENCE / (PROBES + 1), socket.recv(&mut answer)).await {
            return received.map(drop);
        }
    }
    // The caller's patience ends it.
    std::future::pending().await
}

/// A line, which the other side ends or is cut off at.
async fn read_line(stream: &mut TcpStream) -> Result<String> {
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST))
        .read_line(&mut line)
        .await
        .context("cannot read a line")?;
    Ok(line)
}

impl Request {
    fn parse(line: &str) -> Option<Self> {
        let words = line.trim_end().strip_prefix(GREETING)?;
        let (protocol, port) = words.strip_prefix(' ')?.split_once(' ')?;
        let protocol = match protocol {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return None,
        };
        let port = port.parse().ok().filter(|port| *port != 0)?;
        Some(Self { protocol, port })
    }
}

impl Answer {
    fn line(&self) -> String {
        match self {
            Self::Open => "open".to_owned(),
            Self::Refused => "refused".to_owned(),
            Self::Silent => "silent".to_owned(),
            Self::Failed(why) => format!("failed {why}"),
        }
    }

    fn parse(line: &str) -> Result<Self> {
        Ok(match line.trim_end() {
            "open" => Self::Open,
            "refused" => Self::Refused,
            "silent" => Self::Silent,
            line => match line.strip_prefix("failed ") {
                Some(why) => Self::Failed(why.to_owned()),
                None => bail!("it does not speak like a helper: {line:?}"),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::proptest;

    use super::*;

    #[test]
    fn requests_are_understood_or_refused() {
        let request = |protocol, port| Some(Request { protocol, port });
        for (line, expected) in [
            ("portfwd-check 1 tcp 8080\n", request(Transport::Tcp, 8080)),
            ("portfwd-check 1 udp 1\r\n", request(Transport::Udp, 1)),
            ("portfwd-check 1 tcp 0", None),
            ("portfwd-check 1 tcp 65536", None),
            ("portfwd-check 1 tcp 80 10.0.0.1", None),
            ("portfwd-check 1 both 80", None),
            ("portfwd-check 2 tcp 80", None),
            ("portfwd-check 1tcp 80", None),
            ("GET / HTTP/1.1", None),
            ("", None),
        ] {
            assert_eq!(Request::parse(line), expected, "{line:?}");
        }
    }

    #[test]
    fn answers_are_read_as_they_are_written() {
        for answer in [
            Answer::Open,
            Answer::Refused,
            Answer::Silent,
            Answer::Failed("no route".to_owned()),
        ] {
            assert_eq!(
                Answer::parse(&format!("{}\n", answer.line())).unwrap(),
                answer
            );
        }
        assert!(Answer::parse("220 mail.example ESMTP").is_err());
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "\\PC*") {
            let _ = Request::parse(&line);
            let _ = Request::parse(&format!("{GREETING} {line}"));
            let _ = Answer::parse(&line);
        }
    }
}
