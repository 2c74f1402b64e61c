//! What client and server send to each other, and how much of it is counted where.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::{CLIENT, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::Rule;
use portfwd_tests::deadline::{PATIENCE, here, wait_for};
use portfwd_tests::nginx::Nginx;
use portfwd_tests::vm::Vm;
use portfwd_tests::{Family, curl, snmp, tcp, udp};

use crate::report::Report;

/// What the client dials, and where the server listens: the web, an echo of streams, an echo of datagrams.
const WEB: (u16, u16) = (8080, 80);
const STREAM: (u16, u16) = (7007, 7);
const DATAGRAM: (u16, u16) = (5353, 53);

/// Size of the file that is fetched, and of the stream that goes to the server and back at the same time, in bytes.
const FILE: usize = 8 << 20;
const BOTH_WAYS: usize = 4 << 20;
/// Datagrams over each family, of every size up to what a frame holds.
const DATAGRAMS: usize = 250;
const LARGEST_DATAGRAM: usize = 1452;

/// What carries the packets.
#[derive(Clone, Copy)]
pub(super) enum Carrier {
    /// Native XDP, all of them.
    Xdp,
    /// TC, all of them.
    Tc,
}

/// Sends everything, and has everything counted.
pub(super) fn run(vm: &mut Vm, report: &mut Report, carrier: Carrier) -> Result<()> {
    let mut ready = None;
    report.check("servers and rules", || {
        let servers = ready.insert(Servers::start(vm)?);
        add_rules(vm)?;
        servers.before = Some(Before::now(vm)?);
        Ok("ready".to_owned())
    })?;
    let Some(servers) = ready else {
        return Ok(());
    };
    let Some(before) = &servers.before else {
        return Ok(());
    };
    for family in Family::BOTH {
        report.check(&format!("TCP {family}, a file from the server"), || {
            servers.fetch(vm, family)
        })?;
        report.check(&format!("TCP {family}, both ways at once"), || {
            servers.send_both_ways(vm, family)
        })?;
        report.check(&format!("UDP {family}, an echo"), || {
            servers.echo_datagrams(vm, family)
        })?;
    }
    report.check("counted by rules", || before.expect_counted(vm))?;
    report.check("counted by the driver", || before.expect_by(vm, carrier))?;
    report.check("dropped by portfwd", || expect_no_drops(vm))?;
    report.check("found by doctor", || {
        let findings = vm.findings()?;
        ensure!(findings.is_empty(), "{}", findings.join(", "));
        Ok("nothing".to_owned())
    })?;
    report.check("malformed for any kernel", || {
        snmp::expect_no_malformed(&[&vm.client, &vm.server])?;
        snmp::expect_none_malformed_in(&vm.snmp()?, "the machine")?;
        Ok("nothing".to_owned())
    })?;
    Ok(())
}

/// What runs on the server.
struct Servers {
    content: Vec<u8>,
    nginx: Nginx,
    streams: [tcp::Echo; 2],
    datagrams: [udp::Echo; 2],
    before: Option<Before>,
}

impl Servers {
    fn start(vm: &Vm) -> Result<Self> {
        let content = curl::varied_content(FILE);
        Ok(Self {
            nginx: Nginx::start(&vm.server, WEB.1, &[("file", &content)])?,
            streams: [
                tcp::Echo::start(&vm.server, Family::V4, STREAM.1)?,
                tcp::Echo::start(&vm.server, Family::V6, STREAM.1)?,
            ],
            datagrams: [
                udp::Echo::start(&vm.server, Family::V4, DATAGRAM.1)?,
                udp::Echo::start(&vm.server, Family::V6, DATAGRAM.1)?,
            ],
            content,
            before: None,
        })
    }

    fn fetch(&self, vm: &Vm, family: Family) -> Result<String> {
        let url = curl::url(GATEWAY_WAN.endpoint(family, WEB.0), "file");
        let start = Instant::now();
        let arrived = curl::fetch_sha256(&vm.client, &url, here(PATIENCE))?;
        let rate = rate(self.content.len(), start);
        ensure!(
            arrived == curl::sha256(&self.content)?,
            "the file arrived damaged"
        );
        let client = CLIENT.of(family).to_string();
        self.nginx
            .wait_for_access(|access| access.client == client)
            .context("nginx did not see the client's address")?;
        Ok(format!("{} MiB unchanged, {rate}", FILE >> 20))
    }

    fn send_both_ways(&self, vm: &Vm, family: Family) -> Result<String> {
        let content = &self.content[..BOTH_WAYS];
        let endpoint = GATEWAY_WAN.endpoint(family, STREAM.0);
        let start = Instant::now();
        let mut stream = tcp::connect(&vm.client, endpoint)?;
        let local = stream.local_addr()?;
        let mut sender = stream.try_clone()?;
        let back = std::thread::scope(|scope| -> Result<Vec<u8>> {
            let sending = scope.spawn(move || sender.write_all(content));
            let mut back = vec![0; BOTH_WAYS];
            let received = stream.read_exact(&mut back);
            let sent = sending.join().ok().context("the sender panicked")?;
            sent.context("send")?;
            received.context("receive the echo")?;
            Ok(back)
        })?;
        let rate = rate(BOTH_WAYS, start);
        ensure!(back == content, "what came back is not what was sent");
        let seen = self.streams[index(family)].peers();
        ensure!(
            seen.contains(&local),
            "the server saw {seen:?}, not {local}"
        );
        Ok(format!("{} MiB unchanged, {rate}", BOTH_WAYS >> 20))
    }

    fn echo_datagrams(&self, vm: &Vm, family: Family) -> Result<String> {
        let endpoint = GATEWAY_WAN.endpoint(family, DATAGRAM.0);
        // Connected: what comes from elsewhere than the endpoint that was dialled is not received.
        let socket = udp::connect(&vm.client, endpoint)?;
        for number in 1..=DATAGRAMS {
            let length = number * LARGEST_DATAGRAM / DATAGRAMS;
            udp::exchange(&socket, &self.content[number..number + length])
                .with_context(|| format!("datagram {number}, of {length} bytes"))?;
        }
        let local = std::net::SocketAddr::new(CLIENT.of(family), socket.local_addr()?.port());
        let seen = self.datagrams[index(family)].peers();
        ensure!(
            seen.contains(&local),
            "the server saw {seen:?}, not {local}"
        );
        Ok(format!("{DATAGRAMS} of {DATAGRAMS} came back"))
    }
}

fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

fn rate(bytes: usize, since: Instant) -> String {
    let megabits = bytes as f64 * 8e-6 / since.elapsed().as_secs_f64();
    format!("{megabits:.0} Mbit/s")
}

fn add_rules(vm: &mut Vm) -> Result<()> {
    for (name, proto, (listen, target)) in [
        ("web", "tcp", WEB),
        ("stream", "tcp", STREAM),
        ("datagram", "udp", DATAGRAM),
    ] {
        for family in Family::BOTH {
            vm.portfwd(&[
                "add",
                proto,
                &listen.to_string(),
                &SERVER.endpoint(family, target).to_string(),
                "--name",
                &format!("{name}-{}", index(family)),
            ])?;
        }
    }
    Ok(())
}

fn expect_no_drops(vm: &mut Vm) -> Result<String> {
    let counters: serde_json::Value = vm.json(&["counters"])?;
    let group = |name: &str| -> Result<BTreeMap<String, u64>> {
        let mut reasons: BTreeMap<String, u64> = serde_json::from_value(counters[name].clone())?;
        reasons.retain(|_, count| *count > 0);
        Ok(reasons)
    };
    let drops = group("drops")?;
    ensure!(drops.is_empty(), "{drops:?}");
    Ok(format!(
        "nothing; left to the kernel: {:?}; events: {:?}",
        group("passes")?,
        group("events")?
    ))
}

/// What was counted before the traffic.
struct Before {
    /// TCP segments that client and server had sent.
    segments: (u64, u64),
    /// Packets that XDP had redirected from WAN and LAN.
    redirected: (u64, u64),
    /// Packets that XDP could not send, on WAN and LAN together.
    lost: u64,
    /// Packets that the WAN card had received.
    received: u64,
}

/// Packets of all rules of a protocol, to the target and to the client.
fn packets(rules: &[Rule], proto: &str) -> (u64, u64) {
    rules
        .iter()
        .filter(|rule| rule.proto == proto)
        .fold((0, 0), |(to_target, to_client), rule| {
            (
                to_target + rule.to_target.packets,
                to_client + rule.to_client.packets,
            )
        })
}

impl Before {
    fn now(vm: &mut Vm) -> Result<Self> {
        Ok(Self {
            segments: (
                snmp::tcp_segments_sent(&vm.client)?,
                snmp::tcp_segments_sent(&vm.server)?,
            ),
            redirected: (
                vm.driver_sum("wan0", "xdp_redirects")?,
                vm.driver_sum("lan0", "xdp_redirects")?,
            ),
            lost: vm.driver_sum("wan0", "xdp_tx_drops")? + vm.driver_sum("lan0", "xdp_tx_drops")?,
            received: vm.received("wan0")?,
        })
    }

    /// Rules have counted every datagram, and every segment that the two kernels have sent.
    fn expect_counted(&self, vm: &mut Vm) -> Result<String> {
        let datagrams = packets(&vm.rules()?, "udp");
        let expected = 2 * DATAGRAMS as u64;
        ensure!(
            datagrams == (expected, expected),
            "{datagrams:?} datagrams there and back, of {expected} each"
        );
        let mut last = None;
        // The last segments of connections that are closed may be on their way.
        let segments = wait_for("the rules' counts", PATIENCE, || {
            let sent = (
                snmp::tcp_segments_sent(&vm.client)? - self.segments.0,
                snmp::tcp_segments_sent(&vm.server)? - self.segments.1,
            );
            let counted = packets(&vm.rules()?, "tcp");
            last = Some((sent, counted));
            Ok((counted == sent).then_some(counted))
        })
        .with_context(|| format!("segments sent by client and server, and counted: {last:?}"))?;
        Ok(format!(
            "{expected} datagrams and {} segments there, {expected} and {} back, as sent",
            segments.0, segments.1
        ))
    }

    /// The driver has counted every packet that the rules have as redirected by XDP, or none.
    fn expect_by(&self, vm: &mut Vm, carrier: Carrier) -> Result<String> {
        let now = Self::now(vm)?;
        let rules = vm.rules()?;
        let (tcp, udp) = (packets(&rules, "tcp"), packets(&rules, "udp"));
        let counted = (tcp.0 + udp.0, tcp.1 + udp.1);
        let redirected = (
            now.redirected.0 - self.redirected.0,
            now.redirected.1 - self.redirected.1,
        );
        match carrier {
            Carrier::Xdp => {
                ensure!(
                    redirected == counted,
                    "XDP redirected {redirected:?}, the rules counted {counted:?}"
                );
                Ok(format!(
                    "{} and {} packets redirected by XDP, all of them; {} could not be sent",
                    redirected.0,
                    redirected.1,
                    now.lost - self.lost
                ))
            }
            Carrier::Tc => {
                ensure!(redirected == (0, 0), "XDP redirected {redirected:?}");
                Ok(format!(
                    "none by XDP; {} packets to the server came in as {}",
                    counted.0,
                    now.received - self.received
                ))
            }
        }
    }
}
