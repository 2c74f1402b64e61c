//! A real name server: dnsmasq, which knows the names that a test gives it and nothing else.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::deadline::{PATIENCE, wait_until};
use crate::namespace::Namespace;
use crate::process::Process;

/// dnsmasq in a namespace.
pub struct NameServer {
    process: Process,
    directory: TempDir,
}

impl NameServer {
    /// Starts it on an address of `namespace`, without a name.
    pub fn start(namespace: &Namespace, address: IpAddr) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pfwd-dns-").tempdir()?;
        let hosts = directory.path().join("hosts");
        fs::write(&hosts, "")?;
        // The resolver's own patience, 5 s twice for each family, is more than a test has.
        let resolv_conf = format!("nameserver {address}\noptions timeout:1 attempts:1\n");
        fs::write(directory.path().join("resolv.conf"), resolv_conf)?;
        let mut command = namespace.command("dnsmasq")?;
        command
            .args(["--keep-in-foreground", "--log-facility=-", "--pid-file="])
            .args([
                "--conf-file=/dev/null",
                "--user=root",
                "--no-resolv",
                "--no-hosts",
            ])
            .args(["--bind-interfaces", "--except-interface=lo"])
            .arg(format!("--listen-address={address}"))
            .arg(format!("--addn-hosts={}", hosts.display()));
        let process = Process::spawn(command)?;
        process
            .wait_for_output("started", PATIENCE)
            .context("start dnsmasq")?;
        Ok(Self { process, directory })
    }

    /// The resolver configuration that leads here.
    pub fn resolv_conf(&self) -> PathBuf {
        self.directory.path().join("resolv.conf")
    }

    /// The names and their addresses from here on.
    pub fn publish(&self, names: &[(&str, IpAddr)]) -> Result<()> {
        let lines: String = names
            .iter()
            .map(|(name, address)| format!("{address} {name}\n"))
            .collect();
        let hosts = self.directory.path().join("hosts");
        // A question for one family that comes before the file is read and one for the other after it would have answers of
        // two different times.
        let reading = format!("read {}", hosts.display());
        let readings = || self.process.output().matches(&reading).count();
        let before = readings();
        fs::write(&hosts, lines)?;
        self.process.signal(Signal::SIGHUP)?;
        wait_until("dnsmasq to read its names", PATIENCE, || {
            Ok(readings() > before)
        })
    }

    /// No question is answered any more, nor refused.
    pub fn fall_silent(&self) -> Result<()> {
        self.process.signal(Signal::SIGSTOP)
    }
}
