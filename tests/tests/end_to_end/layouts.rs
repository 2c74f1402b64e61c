//! A start that meets tables it cannot take over: another version's, of other sizes, or not what they should be. It says so,
//! with the command that helps, and what is there goes on until somebody types it.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use aya::util::KernelVersion;
use portfwd::bpf::Pins;
use portfwd_common::abi::{ABI_VERSION, DEFAULT_MAX_PORTS, names};
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::process::{run, run_for_text};
use portfwd_tests::{Family, Lab, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

const CONFLICT: i32 = 6;
/// Every kind of map says what it takes since "bpf: Use bpf_map_mem_usage" of this kernel.
const TELLS_MEMORY: KernelVersion = KernelVersion::new(6, 4, 0);

/// A daemon that has forwarded something, and ended.
struct Ended {
    scene: Scene,
    _echo: udp::Echo,
    flow: std::net::UdpSocket,
}

impl Ended {
    fn new(mode: Mode) -> Result<Self> {
        let mut scene = Scene::forwarding(mode, "udp")?;
        let echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
        let flow = udp::connect(&scene.lab.client, listen(Family::V4))?;
        udp::exchange(&flow, b"before")?;
        scene.daemon.stop()?;
        Ok(Self {
            scene,
            _echo: echo,
            flow,
        })
    }

    fn pins(&self) -> Pins {
        Pins::new(&self.scene.daemon.pins())
    }

    /// Fails unless a start with `more` options is refused in one line that holds `about`, while the flow goes on; returns
    /// the command that the line tells to type.
    fn expect_refusal(&self, more: &[&str], about: &str) -> Result<String> {
        let output = self
            .scene
            .daemon
            .cli(&[&["run", "--wan", "wan0", "--lan", "lan0"], more].concat())?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(CONFLICT), "{stderr}");
        ensure!(stderr.lines().count() == 1, "one line, not:\n{stderr}");
        ensure!(stderr.contains(about), "{stderr:?} does not say {about:?}");
        udp::exchange(&self.flow, b"as if nothing were").context("the flow has ended")?;
        let command = stderr.split('`').find(|text| text.starts_with("portfwd "));
        let command = command.with_context(|| format!("no command in {stderr:?}"))?;
        Ok(command.to_string())
    }

    /// Types the command, and fails unless the rules are there, and work, with the next start.
    fn expect_it_helps(mut self, command: &str) -> Result<Scene> {
        let words: Vec<&str> = command.split(' ').collect();
        let [_, "-n", name, arguments @ ..] = words.as_slice() else {
            anyhow::bail!("{command:?} does not name the instance");
        };
        ensure!(*name == self.scene.lab.gateway.name());
        self.scene.daemon.ok(arguments)?;
        self.scene.daemon.start()?;
        ensure!(self.scene.daemon.rules()?.len() == 2);
        let socket = udp::connect(&self.scene.lab.client, listen(Family::V4))?;
        udp::exchange(&socket, b"afterwards")?;
        Ok(self.scene)
    }
}

/// Up and down: what another version has attached goes on forwarding meanwhile, because its programs and links are its own.
#[rstest]
fn another_versions_tables_are_refused_and_go_on(
    #[values(Mode::Tc, Mode::Xdp)] mode: Mode,
    #[values(ABI_VERSION - 1, ABI_VERSION + 1)] version: u32,
) -> Result<()> {
    let ended = Ended::new(mode)?;
    let pins = ended.pins();
    let other = pins.instance().join(format!("v{version}"));
    fs::rename(pins.version(), &other).context("make the pins another version's")?;
    let command = ended.expect_refusal(&[], &format!("v{version}"))?;
    ensure!(other.exists() && !pins.version().exists());
    let scene = ended.expect_it_helps(&command)?;
    ensure!(!other.exists(), "the other version's pins are left");
    scene.expect_no_errors()
}

/// Who sizes a machine, or `MemoryMax=` of the service, goes by what the log says. It left out what stands for clients and the flows that
/// begin, and said 208 MiB of 295.
#[rstest]
#[case::by_default(None, None)]
#[case::with_sizes_of_its_own(Some(5_000), Some(20_000))]
fn the_tables_take_what_the_log_says(
    #[case] max_flows: Option<u32>,
    #[case] max_half_open: Option<u32>,
) -> Result<()> {
    if KernelVersion::current()? < TELLS_MEMORY {
        println!("skipped: this kernel tells no more than a guess");
        return Ok(());
    }
    let lab = Lab::for_mode(Mode::Tc)?;
    let daemon = DaemonOptions {
        max_flows,
        max_half_open,
        ..DaemonOptions::new(Mode::Tc)
    }
    .start(&lab.gateway)?;
    let log = daemon.log()?;
    let told = log
        .split("the tables take ")
        .nth(1)
        .context("no word of it")?;
    let told: u64 = told
        .split(' ')
        .next()
        .context("nothing behind it")?
        .parse()?;
    let mut taken = 0;
    for map in fs::read_dir(Pins::new(&daemon.pins()).maps())? {
        let shown = run_for_text(
            Command::new("bpftool")
                .args(["--json", "map", "show", "pinned"])
                .arg(map?.path()),
        )?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        taken += shown["bytes_memlock"].as_u64().context("no memory")?;
    }
    ensure!(
        told.abs_diff(taken >> 20) <= 1,
        "the log says {told} MiB, and the kernel {} bytes",
        taken
    );
    Ok(())
}

#[test]
fn other_sizes_are_refused_and_what_is_there_goes_on() -> Result<()> {
    let ended = Ended::new(Mode::Tc)?;
    let flows = ended.expect_refusal(&["--max-flows", "1000"], "--max-flows 1000")?;
    let ports = ended.expect_refusal(&["--max-ports", "1000"], "--max-ports 1000")?;
    assert_eq!(flows, ports);
    ended.expect_it_helps(&ports)?;
    Ok(())
}

/// The library that opens the pins takes whatever map has the right name.
#[test]
fn a_pinned_map_that_is_not_what_it_should_be_is_refused() -> Result<()> {
    let ended = Ended::new(Mode::Tc)?;
    let path = ended.pins().maps().join(names::COUNTERS);
    let mut command = None;
    for (kind, key, value, about) in [
        ("array", 4, 40, "value size 40"),
        ("array", 4, 32, "flags"),
        ("percpu_array", 4, 32, "type"),
        ("percpu_hash", 8, 32, "type"),
    ] {
        fs::remove_file(&path)?;
        let entries = DEFAULT_MAX_PORTS.to_string();
        run(Command::new("bpftool")
            .args(["map", "create"])
            .arg(&path)
            .args(["type", kind, "key", &key.to_string()])
            .args(["value", &value.to_string()])
            .args(["entries", &entries, "name", names::COUNTERS]))?;
        command = Some(ended.expect_refusal(&[], about)?);
        ended.expect_refusal(&[], names::COUNTERS)?;
    }
    ended.expect_it_helps(&command.context("none was tried")?)?;
    Ok(())
}

/// A table of the same layout but another size: no option was given, and it is not `FLOWS_V4` that sizes are taken from.
#[test]
fn tables_of_two_sizes_are_refused() -> Result<()> {
    let ended = Ended::new(Mode::Tc)?;
    let path = ended.pins().maps().join(names::LISTENS);
    fs::remove_file(&path)?;
    run(Command::new("bpftool")
        .args(["map", "create"])
        .arg(&path)
        .args(["type", "lpm_trie", "key", "24", "value", "4"])
        .args(["entries", "7", "name", names::LISTENS, "flags", "1"]))?;
    let command = ended.expect_refusal(&[], "size 7")?;
    ended.expect_it_helps(&command)?;
    Ok(())
}
