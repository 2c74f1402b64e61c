//! Child processes that do not outlive their test.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deadline::{here, wait_for};

/// A running child process; killed and waited for on drop.
///
/// What it writes to stdout and stderr is kept in one text, in order of arrival.
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Transcript>,
}

/// Physical memory of a process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What it has.
    pub now: u64,
    /// The most it ever had.
    pub peak: u64,
    /// What it has of its own: heap and stacks.
    pub anonymous: u64,
    /// What it has of files: its program and libraries. The kernel can take it back, and reads it again.
    pub file: u64,
}

/// What a process has done so far, over all of its threads that still are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activity {
    /// Processor time, to the nanosecond.
    pub time: Duration,
    /// How often it waited for something, and was woken up.
    pub waits: u64,
}

/// What a process has written so far.
#[derive(Default)]
struct Transcript {
    state: Mutex<TranscriptState>,
    grown: Condvar,
}

#[derive(Default)]
struct TranscriptState {
    bytes: Vec<u8>,
    /// Streams that have come to their end; both have when it is 2.
    ended: u8,
}

impl Process {
    /// Starts `command` with its output captured and no input.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {name}; is it installed?"))?;
        let output = Arc::new(Transcript::default());
        if let Some(stdout) = child.stdout.take() {
            output.follow(stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            output.follow(stderr);
        }
        Ok(Self {
            name,
            child,
            output,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time that the process has used so far, in user space and in the kernel.
    pub fn processor_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid());
        let stat = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        // The second field is the program's name in parentheses; user and system time are the 14th and 15th.
        let (_, fields) = stat.rsplit_once(')').context("a stat without name")?;
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(str::parse::<u64>)
            .sum::<Result<_, _>>()?;
        of_ticks(ticks)
    }

    /// Physical memory of the process, in bytes: now, and at its highest so far.
    pub fn memory(&self) -> Result<Memory> {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let bytes = |field: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            let line = line.with_context(|| format!("{path} has no {field}"))?;
            let kibibytes = line.trim().trim_end_matches(" kB");
            Ok(kibibytes.parse::<u64>()? << 10)
        };
        Ok(Memory {
            now: bytes("VmRSS:")?,
            peak: bytes("VmHWM:")?,
            anonymous: bytes("RssAnon:")?,
            file: bytes("RssFile:")?,
        })
    }

    /// What the process has done so far.
    pub fn activity(&self) -> Result<Activity> {
        let tasks = format!("/proc/{}/task", self.pid());
        let mut activity = Activity {
            time: Duration::ZERO,
            waits: 0,
        };
        for task in std::fs::read_dir(&tasks).with_context(|| format!("read {tasks}"))? {
            let task = task?.path();
            // A thread may end while it is looked at.
            let (Ok(times), Ok(status)) = (
                std::fs::read_to_string(task.join("schedstat")),
                std::fs::read_to_string(task.join("status")),
            ) else {
                continue;
            };
            let time = times.split(' ').next().context("an empty schedstat")?;
            activity.time += Duration::from_nanos(time.trim().parse()?);
            let waits = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .context("a status without switches")?;
            activity.waits += waits.trim().parse::<u64>()?;
        }
        Ok(activity)
    }

    /// Everything written so far, to stdout and stderr.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().bytes).into_owned()
    }

    /// Waits until the process has written `text`.
    pub fn wait_for_output(&self, text: &str, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        let mut state = self.output.lock();
        loop {
            let written = String::from_utf8_lossy(&state.bytes);
            if written.contains(text) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended == 2 {
                bail!("{} never wrote {text:?}, only:\n{written}", self.name);
            }
            state = self
                .output
                .grown
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Sends a signal to this process alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).with_context(|| format!("send {signal} to {} ({pid})", self.name))
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let child = &mut self.child;
        let status = wait_for(&what, within, || Ok(child.try_wait()?))?;
        self.output.wait_for_end(within);
        Ok(status)
    }

    /// The exit status, if the process has ended.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Kills the process as nothing can refuse, and waits for it.
    pub fn kill(&mut self) -> Result<()> {
        self.child
            .kill()
            .with_context(|| format!("kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that the process has ended and was waited for already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Transcript {
    fn lock(&self) -> MutexGuard<'_, TranscriptState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends what `stream` delivers, on a thread that ends with the stream.
    fn follow(self: &Arc<Self>, mut stream: impl Read + Send + 'static) {
        let transcript = Arc::clone(self);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                transcript.lock().bytes.extend_from_slice(&buffer[..length]);
                transcript.grown.notify_all();
            }
            transcript.lock().ended += 1;
            transcript.grown.notify_all();
        });
    }

    /// Waits until both streams are read to their end, so that nothing of the output is missed.
    fn wait_for_end(&self, within: Duration) {
        drop(
            self.grown
                .wait_timeout_while(self.lock(), within, |state| state.ended < 2),
        );
    }
}

/// Time that the kernel counts in ticks, as in proc_stat(5).
pub fn of_ticks(ticks: u64) -> Result<Duration> {
    // SAFETY: the call takes a number and returns one.
    let a_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let ticks_per_second = u64::try_from(a_second).ok().filter(|rate| *rate > 0);
    let rate = ticks_per_second.context("the kernel does not say how long a tick is")?;
    Ok(Duration::from_millis(ticks * 1000 / rate))
}

/// Runs `command` to its end, whatever becomes of it; kills it and fails when it takes too long.
pub fn output_within(command: &mut Command, within: Duration) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}; is it installed?"))?;
    let streams = (
        child.stdout.take().map(read_aside),
        child.stderr.take().map(read_aside),
    );
    let within = here(within);
    let deadline = Instant::now() + within;
    let content = |stream: Option<mpsc::Receiver<Vec<u8>>>| -> Result<Vec<u8>> {
        let left = deadline.saturating_duration_since(Instant::now());
        Ok(stream.context("no pipe")?.recv_timeout(left)?)
    };
    // A process has ended when both of its streams have; no need to look at it again and again.
    let (Ok(stdout), Ok(stderr)) = (content(streams.0), content(streams.1)) else {
        child.kill()?;
        child.wait()?;
        bail!(
            "{program} {} did not end within {within:?}",
            arguments(command)
        );
    };
    Ok(Output {
        status: child.wait()?,
        stdout,
        stderr,
    })
}

/// Everything that `stream` delivers, once it has ended.
fn read_aside(mut stream: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut content = Vec::new();
        if stream.read_to_end(&mut content).is_ok() {
            // Nobody waits any more when the process took too long.
            drop(sender.send(content));
        }
    });
    receiver
}

fn arguments(command: &Command) -> String {
    let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    words.join(" ")
}

/// Runs `command` to its end and fails, quoting what it wrote, unless it succeeds.
pub fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("start {program}; is it installed?"))?;
    if !output.status.success() {
        return Err(anyhow!(
            "{program} {} failed ({}): {}{}",
            arguments(command),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout),
        ));
    }
    Ok(output)
}

/// Lets this process have as many descriptors as the system allows: a shell's is let have 1,024 until it asks for more.
///
/// # Errors
/// If it is not even allowed `wanted`.
pub fn allow_descriptors(wanted: u64) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("ask for the limit of files")?;
    ensure!(
        hard >= wanted,
        "{wanted} descriptors are needed, and {hard} allowed: see `ulimit -Hn`"
    );
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of files")?;
    }
    Ok(())
}

/// [`run`], and what it wrote to stdout.
pub fn run_for_text(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    String::from_utf8(output.stdout).context("output is not UTF-8")
}
