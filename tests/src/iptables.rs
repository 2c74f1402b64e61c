//! A reference gateway: destination NAT by the tables that iptables had before nftables.
//!
//! `iptables-legacy` fills the kernel's x_tables; what is called `iptables` elsewhere may be a translator that fills the tables
//! of nftables, and is measured with these. What follows connections is the same in both.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::address::Family;
use crate::namespace::Namespace;
use crate::nftables::Forward;

/// Loads the forwards into the gateway's kernel; they go when the namespace goes.
///
/// # Errors
/// If iptables-legacy is not installed, or the kernel was built without its tables.
pub fn forward(gateway: &Namespace, forwards: &[Forward]) -> Result<()> {
    for (family, program) in [
        (Family::V4, "iptables-legacy-restore"),
        (Family::V6, "ip6tables-legacy-restore"),
    ] {
        let own = forwards
            .iter()
            .filter(|forward| Family::of(forward.listen.ip()) == family);
        load(gateway, program, &ruleset(own)?)?;
    }
    Ok(())
}

fn load(gateway: &Namespace, program: &str, ruleset: &str) -> Result<()> {
    let mut child = gateway
        .command(program)?
        .args(["--wait", "10"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}; is iptables installed?"))?;
    let mut input = child.stdin.take().context("it has no stdin")?;
    input.write_all(ruleset.as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{program} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn ruleset<'f>(forwards: impl Iterator<Item = &'f Forward>) -> Result<String> {
    let mut text = String::from("*nat\n");
    for Forward { listen, target } in forwards {
        for protocol in ["tcp", "udp"] {
            writeln!(
                text,
                "-A PREROUTING -d {} -p {protocol} --dport {} -j DNAT --to-destination {target}",
                listen.ip(),
                listen.port()
            )?;
        }
    }
    text.push_str("COMMIT\n");
    Ok(text)
}
