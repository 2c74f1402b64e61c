//! The reference gateway: destination NAT by nftables, in place of portfwd.
//!
//! The lab is proved with it, and benchmarks are compared with it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::namespace::Namespace;

/// One destination NAT: `listen` → `target`, for TCP and UDP.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// What the client dials.
    pub listen: SocketAddr,
    /// Who serves it.
    pub target: SocketAddr,
}

/// Loads the forwards into the gateway's kernel; they go when the namespace goes.
pub fn forward(gateway: &Namespace, forwards: &[Forward]) -> Result<()> {
    load(gateway, &ruleset(forwards)?)
}

/// [`forward`], and connections that go on between the interfaces are taken past most of the kernel's stack.
///
/// # Errors
/// If the kernel was built without flowtables, or as for [`forward`].
pub fn forward_by_flowtable(
    gateway: &Namespace,
    forwards: &[Forward],
    interfaces: [&str; 2],
) -> Result<()> {
    let table = format!(
        "table inet beside {{\n flowtable fast {{\n  hook ingress priority 0; devices = {{ {} }};\n }}\n \
         chain forward {{\n  type filter hook forward priority 0;\n  \
         meta l4proto {{ tcp, udp }} flow add @fast\n }}\n}}\n",
        interfaces.join(", ")
    );
    load(gateway, &(ruleset(forwards)? + &table))
}

/// Loads a ruleset into a namespace's kernel, beside what is there.
pub fn load(namespace: &Namespace, ruleset: &str) -> Result<()> {
    let mut child = namespace
        .command("nft")?
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start nft; is nftables installed?")?;
    let mut input = child.stdin.take().context("nft has no stdin")?;
    input.write_all(ruleset.as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn ruleset(forwards: &[Forward]) -> Result<String> {
    let mut text = String::from(
        "table inet reference {\n chain prerouting {\n  type nat hook prerouting priority dstnat;\n",
    );
    for Forward { listen, target } in forwards {
        let family = if listen.is_ipv4() { "ip" } else { "ip6" };
        for protocol in ["tcp", "udp"] {
            writeln!(
                text,
                "  {family} daddr {} {protocol} dport {} dnat {family} to {target}",
                listen.ip(),
                listen.port()
            )?;
        }
    }
    text.push_str(" }\n}\n");
    Ok(text)
}
