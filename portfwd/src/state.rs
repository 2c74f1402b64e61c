//! The state file: the rules as the operator wrote them, and what must outlive the daemon. Every
//! change is on disk before it is acknowledged, whole or not at all.

mod file;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use jiff::Timestamp;
use redb::{ReadableTable, TableDefinition, TableError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use self::file::Store;
use crate::{
    control::protocol::InterfaceReport,
    failure::{Failure, Kind, Result},
    ruleset::{Rule, RuleSpec, RuleWords, lease::Lease},
};

/// Rules by id, as JSON of [`RuleWords`]: what the operator wrote stays readable.
const RULES: TableDefinition<u32, &str> = TableDefinition::new("rules");
/// Lengths of time that run, by rule, as JSON of [`Lease`].
const LEASES: TableDefinition<u32, &str> = TableDefinition::new("leases");
/// [`FORMAT_KEY`] and the other keys.
const NUMBERS: TableDefinition<&str, u32> = TableDefinition::new("numbers");
/// [`INTERFACES_KEY`], as JSON.
const REPORTS: TableDefinition<&str, &str> = TableDefinition::new("reports");

const FORMAT_KEY: &str = "format";
const NEXT_ID_KEY: &str = "next_id";
const CURSOR_KEY: &str = "slot_cursor";
const INTERFACES_KEY: &str = "interfaces";
const FILE_RULES_KEY: &str = "file_rules";
const PENDING_KEY: &str = "pending";

/// Where the file is.
const DIRECTORY: &str = "/var/lib/portfwd";
/// Format of the file; another one is refused.
const FORMAT: u32 = 1;

/// The open state file. Only one process has it open for writing: the daemon of the instance.
#[derive(Debug)]
pub struct State {
    database: Store,
}

/// What a configuration that waits to be confirmed has taken the place of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Until when it waits, as long as the machine is not restarted.
    pub lease: Lease,
    /// The same by the clock on the wall, computed at the beginning: what counts after a restart.
    pub deadline: Timestamp,
    /// The rules before, by number.
    pub rules: BTreeMap<u32, RuleWords>,
    /// Those of them that the configuration had brought.
    pub file_rules: BTreeSet<u32>,
}

/// A transaction that is on disk once committed, and never happened if dropped.
pub struct Transaction {
    inner: redb::WriteTransaction,
}

/// Wraps redb's many error types.
fn failed<E: Into<redb::Error>>(doing: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| {
        let error = error.into();
        let failure = Failure::during(doing, &error);
        if let redb::Error::Io(error) = &error
            && let Some(advice) = Failure::advice(Path::new(DIRECTORY), error)
        {
            return failure.hint(format!("nothing is changed; {advice}"));
        }
        failure
    }
}

impl State {
    /// Opens the file, which is made if it does not exist, for a daemon. Refused while another
    /// daemon has it.
    pub fn open(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(|error| {
                let failure = Failure::during(format!("make {}", directory.display()), &error);
                Failure {
                    hint: Failure::advice(directory, &error),
                    ..failure
                }
            })?;
        }
        let database = Store::open(path)?;
        let state = Self { database };
        state.check_format(path)?;
        Ok(state)
    }

    /// Reads a copy of the file without touching it, for when no daemon runs. `None` if there is no
    /// file.
    pub fn read_copy(path: &Path) -> Result<Option<Self>> {
        let bytes = match file::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::during(format!("read {}", path.display()), &error)),
        };
        let database = Store::copy(path, &bytes)?;
        let state = Self { database };
        state.check_format(path)?;
        Ok(Some(state))
    }

    /// A new file gets its format, one of another format is refused.
    fn check_format(&self, path: &Path) -> Result<()> {
        match self.number(FORMAT_KEY)? {
            Some(FORMAT) => Ok(()),
            Some(other) => Err(Failure::new(
                Kind::Failed,
                format!("{} has format {other}, not {FORMAT}", path.display()),
            )
            .hint(
                "it was written by another version of portfwd: run that one, or move the file away",
            )),
            None => {
                let transaction = self.begin()?;
                transaction.set_number(FORMAT_KEY, FORMAT)?;
                transaction.commit()
            }
        }
    }

    /// Begins a change.
    pub fn begin(&self) -> Result<Transaction> {
        Ok(Transaction {
            inner: self
                .database
                .begin_write()
                .map_err(failed("write the state file"))?,
        })
    }

    /// All rules by id.
    pub fn rules(&self) -> Result<Vec<Rule>> {
        let read = self
            .database
            .begin_read()
            .map_err(failed("read the state file"))?;
        let table = match read.open_table(RULES) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed("read the rules")(error)),
        };
        let mut rules = Vec::new();
        for entry in table.iter().map_err(failed("read the rules"))? {
            let (id, text) = entry.map_err(failed("read the rules"))?;
            rules.push(Rule {
                id: id.value(),
                spec: parse(id.value(), text.value())?,
            });
        }
        Ok(rules)
    }

    /// Lengths of time that run, by rule.
    pub fn leases(&self) -> Result<Vec<(u32, Lease)>> {
        let read = self
            .database
            .begin_read()
            .map_err(failed("read the state file"))?;
        let table = match read.open_table(LEASES) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed("read the leases")(error)),
        };
        let mut leases = Vec::new();
        for entry in table.iter().map_err(failed("read the leases"))? {
            let (id, text) = entry.map_err(failed("read the leases"))?;
            let lease = serde_json::from_str(text.value())
                .map_err(|error| Failure::during("read the leases in the state file", &error))?;
            leases.push((id.value(), lease));
        }
        Ok(leases)
    }

    /// The id that the next rule gets.
    pub fn next_id(&self) -> Result<u32> {
        Ok(self.number(NEXT_ID_KEY)?.unwrap_or(1))
    }

    /// The slot of RULES that was given out last.
    pub fn slot_cursor(&self) -> Result<u16> {
        Ok(self
            .number(CURSOR_KEY)?
            .and_then(|slot| u16::try_from(slot).ok())
            .unwrap_or(0))
    }

    /// Ids of the rules that the configuration has brought.
    pub fn file_rules(&self) -> Result<BTreeSet<u32>> {
        Ok(self.report(FILE_RULES_KEY)?.unwrap_or_default())
    }

    /// The configuration that waits to be confirmed, and what was before.
    pub fn pending(&self) -> Result<Option<Pending>> {
        Ok(self.report::<Option<Pending>>(PENDING_KEY)?.flatten())
    }

    fn report<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let read = self
            .database
            .begin_read()
            .map_err(failed("read the state file"))?;
        let table = match read.open_table(REPORTS) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(failed("read the state file")(error)),
        };
        let text = table.get(key).map_err(failed("read the state file"))?;
        text.map(|text| serde_json::from_str(text.value()))
            .transpose()
            .map_err(|error| Failure::during(format!("read {key} in the state file"), &error))
    }

    /// The interfaces as the daemon last attached to them.
    pub fn interfaces(&self) -> Result<Vec<InterfaceReport>> {
        let read = self
            .database
            .begin_read()
            .map_err(failed("read the state file"))?;
        let table = match read.open_table(REPORTS) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed("read the interfaces")(error)),
        };
        let Some(text) = table
            .get(INTERFACES_KEY)
            .map_err(failed("read the interfaces"))?
        else {
            return Ok(Vec::new());
        };
        serde_json::from_str(text.value())
            .map_err(|error| Failure::during("read the interfaces in the state file", &error))
    }

    fn number(&self, key: &str) -> Result<Option<u32>> {
        let read = self
            .database
            .begin_read()
            .map_err(failed("read the state file"))?;
        match read.open_table(NUMBERS) {
            Ok(table) => Ok(table
                .get(key)
                .map_err(failed("read the state file"))?
                .map(|number| number.value())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(failed("read the state file")(error)),
        }
    }
}

impl Transaction {
    /// Stores rules, each in place of what its id said before.
    pub fn store_rules<'a>(&self, rules: impl Iterator<Item = &'a Rule>) -> Result<()> {
        let mut table = self
            .inner
            .open_table(RULES)
            .map_err(failed("store the rules"))?;
        for rule in rules {
            let text = serde_json::to_string(&rule.spec.words())
                .map_err(|error| Failure::during("store the rules", &error))?;
            table
                .insert(rule.id, text.as_str())
                .map_err(failed("store the rules"))?;
        }
        Ok(())
    }

    /// Removes rules.
    pub fn remove_rules(&self, ids: impl Iterator<Item = u32>) -> Result<()> {
        let mut table = self
            .inner
            .open_table(RULES)
            .map_err(failed("remove the rules"))?;
        for id in ids {
            table.remove(id).map_err(failed("remove the rules"))?;
        }
        Ok(())
    }

    /// Stores or forgets lengths of time that run.
    pub fn set_leases(&self, leases: &[(u32, Option<Lease>)]) -> Result<()> {
        if leases.is_empty() {
            return Ok(());
        }
        let mut table = self
            .inner
            .open_table(LEASES)
            .map_err(failed("store the leases"))?;
        for (id, lease) in leases {
            let Some(lease) = lease else {
                table.remove(id).map_err(failed("store the leases"))?;
                continue;
            };
            let text = serde_json::to_string(lease)
                .map_err(|error| Failure::during("store the leases", &error))?;
            table
                .insert(id, text.as_str())
                .map_err(failed("store the leases"))?;
        }
        Ok(())
    }

    /// Stores the id that the next rule gets.
    pub fn set_next_id(&self, id: u32) -> Result<()> {
        self.set_number(NEXT_ID_KEY, id)
    }

    /// Stores the slot of RULES that was given out last.
    pub fn set_slot_cursor(&self, slot: u16) -> Result<()> {
        self.set_number(CURSOR_KEY, u32::from(slot))
    }

    /// Stores which rules the configuration has brought.
    pub fn set_file_rules(&self, ids: &BTreeSet<u32>) -> Result<()> {
        self.set_report(FILE_RULES_KEY, ids)
    }

    /// Stores what waits to be confirmed.
    pub fn set_pending(&self, pending: Option<&Pending>) -> Result<()> {
        self.set_report(PENDING_KEY, &pending)
    }

    fn set_report(&self, key: &str, report: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(report)
            .map_err(|error| Failure::during(format!("store {key}"), &error))?;
        let mut table = self
            .inner
            .open_table(REPORTS)
            .map_err(failed("write the state file"))?;
        table
            .insert(key, text.as_str())
            .map_err(failed("write the state file"))?;
        Ok(())
    }

    /// Stores how the interfaces are attached, for `status` without daemon.
    pub fn set_interfaces(&self, interfaces: &[InterfaceReport]) -> Result<()> {
        let text = serde_json::to_string(interfaces)
            .map_err(|error| Failure::during("store the interfaces", &error))?;
        let mut table = self
            .inner
            .open_table(REPORTS)
            .map_err(failed("store the interfaces"))?;
        table
            .insert(INTERFACES_KEY, text.as_str())
            .map_err(failed("store the interfaces"))?;
        Ok(())
    }

    fn set_number(&self, key: &str, number: u32) -> Result<()> {
        let mut table = self
            .inner
            .open_table(NUMBERS)
            .map_err(failed("write the state file"))?;
        table
            .insert(key, number)
            .map_err(failed("write the state file"))?;
        Ok(())
    }

    /// Puts it on disk.
    pub fn commit(self) -> Result<()> {
        self.inner.commit().map_err(failed("write the state file"))
    }
}

fn parse(id: u32, text: &str) -> Result<RuleSpec> {
    let damaged = |error: &dyn std::error::Error| {
        Failure::new(
            Kind::Failed,
            format!("rule {id} in the state file is damaged: {error}"),
        )
    };
    let words: RuleWords = serde_json::from_str(text).map_err(|error| damaged(&error))?;
    RuleSpec::parse(&words).map_err(|refusal| damaged(&refusal))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(id: u32, line: &str) -> Rule {
        Rule {
            id,
            spec: RuleSpec::parse(&RuleWords::line(line)).unwrap(),
        }
    }

    fn store(state: &State, rules: &[Rule]) {
        let transaction = state.begin().unwrap();
        transaction.store_rules(rules.iter()).unwrap();
        let last = rules.iter().map(|rule| rule.id).max().unwrap();
        transaction.set_next_id(last + 1).unwrap();
        transaction.set_slot_cursor(7).unwrap();
        transaction.commit().unwrap();
    }

    #[test]
    fn a_link_in_the_place_of_the_file_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (elsewhere, path) = (
            directory.path().join("elsewhere.redb"),
            directory.path().join("default.redb"),
        );
        store(
            &State::open(&elsewhere).unwrap(),
            &[rule(1, "tcp 80 10.0.0.2")],
        );
        let before = fs::read(&elsewhere).unwrap();
        for leads_to in [elsewhere.clone(), directory.path().join("nowhere")] {
            std::os::unix::fs::symlink(&leads_to, &path).unwrap();
            assert!(State::read_copy(&path).is_err(), "{leads_to:?}");
            let opened = State::open(&path);
            // A link that leads nowhere is none that rules are written to either.
            if leads_to == elsewhere {
                assert!(opened.is_err());
            }
            assert!(!directory.path().join("nowhere").exists());
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs::read(&elsewhere).unwrap(), before);
    }

    #[test]
    fn what_was_committed_is_there_after_reopening_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/default.redb");
        let rules = [
            rule(1, "tcp 80 10.0.0.2 web"),
            rule(2, "both 1000-1999 [2001:db8::2]:2000-2999"),
            rule(9, "udp 203.0.113.5:53 10.0.0.3"),
        ];
        let state = State::open(&path).unwrap();
        assert_eq!(
            (
                state.rules().unwrap(),
                state.next_id().unwrap(),
                state.slot_cursor().unwrap()
            ),
            (vec![], 1, 0)
        );
        store(&state, &rules);
        let dropped = state.begin().unwrap();
        dropped.remove_rules([1].into_iter()).unwrap();
        drop(dropped);
        drop(state);

        let state = State::open(&path).unwrap();
        assert_eq!(
            (state.next_id().unwrap(), state.slot_cursor().unwrap()),
            (10, 7)
        );
        assert_eq!(state.rules().unwrap(), rules);
        let transaction = state.begin().unwrap();
        transaction.remove_rules([2].into_iter()).unwrap();
        transaction.commit().unwrap();
        assert_eq!(state.rules().unwrap(), [rules[0].clone(), rules[2].clone()]);
        assert_eq!(state.next_id().unwrap(), 10);
    }

    #[test]
    fn a_second_daemon_is_refused_and_a_reader_disturbs_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("default.redb");
        assert!(State::read_copy(&path).unwrap().is_none());
        let state = State::open(&path).unwrap();
        let rules = [rule(1, "tcp 80 10.0.0.2")];
        store(&state, &rules);
        assert_eq!(State::open(&path).unwrap_err().kind, Kind::Conflict);
        // The file is as a killed daemon leaves it: open, not shut down.
        let before = fs::read(&path).unwrap();
        let copy = State::read_copy(&path).unwrap().unwrap();
        assert_eq!(copy.rules().unwrap(), rules);
        assert_eq!(fs::read(&path).unwrap(), before);
    }

    #[test]
    fn interfaces_are_kept_for_status() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(&directory.path().join("default.redb")).unwrap();
        assert_eq!(state.interfaces().unwrap(), []);
        let interface = InterfaceReport {
            name: "eth0".into(),
            role: "wan".into(),
            mode: "tc".into(),
            reason: "forced".into(),
        };
        let transaction = state.begin().unwrap();
        transaction
            .set_interfaces(std::slice::from_ref(&interface))
            .unwrap();
        transaction.commit().unwrap();
        assert_eq!(state.interfaces().unwrap(), [interface]);
    }
}
