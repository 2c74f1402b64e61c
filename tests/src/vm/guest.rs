//! What is typed in the machine.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{CARDS, Card, Vm};
use crate::address::{CLIENT, DualStack, GATEWAY_LAN, GATEWAY_WAN, SERVER};
use crate::daemon::{Mode, Rule, START, binary};
use crate::deadline::PATIENCE;
use crate::snmp::{self, Counters};

/// How an interface is attached, in `portfwd status`.
#[derive(Clone, Debug, serde::Deserialize, PartialEq, Eq)]
pub struct Attached {
    /// Its name.
    pub name: String,
    /// The mode's word.
    pub mode: String,
    /// Why this mode.
    pub reason: String,
}

impl Vm {
    /// Runs a line in the machine's shell, which must succeed, and returns what it wrote.
    pub fn shell(&mut self, line: &str) -> Result<String> {
        self.console.run(line, PATIENCE)
    }

    /// The cards get their names and addresses, and the kernel forwards.
    pub(super) fn set_up_cards(&mut self) -> Result<()> {
        self.shell("modprobe virtio_net")?;
        for Card { name, mac, .. } in CARDS {
            self.shell(&format!(
                "for card in /sys/class/net/*; do [ \"$(cat $card/address)\" != {mac} ] || ip link set ${{card##*/}} name {name}; done"
            ))?;
        }
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
        ] {
            self.shell(&format!("echo {value} > /proc/sys/net/{key}"))?;
        }
        for (card, DualStack { v4, v6 }) in [("wan0", GATEWAY_WAN), ("lan0", GATEWAY_LAN)] {
            self.shell(&format!(
                "ip link set {card} up && ip addr add {v4}/24 dev {card} && ip addr add {v6}/64 dev {card} nodad"
            ))?;
        }
        // A gateway as it should be: doctor would rightly say of the lab's own that the internet cannot reach it.
        self.shell(
            "ip addr add 203.0.113.1/24 dev wan0 && ip route add default dev wan0 && ip -6 route add default dev wan0",
        )?;
        Ok(())
    }

    /// Starts `portfwd run` with the cards as WAN and LAN, each in a mode, and waits until it is ready.
    ///
    /// # Errors
    /// When it ends, with what it said.
    pub fn start_portfwd(&mut self, wan: Mode, lan: Mode) -> Result<()> {
        let (portfwd, wan, lan) = (quoted_binary()?, wan.word(), lan.word());
        self.shell(&format!(
            "{{ setsid {portfwd} run --wan wan0={wan} --lan lan0={lan} > /run/portfwd.log 2>&1 & }}; echo $! > /run/portfwd.pid"
        ))?;
        self.console.run(
            &format!(
                "until {portfwd} status > /run/status 2>&1; do kill -0 $(cat /run/portfwd.pid) 2> /run/gone || {{ cat /run/portfwd.log; exit 1; }}; sleep 0.1; done"
            ),
            START,
        )?;
        Ok(())
    }

    /// Ends portfwd, takes off what it attached and forgets its rules.
    pub fn stop_portfwd(&mut self) -> Result<()> {
        let portfwd = quoted_binary()?;
        self.shell(
            "kill $(cat /run/portfwd.pid) && while kill -0 $(cat /run/portfwd.pid) 2> /run/gone; do sleep 0.1; done",
        )?;
        self.shell(&format!("{portfwd} detach && rm -rf /var/lib/portfwd"))?;
        Ok(())
    }

    /// Runs `portfwd ARGUMENTS`, which must succeed, and returns what it wrote.
    pub fn portfwd(&mut self, arguments: &[&str]) -> Result<String> {
        let words: Vec<_> = arguments.iter().map(|word| format!("'{word}'")).collect();
        self.shell(&format!("{} {}", quoted_binary()?, words.join(" ")))
    }

    /// What `portfwd --json ARGUMENTS` says.
    pub fn json<T: DeserializeOwned>(&mut self, arguments: &[&str]) -> Result<T> {
        let text = self.portfwd(&[&["--json"], arguments].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("JSON of portfwd {}: {text}", arguments.join(" ")))
    }

    /// The lines of `portfwd rules`.
    pub fn rules(&mut self) -> Result<Vec<Rule>> {
        self.json(&["rules"])
    }

    /// How the interfaces are attached.
    pub fn attached(&mut self) -> Result<Vec<Attached>> {
        let status: Value = self.json(&["status"])?;
        Ok(serde_json::from_value(status["interfaces"].clone())?)
    }

    /// What `portfwd doctor` finds wrong.
    pub fn findings(&mut self) -> Result<Vec<String>> {
        // It fails when it finds an error, and says so.
        let line = format!(
            "{} --json doctor 2> /run/doctor.log || true",
            quoted_binary()?
        );
        let text = self.shell(&line)?;
        let diagnosis: Value =
            serde_json::from_str(&text).with_context(|| format!("JSON of doctor: {text}"))?;
        let findings = diagnosis["findings"].as_array().context("no findings")?;
        let words = findings
            .iter()
            .map(|finding| format!("{}: {}", finding["id"], finding["cause"]));
        Ok(words.collect())
    }

    /// What the driver of a card counts, as `ethtool -S` shows it.
    pub fn driver_counters(&mut self, card: &str) -> Result<BTreeMap<String, u64>> {
        let text = self.shell(&format!("ethtool -S {card}"))?;
        let counters = text.lines().filter_map(|line| {
            let (name, value) = line.trim().split_once(": ")?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Ok(counters.collect())
    }

    /// Sum of what all queues of a card count under a name, such as `xdp_redirects`.
    ///
    /// # Errors
    /// When the driver does not count that.
    pub fn driver_sum(&mut self, card: &str, name: &str) -> Result<u64> {
        let counters = self.driver_counters(card)?;
        // Of a queue, "rx0_xdp_redirects" or "rx_queue_0_xdp_redirects"; there may be a sum of them, which is not to count too.
        let of_name = |counter: &&String| {
            let queue = counter
                .strip_suffix(name)
                .and_then(|rest| rest.strip_suffix('_'));
            queue.is_some_and(|queue| queue.ends_with(|c: char| c.is_ascii_digit()))
        };
        let names: Vec<_> = counters.keys().filter(of_name).collect();
        ensure!(
            !names.is_empty(),
            "the driver of {card} does not count {name}: {counters:?}"
        );
        Ok(names.iter().map(|name| counters[*name]).sum())
    }

    /// Packets that a card has handed to the machine's kernel, or to XDP.
    pub fn received(&mut self, card: &str) -> Result<u64> {
        let path = format!("/sys/class/net/{card}/statistics/rx_packets");
        Ok(self.shell(&format!("cat {path}"))?.trim().parse()?)
    }

    /// Sets the MTU of both cards, in bytes.
    pub fn set_mtu(&mut self, mtu: u32) -> Result<()> {
        for Card { name, .. } in CARDS {
            self.shell(&format!("ip link set {name} mtu {mtu}"))?;
        }
        Ok(())
    }

    /// The counters of the machine's kernel.
    pub fn snmp(&mut self) -> Result<Counters> {
        let [snmp, netstat, snmp6] =
            ["snmp", "netstat", "snmp6"].map(|file| self.shell(&format!("cat /proc/net/{file}")));
        snmp::parse(&snmp?, &netstat?, &snmp6?)
    }

    /// What the machine's kernel has logged about its network cards since it was booted.
    pub fn card_messages(&mut self) -> Result<Vec<String>> {
        let text = self.shell("dmesg | grep virtio_net || true")?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Waits until client and server answer the machine, and it knows where they are.
    pub fn meet_neighbours(&mut self) -> Result<()> {
        for address in [CLIENT, SERVER] {
            for address in [address.v4.to_string(), address.v6.to_string()] {
                self.console.run(
                    &format!("ping -n -c 1 -w 60 {address}"),
                    Duration::from_secs(60),
                )?;
            }
        }
        Ok(())
    }
}

fn quoted_binary() -> Result<String> {
    Ok(format!("\"{}\"", binary()?.display()))
}
