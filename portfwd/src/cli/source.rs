//! Where the nouns read: the daemon, or, when none runs, pins and state file. Reading changes
//! neither.

use serde::de::DeserializeOwned;

use crate::{
    bpf::{Pins, Tables},
    config::schema::FileWords,
    control::{
        client::Client,
        protocol::{CountersReport, FlowReport, RuleReport, StatusReport},
    },
    failure::{Failure, Kind, Result},
    instance::Instance,
    report::{self, View},
    ruleset::Rule,
    state::State,
};

/// What an instance left on the machine.
#[derive(Debug)]
pub struct Remains {
    instance: Instance,
    rules: Vec<Rule>,
    tables: Option<Tables>,
    state: Option<State>,
}

/// Asks the daemon, or reads what it left. If there is nothing at all, no daemon runs, and that is
/// the failure.
pub async fn ask<T: DeserializeOwned>(
    instance: &Instance,
    path: &str,
    read: impl FnOnce(&Remains) -> Result<T>,
) -> Result<T> {
    match Client::connect(instance).await {
        Ok(mut client) => client.get(path).await,
        Err(failure) if failure.kind == Kind::NotRunning => match Remains::read(instance) {
            Ok(Some(remains)) => read(&remains),
            Ok(None) => Err(failure),
            Err(denied) if denied.kind == Kind::Permission => Err(denied),
            // A daemon that is starting has half of it in place.
            Err(unreadable) => Err(Failure {
                error: format!(
                    "{}, and what is there cannot be read: {}",
                    failure.error, unreadable.error
                ),
                ..failure
            }),
        },
        Err(failure) => Err(failure),
    }
}

impl Remains {
    /// `None` if there is nothing.
    fn read(instance: &Instance) -> Result<Option<Self>> {
        let state = State::read_copy(&instance.state_file()).map_err(needs_root)?;
        let pins = instance.pins();
        let tables = Pins::new(&pins)
            .exist()
            .then(|| Tables::open_pinned(&pins))
            .transpose();
        let tables = tables.map_err(|error| needs_root(error.into()))?;
        if state.is_none() && tables.is_none() {
            return Ok(None);
        }
        let rules = state.as_ref().map_or(Ok(Vec::new()), State::rules)?;
        Ok(Some(Self {
            instance: instance.clone(),
            rules,
            tables,
            state,
        }))
    }

    fn view(&self) -> Result<View<'_>> {
        let placed = self.tables.as_ref().map_or(Ok(Vec::new()), Tables::rules)?;
        Ok(View::new(
            self.rules.iter().map(|rule| (rule.id, &rule.spec)),
            placed.into_iter(),
        ))
    }

    /// `rules`.
    pub fn rules(&self) -> Result<Vec<RuleReport>> {
        report::rules(&self.view()?, self.tables.as_ref())
    }

    /// `save`; settings are those of a daemon.
    pub fn words(&self) -> Result<FileWords> {
        Ok(FileWords {
            gateway: None,
            rule: self
                .rules
                .iter()
                .map(|rule| rule.spec.words().of_file())
                .collect(),
        })
    }

    /// `flows`.
    pub fn flows(&self) -> Result<Vec<FlowReport>> {
        report::flows(&self.view()?, self.tables.as_ref())
    }

    /// `counters`.
    pub fn counters(&self) -> Result<CountersReport> {
        report::counters(&self.view()?, self.tables.as_ref())
    }

    /// `status`. Without pins nothing is attached, whatever was before.
    pub fn status(&self) -> Result<StatusReport> {
        let interfaces = match (&self.tables, &self.state) {
            (Some(_), Some(state)) => state.interfaces()?,
            (_, _) => Vec::new(),
        };
        report::status(&self.instance, interfaces, self.tables.as_ref(), None)
    }
}

fn needs_root(failure: Failure) -> Failure {
    match failure.kind {
        Kind::Permission => failure.hint("without a daemon only root can read it"),
        Kind::Failed | Kind::Usage | Kind::NotRunning | Kind::NotFound | Kind::Conflict => failure,
    }
}
