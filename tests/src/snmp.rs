//! The kernel's own counters of a namespace, as in `/proc/net/snmp`.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;

/// Counters by name, such as `Tcp.InCsumErrors`, `Udp6InErrors` or `TcpExt.TCPRcvCollapsed`.
pub type Counters = BTreeMap<String, u64>;

/// Counters that stay at 0 when every packet that arrives is well made.
const MALFORMED: [&str; 8] = [
    "IpExt.InTruncatedPkts",
    "IpExt.InCsumErrors",
    "Tcp.InCsumErrors",
    "Udp.InCsumErrors",
    "Icmp.InCsumErrors",
    "IpExt.InTruncatedPkts",
    "Udp6InCsumErrors",
    "Icmp6InCsumErrors",
];

/// Counters of bad headers, each with the counter of packets that only were at the end of their
/// life: the kernel counts those as bad headers too.
const BAD_HEADERS: [(&str, &str); 2] = [
    ("Ip.InHdrErrors", "Icmp.OutTimeExcds"),
    ("Ip6InHdrErrors", "Icmp6OutTimeExcds"),
];

/// Reads `snmp`, `netstat` and `snmp6` of a namespace.
pub fn read(namespace: &Namespace) -> Result<Counters> {
    // `/proc/net` is that of the process; a thread that changed namespace has its own beside it.
    let texts = namespace.run(|| {
        ["snmp", "netstat", "snmp6"].map(|file| {
            let path = format!("/proc/thread-self/net/{file}");
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        })
    })?;
    let [snmp, netstat, snmp6] = texts;
    parse(&snmp?, &netstat?, &snmp6?)
}

/// The counters in the texts of the three files.
pub fn parse(snmp: &str, netstat: &str, snmp6: &str) -> Result<Counters> {
    let mut counters = Counters::new();
    parse_pairs(snmp, &mut counters)?;
    parse_pairs(netstat, &mut counters)?;
    parse_lines(snmp6, &mut counters)?;
    Ok(counters)
}

/// A line of names and under it a line of values, each with the group's name before it.
fn parse_pairs(text: &str, counters: &mut Counters) -> Result<()> {
    let mut lines = text.lines();
    while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
        let (group, names) = names.split_once(':').context("line without a group")?;
        let (_, values) = values.split_once(':').context("line without a group")?;
        for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
            // A few are signed (-1 for "no limit"); none of them counts anything.
            if let Ok(value) = value.parse() {
                counters.insert(format!("{group}.{name}"), value);
            }
        }
    }
    Ok(())
}

/// A name and a value in each line.
fn parse_lines(text: &str, counters: &mut Counters) -> Result<()> {
    for line in text.lines() {
        let (name, value) = line
            .split_once(char::is_whitespace)
            .with_context(|| format!("line {line:?}"))?;
        counters.insert(name.to_string(), value.trim().parse()?);
    }
    Ok(())
}

/// TCP segments that the kernel of `namespace` has sent, those that it sent again included. A super-packet counts as the
/// segments that it is cut into.
pub fn tcp_segments_sent(namespace: &Namespace) -> Result<u64> {
    let counters = read(namespace)?;
    let value = |name: &str| {
        counters
            .get(name)
            .with_context(|| format!("the kernel does not count {name}"))
    };
    Ok(value("Tcp.OutSegs")? + value("Tcp.RetransSegs")?)
}

/// Fails when the kernel of one of `namespaces` met a malformed packet.
pub fn expect_no_malformed(namespaces: &[&Namespace]) -> Result<()> {
    for namespace in namespaces {
        expect_none_malformed_in(&read(namespace)?, namespace.name())?;
    }
    Ok(())
}

/// Fails when the kernel of `name`, whose counters these are, met a malformed packet.
pub fn expect_none_malformed_in(counters: &Counters, name: &str) -> Result<()> {
    let value = |name: &str| {
        counters
            .get(name)
            .copied()
            .with_context(|| format!("the kernel does not count {name}"))
    };
    let mut bad = Vec::new();
    for name in MALFORMED {
        bad.push((name, value(name)?));
    }
    for (name, expired) in BAD_HEADERS {
        bad.push((name, value(name)?.saturating_sub(value(expired)?)));
    }
    bad.retain(|(_, count)| *count > 0);
    ensure!(
        bad.is_empty(),
        "the kernel of {name} counted malformed packets: {bad:?}"
    );
    Ok(())
}
