//! What the control server reads and changes: everything of a running gateway, behind one lock.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{
    listeners,
    protocol::{
        Added, CountersReport, DaemonReport, FlowReport, InterfaceReport, RemoveRequest, Replaced,
        RuleLine, RuleReport, StatusReport,
    },
};
use crate::{
    bpf::Tables,
    config::schema::FileWords,
    daemon::words::GatewayWords,
    failure::{Failure, Kind, Result},
    gateway_ports::GatewayPorts,
    instance::Instance,
    report::{self, View},
    resolve::Answers,
    ruleset::{
        Edit, Engine, FlowPolicy, Network, Rule, RuleFamily, RuleSpec, RuleWords, Site, lease::Now,
        movement::Opening,
    },
    state::{Pending, State},
};

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    instance: Instance,
    pub(super) engine: Engine,
    tables: Tables,
    state: State,
    interfaces: Vec<InterfaceReport>,
    started: Instant,
    /// Slots of rules that are gone while flows of theirs go on, and when that was first seen.
    draining: HashMap<u16, Instant>,
    /// Told when rules change, and with them what is due next.
    timing: Arc<Notify>,
    /// Rules whose names could not be resolved the last time, and why.
    unresolved: HashMap<u32, String>,
    /// Rules that the configuration has brought.
    pub(super) file_rules: BTreeSet<u32>,
    /// What an unconfirmed configuration has taken the place of.
    pub(super) pending: Option<Pending>,
    /// The settings it was started with, in words.
    settings: GatewayWords,
}

/// The gateway as the daemon's tasks share it. The lock is held for one request or one step of the
/// daemon at a time, and never across an await.
#[derive(Clone, Debug)]
pub struct Shared(Arc<Mutex<Gateway>>);

impl Shared {
    /// Shares a gateway.
    pub fn new(gateway: Gateway) -> Self {
        Self(Arc::new(Mutex::new(gateway)))
    }

    /// Waits for its turn.
    pub fn lock(&self) -> MutexGuard<'_, Gateway> {
        // A panic in another request has not made the maps worse than a crash would: the next start
        // adopts them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gateway {
    /// A gateway whose maps hold the rules of its state file from here on; `wan` are the own
    /// addresses of the WAN interfaces.
    pub fn new(
        instance: Instance,
        mut tables: Tables,
        state: State,
        wan: Vec<IpAddr>,
        settings: GatewayWords,
    ) -> Result<Self> {
        let engine = Engine::adopt(
            Site {
                maps: &mut tables,
                state: &state,
                now: Now::read()?,
            },
            wan,
        )?;
        let (file_rules, pending) = (state.file_rules()?, state.pending()?);
        Ok(Self {
            instance,
            engine,
            tables,
            state,
            interfaces: Vec::new(),
            started: Instant::now(),
            draining: HashMap::new(),
            timing: Arc::default(),
            unresolved: HashMap::new(),
            file_rules,
            pending,
            settings,
        })
    }

    /// The kernel's tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The kernel's tables, to write what is none of the rules' business.
    pub fn tables_mut(&mut self) -> &mut Tables {
        &mut self.tables
    }

    /// The rules.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The WAN interfaces have these own addresses now.
    pub fn set_wan_addresses(&mut self, addresses: Vec<IpAddr>) -> Result<()> {
        self.engine.set_wan_addresses(addresses, &mut self.tables)
    }

    /// The gateway has addresses in these networks now.
    pub fn set_networks(&mut self, networks: Vec<Network>) {
        self.engine.set_networks(networks);
    }

    /// How the interfaces are attached now; kept in the state file for `status` without daemon.
    pub fn set_interfaces(&mut self, interfaces: Vec<InterfaceReport>) -> Result<()> {
        if self.interfaces == interfaces {
            return Ok(());
        }
        let transaction = self.state.begin()?;
        transaction.set_interfaces(&interfaces)?;
        transaction.commit()?;
        self.interfaces = interfaces;
        Ok(())
    }

    /// `add`.
    pub fn add(&mut self, words: &RuleWords) -> Result<Added> {
        let spec = RuleSpec::parse(words)?;
        self.refuse_while_pending()?;
        self.check_source(&spec)?;
        let (engine, site) = self.at_work()?;
        let rule = engine.add(spec, site)?;
        let Rule { id, spec } = rule;
        let warnings = self.warnings(&spec);
        let rule = RuleLine::of(&Rule { id, spec });
        log::info!("rule {id} added: {rule}");
        for warning in &warnings {
            log::warn!("rule {id}: {warning}");
        }
        Ok(Added { rule, warnings })
    }

    /// `replace`: the rule keeps its number, and its name if it is not given another.
    pub fn replace(&mut self, selector: &str, words: &RuleWords) -> Result<Replaced> {
        let id = self.engine.ruleset().find(selector)?;
        let before = self.engine.ruleset().rule(id);
        let name = before.and_then(|spec| spec.name().map(str::to_owned));
        self.refuse_while_pending()?;
        let words = RuleWords {
            name: words.name.clone().or(name),
            ..words.clone()
        };
        let spec = RuleSpec::parse(&words)?;
        let before = before.cloned().unwrap_or_else(|| spec.clone());
        let flows = spec.flows().unwrap_or(FlowPolicy::Drain);
        self.check_source(&spec)?;
        let edit = Edit::Replace {
            id,
            spec: spec.clone(),
            flows,
        };
        let (engine, site) = self.at_work()?;
        engine.change(vec![edit], site)?;
        let warnings = self.warnings(&spec);
        let before = RuleLine::of(&Rule { id, spec: before });
        let rule = RuleLine::of(&Rule { id, spec });
        log::info!("rule {id} replaced: {before}, now {rule}; flows: {flows}");
        for warning in &warnings {
            log::warn!("rule {id}: {warning}");
        }
        Ok(Replaced {
            before,
            rule,
            warnings,
        })
    }

    /// The engine, and what it works on.
    pub(super) fn at_work(&mut self) -> Result<(&mut Engine, Site<'_>)> {
        self.timing.notify_one();
        let site = Site {
            maps: &mut self.tables,
            state: &self.state,
            now: Now::read()?,
        };
        Ok((&mut self.engine, site))
    }

    /// Gives names in rules that are to be applied the addresses at which rules have them already:
    /// where these lead is followed anyway.
    pub fn recall_names(&self, rules: &mut [RuleWords]) {
        let hosts = self.engine.ruleset().iter();
        let known: HashMap<_, _> = hosts
            .filter_map(|(_, spec)| Some((spec.host()?.clone(), spec.target().address)))
            .collect();
        for words in rules {
            words.resolved = None;
            if let Ok(spec) = RuleSpec::on_paper(words)
                && let Some(host) = spec.host()
            {
                words.resolved = known.get(host).copied();
            }
        }
    }

    /// The names that targets are.
    pub fn names(&self) -> BTreeSet<String> {
        let hosts = self.engine.ruleset().iter();
        hosts
            .filter_map(|(_, spec)| Some(spec.host()?.name().to_owned()))
            .collect()
    }

    /// Has rules follow their names, each as a change of its own. A rule whose name cannot be resolved stays as it is.
    pub fn follow_names(&mut self, answers: &Answers) {
        let mut unresolved = HashMap::new();
        for (id, spec, answer) in self.named(answers) {
            let followed = answer.and_then(|addresses| self.follow_name(id, &spec, &addresses));
            if let Err(reason) = followed {
                if self.unresolved.get(&id) != Some(&reason) {
                    let target = spec.target();
                    log::warn!("rule {id} goes on to {target}: {reason}");
                }
                unresolved.insert(id, reason);
            }
        }
        self.unresolved = unresolved;
    }

    /// Rules that are there now and whose names were asked for, with the answers.
    fn named(&self, answers: &Answers) -> Vec<(u32, RuleSpec, Result<Vec<IpAddr>, String>)> {
        let answered = |(id, spec): (u32, &RuleSpec)| {
            let name = spec.host()?.name();
            let answer = answers.get(name)?.clone();
            let answer = answer.map_err(|error| format!("{name} cannot be resolved: {error}"));
            Some((id, spec.clone(), answer))
        };
        self.engine.ruleset().iter().filter_map(answered).collect()
    }

    fn follow_name(
        &mut self,
        id: u32,
        spec: &RuleSpec,
        addresses: &[IpAddr],
    ) -> Result<(), String> {
        let Some(host) = spec.host() else {
            return Ok(());
        };
        let current = spec.target().address;
        let chosen = host.choose(addresses, Some(current));
        let address = chosen.ok_or_else(|| {
            let family = RuleFamily::from(spec.family()).word();
            format!("{host} has no {family} address any more")
        })?;
        if address == current {
            return Ok(());
        }
        let cannot = |why: &dyn fmt::Display| format!("{host} leads to {address} now, but {why}");
        let spec = spec.led_to(address).map_err(|refusal| cannot(&refusal))?;
        let flows = spec.flows().unwrap_or(FlowPolicy::Drain);
        let edit = Edit::Replace { id, spec, flows };
        let (engine, site) = self.at_work().map_err(|failure| cannot(&failure))?;
        let changed = engine.change(vec![edit], site);
        changed.map_err(|rejected| cannot(&Failure::from(rejected)))?;
        log::info!("rule {id}: {host} leads to {address} now, not to {current}; flows: {flows}");
        Ok(())
    }

    /// What the operator should know about a rule.
    fn warnings(&self, spec: &RuleSpec) -> Vec<String> {
        listeners::shadowed_by(spec, self.engine.wan_addresses()).unwrap_or_else(|error| {
            vec![format!(
                "whether this gateway listens on the port itself is not known: {error:#}"
            )]
        })
    }

    /// Refuses an address that is to stand for clients and has no port to give.
    pub(super) fn check_source(&self, spec: &RuleSpec) -> Result<()> {
        let Some(source) = spec.source().snat() else {
            return Ok(());
        };
        let ports = GatewayPorts::of(&self.tables, &self.tables.rules()?)?;
        for protocol in spec.protocol().protocols() {
            let kept = ports.of_address(source.address, *protocol);
            let (first, last) = source
                .ports
                .map_or((1, u16::MAX), |ports| (ports.first(), ports.last()));
            if (first..=last).all(|port| kept.is_taken(port)) {
                let error = format!(
                    "--snat {source} leaves no port to clients: this gateway uses them all itself"
                );
                let hint = "`sysctl net.ipv4.ip_local_port_range` shows what its own connections use, \
                     net.ipv4.ip_local_reserved_ports takes ports out of it";
                return Err(Failure::new(Kind::Conflict, error).hint(hint));
            }
        }
        Ok(())
    }

    /// `remove`: all or none.
    pub fn remove(&mut self, request: &RemoveRequest) -> Result<Vec<RuleLine>> {
        self.refuse_while_pending()?;
        let (engine, site) = self.at_work()?;
        let removed = engine.remove(&request.rules, &request.tags, request.flows, site)?;
        let lines: Vec<_> = removed.iter().map(RuleLine::of).collect();
        for rule in &lines {
            log::info!("rule {} removed: {rule}", rule.id);
        }
        Ok(lines)
    }

    /// Is told when what is due next may have changed.
    pub fn timing(&self) -> Arc<Notify> {
        Arc::clone(&self.timing)
    }

    /// Time until [`Self::tick`] has something to do, unless somebody sets the clock; `None` if
    /// nothing is timed.
    pub fn next_due(&self) -> Result<Option<Duration>> {
        let now = Now::read()?;
        let rollback = self
            .pending
            .as_ref()
            .map(|pending| pending.left(now))
            .transpose()?;
        Ok(self.engine.next_due(now).into_iter().chain(rollback).min())
    }

    /// Does what is due: rules end, open and close, and what nobody has confirmed is taken back.
    pub fn tick(&mut self) -> Result<()> {
        self.take_back_if_due()?;
        let site = Site {
            maps: &mut self.tables,
            state: &self.state,
            now: Now::read()?,
        };
        let ticked = self.engine.tick(site)?;
        for rule in &ticked.ended {
            log::info!("rule {} has expired: {}", rule.id, RuleLine::of(rule));
        }
        for (id, opening) in ticked.turned {
            let does = match opening {
                Opening::Open => "opens",
                Opening::Closed => "closes",
            };
            log::info!("rule {} {does}", self.engine.ruleset().label(id));
        }
        Ok(())
    }

    /// Frees what rules that are gone have left. `used` are the slots that flows named in a sweep
    /// that began at `began`.
    pub fn release(&mut self, used: &HashSet<u16>, began: Instant) -> Result<()> {
        let draining = &self.draining;
        // Of a rule that went while the sweep was under way, a flow may have begun behind its back.
        let is_in_use = |slot| {
            let went_before = draining.get(&slot).is_some_and(|seen| *seen < began);
            !went_before || used.contains(&slot)
        };
        self.engine.release(is_in_use, &mut self.tables)?;
        let now = Instant::now();
        self.draining = self
            .engine
            .draining()
            .map(|slot| (slot, self.draining.get(&slot).copied().unwrap_or(now)))
            .collect();
        Ok(())
    }

    /// `save`: everything that it takes to be as it is.
    pub fn words(&self) -> Result<FileWords> {
        let rules = self.engine.ruleset().iter();
        Ok(FileWords {
            gateway: Some(self.settings.clone()),
            rule: rules.map(|(_, spec)| spec.words().of_file()).collect(),
        })
    }

    /// `rules`.
    pub fn rules(&self) -> Result<Vec<RuleReport>> {
        let mut rules = report::rules(&self.view(), Some(&self.tables))?;
        for rule in &mut rules {
            if let Some(host) = &mut rule.host {
                host.error = self.unresolved.get(&rule.id).cloned();
            }
        }
        Ok(rules)
    }

    /// `flows`.
    pub fn flows(&self) -> Result<Vec<FlowReport>> {
        report::flows(&self.view(), Some(&self.tables))
    }

    /// `counters`.
    pub fn counters(&self) -> Result<CountersReport> {
        report::counters(&self.view(), Some(&self.tables))
    }

    /// `status`.
    pub fn status(&self) -> Result<StatusReport> {
        let daemon = DaemonReport {
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
        };
        report::status(
            &self.instance,
            self.interfaces.clone(),
            Some(&self.tables),
            Some(daemon),
        )
    }

    fn view(&self) -> View<'_> {
        View::new(self.engine.ruleset().iter(), self.engine.placed())
    }
}

impl RuleLine {
    /// A rule as users see it.
    pub fn of(Rule { id, spec }: &Rule) -> Self {
        let words = serde_json::to_value(spec.words().of_file()).unwrap_or_default();
        let words = words.as_object().cloned().unwrap_or_default();
        let mut options: BTreeMap<_, _> = words.into_iter().collect();
        options.retain(|key, _| {
            !matches!(
                key.as_str(),
                "proto" | "listen" | "target" | "name" | "masquerade" | "snat"
            )
        });
        Self {
            id: *id,
            name: spec.name().map(str::to_owned),
            proto: spec.protocol(),
            listen: spec.listen().to_string(),
            target: spec.target().to_string(),
            host: spec.host().map(ToString::to_string),
            source: spec.source().words(),
            options,
        }
    }
}
