//! Changes against a model of the maps and a real state file.

use std::{path::Path, time::Duration};

use super::*;
use crate::ruleset::{RuleWords, Ticked, model::Model, movement::Opening};

const MAX_PORTS: u32 = 200_000;

struct World {
    directory: tempfile::TempDir,
    state: Option<State>,
    model: Model,
    engine: Engine,
    now: Now,
}

fn now() -> Now {
    Now {
        // A Monday.
        wall: "2026-11-23T12:00:00Z".parse().unwrap(),
        boot: Duration::from_secs(1_000),
    }
}

fn site<'a>(model: &'a mut Model, state: &'a State, now: Now) -> Site<'a> {
    Site {
        maps: model,
        state,
        now,
    }
}

fn wan() -> Vec<IpAddr> {
    vec!["203.0.113.1".parse().unwrap()]
}

fn spec(words: &str) -> RuleSpec {
    RuleSpec::parse(&RuleWords::line(words)).unwrap()
}

fn open(directory: &Path) -> State {
    State::open(&directory.join("state.redb")).unwrap()
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = open(directory.path());
        let mut model = Model::new(MAX_PORTS);
        let engine = Engine::adopt(site(&mut model, &state, now()), wan()).unwrap();
        Self {
            directory,
            state: Some(state),
            model,
            engine,
            now: now(),
        }
    }

    fn add(&mut self, words: &str) -> Result<u32> {
        let site = site(&mut self.model, self.state.as_ref().unwrap(), self.now);
        Ok(self.engine.add(spec(words), site)?.id)
    }

    fn remove(&mut self, selectors: &[&str]) -> Result<Vec<u32>> {
        let selectors: Vec<_> = selectors.iter().map(ToString::to_string).collect();
        let site = site(&mut self.model, self.state.as_ref().unwrap(), self.now);
        let removed = self.engine.remove(&selectors, &[], None, site)?;
        Ok(removed.into_iter().map(|rule| rule.id).collect())
    }

    fn change(&mut self, edits: Vec<Edit>) -> Result<Changed, Rejected> {
        let site = site(&mut self.model, self.state.as_ref().unwrap(), self.now);
        self.engine.change(edits, site)
    }

    /// So much time passes, by both clocks.
    fn pass(&mut self, seconds: i64) {
        self.set_clock(seconds);
        self.now.boot += Duration::from_secs(seconds.unsigned_abs());
    }

    /// Somebody sets the clock on the wall.
    fn set_clock(&mut self, seconds: i64) {
        self.now.wall += jiff::SignedDuration::from_secs(seconds);
    }

    fn tick(&mut self) -> Ticked {
        let site = site(&mut self.model, self.state.as_ref().unwrap(), self.now);
        self.engine.tick(site).unwrap()
    }

    fn due(&self) -> Option<u64> {
        Some(self.engine.next_due(self.now)?.as_secs())
    }

    /// Whether packets find a rule.
    fn is_open(&self, id: u32) -> bool {
        let rules = self.model.rules().unwrap();
        rules
            .iter()
            .any(|(_, rule)| rule.id == id && rule.takes_flows())
    }

    fn specs(&self) -> Vec<(u32, RuleSpec)> {
        let rules = self.engine.ruleset().iter();
        rules.map(|(id, spec)| (id, spec.clone())).collect()
    }

    fn restart(&mut self) {
        drop(self.state.take());
        let state = self.state.insert(open(self.directory.path()));
        let site = site(&mut self.model, state, self.now);
        self.engine = Engine::adopt(site, wan()).unwrap();
    }

    fn ids(&self) -> Vec<u32> {
        let stored: Vec<_> = self
            .state
            .as_ref()
            .unwrap()
            .rules()
            .unwrap()
            .iter()
            .map(|rule| rule.id)
            .collect();
        let known: Vec<_> = self.engine.ruleset().iter().map(|(id, _)| id).collect();
        let mut in_maps: Vec<_> = self
            .model
            .rules()
            .unwrap()
            .iter()
            .map(|(_, rule)| rule.id)
            .collect();
        in_maps.sort_unstable();
        in_maps.dedup();
        assert_eq!(
            (&stored, &in_maps),
            (&known, &known),
            "state file, maps and memory"
        );
        stored
    }
}

#[test]
fn rules_and_ids_outlive_the_daemon_and_keep_their_places() {
    let mut world = World::new();
    assert_eq!(world.add("tcp 80 10.0.0.2 web"), Ok(1));
    assert_eq!(world.add("both 1000-1999 10.0.0.3"), Ok(2));
    assert_eq!(world.add("udp 53 10.0.0.3"), Ok(3));
    assert_eq!(world.remove(&["3"]), Ok(vec![3]));
    let before = world.model.rules().unwrap();
    let cleared = world.model.cleared.len();
    world.restart();
    assert_eq!(world.model.rules().unwrap(), before);
    assert_eq!(world.model.cleared.len(), cleared, "no counter was zeroed");
    assert_eq!(world.ids(), [1, 2]);
    // Ids are never given twice, and the slot of the removed rule rests.
    assert_eq!(world.add("udp 53 10.0.0.3"), Ok(4));
    let fresh: Vec<_> = world
        .model
        .rules()
        .unwrap()
        .into_iter()
        .filter(|rule| !before.contains(rule))
        .collect();
    assert_eq!(fresh.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [5]);
    // After a reboot the maps are empty and the rules come back.
    world.model = Model::new(MAX_PORTS);
    world.restart();
    assert_eq!(world.ids(), [1, 2, 4]);
}

/// Seen by reading: where undoing failed, too, packets went over to the bank that was half undone, at once or with the next change.
#[test]
fn what_cannot_be_undone_is_undone_before_the_next_change() {
    for writes in 0.. {
        let mut world = World::new();
        world.add("tcp 80 10.0.0.2 web").unwrap();
        world.add("tcp 203.0.113.5:70-90 10.0.0.2:70-90").unwrap();
        let before = world.model.banks.clone();
        // The step, and the first one that undoes.
        (world.model.fail_after, world.model.failures) = (Some(writes), 2);
        let added = world.add("both 203.0.113.5:80 10.0.0.2");
        let has_failed_twice = world.model.fail_after.is_none();
        world.model.fail_after = None;
        if added.is_ok() {
            assert!(writes > 6, "{writes}");
            return;
        }
        assert!(has_failed_twice);
        let [found, undone] = [&world.model.banks[world.model.bank as usize], &before[0]];
        let is_new =
            |bank: &super::super::model::BankModel| bank.rules.values().any(|rule| rule.id == 3);
        assert!(
            found.listens == undone.listens || is_new(found),
            "half a change after {writes}"
        );
        // One of another address, and then all is as if nothing had been.
        assert_eq!(world.add("udp 203.0.113.6:53 10.0.0.3").unwrap(), 3);
        assert!(world.model.is_settled());
        world.remove(&["3"]).unwrap();
        assert_eq!(world.ids(), [1, 2]);
        let now = &world.model.banks[0];
        assert!(now.listens == before[0].listens && now.targets == before[0].targets);
        assert!(now.ports == before[0].ports);
    }
}

#[test]
fn a_failing_write_leaves_everything_as_it_was() {
    let mut world = World::new();
    world.add("tcp 80 10.0.0.2 web").unwrap();
    world.add("tcp 203.0.113.5:70-90 10.0.0.2:70-90").unwrap();
    let (rules, ports) = (world.model.rules().unwrap(), world.model.ports.clone());
    let (listens, targets) = (world.model.listens.clone(), world.model.targets.clone());
    let mut failures = 0;
    for writes in 0.. {
        world.model.fail_after = Some(writes);
        let added = world.add("both 203.0.113.5:80 10.0.0.2");
        world.model.fail_after = None;
        match added {
            Err(failure) => assert_eq!(
                (failure.kind, failure.error.as_str()),
                (Kind::Failed, "the kernel refuses")
            ),
            Ok(id) => {
                assert_eq!(id, 3);
                world.remove(&["3"]).unwrap();
                break;
            }
        }
        failures += 1;
        assert_eq!(world.ids(), [1, 2]);
        assert_eq!(world.model.rules().unwrap(), rules);
        assert!(world.model.is_settled());
        assert!(
            world.model.ports == ports
                && world.model.listens == listens
                && world.model.targets == targets
        );
    }
    assert!(failures > 6, "{failures}");
    let mut failures = 0;
    for writes in 0.. {
        world.model.fail_after = Some(writes);
        let removed = world.remove(&["web", "2"]);
        world.model.fail_after = None;
        if removed.is_ok() {
            break;
        }
        failures += 1;
        assert_eq!(world.ids(), [1, 2]);
        assert_eq!(world.model.rules().unwrap(), rules);
        assert!(world.model.is_settled());
        assert!(
            world.model.ports == ports
                && world.model.listens == listens
                && world.model.targets == targets
        );
    }
    assert!(failures > 6, "{failures}");
    assert!(world.ids().is_empty());
}

#[test]
fn refusals_change_nothing() {
    let mut world = World::new();
    world.add("tcp 80 10.0.0.2 web").unwrap();
    world.add("tcp 81 10.0.0.2").unwrap();
    let before = world.model.rules().unwrap();
    for (words, kind) in [
        ("tcp 80 10.0.0.3", Kind::Conflict),
        ("tcp 82 10.0.0.3 web", Kind::Conflict),
        ("tcp 82 203.0.113.1", Kind::Usage),
    ] {
        let failure = world.add(words).unwrap_err();
        assert_eq!(failure.kind, kind, "{words}: {failure}");
        assert!(failure.hint.is_some());
    }
    assert_eq!(
        world.remove(&["web", "nothing"]).unwrap_err().kind,
        Kind::NotFound
    );
    assert_eq!(world.model.rules().unwrap(), before);
    assert_eq!(world.ids(), [1, 2]);
    assert_eq!(world.remove(&["web", "1", "2"]), Ok(vec![1, 2]));
}

#[test]
fn a_transaction_happens_whole_or_not_at_all() {
    let mut world = World::new();
    for words in [
        "tcp 80 10.0.0.2 web",
        "both 1000-1999 10.0.0.3",
        "udp 53 10.0.0.4 dns",
    ] {
        world.add(words).unwrap();
    }
    let edits = || {
        vec![
            Edit::Remove {
                id: 2,
                flows: FlowPolicy::Drain,
            },
            Edit::Replace {
                id: 1,
                spec: spec("tcp 80 10.0.0.9 web"),
                flows: FlowPolicy::Keep,
            },
            // The name alone: nothing of it concerns packets.
            Edit::Replace {
                id: 3,
                spec: spec("udp 53 10.0.0.4 resolver"),
                flows: FlowPolicy::Kill,
            },
            Edit::Add(spec("tcp 1500 10.0.0.5")),
            Edit::Add(spec("udp 203.0.113.5:1000-1999 10.0.0.5 dns")),
        ]
    };
    let (rules, ports) = (world.model.rules().unwrap(), world.model.ports.clone());
    let (listens, targets) = (world.model.listens.clone(), world.model.targets.clone());
    let specs: Vec<_> = world.specs();
    let dns = rules.iter().find(|(_, rule)| rule.id == 3).copied();
    let changed = world.engine.try_change(edits(), now()).unwrap();
    assert_eq!(world.specs(), specs, "a trial changes nothing");
    let mut failures = 0;
    for writes in 0.. {
        world.model.fail_after = Some(writes);
        let done = world.change(edits());
        world.model.fail_after = None;
        if let Ok(done) = done {
            assert_eq!(done, changed);
            break;
        }
        failures += 1;
        assert_eq!(world.ids(), [1, 2, 3]);
        assert_eq!(world.specs(), specs);
        assert_eq!(world.model.rules().unwrap(), rules);
        assert!(world.model.is_settled());
        assert!(
            world.model.ports == ports
                && world.model.listens == listens
                && world.model.targets == targets
        );
    }
    assert!(failures > 8, "{failures}");
    assert_eq!(
        changed
            .removed
            .iter()
            .map(|rule| rule.id)
            .collect::<Vec<_>>(),
        [2]
    );
    assert_eq!(
        changed.added.iter().map(|rule| rule.id).collect::<Vec<_>>(),
        [4, 5]
    );
    let after = world.specs();
    assert_eq!(
        after.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [1, 3, 4, 5]
    );
    // The old slots of rule 1, and of TCP of rule 2, hold flows; rule 3 has not moved.
    assert_eq!(world.engine.draining().count(), 2);
    let now = world.model.rules().unwrap();
    assert!(now.contains(&dns.unwrap()));
    world.restart();
    assert_eq!(world.model.rules().unwrap(), now);
    assert_eq!(world.specs(), after);
    world.engine.release(|_| false, &mut world.model).unwrap();
    assert_eq!(world.engine.draining().count(), 0);
    assert_eq!(world.ids(), [1, 3, 4, 5]);
}

#[test]
fn what_is_removed_and_added_again_at_once_has_not_changed() {
    let mut world = World::new();
    world.add("tcp 80 10.0.0.2 web").unwrap();
    world.add("udp 53 10.0.0.4").unwrap();
    let before = (world.model.rules().unwrap(), world.model.generation);
    let again = |id, words| {
        let flows = FlowPolicy::Kill;
        [Edit::Remove { id, flows }, Edit::Add(spec(words))]
    };
    let edits = [again(1, "tcp 80 10.0.0.2 web"), again(2, "udp 53 10.0.0.4")];
    let changed = world.change(edits.concat()).unwrap();
    assert!(changed.is_empty());
    assert_eq!(
        (world.model.rules().unwrap(), world.model.generation),
        before
    );
}

/// A rule that comes back as it was while its flows go on has them again, and its counters.
#[test]
fn a_rule_that_comes_back_finds_its_flows() {
    let mut world = World::new();
    world.add("tcp 80 10.0.0.2 web").unwrap();
    let before = world.model.rules().unwrap();
    let replace = |words| {
        vec![Edit::Replace {
            id: 1,
            spec: spec(words),
            flows: FlowPolicy::Drain,
        }]
    };
    world.change(replace("tcp 80 10.0.0.3 web")).unwrap();
    assert_eq!(world.engine.draining().count(), 1);
    world.change(replace("tcp 80 10.0.0.2 web")).unwrap();
    let now = world.model.rules().unwrap();
    assert!(now.contains(&before[0]), "{now:?}");
    assert_eq!(world.engine.draining().count(), 1);
}

#[test]
fn every_edit_that_makes_no_sense_is_named() {
    let mut world = World::new();
    world.add("tcp 80 10.0.0.2 web").unwrap();
    world.add("tcp 443 10.0.0.2").unwrap();
    let before = (world.specs(), world.model.rules().unwrap());
    let flows = FlowPolicy::Drain;
    let edits = vec![
        Edit::Add(spec("tcp 80 10.0.0.3")),
        Edit::Add(spec("tcp 81 10.0.0.3 web")),
        Edit::Add(spec("tcp 82 10.0.0.3")),
        Edit::Replace {
            id: 2,
            spec: spec("tcp 82 10.0.0.4"),
            flows,
        },
    ];
    let Err(Rejected::Refused(refused)) = world.change(edits) else {
        panic!("not refused");
    };
    let lines: Vec<_> = refused
        .iter()
        .map(|(index, why)| format!("{index}: {why}"))
        .collect();
    assert_eq!(
        lines,
        [
            "0: rule 1 (web) listens on tcp 80 already",
            "1: the name web belongs to rule 1",
            "3: rule 3 listens on tcp 82 already",
        ]
    );
    assert_eq!((world.specs(), world.model.rules().unwrap()), before);
}

fn timed(words: RuleWords) -> Vec<Edit> {
    vec![Edit::Add(RuleSpec::parse(&words).unwrap())]
}

fn leased(expires: &str) -> RuleWords {
    RuleWords {
        expires: Some(expires.to_owned()),
        ..RuleWords::line("tcp 80 10.0.0.2 leased")
    }
}

#[test]
fn a_lease_ends_on_time_whatever_the_clock_on_the_wall_says() {
    let mut world = World::new();
    world.change(timed(leased("2h"))).unwrap();
    let (_, spec) = world.specs().remove(0);
    assert_eq!(
        spec.words().expires.as_deref(),
        Some("2026-11-23T14:00:00Z")
    );
    world.pass(3_600);
    world.set_clock(1_000_000);
    assert_eq!(world.tick(), Ticked::default());
    assert_eq!(world.due(), Some(3_600));
    world.set_clock(-2_000_000);
    world.restart();
    world.pass(3_599);
    assert_eq!(world.tick(), Ticked::default());
    assert_eq!(world.due(), Some(1));
    world.pass(1);
    assert_eq!(world.tick().ended.len(), 1);
    assert!(world.ids().is_empty());
    assert_eq!(world.due(), None);
    world.restart();
    assert!(world.ids().is_empty());
}

#[test]
fn a_point_in_time_follows_the_clock_on_the_wall() {
    let mut world = World::new();
    world
        .change(timed(leased("2026-11-23T13:00:00+01:00")))
        .unwrap_err();
    world
        .change(timed(leased("2026-11-23T13:00:01+01:00")))
        .unwrap();
    assert_eq!(world.due(), Some(1));
    world.set_clock(1);
    assert_eq!(world.tick().ended.len(), 1);
}

/// The comment of a rule that ends is changed: the lease goes on. Its end is changed: that counts.
#[test]
fn a_lease_is_that_of_the_last_end_that_was_said() {
    let mut world = World::new();
    world.change(timed(leased("2h"))).unwrap();
    let end = world.specs()[0].1.words().expires;
    let replace = |expires: Option<String>| {
        let spec = RuleSpec::parse(&RuleWords {
            comment: Some("said later".into()),
            expires,
            ..RuleWords::line("tcp 80 10.0.0.2 leased")
        });
        vec![Edit::Replace {
            id: 1,
            spec: spec.unwrap(),
            flows: FlowPolicy::Drain,
        }]
    };
    world.change(replace(end)).unwrap();
    world.set_clock(-100_000);
    assert_eq!(world.due(), Some(7_200));
    world.change(replace(Some("1h".into()))).unwrap();
    assert_eq!(world.due(), Some(3_600));
    world.change(replace(None)).unwrap();
    assert_eq!(world.due(), None);
}

#[test]
fn a_schedule_opens_and_closes_a_rule_in_its_place() {
    let mut world = World::new();
    let office = RuleWords {
        schedule: Some("mon-fri 08:00-18:00 Europe/Berlin".into()),
        ..RuleWords::line("both 80 10.0.0.2 office")
    };
    world.change(timed(office)).unwrap();
    let place = |world: &World| -> Vec<_> {
        let rules = world.model.rules().unwrap().into_iter();
        rules
            .map(|(slot, rule)| (slot, rule.counter_base))
            .collect()
    };
    let placed = place(&world);
    assert!(world.is_open(1));
    assert_eq!(world.due(), Some(5 * 3_600));
    world.pass(5 * 3_600);
    assert_eq!(world.tick().turned, [(1, Opening::Closed)]);
    assert!(!world.is_open(1));
    // TCP drains, UDP has ended.
    assert_eq!(world.engine.draining().count(), 1);
    // Its port stays its own.
    assert!(world.add("tcp 80 10.0.0.3").is_err());
    world.restart();
    assert!(!world.is_open(1) && world.tick() == Ticked::default());
    world.pass(14 * 3_600);
    assert_eq!(world.tick().turned, [(1, Opening::Open)]);
    assert!(world.is_open(1));
    assert_eq!(place(&world), placed);
    // It closes while no daemon runs.
    world.pass(12 * 3_600);
    world.restart();
    assert!(!world.is_open(1));
    assert_eq!(place(&world), placed);
}

#[test]
fn a_rule_that_is_not_enabled_is_in_nobodys_way_until_it_is() {
    let mut world = World::new();
    world.add("tcp 80 10.0.0.2 day").unwrap();
    let night = |enabled| {
        RuleSpec::parse(&RuleWords {
            enabled,
            ..RuleWords::line("tcp 80 10.0.0.3 night")
        })
        .unwrap()
    };
    world.change(vec![Edit::Add(night(Some(false)))]).unwrap();
    assert!(!world.is_open(2));
    let flows = FlowPolicy::Drain;
    let enable = |spec| Edit::Replace { id: 2, spec, flows };
    let refused = world.change(vec![enable(night(None))]);
    assert!(matches!(refused, Err(Rejected::Refused(_))));
    // One goes, the other comes: one change.
    world
        .change(vec![Edit::Remove { id: 1, flows }, enable(night(None))])
        .unwrap();
    assert!(world.is_open(2) && !world.is_open(1));
    world.change(vec![enable(night(Some(false)))]).unwrap();
    assert!(!world.is_open(2));
    world.restart();
    assert!(!world.is_open(2));
}
