//! Captures with tcpdump, judged by tshark.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::deadline::{PATIENCE, wait_for, wait_until};
use crate::lab::Offloads;
use crate::link::End;
use crate::process::{Process, run_for_text};

/// A running tcpdump on one interface.
pub struct Capture {
    process: Process,
    directory: TempDir,
    /// The longest frame that the interface can send or get, bytes.
    longest: u64,
}

impl Capture {
    /// Starts a capture of every frame of an interface, either way, and waits until it sees them. What a test is about it selects
    /// from what was captured: a defect in a frame that it does not think of must show all the same.
    pub fn start(end: End<'_>) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pfwd-pcap-").tempdir()?;
        let mut command = end.namespace.command("tcpdump")?;
        // As root to the end: the directory is closed to the user that tcpdump would become.
        command.args(["-i", end.interface, "-n", "-U", "-Z", "root"]);
        // Whole super-packets, and a buffer (KiB) that holds them when the machine is busy.
        command.args(["-s", "65535", "-B", "65536"]);
        command.arg("--immediate-mode").arg("-w");
        command.arg(directory.path().join("capture.pcap"));
        let process = Process::spawn(command)?;
        process.wait_for_output("listening on", PATIENCE)?;
        let longest = end.mtu()? + ETHERNET;
        Ok(Self {
            process,
            directory,
            longest,
        })
    }

    /// Ends the capture; the frames that were on the wire before are all in the file. tshark judges every sum of every one of them.
    ///
    /// # Errors
    /// If a frame has a wrong sum (all such frames are named), there is no frame at all, or tcpdump missed some.
    pub fn stop(self) -> Result<Frames> {
        self.stop_excusing(NO_FRAME)
    }

    /// [`Self::stop`] in a lab whose hosts have these offloads. Where hosts leave sums to hardware that a veth does not have, those of
    /// TCP and UDP are unfinished from one end to the other, and are not judged.
    ///
    /// # Errors
    /// As for [`Self::stop`].
    pub fn stop_with(self, offloads: Offloads) -> Result<Frames> {
        self.stop_excusing(match offloads {
            Offloads::On => EVERY_FRAME,
            Offloads::Off => NO_FRAME,
        })
    }

    /// [`Self::stop`], but for the sums of TCP and UDP in the frames that `unfinished` (Wireshark syntax) accepts: those that the lab
    /// leaves to hardware on purpose (the kernel's `CHECKSUM_PARTIAL`), and has a reason to. Sums of IP and ICMP are never left to
    /// any, and are judged in those frames as well.
    ///
    /// # Errors
    /// As for [`Self::stop`].
    pub fn stop_excusing(self, unfinished: &str) -> Result<Frames> {
        // The host has put it together from others (GRO) before tcpdump sees it, has found the sum of each of them to be right, and
        // leaves the new one unfinished (skb_gro_checksum_validate and tcp_gro_complete in the kernel).
        let merged = format!("frame.len > {}", self.longest);
        let frames = self.end()?;
        frames.judge(&format!("{unfinished} || {merged}"))?;
        Ok(frames)
    }

    fn end(mut self) -> Result<Frames> {
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

    /// One line per frame that `display_filter` (Wireshark syntax) accepts, with the values of `fields` separated by tabs.
    pub fn select(&self, display_filter: &str, fields: &[&str]) -> Result<Vec<String>> {
        select(&self.path(), display_filter, fields)
    }

    /// How many frames `display_filter` accepts; fails when it is none.
    pub fn expect(&self, display_filter: &str) -> Result<usize> {
        let accepted = self.select(display_filter, &["frame.number"])?.len();
        ensure!(
            accepted > 0,
            "no frame in the capture matches {display_filter}"
        );
        Ok(accepted)
    }

    /// Fails when a sum is wrong, but for those of TCP and UDP in the frames that `unfinished` accepts.
    fn judge(&self, unfinished: &str) -> Result<()> {
        let all = self.select(EVERY_FRAME, &["frame.number"])?.len();
        ensure!(all > 0, "there is no frame in the capture");
        let bad = self.select(
            &format!("{BAD_SUM} || (({BAD_SUM_OF_PORTS}) && !({unfinished}))"),
            &["frame.number", "_ws.col.Info", "_ws.expert.message"],
        )?;
        ensure!(
            bad.is_empty(),
            "{} of {all} frames have a wrong sum:\nframe {}",
            bad.len(),
            bad.join("\nframe ")
        );
        Ok(())
    }
}

/// A display filter for the frames that an interface sends.
pub fn sent_by(end: End<'_>) -> Result<String> {
    let mac = end.mac()?.map(|byte| format!("{byte:02x}")).join(":");
    Ok(format!("eth.src == {mac}"))
}

/// Bytes in front of an IP packet, with two VLAN tags.
const ETHERNET: u64 = 14 + 2 * 4;
const EVERY_FRAME: &str = "frame";
const NO_FRAME: &str = "!frame";

/// What tshark finds wrong; status 0 is "bad". Any field of the name counts: an ICMP error quotes a second header.
const BAD_SUM: &str =
    "ip.checksum.status == 0 || icmp.checksum.status == 0 || icmpv6.checksum.status == 0";
/// The same of what has ports.
const BAD_SUM_OF_PORTS: &str = "tcp.checksum.status == 0 || udp.checksum.status == 0";

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
