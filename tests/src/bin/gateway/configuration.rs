//! What the cards are like, and what is tried on each set of them.

use std::ffi::OsString;

use anyhow::{Context, Result, bail, ensure};
use portfwd_tests::daemon::Mode;
use portfwd_tests::vm::{Cards, Vm};

use crate::report::Report;
use crate::traffic::{self, Carrier};

/// A frame of one page has no room for so much beside what XDP needs.
const JUMBO: u32 = 9000;
/// From when on the driver gives XDP frames in several buffers (`virtnet_build_xdp_buff_mrg`), major and minor.
const SCATTERS: (u32, u32) = (6, 3);

/// A set of cards, and what is tried on it.
pub(super) struct Configuration {
    name: &'static str,
    cards: Cards,
    parts: &'static [Part],
}

/// What is tried.
#[derive(Clone, Copy)]
enum Part {
    /// Traffic by native XDP, with what the driver says about its queues.
    Native(Queues),
    /// Traffic by TC, with packets as the offloads make them.
    Tc,
    /// Traffic between a card with native XDP and one without. The driver takes nothing from XDP for a card that has no program,
    /// so all of it is TC's.
    Mixed,
    /// The driver refuses native XDP: portfwd does too where it is asked for that, and takes TC where it may choose.
    Refused,
    /// Frames may be too large for one buffer: the driver gives XDP several, or refuses it.
    Jumbo,
}

/// What native XDP sends on.
#[derive(Clone, Copy)]
enum Queues {
    /// A queue for each CPU.
    OfItsOwn,
    /// Queues that the stack sends on too, behind a lock. The driver logs that.
    Shared,
}

impl Configuration {
    /// Every set, the usual one first.
    pub(super) const ALL: [Self; 5] = [
        Self {
            name: "queues for stack and XDP, all offloads",
            cards: Cards {
                queues: 4,
                options: &[],
            },
            parts: &[
                Part::Native(Queues::OfItsOwn),
                Part::Tc,
                Part::Mixed,
                Part::Jumbo,
            ],
        },
        Self {
            name: "queues for stack and XDP, no receive offloads",
            cards: Cards {
                queues: 4,
                options: &[
                    "guest_csum=off",
                    "guest_tso4=off",
                    "guest_tso6=off",
                    "guest_ecn=off",
                    "guest_ufo=off",
                ],
            },
            parts: &[Part::Native(Queues::OfItsOwn), Part::Tc],
        },
        Self {
            name: "a queue for each CPU, all offloads",
            cards: Cards {
                queues: 2,
                options: &[],
            },
            parts: &[Part::Native(Queues::Shared)],
        },
        Self {
            name: "one queue, all offloads",
            cards: Cards {
                queues: 1,
                options: &[],
            },
            parts: &[Part::Native(Queues::Shared)],
        },
        Self {
            name: "offloads that cannot be turned off",
            cards: Cards {
                queues: 4,
                options: &["ctrl_guest_offloads=off"],
            },
            parts: &[Part::Refused],
        },
    ];

    /// Boots a machine with the cards, and tries everything.
    ///
    /// # Errors
    /// When the run was interrupted; what fails is in the report.
    pub(super) fn run(&self, machine: &[OsString], report: &mut Report) -> Result<()> {
        report.under(self.name);
        let mut booted = None;
        report.check("boot", || {
            let vm = booted.insert(Vm::boot(machine, self.cards)?);
            let version = vm.portfwd(&["--version"])?;
            Ok(version.trim().to_owned())
        })?;
        let Some(vm) = &mut booted else {
            return Ok(());
        };
        for part in self.parts {
            part.run(self, vm, report)?;
        }
        Ok(())
    }
}

impl Part {
    fn run(self, of: &Configuration, vm: &mut Vm, report: &mut Report) -> Result<()> {
        let under = |words: &str| format!("{} | {words}", of.name);
        match self {
            Self::Native(queues) => {
                report.under(&under("native XDP"));
                if attach(vm, report, Wanted::forced([Mode::Xdp; 2]))? {
                    report.check("queues", || queues.check(vm))?;
                    report.check("receive offloads", || expect_receive_offloads(vm, false))?;
                    traffic::run(vm, report, Carrier::Xdp)?;
                    detach(vm, report)?;
                }
            }
            Self::Tc => {
                report.under(&under("TC"));
                if attach(vm, report, Wanted::forced([Mode::Tc; 2]))? {
                    let on = of.cards.options.is_empty();
                    report.check("receive offloads", || expect_receive_offloads(vm, on))?;
                    traffic::run(vm, report, Carrier::Tc)?;
                    detach(vm, report)?;
                }
            }
            Self::Mixed => {
                for (wan, lan) in [(Mode::Tc, Mode::Xdp), (Mode::Xdp, Mode::Tc)] {
                    let words = format!("WAN {}, LAN {}", wan.word(), lan.word());
                    report.under(&under(&words));
                    if attach(vm, report, Wanted::forced([wan, lan]))? {
                        traffic::run(vm, report, Carrier::Tc)?;
                        detach(vm, report)?;
                    }
                }
            }
            Self::Refused => {
                report.under(&under("native XDP refused"));
                refused(vm, report)?;
            }
            Self::Jumbo => {
                report.under(&under(&format!("native XDP, MTU {JUMBO}")));
                let mut scatters = false;
                report.check("MTU", || {
                    vm.set_mtu(JUMBO)?;
                    scatters = version(vm)? >= SCATTERS;
                    let buffers = if scatters {
                        "several buffers"
                    } else {
                        "one buffer"
                    };
                    Ok(format!("{JUMBO} on both cards, {buffers}"))
                })?;
                if !scatters {
                    refused(vm, report)?;
                } else if attach(vm, report, Wanted::forced([Mode::Xdp; 2]))? {
                    traffic::run(vm, report, Carrier::Xdp)?;
                    detach(vm, report)?;
                }
            }
        }
        Ok(())
    }
}

/// Major and minor of the machine's kernel.
fn version(vm: &mut Vm) -> Result<(u32, u32)> {
    let release = vm.shell("uname -r")?;
    let mut numbers = release.trim().split(['.', '-']).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        (_, _) => bail!("{release:?} is no version"),
    }
}

/// What asks for native XDP is refused with the kernel's reason, and `auto` forwards by TC.
fn refused(vm: &mut Vm, report: &mut Report) -> Result<()> {
    report.check("--wan wan0=xdp --lan lan0=xdp", || {
        let error = vm.start_portfwd(Mode::Xdp, Mode::Xdp).err();
        let said = format!("{:#}", error.context("portfwd runs")?);
        let line = said
            .lines()
            .find(|line| line.contains("the kernel refuses to attach to wan0"))
            .with_context(|| format!("another reason: {said}"))?;
        Ok(line.trim().to_owned())
    })?;
    let wanted = Wanted {
        modes: [Mode::Auto; 2],
        attached: [Mode::Tc; 2],
        reason: "the driver refuses native XDP",
    };
    if attach(vm, report, wanted)? {
        traffic::run(vm, report, Carrier::Tc)?;
        detach(vm, report)?;
    }
    Ok(())
}

/// How the cards, WAN and LAN, are to be attached.
struct Wanted {
    /// What is asked for.
    modes: [Mode; 2],
    /// What it is to become.
    attached: [Mode; 2],
    /// The beginning of the reason that portfwd gives.
    reason: &'static str,
}

impl Wanted {
    /// What is asked for is what is done.
    fn forced(modes: [Mode; 2]) -> Self {
        Self {
            modes,
            attached: modes,
            reason: "forced",
        }
    }
}

/// Starts portfwd, which must attach to the cards as wanted.
fn attach(vm: &mut Vm, report: &mut Report, wanted: Wanted) -> Result<bool> {
    let [wan, lan] = wanted.modes;
    let what = format!("--wan wan0={} --lan lan0={}", wan.word(), lan.word());
    let passed = report.check(&what, || {
        vm.start_portfwd(wan, lan)?;
        let found = vm.attached()?;
        ensure!(
            found.len() == 2
                && found.iter().zip(wanted.attached).all(|(card, mode)| {
                    card.mode == mode.word() && card.reason.starts_with(wanted.reason)
                }),
            "attached otherwise: {found:?}"
        );
        let words: Vec<_> = found
            .iter()
            .map(|card| format!("{} {} ({})", card.name, card.mode, card.reason))
            .collect();
        Ok(words.join(", "))
    })?;
    if !passed {
        // Nothing may run that would be in the way of the next part; an error means that nothing does.
        drop(vm.stop_portfwd());
    }
    Ok(passed)
}

fn detach(vm: &mut Vm, report: &mut Report) -> Result<()> {
    report.check("detach", || {
        vm.stop_portfwd()?;
        Ok("nothing is left".to_owned())
    })?;
    Ok(())
}

/// Whether the cards take what client and server leave for hardware to do. The driver has the cards give that up when native XDP
/// comes; what it shows in the machine stays as it was.
fn expect_receive_offloads(vm: &Vm, on: bool) -> Result<String> {
    for end in [vm.client_end(), vm.server_end()] {
        for offload in ["tx-checksumming", "tcp-segmentation-offload"] {
            let found = end.has_offload(offload)?;
            ensure!(found == on, "{offload} of {} is {found}", end.interface);
        }
    }
    Ok(if on {
        "unfinished checksums and super-packets come in"
    } else {
        "whole frames with finished checksums come in"
    }
    .to_owned())
}

impl Queues {
    /// The driver logs once what XDP sends on, if it is not queues of its own.
    fn check(self, vm: &mut Vm) -> Result<String> {
        let messages = vm.card_messages()?;
        let warning = messages
            .iter()
            .find(|message| message.contains("slower locked tx mode"));
        match (self, warning) {
            (Self::OfItsOwn, None) => Ok("XDP has one for each CPU".to_owned()),
            (Self::Shared, Some(warning)) => Ok(warning.clone()),
            (Self::OfItsOwn, Some(warning)) => bail!("the driver warns: {warning}"),
            (Self::Shared, None) => bail!("the driver does not warn: {messages:?}"),
        }
    }
}
