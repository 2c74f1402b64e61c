//! Captures with tcpdump, judged by tshark.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::deadline::{PATIENCE, wait_for, wait_until};
use crate::link::End;
use crate::process::{Process, run_for_text};

/// A running tcpdump on one interface.
pub struct Capture {
    process: Process,
    directory: TempDir,
}

impl Capture {
    /// Starts a capture of the frames that match `filter` (pcap syntax, empty for all) and waits
    /// until it sees them.
    pub fn start(end: End<'_>, filter: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pfwd-pcap-").tempdir()?;
        let mut command = end.namespace.command("tcpdump")?;
        // As root to the end: the directory is closed to the user that tcpdump would become.
        command.args(["-i", end.interface, "-n", "-U", "-Z", "root"]);
        // Whole super-packets, and a buffer (KiB) that holds them when the machine is busy.
        command.args(["-s", "65535", "-B", "65536"]);
        command.arg("--immediate-mode").arg("-w");
        command.arg(directory.path().join("capture.pcap"));
        if !filter.is_empty() {
            command.arg(filter);
        }
        let process = Process::spawn(command)?;
        process.wait_for_output("listening on", PATIENCE)?;
        Ok(Self { process, directory })
    }

    /// Ends the capture; the frames that were on the wire before are all in the file.
    pub fn stop(mut self) -> Result<Frames> {
        wait_until("tcpdump to write what it received", PATIENCE, || {
            let (written, received) = self.progress()?;
            Ok(written == received)
        })?;
        self.process.signal(Signal::SIGINT)?;
        let status = self.process.wait(PATIENCE)?;
        let output = self.process.output();
        ensure!(status.success(), "tcpdump failed ({status}): {output}");
        ensure!(
            output.contains("\n0 packets dropped by kernel"),
            "tcpdump missed packets: {output}"
        );
        Ok(Frames {
            directory: self.directory,
        })
    }

    /// How many frames tcpdump has written, and how many it has received: told to end, it would leave the rest.
    fn progress(&self) -> Result<(u64, u64)> {
        let reports = |output: &str| -> Vec<String> {
            let whole = |line: &&str| line.contains(" captured, ") && line.contains(" dropped by");
            output.lines().filter(whole).map(str::to_string).collect()
        };
        let before = reports(&self.process.output()).len();
        self.process.signal(Signal::SIGUSR1)?;
        let report = wait_for("a report of tcpdump", PATIENCE, || {
            Ok(reports(&self.process.output()).into_iter().nth(before))
        })?;
        let mut numbers = report.split_whitespace().filter_map(|w| w.parse().ok());
        numbers
            .next()
            .zip(numbers.next())
            .with_context(|| format!("tcpdump reports {report:?}"))
    }
}

/// A finished capture.
pub struct Frames {
    directory: TempDir,
}

impl Frames {
    /// The pcap file.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("capture.pcap")
    }

    /// One line per frame that `display_filter` (Wireshark syntax) accepts, with the values of
    /// `fields` separated by tabs. Every checksum is validated first.
    pub fn select(&self, display_filter: &str, fields: &[&str]) -> Result<Vec<String>> {
        select(&self.path(), display_filter, fields)
    }

    /// Fails when a frame that `display_filter` accepts has a bad checksum at any layer, or when
    /// there is no such frame to judge. Returns how many there are.
    pub fn judge_checksums(&self, display_filter: &str) -> Result<usize> {
        let judged = self.select(display_filter, &["frame.number"])?.len();
        ensure!(
            judged > 0,
            "no frame in the capture matches {display_filter}"
        );
        let bad = self.select(
            &format!("({display_filter}) && ({BAD_CHECKSUM})"),
            &["frame.number", "_ws.col.Info", "_ws.expert.message"],
        )?;
        ensure!(
            bad.is_empty(),
            "{} of {judged} frames have a bad checksum:\n{}",
            bad.len(),
            bad.join("\n")
        );
        Ok(judged)
    }
}

/// What tshark finds wrong; status 0 is "bad". `any` because an ICMP error quotes a second header.
const BAD_CHECKSUM: &str = "ip.checksum.status == 0 || tcp.checksum.status == 0 \
     || udp.checksum.status == 0 || icmp.checksum.status == 0 || icmpv6.checksum.status == 0";

fn select(file: &Path, display_filter: &str, fields: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new("tshark");
    command.arg("-r").arg(file).arg("-n");
    for checksum in ["ip", "tcp", "udp"] {
        command.args(["-o", &format!("{checksum}.check_checksum:TRUE")]);
    }
    command.args(["-Y", display_filter, "-T", "fields"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let text = run_for_text(&mut command).context("read the capture")?;
    Ok(text.lines().map(str::to_string).collect())
}
