//! `portfwd doctor`: silence on a healthy gateway, and every fault by its name.

use std::any::Any;
use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::{DaemonOptions, Mode, binary};
use portfwd_tests::deadline::{PATIENCE, wait_for};
use portfwd_tests::foreign_xdp::ForeignXdp;
use portfwd_tests::process::output_within;
use portfwd_tests::{Family, Lab, LabOptions, nftables, tcp, udp};
use serde_json::Value;

use crate::scene::{LISTEN, Scene};

/// A gateway as it should be: a public address beside the lab's own, and a way to the internet.
fn healthy(mode: Mode) -> Result<Scene> {
    let scene = Scene::forwarding(mode, "tcp")?;
    make_public(&scene.lab)?;
    Ok(scene)
}

fn make_public(lab: &Lab) -> Result<()> {
    lab.gateway.ip("addr add 203.0.113.1/24 dev wan0\n\
                    route add default dev wan0\n\
                    route add ::/0 dev wan0\n")
}

/// The names of what `doctor` finds.
fn names(output: &Output) -> Result<BTreeSet<String>> {
    let diagnosis: Value = serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "JSON of doctor: {}",
            String::from_utf8_lossy(&output.stderr)
        )
    })?;
    let findings = diagnosis["findings"].as_array().context("no findings")?;
    let errors = findings
        .iter()
        .filter(|finding| finding["severity"] == "error")
        .count();
    // The exit code says whether anything is an error.
    ensure!(
        output.status.code() == Some(i32::from(errors > 0)),
        "{} with {errors} errors",
        output.status
    );
    for finding in findings {
        for key in ["id", "subject", "cause", "fix"] {
            let text = finding[key].as_str().unwrap_or_default();
            ensure!(
                !text.is_empty() && !text.contains('\n'),
                "{key} of {finding}"
            );
        }
    }
    findings
        .iter()
        .map(|finding| Ok(finding["id"].as_str().context("no id")?.to_owned()))
        .collect()
}

/// Waits until `doctor` finds exactly this: the daemon follows the network a moment later.
fn expect(scene: &Scene, expected: &[&str], after: &str) -> Result<()> {
    let mut found = BTreeSet::new();
    let wanted: BTreeSet<_> = expected.iter().map(|id| (*id).to_owned()).collect();
    wait_for("doctor to find it", PATIENCE, || {
        found = names(&scene.daemon.cli(&["--json", "doctor"])?)?;
        Ok((found == wanted).then_some(()))
    })
    .with_context(|| format!("{after}: {expected:?} expected, {found:?} found"))
}

/// What keeps a fault in place.
type Held = Box<dyn Any>;

/// A fault: what is to be found, how it is made, and how it goes.
struct Fault {
    names: &'static [&'static str],
    make: fn(&Scene) -> Result<Held>,
    mend: fn(&Scene) -> Result<()>,
}

fn made(result: Result<()>) -> Result<Held> {
    result.map(|()| Box::new(()) as Held)
}

macro_rules! faults {
    ($($names:expr, |$make:ident| $how:expr, |$mend:ident| $back:expr;)+) => {
        [$(Fault { names: &$names, make: |$make| made($how), mend: |$mend| $back },)+]
    };
}

fn run_all(scene: &Scene, faults: &[Fault]) -> Result<()> {
    expect(scene, &[], "at first")?;
    for fault in faults {
        let held = (fault.make)(scene).with_context(|| format!("make {:?}", fault.names))?;
        expect(scene, fault.names, "made")?;
        drop(held);
        (fault.mend)(scene).with_context(|| format!("mend {:?}", fault.names))?;
        expect(scene, &[], &format!("{:?} mended", fault.names))?;
    }
    Ok(())
}

#[test]
fn faults_of_the_kernels_settings_and_routes_are_named() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    let faults = faults![
        ["ipv4-forwarding-off"],
            |s| s.lab.gateway.sysctl("net/ipv4/ip_forward", "0"),
            |s| s.lab.gateway.sysctl("net/ipv4/ip_forward", "1");
        ["ipv6-forwarding-off"],
            |s| s.lab.gateway.sysctl("net/ipv6/conf/all/forwarding", "0"),
            |s| s.lab.gateway.sysctl("net/ipv6/conf/all/forwarding", "1");
        ["ipv4-forwarding-off-for-interface"],
            |s| s.lab.gateway.sysctl("net/ipv4/conf/wan0/forwarding", "0"),
            |s| s.lab.gateway.sysctl("net/ipv4/conf/wan0/forwarding", "1");
        ["ipv6-forwarding-off-for-interface"],
            |s| s.lab.gateway.sysctl("net/ipv6/conf/lan0/forwarding", "0"),
            |s| s.lab.gateway.sysctl("net/ipv6/conf/lan0/forwarding", "1");
        ["no-route-to-clients"],
            |s| s.lab.gateway.ip("route del default\n"),
            |s| s.lab.gateway.ip("route add default dev wan0\n");
        ["clients-not-behind-wan"],
            |s| s.lab.gateway.ip("route replace default dev lan0\n"),
            |s| s.lab.gateway.ip("route replace default dev wan0\n");
        ["clients-not-behind-wan", "reverse-path-strict"],
            |s| {
                s.lab.gateway.sysctl("net/ipv4/conf/wan0/rp_filter", "1")?;
                s.lab.gateway.ip("route replace default dev lan0\n")
            },
            |s| {
                s.lab.gateway.sysctl("net/ipv4/conf/wan0/rp_filter", "0")?;
                s.lab.gateway.ip("route replace default dev wan0\n")
            };
        ["router-advertisements-ignored"],
            |s| s.lab.gateway.ip("route del ::/0\nroute add ::/0 dev wan0 proto ra\n"),
            |s| s.lab.gateway.ip("route del ::/0\nroute add ::/0 dev wan0\n");
        ["lan-mtu-smaller"],
            |s| s.lab.gateway.ip("link set lan0 mtu 1400\n"),
            |s| s.lab.gateway.ip("link set lan0 mtu 1500\n");
        ["port-of-a-bridge"],
            |s| s.lab.gateway.ip("link add br9 type bridge\nlink set lan0 master br9\n"),
            |s| s.lab.gateway.ip("link set lan0 nomaster\nlink del br9\n");
        ["interface-no-carrier"],
            |s| s.lab.server.ip("link set s0 down\n"),
            |s| s.lab.server.ip("link set s0 up\n");
    ];
    run_all(&scene, &faults)
}

#[test]
fn faults_of_addresses_and_targets_are_named() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    fn put(scene: &Scene, listen: &str, target: &str) -> Result<()> {
        scene.daemon.add("faulty", "tcp", listen, target)
    }
    fn take(scene: &Scene) -> Result<()> {
        scene.daemon.ok(&["remove", "faulty"]).map(drop)
    }
    let faults = faults![
        ["wan-address-private"],
            |s| s.lab.gateway.ip("addr del 203.0.113.1/24 dev wan0\n"),
            |s| s.lab.gateway.ip("addr add 203.0.113.1/24 dev wan0\n");
        ["wan-address-shared"],
            |s| s.lab.gateway.ip("addr add 100.64.0.1/10 dev wan0\n\
                                  addr del 203.0.113.1/24 dev wan0\n\
                                  addr del 10.1.0.1/24 dev wan0\n"),
            |s| s.lab.gateway.ip("addr add 203.0.113.1/24 dev wan0\n\
                                  addr add 10.1.0.1/24 dev wan0\n\
                                  addr del 100.64.0.1/10 dev wan0\n");
        ["wan-without-address"],
            |s| s.lab.gateway.ip("addr del 2001:db8:1::1/64 dev wan0\n"),
            |s| s.lab.gateway.ip("addr add 2001:db8:1::1/64 dev wan0 nodad\n");
        ["listen-address-missing"],
            |s| put(s, "203.0.113.77:81", "10.2.0.2"), |s| take(s);
        ["target-unreachable"],
            |s| {
                s.lab.gateway.ip("route add unreachable 10.99.0.9\n")?;
                put(s, "81", "10.99.0.9")
            },
            |s| {
                s.lab.gateway.ip("route del unreachable 10.99.0.9\n")?;
                take(s)
            };
        ["target-behind-wan"],
            |s| put(s, "81", "10.99.0.9"), |s| take(s);
        ["target-is-gateway"],
            |s| put(s, "81", "10.2.0.1"), |s| take(s);
        // A network that comes after the rule.
        ["target-is-gateway"],
            |s| {
                put(s, "81", "10.99.0.255")?;
                s.lab.gateway.ip("addr add 10.99.0.1/24 dev lan0\n")
            },
            |s| {
                take(s)?;
                s.lab.gateway.ip("addr del 10.99.0.1/24 dev lan0\n")
            };
        ["target-not-attached"],
            |s| {
                s.lab.gateway.ip("link add br9 type bridge\naddr add 10.9.0.1/24 dev br9\nlink set br9 up\n")?;
                put(s, "81", "10.9.0.9")
            },
            |s| {
                take(s)?;
                s.lab.gateway.ip("link del br9\n")
            };
        ["target-silent"],
            |s| {
                put(s, "81", "10.2.0.77")?;
                s.lab.gateway.ip("neigh replace 10.2.0.77 dev lan0 nud failed\n")
            },
            |s| {
                s.lab.gateway.ip("neigh del 10.2.0.77 dev lan0\n")?;
                take(s)
            };
        ["own-connections"],
            |s| put(s, "40000", "10.2.0.2"), |s| take(s);
    ];
    run_all(&scene, &faults)?;
    // What is not enabled needs no way to its target yet.
    scene
        .daemon
        .ok(&["add", "tcp", "81", "10.99.0.9", "--disabled"])?;
    expect(&scene, &[], "a rule that is not enabled")
}

#[test]
fn a_target_that_never_answers_is_named() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    scene.daemon.add("mute", "udp", "81", "10.2.0.2")?;
    let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(Family::V4, 81))?;
    for _ in 0..3 {
        // The server answers with ICMP errors, which the next call reports.
        while socket.send(b"anybody there?").is_err() {}
    }
    expect(&scene, &["no-replies"], "three packets without answer")
}

#[test]
fn faults_of_the_firewall_are_named() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    fn chain(scene: &Scene, ruleset: &str) -> Result<()> {
        nftables::load(&scene.lab.gateway, ruleset)
    }
    fn flush(scene: &Scene) -> Result<()> {
        nftables::load(&scene.lab.gateway, "flush ruleset")
    }
    // What most gateways have, and what does no harm.
    chain(
        &scene,
        "table inet filter {
           chain input { type filter hook input priority filter; policy drop;
             iif lo accept; ct state vmap { established : accept, related : accept, invalid : drop }
             iifname lan0 accept; meta l4proto { icmp, ipv6-icmp } accept; tcp dport 22 accept; }
           chain forward { type filter hook forward priority filter; policy drop;
             ct state established,related accept; iifname lan0 oifname wan0 accept; ct status dnat accept; }
         }
         table ip nat { chain post { type nat hook postrouting priority srcnat;
           oifname wan0 masquerade; }
}",
    )?;
    expect(&scene, &[], "a usual firewall")?;
    flush(&scene)?;
    let faults = faults![
        ["firewall-drops-forwarded"],
            |s| chain(s, "table netdev t { chain c { type filter hook egress device lan0 priority 0;
                          ip daddr 10.2.0.2 drop; }
}"),
            |s| flush(s);
        ["firewall-bypassed"],
            |s| chain(s, "table ip t { chain c { type filter hook forward priority 0;
                          ip daddr 10.2.0.0/24 tcp dport { 22, 80 } drop; }
}"),
            |s| flush(s);
        ["firewall-drops-large"],
            |s| {
                s.lab.gateway.ip("route add 10.2.0.2 dev lan0 mtu 1400\n")?;
                chain(s, "table inet t { chain c { type filter hook forward priority 0; policy drop; }
    }")
            },
            |s| {
                s.lab.gateway.ip("route del 10.2.0.2 dev lan0\n")?;
                flush(s)
            };
        ["translation-shadowed"],
            |s| chain(s, "table ip t { chain c { type nat hook prerouting priority dstnat;
                          iifname wan0 tcp dport 8000-8100 dnat to 10.2.0.9:80; }
}"),
            |s| flush(s);
        ["masquerade-on-listen-port"],
            |s| chain(s, "table ip t { chain c { type nat hook postrouting priority srcnat;
                          oifname wan0 ip protocol tcp masquerade to :1024-65535; }
}"),
            |s| flush(s);
    ];
    run_all(&scene, &faults)
}

#[test]
fn others_on_the_same_ports_and_interfaces_are_named() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    expect(&scene, &[], "at first")?;
    let service = tcp::Echo::start(&scene.lab.gateway, Family::V4, LISTEN)?;
    expect(
        &scene,
        &["local-service"],
        "an own service on the listen port",
    )?;
    drop(service);
    let program = ForeignXdp::attach(scene.lab.wan_end())?;
    expect(&scene, &["foreign-xdp"], "a foreign XDP program")?;
    drop(program);
    expect(&scene, &[], "both gone")
}

#[test]
fn faults_of_the_instance_are_named() -> Result<()> {
    let mut scene = healthy(Mode::Tc)?;
    expect(&scene, &[], "at first")?;
    let other = scene.daemon.pins().join("v0");
    fs::create_dir(&other)?;
    expect(
        &scene,
        &["pins-of-another-version"],
        "another layout is pinned",
    )?;
    fs::remove_dir(&other)?;

    scene.daemon.kill9()?;
    expect(&scene, &["daemon-not-running"], "the daemon killed")?;
    scene
        .lab
        .gateway
        .ip("link set lan0 address 02:00:00:00:00:77\n")?;
    expect(
        &scene,
        &["daemon-not-running", "interface-stale"],
        "a new MAC address without daemon",
    )?;
    scene.lab.gateway.ip("addr add 203.0.113.9/24 dev wan0\n")?;
    expect(
        &scene,
        &["daemon-not-running", "interface-stale", "address-unknown"],
        "a new address without daemon",
    )?;
    scene.daemon.start()?;
    expect(&scene, &[], "the daemon started again")?;

    scene.take_off("wan0")?;
    expect(&scene, &["detached"], "a link removed")?;
    scene.daemon.stop()?;
    scene.daemon.start()?;
    expect(&scene, &[], "attached again")?;

    scene.daemon.kill9()?;
    scene.rename("lan0", "lan9")?;
    expect(
        &scene,
        &[
            "daemon-not-running",
            "interface-gone",
            "target-not-attached",
        ],
        "an interface has another name",
    )?;
    scene.rename("lan9", "lan0")
}

#[test]
fn a_full_table_is_named_before_and_when_it_is_full() -> Result<()> {
    let options = DaemonOptions {
        max_flows: Some(10),
        ..DaemonOptions::new(Mode::Tc)
    };
    let scene = Scene::with(LabOptions::for_mode(Mode::Tc), options)?;
    make_public(&scene.lab)?;
    scene.daemon.add("game", "udp", "7000", "10.2.0.2:7000")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 7000)?;
    let open = || -> Result<_> {
        let socket = udp::connect(&scene.lab.client, GATEWAY_WAN.endpoint(Family::V4, 7000))?;
        socket.send(b"hello")?;
        Ok(socket)
    };
    let _flows = (0..9).map(|_| open()).collect::<Result<Vec<_>>>()?;
    expect(&scene, &["table-nearly-full"], "nine of ten")?;
    let _more = (0..4).map(|_| open()).collect::<Result<Vec<_>>>()?;
    expect(&scene, &["table-full"], "more than ten")
}

#[test]
fn xdp_on_virtual_devices_is_named() -> Result<()> {
    let scene = healthy(Mode::Xdp)?;
    expect(&scene, &["xdp-on-virtual-device"], "native XDP on veth")
}

#[test]
fn a_machine_before_the_first_start_is_looked_at_too() -> Result<()> {
    let lab = Lab::for_mode(Mode::Tc)?;
    make_public(&lab)?;
    let doctor = |arguments: &[&str]| -> Result<BTreeSet<String>> {
        let mut command = Command::new(binary()?);
        command
            .args(["-n", lab.gateway.name(), "-j", "doctor"])
            .args(arguments);
        names(&output_within(&mut command, PATIENCE)?)
    };
    let only = |id: &str| BTreeSet::from([id.to_owned()]);
    assert_eq!(doctor(&[])?, only("not-started"));
    let sides = ["--wan", "wan0", "--lan", "lan0"];
    assert_eq!(doctor(&sides)?, only("not-started"));
    lab.gateway.ip("link set lan0 down\n")?;
    let mut expected = only("not-started");
    expected.insert("interface-down".to_owned());
    assert_eq!(doctor(&sides)?, expected);
    Ok(())
}

#[test]
fn what_the_caller_or_the_machine_lacks_is_named() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    let portfwd = binary()?;
    let instance = scene.lab.gateway.name();
    for (wrapper, expected) in [
        (
            "exec setpriv --bounding-set=-bpf,-sys_admin,-perfmon --inh-caps=-bpf,-sys_admin,-perfmon",
            "capability-missing",
        ),
        ("umount -l /sys/fs/bpf && exec", "bpffs-not-mounted"),
    ] {
        // In a mount namespace of its own: the machine keeps its BPF file system.
        let mut command = scene.lab.gateway.command("unshare")?;
        command.args([
            "--mount",
            "sh",
            "-c",
            &format!(
                "{wrapper} {} --instance {instance} -j doctor",
                portfwd.display()
            ),
        ]);
        let found = names(&output_within(&mut command, PATIENCE)?)?;
        assert!(found.contains(expected), "{expected}: {found:?}");
    }
    Ok(())
}

#[test]
fn a_finding_says_what_is_wrong_and_what_to_type() -> Result<()> {
    let scene = healthy(Mode::Tc)?;
    let silent = scene.daemon.cli(&["doctor"])?;
    assert_eq!(
        (
            silent.status.code(),
            String::from_utf8(silent.stdout)?.as_str()
        ),
        (Some(0), "nothing is wrong that portfwd can see\n")
    );
    scene.lab.gateway.sysctl("net/ipv4/ip_forward", "0")?;
    let output = scene.daemon.cli(&["doctor"])?;
    let text = String::from_utf8(output.stdout)?;
    let command = format!(
        "ip netns exec {} sysctl -w net.ipv4.ip_forward=1",
        scene.lab.gateway.name()
    );
    assert_eq!(
        text,
        format!(
            "error ipv4-forwarding-off: net.ipv4.ip_forward\n  \
             it is 0: the kernel gives no route to portfwd and forwards nothing itself\n  # {command}\n"
        )
    );
    assert_eq!(
        String::from_utf8(output.stderr)?,
        "portfwd: 1 error was found\n"
    );
    // The command does what it is said to do.
    let words: Vec<_> = command.split(' ').collect();
    portfwd_tests::process::run(Command::new(words[0]).args(&words[1..]))?;
    expect(&scene, &[], "the command typed")
}
