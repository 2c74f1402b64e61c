//! The control socket, spoken to byte by byte: by clients that no library would make.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A connection to the control socket that says what it is told to.
pub struct Raw {
    stream: UnixStream,
}

/// What the daemon answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status; 0 if the daemon closed the connection without a word.
    pub status: u16,
    /// Everything behind the header.
    pub body: Vec<u8>,
}

impl Raw {
    /// Connects; waits while the backlog of the socket is full.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self { stream })
    }

    /// Writes; what the daemon does not take any more, because it has closed the connection, is left out.
    pub fn say(&mut self, bytes: &[u8]) -> Result<()> {
        match self.stream.write_all(bytes) {
            Err(error) if is_closed(error.kind()) => Ok(()),
            written => written.context("write to the control socket"),
        }
    }

    /// Ends its side of the connection.
    pub fn end(&self) -> Result<()> {
        match self.stream.shutdown(std::net::Shutdown::Write) {
            Err(error) if error.kind() == ErrorKind::NotConnected => Ok(()),
            ended => ended.context("end one side of a connection"),
        }
    }

    /// Everything that comes until the daemon closes the connection, which it has to do `within`.
    pub fn answer(&mut self, within: Duration) -> Result<Answer> {
        let deadline = Instant::now() + within;
        let mut bytes = Vec::new();
        let mut buffer = [0; 16 << 10];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the daemon did not close the connection within {within:?}, it said {:?}",
                    String::from_utf8_lossy(&bytes)
                );
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => bytes.extend_from_slice(&buffer[..length]),
                Err(error) if is_closed(error.kind()) => break,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error).context("read from the control socket"),
            }
        }
        Answer::parse(&bytes)
    }
}

impl Answer {
    fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() {
            let body = Vec::new();
            return Ok(Self { status: 0, body });
        }
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        let (header, body) = bytes.split_at(end.context("an answer without end of its header")?);
        let header = String::from_utf8_lossy(header);
        let status = header
            .split(' ')
            .nth(1)
            .context("an answer without status")?;
        Ok(Self {
            status: status.parse().context("a status that is no number")?,
            body: body[4..].to_vec(),
        })
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

fn is_closed(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}
