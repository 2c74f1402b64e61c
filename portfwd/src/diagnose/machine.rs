//! The machine: kernel, BPF file system, capabilities, clock.

use std::time::{Duration, SystemTime};

use super::{Check, Facts, Finding};

pub(super) const CHECKS: &[Check] = &[kernel, file_system, capabilities, just_in_time, clock];

/// The oldest kernel that portfwd was seen running on.
const OLDEST: (u32, u32) = (6, 1);
/// 2026-01-01: no clock that is right shows an earlier time.
const BEFORE_THIS_PROGRAM: Duration = Duration::from_secs(1_767_225_600);

fn kernel(facts: &Facts) -> Vec<Finding> {
    let machine = &facts.machine;
    let (major, minor) = OLDEST;
    let mut findings = Vec::new();
    if machine.version < OLDEST {
        findings.push(
            Finding::error(
                "kernel-too-old",
                &machine.kernel,
                format!("portfwd was never seen running on a kernel before {major}.{minor}"),
            )
            .fix("apt-get install --only-upgrade linux-image-amd64"),
        );
    }
    if !machine.btf {
        findings.push(
            Finding::warning(
                "kernel-without-btf",
                &machine.kernel,
                "there is no /sys/kernel/btf/vmlinux: bpftool cannot show what is in the tables",
            )
            .fix("grep CONFIG_DEBUG_INFO_BTF= /boot/config-$(uname -r)"),
        );
    }
    findings
}

fn file_system(facts: &Facts) -> Vec<Finding> {
    if facts.machine.bpffs {
        return Vec::new();
    }
    let finding = Finding::error(
        "bpffs-not-mounted",
        "/sys/fs/bpf",
        "no BPF file system is mounted there: nothing that portfwd attaches would outlive its daemon",
    );
    vec![finding.fix("mount -t bpf bpf /sys/fs/bpf")]
}

fn capabilities(facts: &Facts) -> Vec<Finding> {
    let missing = &facts.machine.missing_capabilities;
    if missing.is_empty() {
        return Vec::new();
    }
    let finding = Finding::error(
        "capability-missing",
        missing.join(", "),
        "this user lacks them, portfwd needs them, and without them not everything here could be looked at",
    );
    vec![finding.fix(format!("sudo {} doctor", facts.command))]
}

fn just_in_time(facts: &Facts) -> Vec<Finding> {
    // Only the first network namespace has the setting; elsewhere nothing is known of it.
    if facts.sysctl("net/core/bpf_jit_enable") != Some("0") {
        return Vec::new();
    }
    let finding = Finding::warning(
        "jit-off",
        "net.core.bpf_jit_enable",
        "the kernel interprets BPF programs instead of compiling them, which makes every packet several times slower",
    );
    vec![finding.fix("sysctl -w net.core.bpf_jit_enable=1")]
}

fn clock(facts: &Facts) -> Vec<Finding> {
    if facts.machine.now >= SystemTime::UNIX_EPOCH + BEFORE_THIS_PROGRAM {
        return unkept_clock(facts);
    }
    let finding = Finding::warning(
        "clock-wrong",
        "clock",
        "it shows a time before this program was written: logs are wrong, and so is whatever goes by the time of day",
    );
    vec![finding.fix("timedatectl set-ntp true")]
}

/// Rules that come and go by the time of day do so at the wrong time if nobody keeps the clock right.
fn unkept_clock(facts: &Facts) -> Vec<Finding> {
    if facts.machine.clock_is_kept || !facts.is_timed {
        return Vec::new();
    }
    let finding = Finding::warning(
        "clock-unsynchronised",
        "clock",
        "there are rules with a schedule or an end, and nobody keeps the clock right",
    );
    vec![finding.fix("timedatectl set-ntp true")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::expect;

    #[test]
    fn every_fault_of_the_machine_is_named() {
        expect("kernel-too-old", |facts| facts.machine.version = (5, 15));
        expect("kernel-without-btf", |facts| facts.machine.btf = false);
        expect("bpffs-not-mounted", |facts| facts.machine.bpffs = false);
        expect("capability-missing", |facts| {
            facts.machine.missing_capabilities.push("CAP_BPF");
        });
        expect("jit-off", |facts| {
            facts
                .sysctls
                .insert("net/core/bpf_jit_enable".into(), "0".into());
        });
        expect("clock-unsynchronised", |facts| {
            facts.machine.clock_is_kept = false;
            facts.is_timed = true;
        });
        expect("clock-wrong", |facts| {
            facts.machine.now = SystemTime::UNIX_EPOCH;
        });
    }
}
