//! The daemon as a service: what it tells the service manager, and the privileges that its unit leaves it.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use portfwd_tests::address::CLIENT;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::{Family, LabOptions, tcp, udp, unit};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen, rule_name};

/// The service manager's end of the line.
struct Manager {
    socket: UnixDatagram,
    _directory: tempfile::TempDir,
}

impl Manager {
    /// What `WatchdogSec=` of a unit becomes.
    const WATCHDOG: Duration = Duration::from_millis(200);

    /// Listens, and has `options` tell the daemon so.
    fn listen(options: &mut DaemonOptions) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        options.environment = vec![
            ("NOTIFY_SOCKET".into(), path.display().to_string()),
            (
                "WATCHDOG_USEC".into(),
                Self::WATCHDOG.as_micros().to_string(),
            ),
        ];
        Ok(Self {
            socket,
            _directory: directory,
        })
    }

    /// The next message.
    fn next(&self) -> Result<String> {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).context("no message came")?;
        Ok(String::from_utf8(message[..length].to_vec())?)
    }

    /// Reads until a message says `word`.
    fn wait_for(&self, word: &str) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let message = self.next()?;
            if message.lines().any(|line| line == word) {
                return Ok(message);
            }
        }
        bail!("{word} never came")
    }

    /// Whether anything comes while the watchdog has patience twenty times over.
    fn hears_nothing(&self) -> Result<bool> {
        // What was sent before.
        self.socket.set_nonblocking(true)?;
        while self.next().is_ok() {}
        self.socket.set_nonblocking(false)?;
        self.socket.set_read_timeout(Some(20 * Self::WATCHDOG))?;
        let silence = self.next().is_err();
        self.socket
            .set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(silence)
    }
}

#[test]
fn the_service_manager_is_told_of_readiness_life_and_end() -> Result<()> {
    let mut options = DaemonOptions::new(Mode::Tc);
    let manager = Manager::listen(&mut options)?;
    let mut scene = Scene::with(LabOptions::default(), options)?;
    let first = manager.next()?;
    ensure!(
        first.contains("READY=1") && first.contains("STATUS=wan wan0 tc"),
        "{first:?}"
    );
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1")?;
    }
    // The word comes from the event loop itself: when that stands still, so does the word.
    scene.daemon.signal(Signal::SIGSTOP)?;
    ensure!(
        manager.hears_nothing()?,
        "a stopped daemon is said to be alive"
    );
    scene.daemon.signal(Signal::SIGCONT)?;
    manager.wait_for("WATCHDOG=1")?;
    scene.daemon.stop()?;
    manager.wait_for("STOPPING=1")?;
    Ok(())
}

/// A daemon with the capabilities that its unit leaves it, and no others.
fn confined(mode: Mode) -> Result<DaemonOptions> {
    Ok(DaemonOptions {
        capabilities: Some(unit::capabilities()?),
        ..DaemonOptions::new(mode)
    })
}

/// What the daemon's process may do now, `CapPrm` of its status.
fn permitted(scene: &Scene) -> Result<u64> {
    let pid = scene.daemon.pid().context("the daemon runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    Ok(u64::from_str_radix(line.context("no CapPrm")?.trim(), 16)?)
}

/// Numbers of capabilities(7).
const NET_ADMIN: u64 = 1 << 12;
const SYS_PTRACE: u64 = 1 << 19;
const BPF: u64 = 1 << 39;

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn the_units_capabilities_are_enough_to_start_to_forward_and_to_start_again(
    #[case] mode: Mode,
) -> Result<()> {
    let mut scene = Scene::with(LabOptions::for_mode(mode), confined(mode)?)?;
    scene.forward("both")?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V6, TARGET)?;
    let _udp = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V6))?;
    tcp::exchange(&mut stream, b"confined")?;
    assert_eq!(permitted(&scene)?, NET_ADMIN | BPF);
    scene.daemon.kill9()?;
    scene.daemon.start()?;
    tcp::exchange(&mut stream, b"and again")?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"new flows too")?;
    assert_eq!(scene.daemon.rule(rule_name(Family::V6))?.flows, 1);
    // An interface that comes back is attached with what is left.
    scene.lab.gateway.ip("link set wan0 down")?;
    scene.lab.gateway.ip("link set wan0 up")?;
    scene.daemon.ok(&["remove", rule_name(Family::V4)])?;
    scene.daemon.stop()
}

#[test]
fn a_daemon_that_was_given_everything_keeps_little() -> Result<()> {
    let scene = Scene::new(Mode::Tc)?;
    let left = permitted(&scene)?;
    ensure!(
        left & !SYS_PTRACE == NET_ADMIN | BPF,
        "the daemon may still do {left:x}"
    );
    Ok(())
}

#[rstest]
#[case::bpf("bpf", "CAP_BPF")]
#[case::net_admin("net_admin", "CAP_NET_ADMIN")]
#[case::perfmon("perfmon", "CAP_PERFMON")]
fn a_capability_that_is_missing_is_named(#[case] without: &str, #[case] name: &str) -> Result<()> {
    let mut options = confined(Mode::Tc)?;
    let all = options.capabilities.take().unwrap_or_default();
    options.capabilities = Some(all.into_iter().filter(|has| has != without).collect());
    let lab = LabOptions::default().build()?;
    let Err(error) = options.start(&lab.gateway) else {
        bail!("the daemon started without {name}");
    };
    let error = format!("{error:#}");
    ensure!(
        error.contains(&format!("the daemon lacks {name} (")) && !error.contains('\n'),
        "{error}"
    );
    // Exit code 4.
    ensure!(error.contains("exit status: 4"), "{error}");
    Ok(())
}

#[test]
fn the_log_does_not_tell_who_the_clients_are() -> Result<()> {
    let scene = Scene::forwarding(Mode::Tc, "both")?;
    let _tcp = tcp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let _udp = udp::Echo::start(&scene.lab.server, Family::V6, TARGET)?;
    let mut stream = tcp::connect(&scene.lab.client, listen(Family::V4))?;
    tcp::exchange(&mut stream, b"a secret over TCP")?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V6))?;
    udp::exchange(&socket, b"a secret over UDP")?;
    let flows = scene.daemon.flows()?;
    ensure!(flows.len() == 2, "{flows:?}");
    scene.daemon.ok(&["counters"])?;
    scene.daemon.ok(&["remove", rule_name(Family::V4)])?;
    let log = scene.daemon.log()?;
    ensure!(log.contains("removed"), "there is a log: {log}");
    for secret in [
        CLIENT.of(Family::V4).to_string(),
        CLIENT.of(Family::V6).to_string(),
        "a secret".to_string(),
    ] {
        ensure!(!log.contains(&secret), "the log tells {secret:?}: {log}");
    }
    Ok(())
}
