//! Old bugs, put back in on purpose: each must fail the test that is there for it.
//!
//! Every one of them was real in some translator. The sources are copied, so the tree at hand stays as it is.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{host, setup, sources};

/// A bug: where `sound` stands in a file, once, it is put `broken`.
struct Mutant {
    name: &'static str,
    /// What is wrong then.
    bug: &'static str,
    file: &'static str,
    sound: &'static str,
    broken: &'static str,
    suite: Suite,
    /// The test that must fail.
    killer: &'static str,
}

/// Where the test is that must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suite {
    /// The core's own tests and those over the model.
    Core,
    /// The finished programs on the kernel.
    Programs,
}

const MUTANTS: [Mutant; 9] = [
    Mutant {
        name: "fold-once",
        bug: "the carry of the first fold is lost: one sum in 33,000 is off by one",
        file: "portfwd-common/src/net/checksum.rs",
        sound: "((once >> 16) + (once & 0xffff)) as u16",
        broken: "once as u16",
        suite: Suite::Core,
        killer: "net::checksum::tests::fold_leaves_no_carry",
    },
    Mutant {
        name: "timer-at-its-end",
        bug: "a flow ends one tick before its time is over",
        file: "portfwd-common/src/datapath/conntrack.rs",
        sound: "now.since_any_cpu(self.since) > self.length",
        broken: "now.since_any_cpu(self.since) >= self.length",
        suite: Suite::Core,
        killer: "lifetimes::a_single_tick_decides",
    },
    Mutant {
        name: "delta-of-wrong-sign",
        bug: "a checksum is updated by the old words less the new ones",
        file: "portfwd-common/src/net/checksum.rs",
        sound: "wrapping_add(!old as u32).wrapping_add(new as u32)",
        broken: "wrapping_add(old as u32).wrapping_add(!new as u32)",
        suite: Suite::Core,
        killer: "net::checksum::tests::the_worked_example_of_rfc_1624_section_4_gives_zero_not_all_ones",
    },
    Mutant {
        name: "inner-sum-left",
        bug: "the checksum of the segment that an ICMP error quotes stays as it was",
        file: "portfwd-common/src/datapath/icmp.rs",
        sound: "transport.write(at, new)?;",
        broken: "",
        suite: Suite::Core,
        killer: "sums::every_quoted_sum_there_is_comes_out_as_a_full_computation_has_it",
    },
    Mutant {
        name: "reset-deletes",
        bug: "a RST takes the flow's entries away",
        file: "portfwd-common/src/datapath/transport.rs",
        sound: "        work.track.receiver.store(other);\n    }\n",
        broken: "        work.track.receiver.store(other);\n    }
    if work.subject.flags.any(TcpFlags::RST) {
        flows.remove(table, &work.key);
        flows.remove(table, &work.partner);
    }\n",
        suite: Suite::Core,
        killer: "resets::a_reset_that_is_exact_counts_and_the_connection_is_kept_for_four_minutes",
    },
    Mutant {
        name: "insert-over",
        bug: "an entry is put in the place of one that is there, so no race and no clash has an arbiter",
        file: "portfwd-ebpf/src/maps.rs",
        sound: "let flags = u64::from(BPF_NOEXIST);\n                match table",
        broken: "let flags = u64::from(BPF_ANY);\n                match table",
        suite: Suite::Programs,
        killer: "verdicts::every_row_becomes_what_it_says",
    },
    Mutant {
        name: "mask-in-host-order",
        bug: "a prefix is compared with its bytes in the machine's order",
        file: "portfwd-common/src/net/address.rs",
        sound: "u32::from_be(one ^ other) as u64",
        broken: "(one ^ other) as u64",
        suite: Suite::Core,
        killer: "net::address::tests::addresses_of_one_network_begin_alike",
    },
    Mutant {
        name: "late-leaves",
        bug: "what a server sends once its rule is gone leaves with an address of the LAN",
        file: "portfwd-common/src/datapath/late.rs",
        sound: "entry.marks |= FlowEntry::<A>::LATE;",
        broken: "entry.marks |= 0;",
        suite: Suite::Core,
        killer: "late::what_a_target_still_sends_after_its_rule_is_gone_does_not_leave",
    },
    Mutant {
        name: "answer-begins",
        bug: "an echo reply begins a flow: the gateway's own questions are answered to somebody else",
        file: "portfwd-common/src/datapath/opening.rs",
        sound: "    if is_answer {\n",
        broken: "    if is_answer && false {\n",
        suite: Suite::Core,
        killer: "echo::an_answer_to_the_gateway_itself_is_the_gateways",
    },
];

/// Introduces each bug, or those that are named, in a copy of the sources, and runs the suite that must notice.
///
/// # Errors
/// When a name is none, when the sound sources fail, and, after all have been tried, when one was not noticed by its test.
pub fn run(names: &[String]) -> Result<()> {
    let chosen = chosen(names)?;
    setup::run()?;
    let copy = Copy::of_tree()?;
    for suite in [Suite::Core, Suite::Programs] {
        if chosen.iter().any(|mutant| mutant.suite == suite) {
            eprintln!("==> {}: as it is", suite.title());
            let failed = copy.failures(suite)?;
            ensure!(
                failed.is_empty(),
                "without any mutant these fail already: {}",
                failed.join(", ")
            );
        }
    }
    let mut survivors = Vec::new();
    for mutant in chosen {
        eprintln!("==> {}: {}", mutant.name, mutant.bug);
        let sound = copy.put(mutant.file, |text| mutant.introduced(text))?;
        let failed = copy.failures(mutant.suite)?;
        copy.put(mutant.file, |_| Ok(sound.clone()))?;
        let verdict = if failed.iter().any(|test| test == mutant.killer) {
            "killed by"
        } else {
            survivors.push(mutant.name);
            "NOT KILLED by"
        };
        println!(
            "{:<20} {verdict} {}; {} tests fail",
            mutant.name,
            mutant.killer,
            failed.len()
        );
    }
    ensure!(
        survivors.is_empty(),
        "not noticed by the test that is there for it: {}",
        survivors.join(", ")
    );
    Ok(())
}

/// The mutants of these names, all if there are none.
fn chosen(names: &[String]) -> Result<Vec<&'static Mutant>> {
    if names.is_empty() {
        return Ok(MUTANTS.iter().collect());
    }
    let known = || MUTANTS.map(|mutant| mutant.name).join(", ");
    names
        .iter()
        .map(|name| {
            MUTANTS
                .iter()
                .find(|mutant| mutant.name == name)
                .with_context(|| format!("no mutant is named {name}; there are {}", known()))
        })
        .collect()
}

impl Mutant {
    /// The file with the bug.
    fn introduced(&self, text: &str) -> Result<String> {
        let places = text.matches(self.sound).count();
        ensure!(
            places == 1,
            "mutant {}: {} has its line {places} times instead of once; it has to follow the code",
            self.name,
            self.file
        );
        Ok(text.replace(self.sound, self.broken))
    }
}

impl Suite {
    const fn title(self) -> &'static str {
        match self {
            Self::Core => "the core's tests",
            Self::Programs => "the programs on the kernel",
        }
    }

    const fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Core => &["--package", "portfwd-common", "--lib", "--tests"],
            Self::Programs => &["--package", "portfwd-tests", "--test", "programs"],
        }
    }
}

/// A copy of the sources that git knows, with a target directory of its own; both stay for the next run.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

impl Copy {
    fn of_tree() -> Result<Self> {
        let folder = host::target_dir().join("mutants");
        let copy = Self {
            tree: folder.join("tree"),
            target: folder.join("target"),
        };
        sources::copy_to(&copy.tree)?;
        Ok(copy)
    }

    /// Changes a file, and returns what it was.
    fn put(&self, file: &str, change: impl FnOnce(&str) -> Result<String>) -> Result<String> {
        let path = self.tree.join(file);
        let before = fs::read_to_string(&path).with_context(|| format!("cannot read {file}"))?;
        sources::write_if_new(&path, change(&before)?.as_bytes())?;
        Ok(before)
    }

    /// Runs a suite, and returns the names of the tests that failed.
    fn failures(&self, suite: Suite) -> Result<Vec<String>> {
        let build = self.cargo(suite, &["--no-run"])?.status()?;
        if !build.success() {
            bail!("{} do not build", suite.title());
        }
        let output = self
            .cargo(suite, &["--no-fail-fast"])?
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .output()?;
        let report = String::from_utf8_lossy(&output.stdout);
        let failed = failed_tests(&report);
        ensure!(
            output.status.success() == failed.is_empty(),
            "{} ended with {} without a word on which test failed",
            suite.title(),
            output.status
        );
        Ok(failed)
    }

    fn cargo(&self, suite: Suite, options: &[&str]) -> Result<Command> {
        let mut cargo = host::cargo();
        cargo
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            .args(["test", "--quiet"])
            .args(suite.arguments())
            .args(options)
            // One line per test, whatever the runner would choose.
            .args(["--", "--format", "pretty"])
            .stdin(Stdio::null());
        host::as_root(&mut cargo)?;
        Ok(cargo)
    }
}

/// The tests that a report of the test runner calls failed.
fn failed_tests(report: &str) -> Vec<String> {
    report
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use xtask::workspace_root;

    use super::*;

    /// A mutant whose place or whose test is gone would be a bug that nobody tries any more.
    #[test]
    fn every_mutant_has_its_place_and_its_test() {
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        for mutant in &MUTANTS {
            let sound = read(&workspace_root().join(mutant.file));
            assert_ne!(mutant.introduced(&sound).unwrap(), sound, "{}", mutant.name);
            let (place, name) = mutant.killer.rsplit_once("::").unwrap();
            let place = place.trim_end_matches("::tests").replace("::", "/");
            let folder = match (mutant.suite, mutant.killer.contains("::tests::")) {
                (Suite::Core, true) => "portfwd-common/src",
                (Suite::Core, false) => "portfwd-common/tests/datapath",
                (Suite::Programs, _) => "tests/tests/programs",
            };
            let file = workspace_root()
                .join(folder)
                .join(place)
                .with_extension("rs");
            assert!(
                read(&file).contains(&format!("fn {name}(")),
                "{}",
                mutant.name
            );
        }
    }

    #[test]
    fn failed_tests_are_read_from_a_report() {
        let report =
            "running 2 tests\ntest a::b ... ok\ntest c::d ... FAILED\n\nfailures:\n    c::d\n";
        assert_eq!(failed_tests(report), ["c::d"]);
    }
}
