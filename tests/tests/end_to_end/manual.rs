//! The documents for operators: every command in them is typed, and what they show of its output is compared.
//!
//! A document is typed from top to bottom on a gateway that has the names and addresses of the documents. What cannot be
//! typed there says who types it ([`elsewhere`]); that it is really typed there is looked up.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::link::{End, connect};
use portfwd_tests::machine::{Machine, Mounts, shell_in};
use portfwd_tests::manual::{self, Step};
use portfwd_tests::namespace::Namespace;
use portfwd_tests::nginx::Nginx;
use portfwd_tests::process::{Process, output_within, run};
use portfwd_tests::{Family, tcp, udp};

const README: &str = "README.md";
const OPERATIONS: &str = "docs/operations.md";
const LONG: Duration = Duration::from_secs(40);
/// The kernel verifies the programs of a first start: on a busy machine that takes long.
const START: Duration = Duration::from_secs(90);
/// The daemon, and a helper outside: they are typed and go on.
const DAEMON: &str = "portfwd run ";
const HELPER: &str = "portfwd check-port --serve";
const FLOWS: &str = "portfwd flows";
const COUNTERS: &str = "portfwd counters";

fn root() -> Result<&'static Path> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().context("no workspace")
}

fn read(path: &str) -> Result<String> {
    let path = root()?.join(path);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Where a command is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Gateway(Mounts),
    Server,
    Client,
}

const GATEWAY: Place = Place::Gateway(Mounts::Own);

/// On the gateway, if it is not said otherwise.
const PLACES: [(&str, Place); 4] = [
    ("ip route replace default via 10.0.0.1", Place::Server),
    ("ethtool -K eth0 tx off tso off gso off", Place::Client),
    ("ethtool -K eth0 gro on", Place::Client),
    // It would hide what is pinned.
    (
        "mount -t bpf bpf /sys/fs/bpf",
        Place::Gateway(Mounts::Copied),
    ),
];

fn place(command: &str) -> Place {
    let found = PLACES
        .iter()
        .find(|(begins, _)| command.starts_with(begins));
    found.map_or(GATEWAY, |(_, place)| *place)
}

/// What is typed in a Debian that has the package (`cargo xtask dist --check`), by its program.
const OF_THE_PACKAGE: [&str; 4] = ["apt-get", "systemctl", "systemd-analyze", "man"];
const PACKAGE_SCRIPTS: [&str; 2] = ["xtask/src/dist/check.sh", "xtask/src/dist/boot.sh"];

/// What is typed in a clone of the repository, and where it is looked up that it is done.
const OF_THE_REPOSITORY: [(&str, &str, &str); 6] = [
    ("cargo xtask test", ".ci/run", "cargo xtask test"),
    ("cargo xtask setup", "xtask/src/test.rs", "setup::run()?"),
    (
        "cargo xtask demo",
        "tests/tests/end_to_end/manual.rs",
        "env!(\"CARGO_BIN_EXE_demo\")",
    ),
    // A check of its own, for minutes; its first step is the other two.
    (
        "cargo xtask dist --check",
        "xtask/src/dist/mod.rs",
        "check::run(&package)?",
    ),
    (
        "cargo xtask dist",
        "xtask/src/dist/mod.rs",
        "let package = package()?",
    ),
    (
        "cargo build --release -p portfwd",
        "xtask/src/dist/mod.rs",
        "[\"build\", \"--release\", \"--package\", \"portfwd\"]",
    ),
];

/// Whether a command is typed elsewhere. Fails if it should be, and is not.
fn elsewhere(command: &str) -> Result<bool> {
    let program = command.split(' ').next().unwrap_or_default();
    if OF_THE_PACKAGE.contains(&program) {
        let mut typed = false;
        for script in PACKAGE_SCRIPTS {
            typed |= read(script)?.lines().any(|line| line.starts_with(command));
        }
        ensure!(typed, "none of {PACKAGE_SCRIPTS:?} types {command:?}");
        return Ok(true);
    }
    if program != "cargo" {
        return Ok(false);
    }
    let (_, file, needle) = OF_THE_REPOSITORY
        .iter()
        .find(|(known, ..)| *known == command)
        .with_context(|| format!("nothing types {command:?}"))?;
    ensure!(
        read(file)?.contains(needle),
        "{file} has no {needle:?}, and {command:?} is not typed there"
    );
    if let Some(arguments) = command.strip_prefix("cargo xtask ") {
        // With `--help` behind it, everything before is read and nothing done.
        let mut xtask = Command::new(sibling("xtask")?);
        run(xtask.args(arguments.split(' ')).arg("--help"))?;
    }
    Ok(true)
}

fn sibling(program: &str) -> Result<PathBuf> {
    Ok(portfwd_tests::daemon::binary()?.with_file_name(program))
}

/// The gateway of the documents, with a client on its WAN and a server on its LAN.
struct World {
    daemon: Option<Process>,
    helper: Option<Process>,
    _services: ([tcp::Echo; 2], udp::Echo, Nginx),
    streams: Vec<std::net::TcpStream>,
    datagrams: Option<std::net::UdpSocket>,
    gateway: Machine,
    client: Namespace,
    server: Namespace,
}

impl World {
    fn new() -> Result<Self> {
        let gateway = Machine::new("gateway")?;
        let client = Namespace::new("client")?;
        let server = Namespace::new("server")?;
        for (interface, other) in [("eth0", &client), ("eth1", &server)] {
            let ends = [(&gateway.network, interface), (other, "eth0")];
            let [here, there] = ends.map(|(namespace, interface)| End {
                namespace,
                interface,
            });
            connect(here, there)?;
            there.turn_gro_on()?;
        }
        gateway.network.ip("link set eth0 up\nlink set eth1 up\n\
             addr add 198.51.100.1/24 dev eth0\naddr add 2001:db8:1::1/64 dev eth0 nodad\n\
             addr add 10.0.0.1/24 dev eth1\naddr add 2001:db8:2::1/64 dev eth1 nodad\n\
             route add default via 198.51.100.254\nroute add default via 2001:db8:1::fe\n")?;
        client.ip("link set eth0 up\n\
             addr add 198.51.100.7/24 dev eth0\naddr add 198.51.100.254/24 dev eth0\n\
             addr add 2001:db8:1::7/64 dev eth0 nodad\naddr add 2001:db8:1::fe/64 dev eth0 nodad\n")?;
        server.ip("link set eth0 up\n\
             addr add 10.0.0.2/24 dev eth0\naddr add 10.0.0.3/24 dev eth0\n\
             addr add 2001:db8:2::2/64 dev eth0 nodad\nroute add default via 2001:db8:2::1\n")?;
        gateway.write_etc("hosts", "127.0.0.1 localhost\n10.0.0.2 web.lan\n")?;
        gateway.write_etc("portfwd/blocked", "192.0.2.0/24  # a bad neighbourhood\n")?;
        Ok(Self {
            daemon: None,
            helper: None,
            _services: (
                [
                    tcp::Echo::start(&server, Family::V4, 80)?,
                    tcp::Echo::start(&server, Family::V6, 80)?,
                ],
                udp::Echo::start(&server, Family::V4, 27000)?,
                Nginx::start(&gateway.network, 9000, &[])?,
            ),
            streams: Vec::new(),
            datagrams: None,
            gateway,
            client,
            server,
        })
    }

    fn shell(&self, line: &str, place: Place) -> Result<Command> {
        match place {
            Place::Gateway(mounts) => self.gateway.shell(line, mounts),
            Place::Server => shell_in(&self.server, line),
            Place::Client => shell_in(&self.client, line),
        }
    }

    /// Ends the daemon, if one runs, and starts this one.
    fn start(&mut self, command: &str) -> Result<()> {
        self.stop()?;
        let mut daemon = Process::spawn(self.shell(command, GATEWAY)?)?;
        wait_until("portfwd status to exit 0", START, || {
            if let Some(status) = daemon.exited()? {
                bail!("{command:?} ended ({status}): {}", daemon.output());
            }
            let status = output_within(&mut self.shell("portfwd status", GATEWAY)?, PATIENCE)?;
            Ok(status.status.success())
        })?;
        self.daemon = Some(daemon);
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else {
            return Ok(());
        };
        if daemon.exited()?.is_none() {
            daemon.signal(Signal::SIGTERM)?;
            daemon.wait(PATIENCE)?;
        }
        Ok(())
    }

    /// A client comes, talks over TCP and UDP, and stays.
    fn come(&mut self) -> Result<()> {
        let mut stream = tcp::connect(&self.client, "198.51.100.1:8080".parse()?)?;
        tcp::exchange(&mut stream, b"so that it has answered before")?;
        self.streams.push(stream);
        let socket = udp::connect(&self.client, "198.51.100.1:27000".parse()?)?;
        udp::exchange(&socket, b"here as well")?;
        udp::exchange(&socket, b"and once more")?;
        self.datagrams = Some(socket);
        Ok(())
    }

    fn follow(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Configuration(text) => self.gateway.write_etc("portfwd/portfwd.toml", text),
            Step::Command(command) if command.line.contains(DAEMON) => self.start(&command.line),
            Step::Command(command) if command.bare().starts_with(HELPER) => {
                if self.helper.is_none() {
                    let helper = Process::spawn(self.shell(&command.line, Place::Client)?)?;
                    helper.wait_for_output("ready to dial back", PATIENCE)?;
                    self.helper = Some(helper);
                }
                Ok(())
            }
            Step::Command(command) => self.type_and_compare(command),
        }
    }

    fn type_and_compare(&mut self, command: &manual::Command) -> Result<()> {
        // The tables of the documents show a client at work.
        if command.printed.is_some() && command.bare() == "portfwd rules" {
            self.come()?;
        }
        // In the order in which a terminal shows it.
        let line = format!("exec 2>&1\n{}", command.line);
        let output = output_within(&mut self.shell(&line, place(command.bare()))?, LONG)?;
        let text = String::from_utf8(output.stdout)?;
        let Some(expected) = &command.printed else {
            ensure!(output.status.success(), "{}: {text}", output.status);
            return Ok(());
        };
        let mut shown: Vec<_> = expected.iter().map(|line| gist(line)).collect();
        // What hosts say to each other beside is passed, and counted: more or less of it from run to run.
        let is_beside = |line: &&str| command.bare() == COUNTERS && line.starts_with("  ");
        let mut printed: Vec<_> = text
            .lines()
            .filter(|line| !is_beside(line) || shown.contains(&gist(line)))
            .map(gist)
            .collect();
        // The connection table has no order.
        if command.bare() == FLOWS {
            shown.sort();
            printed.sort();
        }
        ensure!(
            printed == shown,
            "prints\n{text}\nwhere the document has\n{}",
            expected.join("\n")
        );
        Ok(())
    }
}

/// A line without what differs from run to run: packets counted, times, process ids, MAC addresses, a client's port.
fn gist(line: &str) -> String {
    const CLIENTS_PORTS: u16 = 32768;
    let word = |word: &str| {
        let bare = word.trim_matches(['(', ')', ',', ';']);
        let is_mac = bare.len() == 17 && bare.split(':').count() == 6;
        if is_mac {
            return "MAC".to_owned();
        }
        // Numbers, and lengths of time such as 3.0s or 1m05s.
        if bare.starts_with(|c: char| c.is_ascii_digit())
            && bare
                .chars()
                .all(|c| c.is_ascii_digit() || ".smhd".contains(c))
        {
            let is_address = bare.matches('.').count() == 3;
            return if is_address { word } else { "N" }.to_owned();
        }
        if ["B", "KiB", "MiB", "GiB"].contains(&bare) {
            return "BYTES".to_owned();
        }
        match bare.rsplit_once(':') {
            Some((address, port)) if port.parse().is_ok_and(|port: u16| port >= CLIENTS_PORTS) => {
                format!("{address}:PORT")
            }
            _ => word.to_owned(),
        }
    };
    let words = line.split_whitespace().map(word);
    words.collect::<Vec<_>>().join(" ")
}

/// Types a document, the way `prepared` says first.
fn type_all(document: &str, prepared: &[Step]) -> Result<()> {
    let mut world = World::new()?;
    for step in prepared {
        world.follow(step)?;
    }
    let mut all = Vec::new();
    for other in [README, OPERATIONS] {
        all.extend(manual::steps(&read(other)?)?);
    }
    let is_mention = |command: &manual::Command| {
        command.in_text
            && all.iter().any(|step| match step {
                Step::Command(other) => command.begins(other),
                Step::Configuration(_) => false,
            })
    };
    let mut typed = BTreeSet::new();
    let mut wrong = Vec::new();
    for step in manual::steps(&read(document)?)? {
        if let Step::Command(command) = &step {
            let bare = command.bare().to_owned();
            // The name of a command that is typed whole elsewhere, or one that was typed before.
            if is_mention(command) || command.in_text && typed.contains(&bare) {
                continue;
            }
            typed.insert(bare.clone());
            match elsewhere(&bare) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    wrong.push(format!("{document}:{}: {error:#}", command.number));
                    continue;
                }
            }
            if let Err(error) = world.follow(&step) {
                ensure!(
                    !bare.contains(DAEMON),
                    "{document}:{}: {bare}: {error:#}",
                    command.number
                );
                wrong.push(format!("{document}:{}: {bare}: {error:#}", command.number));
            }
        } else {
            world.follow(&step)?;
        }
    }
    world.stop()?;
    ensure!(typed.len() > 20, "only {} commands", typed.len());
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}

#[test]
fn every_command_of_the_readme_does_what_is_shown() -> Result<()> {
    type_all(README, &[])
}

#[test]
fn every_command_of_the_operations_manual_works() -> Result<()> {
    // It begins where the README ends: a configuration, and a daemon at work.
    let readme = manual::steps(&read(README)?)?;
    let configuration = readme
        .into_iter()
        .find(|step| matches!(step, Step::Configuration(_)));
    let mut prepared = vec![configuration.context("the README has no configuration")?];
    for line in [
        "sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
        "ip route replace default via 10.0.0.1",
        "portfwd run --wan eth0 --lan eth1",
        "portfwd apply",
    ] {
        prepared.push(Step::Command(manual::Command {
            line: line.to_owned(),
            printed: None,
            number: 0,
            in_text: false,
        }));
    }
    type_all(OPERATIONS, &prepared)
}

#[test]
fn the_demo_works() -> Result<()> {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_demo"));
    let output = output_within(&mut demo, 3 * LONG)?;
    let text = String::from_utf8(output.stdout)?;
    let errors = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{text}\n{errors}");
    for shown in [
        "$ portfwd doctor\nnothing is wrong that portfwd can see",
        "works: both ways are open, and the target has answered before",
        "Everything worked and is taken down again",
    ] {
        ensure!(
            text.contains(shown),
            "the demo does not show {shown:?}:\n{text}"
        );
    }
    Ok(())
}
