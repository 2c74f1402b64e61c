//! The serial line of a virtual machine, with a shell at its other end.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::deadline::here;

/// What the shell says when it listens.
const READY: &str = "vm: ready";
/// What it says after each command; the rest of the line is the exit code.
const DONE: &str = "vm: done ";
/// How long a machine may take until its shell listens.
const BOOT: Duration = Duration::from_secs(60);

/// A machine's serial line. The machine is ended on drop.
pub struct Console {
    machine: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// Whether it took too long over something: what it says next would be the answer to that.
    is_lost: bool,
}

impl Console {
    /// Starts a machine whose serial line is its standard input and output.
    pub(super) fn open(mut machine: Command) -> Result<Self> {
        let mut machine = machine
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the machine")?;
        let input = machine.stdin.take().context("the machine has no input")?;
        let output = machine.stdout.take().context("the machine has no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).replace('\r', "");
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            machine,
            input,
            lines,
            is_lost: false,
        })
    }

    /// Waits until the shell listens, and returns what the machine has said until then.
    pub(super) fn wait_until_ready(&mut self) -> Result<String> {
        let (said, _) = self
            .read_until(READY, BOOT)
            .context("the machine does not boot")?;
        Ok(said)
    }

    /// Runs one line in the shell, which must succeed, and returns what it wrote.
    ///
    /// # Errors
    /// When it fails or takes too long, with what it wrote.
    pub fn run(&mut self, line: &str, within: Duration) -> Result<String> {
        let (written, code) = self.attempt(line, within)?;
        ensure!(code == 0, "`{line}` ended with {code}: {}", written.trim());
        Ok(written)
    }

    /// Runs one line in the shell, and returns what it wrote and its exit code.
    ///
    /// # Errors
    /// When it takes too long; the machine is of no use then.
    pub fn attempt(&mut self, line: &str, within: Duration) -> Result<(String, u8)> {
        ensure!(!self.is_lost, "the machine has not answered before");
        ensure!(!line.contains('\n'), "more than one line: {line:?}");
        writeln!(self.input, "{line}").context("the machine does not listen")?;
        let (written, code) = self
            .read_until(DONE, within)
            .with_context(|| format!("typed to the machine: {line}"))?;
        let code = code.parse().with_context(|| format!("{DONE}{code}"))?;
        Ok((written, code))
    }

    /// Reads to a line that begins with `mark`: what came before it, and the rest of it.
    fn read_until(&mut self, mark: &str, within: Duration) -> Result<(String, String)> {
        let within = here(within);
        let deadline = Instant::now() + within;
        let mut written = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(mark) {
                        // The shell begins a line of its own.
                        let length = written.trim_end_matches('\n').len();
                        written.truncate(length);
                        return Ok((written, rest.to_owned()));
                    }
                    written += &line;
                    written.push('\n');
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.is_lost = true;
                    bail!("no {mark:?} within {within:?}, only:\n{written}");
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the machine ended:\n{written}"),
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // An error means that it has ended already.
        drop(self.machine.kill());
        drop(self.machine.wait());
    }
}
