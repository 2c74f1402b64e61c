//! A reference gateway in user space: HAProxy relays TCP between two sockets of its own.

use std::fmt::Write as _;
use std::fs;
use std::net::TcpStream;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::deadline::{PATIENCE, wait_until};
use crate::namespace::Namespace;
use crate::nftables::Forward;
use crate::process::Process;

/// HAProxy at work in a namespace; it ends with this.
pub struct Haproxy {
    _process: Process,
    _directory: TempDir,
}

impl Haproxy {
    /// Relays TCP connections. The target of the last forward must accept connections, one of which is made to see that
    /// HAProxy is there: it listens on all of them before it accepts on any.
    ///
    /// # Errors
    /// If HAProxy is not installed, or does not listen.
    pub fn start(gateway: &Namespace, forwards: &[Forward]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pfwd-haproxy-").tempdir()?;
        let configuration = directory.path().join("haproxy.cfg");
        fs::write(&configuration, configuration_text(forwards)?)?;
        let mut command = gateway.command("haproxy")?;
        // One process, in the foreground: killing it by its pid leaves nothing behind.
        command.arg("-db").arg("-f").arg(&configuration);
        let process = Process::spawn(command)?;
        let last = forwards.last().context("nothing to relay")?.listen;
        wait_until("haproxy to listen", PATIENCE, || {
            gateway.run(|| TcpStream::connect(last).is_ok())
        })
        .with_context(|| format!("start haproxy: {}", process.output()))?;
        Ok(Self {
            _process: process,
            _directory: directory,
        })
    }
}

fn configuration_text(forwards: &[Forward]) -> Result<String> {
    let mut text = String::from(
        "global
    maxconn 4096
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
",
    );
    for Forward { listen, target } in forwards {
        let port = listen.port();
        writeln!(
            text,
            "listen relay{port}\n    bind {listen}\n    server target {target}"
        )?;
    }
    Ok(text)
}
