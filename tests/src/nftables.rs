//! The reference gateway: NAT by nftables, in place of portfwd.
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

/// A forward with what a rule of portfwd may say beside it.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Where the first of its ports leads.
    pub forward: Forward,
    /// How many ports it has: each leads to the one as far from the target's as it is from the listen port.
    pub ports: u16,
    /// Whether the server takes the gateway for its client (`masquerade`, as the flow leaves).
    pub masquerade: bool,
}

impl From<Forward> for Rule {
    fn from(forward: Forward) -> Self {
        Self {
            forward,
            ports: 1,
            masquerade: false,
        }
    }
}

/// Loads the forwards into the gateway's kernel; they go when the namespace goes.
pub fn forward(gateway: &Namespace, forwards: &[Forward]) -> Result<()> {
    let rules: Vec<_> = forwards.iter().copied().map(Rule::from).collect();
    load_rules(gateway, &rules)
}

/// Loads rules into the gateway's kernel; they go when the namespace goes.
pub fn load_rules(gateway: &Namespace, rules: &[Rule]) -> Result<()> {
    load(gateway, &ruleset(rules)?)
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
    let rules: Vec<_> = forwards.iter().copied().map(Rule::from).collect();
    load(gateway, &(ruleset(&rules)? + &table))
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

fn ruleset(rules: &[Rule]) -> Result<String> {
    let (mut arriving, mut leaving) = (String::new(), String::new());
    for rule in rules {
        let Forward { listen, target } = rule.forward;
        let family = if listen.is_ipv4() { "ip" } else { "ip6" };
        for protocol in ["tcp", "udp"] {
            writeln!(
                arriving,
                "  {family} daddr {} {protocol} dport {} dnat {family} to {}",
                listen.ip(),
                ports(listen, rule.ports),
                rule.target(protocol)
            )?;
            if rule.masquerade {
                writeln!(
                    leaving,
                    "  ct status dnat {family} daddr {} {protocol} dport {} masquerade",
                    target.ip(),
                    ports(target, rule.ports)
                )?;
            }
        }
    }
    let mut text = format!(
        "table inet reference {{\n chain prerouting {{\n  type nat hook prerouting priority dstnat;\n{arriving} }}\n"
    );
    // A chain without rules would cost every connection something.
    if !leaving.is_empty() {
        write!(
            text,
            " chain postrouting {{\n  type nat hook postrouting priority srcnat;\n{leaving} }}\n"
        )?;
    }
    Ok(text + "}\n")
}

/// So many ports from an endpoint's on, as nft writes them.
fn ports(first: SocketAddr, count: u16) -> String {
    match (first.port(), count) {
        (port, 1) => port.to_string(),
        (port, count) => format!("{port}-{}", port + count - 1),
    }
}

impl Rule {
    /// Where `dnat` leads. nft leads a range of ports to any of another; port by port it takes a map.
    fn target(&self, protocol: &str) -> String {
        let Forward { listen, target } = self.forward;
        if self.ports == 1 {
            return target.to_string();
        }
        let pair = |at| {
            let (from, to) = (listen.port() + at, target.port() + at);
            format!("{from} : {} . {to}", target.ip())
        };
        let pairs: Vec<_> = (0..self.ports).map(pair).collect();
        format!("{protocol} dport map {{ {} }}", pairs.join(", "))
    }
}
