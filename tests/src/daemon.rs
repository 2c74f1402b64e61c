//! The `portfwd` binary at work in a namespace, driven and read as a user does it.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use aya::programs::ProgramInfo;
use nix::sys::signal::Signal;
use portfwd::bpf::{Pins, Tables, pools::PoolKeeper, sweep::Sweeper, usages::UsageKeeper};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::bpffs;
use crate::deadline::{PATIENCE, wait_for};
use crate::namespace::Namespace;
use crate::process::{Activity, Memory, Process, output_within, run};

/// How long the daemon may take to be ready: the kernel verifies its programs first, which takes a busy machine many seconds.
pub(crate) const START: Duration = Duration::from_secs(60);

/// How portfwd attaches to an interface, as `--mode` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// portfwd chooses.
    Auto,
    /// Native XDP, in the driver.
    Xdp,
    /// Generic XDP, in the stack.
    XdpGeneric,
    /// TC.
    Tc,
}

impl Mode {
    /// The word on the command line and in `status`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp-generic",
            Self::Tc => "tc",
        }
    }
}

/// How a [`Daemon`] is started.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// The values of `--wan`: interfaces, each with `=MODE` or without.
    pub wan: Vec<String>,
    /// The values of `--lan`.
    pub lan: Vec<String>,
    /// The value of `--mode`.
    pub mode: Mode,
    /// The value of `--max-flows`, if it is to be given.
    pub max_flows: Option<u32>,
    /// The value of `--max-half-open`, if it is to be given.
    pub max_half_open: Option<u32>,
    /// A file that the daemon sees in the place of `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// The value of `--resolve-every`, seconds, if it is to be given.
    pub resolve_every: Option<u32>,
    /// Variables that the daemon gets beside those of the test.
    pub environment: Vec<(String, String)>,
    /// The only capabilities that the daemon has, as setpriv(1) names them; `None` for all.
    pub capabilities: Option<Vec<String>>,
    /// Bytes of the disk that the daemon alone has for its state file; `None` for the machine's.
    pub state_disk: Option<u64>,
    /// The value of `--config`, if it is to be given.
    pub config: Option<PathBuf>,
    /// Whether the daemon's log is written to stderr at the end, for the reader of a failed test.
    pub log_at_end: bool,
}

impl DaemonOptions {
    /// `--wan wan0 --lan lan0 --mode MODE`.
    pub fn new(mode: Mode) -> Self {
        Self {
            wan: vec!["wan0".into()],
            lan: vec!["lan0".into()],
            mode,
            max_flows: None,
            max_half_open: None,
            resolv_conf: None,
            resolve_every: None,
            config: None,
            environment: Vec::new(),
            capabilities: None,
            state_disk: None,
            log_at_end: true,
        }
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["run".to_string()];
        for interface in &self.wan {
            arguments.extend(["--wan".into(), interface.clone()]);
        }
        for interface in &self.lan {
            arguments.extend(["--lan".into(), interface.clone()]);
        }
        arguments.extend(["--mode".into(), self.mode.word().into()]);
        if let Some(path) = &self.config {
            arguments.extend(["--config".into(), path.display().to_string()]);
        }
        if let Some(flows) = self.max_flows {
            arguments.extend(["--max-flows".into(), flows.to_string()]);
        }
        if let Some(flows) = self.max_half_open {
            arguments.extend(["--max-half-open".into(), flows.to_string()]);
        }
        if let Some(seconds) = self.resolve_every {
            arguments.extend(["--resolve-every".into(), seconds.to_string()]);
        }
        arguments
    }

    /// Starts the daemon in `namespace` and waits until it is ready.
    pub fn start(self, namespace: &Namespace) -> Result<Daemon> {
        self.start_as(namespace, None)
    }

    /// The same with another binary than the usual one.
    pub fn start_as(self, namespace: &Namespace, other: Option<&Path>) -> Result<Daemon> {
        bpffs::ensure_mounted()?;
        let mut daemon = Daemon {
            binary: match other {
                Some(path) => path.to_owned(),
                None => binary()?,
            },
            namespace: namespace.name().to_string(),
            options: self,
            process: None,
        };
        daemon.start()?;
        Ok(daemon)
    }
}

/// A running `portfwd run`; on drop it is killed and everything of it detached.
pub struct Daemon {
    binary: PathBuf,
    namespace: String,
    options: DaemonOptions,
    process: Option<Process>,
}

/// Packets and bytes of one direction.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A line of `portfwd --json rules`.
#[derive(Clone, Debug, Deserialize)]
pub struct Rule {
    /// The number that `remove` takes.
    pub id: u64,
    /// The name that `add --name` gave.
    pub name: Option<String>,
    /// `tcp`, `udp` or `both`.
    pub proto: String,
    /// What the world dials.
    pub listen: String,
    /// Who serves it.
    pub target: String,
    /// What the target sees instead of clients.
    pub source: Option<String>,
    /// Live flows.
    pub flows: u64,
    /// Live flows of what the rule said before it was replaced.
    pub draining: u64,
    /// Whether packets find it.
    pub open: bool,
    /// Its tags.
    pub tags: Vec<String>,
    /// When it ends.
    pub expires: Option<String>,
    /// Counted from client to target.
    pub to_target: Traffic,
    /// Counted from target to client.
    pub to_client: Traffic,
}

/// A line of `portfwd --json flows`.
#[derive(Clone, Debug, Deserialize)]
pub struct Flow {
    /// `tcp` or `udp`.
    pub proto: String,
    /// The client's endpoint.
    pub client: String,
    /// The endpoint that the client dialled.
    pub listen: String,
    /// The endpoint that serves it.
    pub target: String,
    /// Whom the target takes for the client.
    pub source: String,
    /// The state of the flow.
    pub state: String,
    /// Seconds since the first packet.
    pub age_s: f64,
    /// Seconds since the last packet.
    pub idle_s: f64,
    /// Counted from client to target.
    pub to_target: Traffic,
    /// Counted from target to client.
    pub to_client: Traffic,
    /// The rule that made it.
    pub rule: Value,
}

/// Finds the binary: `PORTFWD_BIN`, or beside the running test in cargo's target directory.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("PORTFWD_BIN") {
        return Ok(path.into());
    }
    let executable = env::current_exe()?;
    executable
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("portfwd"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            anyhow!(
                "no portfwd binary beside {}: run `cargo build -p portfwd`, or set PORTFWD_BIN",
                executable.display()
            )
        })
}

impl Daemon {
    /// Starts `portfwd run --wan wan0 --lan lan0 --mode MODE` in `namespace`.
    pub fn start_in(namespace: &Namespace, mode: Mode) -> Result<Self> {
        DaemonOptions::new(mode).start(namespace)
    }

    /// Starts the daemon again after [`Self::kill9`] or [`Self::stop`].
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the daemon is running already");
        let mut command = self.launch();
        command
            .args(self.options.arguments())
            .envs(self.options.environment.iter().cloned());
        let mut process = Process::spawn(command)?;
        let ready = wait_for("portfwd status to exit 0", START, || {
            if let Some(status) = process.exited()? {
                process.wait(PATIENCE)?;
                bail!("portfwd run ended ({status}): {}", process.output().trim());
            }
            Ok(self.cli(&["status"])?.status.success().then_some(()))
        });
        if ready.is_err() {
            self.show_log(&process);
        }
        ready?;
        self.process = Some(process);
        Ok(())
    }

    /// The next start, and every command, is of this binary.
    pub fn use_binary(&mut self, path: &Path) {
        path.clone_into(&mut self.binary);
    }

    /// The next start is in this mode.
    pub fn use_mode(&mut self, mode: Mode) {
        self.options.mode = mode;
    }

    /// The next start has this variable beside those of the test, and no other.
    pub fn set_environment(&mut self, variable: Option<(&str, &str)>) {
        let owned = variable.map(|(name, value)| (name.to_owned(), value.to_owned()));
        self.options.environment = owned.into_iter().collect();
    }

    /// The kernel's numbers of all pinned programs of this instance, by their names.
    pub fn program_ids(&self) -> Result<BTreeMap<String, u32>> {
        let pinned = self.pinned_programs()?;
        let ids = pinned.into_iter().map(|(name, info)| (name, info.id()));
        Ok(ids.collect())
    }

    /// The kernel's tags of all programs of this instance, digests of their instructions: they tell builds apart.
    pub fn program_tags(&self) -> Result<Vec<String>> {
        let pinned = self.pinned_programs()?;
        let tags = pinned
            .into_iter()
            .map(|(name, info)| format!("{name} {:016x}", info.tag()));
        Ok(tags.collect())
    }

    fn pinned_programs(&self) -> Result<BTreeMap<String, ProgramInfo>> {
        let mut versions = fs::read_dir(self.pins())?;
        let version = versions.next().context("nothing is pinned")??;
        let mut programs = BTreeMap::new();
        for program in fs::read_dir(version.path().join("programs"))? {
            let program = program?;
            let path = program.path();
            let info =
                ProgramInfo::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
            programs.insert(program.file_name().to_string_lossy().into_owned(), info);
        }
        Ok(programs)
    }

    /// The daemon's command line up to its own arguments. A daemon that is not allowed everything may not enter a namespace itself:
    /// it is started there, as its service would be.
    fn launch(&self) -> Command {
        if let Some(file) = &self.options.resolv_conf {
            // In a mount namespace of its own. The BPF file system in it is the same.
            const SCRIPT: &str = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
            let mut command = Command::new("unshare");
            command
                .args(["--mount", "sh", "-c", SCRIPT])
                .arg(file)
                .arg(&self.binary)
                .args(["-n", &self.namespace]);
            return command;
        }
        if let Some(bytes) = self.options.state_disk {
            let mut command = Command::new("unshare");
            command
                .args(["--mount", "sh", "-ec"])
                .arg(format!(
                    "mount -t tmpfs -o size={bytes} none /var/lib/portfwd\nexec \"$@\""
                ))
                .arg("sh")
                .arg(&self.binary)
                .args(["-n", &self.namespace]);
            return command;
        }
        let Some(capabilities) = &self.options.capabilities else {
            return self.command();
        };
        let bounds: String = capabilities
            .iter()
            .map(|name| format!(",+{name}"))
            .collect();
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .args(["--", "setpriv", "--no-new-privs"])
            .args(["--inh-caps=-all", "--ambient-caps=-all"])
            .arg(format!("--bounding-set=-all{bounds}"))
            .arg(&self.binary)
            .args(["--instance", &self.namespace]);
        command
    }

    /// Whether the daemon has ended by itself, or by somebody else's hand.
    pub fn has_ended(&mut self) -> Result<bool> {
        let process = self.process.as_mut();
        Ok(process
            .context("the daemon is not running")?
            .exited()?
            .is_some())
    }

    /// The process id of the daemon, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// What the daemon has logged since it was started.
    pub fn log(&self) -> Result<String> {
        let process = self.process.as_ref();
        Ok(process.context("the daemon is not running")?.output())
    }

    /// Processor time that the daemon has used since it was started.
    pub fn processor_time(&self) -> Result<Duration> {
        let process = self.process.as_ref();
        process
            .context("the daemon is not running")?
            .processor_time()
    }

    /// Physical memory of the daemon.
    pub fn memory(&self) -> Result<Memory> {
        let process = self.process.as_ref();
        process.context("the daemon is not running")?.memory()
    }

    /// What the daemon has done since it was started.
    pub fn activity(&self) -> Result<Activity> {
        let process = self.process.as_ref();
        process.context("the daemon is not running")?.activity()
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let process = self.process.as_ref();
        process.context("the daemon is not running")?.signal(signal)
    }

    /// Kills the daemon as nothing can refuse; what it attached stays.
    pub fn kill9(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon is not running")?;
        process.kill()?;
        self.show_log(&process);
        Ok(())
    }

    /// Asks the daemon to end, as a service manager does; what it attached stays.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon is not running")?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(PATIENCE)?;
        self.show_log(&process);
        ensure!(status.success(), "portfwd run ended with {status}");
        Ok(())
    }

    /// Has the daemon read its configuration again.
    pub fn reload(&self) -> Result<()> {
        let process = self.process.as_ref();
        process
            .context("the daemon is not running")?
            .signal(Signal::SIGHUP)
    }

    /// A `portfwd -n NAMESPACE` command, to which arguments can be added.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(["-n", &self.namespace]);
        command
    }

    /// Runs `portfwd -n NAMESPACE ARGUMENTS`, whatever becomes of it.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        output_within(self.command().args(arguments), PATIENCE)
    }

    /// Runs `portfwd -n NAMESPACE ARGUMENTS`, which must succeed, and returns its stdout.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.cli(arguments)?;
        ensure!(
            output.status.success(),
            "portfwd {} failed ({}): {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        String::from_utf8(output.stdout).context("output is not UTF-8")
    }

    /// What `portfwd --json ARGUMENTS` says.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        self.read(arguments)
    }

    /// `portfwd add PROTO LISTEN TARGET --name NAME`.
    pub fn add(&self, name: &str, proto: &str, listen: &str, target: &str) -> Result<()> {
        self.ok(&["add", proto, listen, target, "--name", name])?;
        Ok(())
    }

    /// Adds a rule with options.
    pub fn add_with(
        &self,
        name: &str,
        [proto, listen, target]: [&str; 3],
        options: &[&str],
    ) -> Result<()> {
        let rule = ["add", proto, listen, target, "--name", name];
        self.ok(&[&rule, options].concat())?;
        Ok(())
    }

    /// The lines of `portfwd rules`.
    pub fn rules(&self) -> Result<Vec<Rule>> {
        self.read(&["rules"])
    }

    /// The rule of a name.
    pub fn rule(&self, name: &str) -> Result<Rule> {
        self.rules()?
            .into_iter()
            .find(|rule| rule.name.as_deref() == Some(name))
            .with_context(|| format!("`portfwd rules` has no rule {name:?}"))
    }

    /// The lines of `portfwd flows`.
    pub fn flows(&self) -> Result<Vec<Flow>> {
        self.read(&["flows"])
    }

    /// The drop reasons that were counted at all.
    pub fn drops(&self) -> Result<BTreeMap<String, u64>> {
        self.reasons("drops")
    }

    /// Why packets were left to the kernel, as far as that was counted at all.
    pub fn passes(&self) -> Result<BTreeMap<String, u64>> {
        self.reasons("passes")
    }

    /// What else was counted at all about packets that were forwarded.
    pub fn events(&self) -> Result<BTreeMap<String, u64>> {
        self.reasons("events")
    }

    /// The reasons of a group of `portfwd counters` that are not 0.
    fn reasons(&self, group: &str) -> Result<BTreeMap<String, u64>> {
        let counters = self.json(&["counters"])?;
        let reasons = counters[group]
            .as_object()
            .with_context(|| format!("`portfwd counters` has no {group}"))?;
        reasons
            .iter()
            .map(|(reason, count)| Some((reason.clone(), count.as_u64()?)))
            .filter(|counted| !matches!(counted, Some((_, 0))))
            .collect::<Option<_>>()
            .with_context(|| format!("{group} are not all numbers: {reasons:?}"))
    }

    /// Where the pins of this instance are.
    pub fn pins(&self) -> PathBuf {
        Path::new(bpffs::PATH).join("portfwd").join(&self.namespace)
    }

    /// What this instance sweeps with, for somebody who takes its place.
    pub fn sweeper(&self) -> Result<Sweeper> {
        let pins = Pins::new(&self.pins());
        let tables = Tables::open_pinned(&self.pins())?;
        let pools = PoolKeeper::open(&pins)?;
        Ok(Sweeper::new(tables, pools, UsageKeeper::open(&pins)?))
    }

    /// The file that holds the rules of this instance.
    pub fn state_file(&self) -> PathBuf {
        PathBuf::from(format!("/var/lib/portfwd/{}.redb", self.namespace))
    }

    /// The socket on which the daemon listens.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/run/portfwd/{}.sock", self.namespace))
    }

    /// Another instance beside this one, in the same namespace.
    pub fn second(&self) -> Second<'_> {
        Second {
            beside: self,
            name: format!("{}-second", self.namespace),
        }
    }

    fn read<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let mut with_json = vec!["--json"];
        with_json.extend(arguments);
        let text = self.ok(&with_json)?;
        serde_json::from_str(&text)
            .with_context(|| format!("JSON of portfwd {}: {text}", arguments.join(" ")))
    }

    fn show_log(&self, process: &Process) {
        if self.options.log_at_end {
            eprintln!(
                "--- portfwd in {} ---\n{}",
                self.namespace,
                process.output()
            );
        }
    }

    fn clean_up(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
            self.show_log(&process);
        }
        self.ok(&["detach"])?;
        // The instance's name will never be used again, nor what is kept for its next daemon.
        remove_if_there(&self.state_file())?;
        remove_if_there(&self.socket().with_extension("lock"))
    }
}

/// Another instance where a daemon is, of which nothing stays: neither pins nor state, whatever became of it.
pub struct Second<'a> {
    beside: &'a Daemon,
    name: String,
}

impl Second<'_> {
    /// A command of this instance.
    pub fn command(&self) -> Command {
        let mut command = self.beside.command();
        command.args(["--instance", &self.name]);
        command
    }

    /// Where its pins are.
    pub fn pins(&self) -> PathBuf {
        self.beside.pins().with_file_name(&self.name)
    }

    /// Detaches it.
    ///
    /// # Errors
    /// When something of it stays.
    pub fn end(self) -> Result<()> {
        self.clean_up()
    }

    fn clean_up(&self) -> Result<()> {
        let detached = run(self.command().arg("detach")).map(drop);
        let file = |path: PathBuf, ending| path.with_file_name(format!("{}.{ending}", self.name));
        detached
            .and(remove_if_there(&file(self.beside.state_file(), "redb")))
            .and(remove_if_there(&file(self.beside.socket(), "lock")))
    }
}

impl Drop for Second<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.clean_up() {
            eprintln!("cannot clean up after {}: {error:#}", self.name);
        }
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.clean_up() {
            eprintln!(
                "cannot clean up after portfwd in {}: {error:#}",
                self.namespace
            );
        }
    }
}
