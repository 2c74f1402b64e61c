//! Changes against a model of the maps and a real state file.

use std::path::Path;

use super::*;
use crate::ruleset::{RuleWords, model::Model};

const MAX_PORTS: u32 = 200_000;

struct World {
    directory: tempfile::TempDir,
    state: Option<State>,
    model: Model,
    engine: Engine,
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
        let engine = Engine::adopt(&state, &mut model, wan()).unwrap();
        Self {
            directory,
            state: Some(state),
            model,
            engine,
        }
    }

    fn add(&mut self, words: &str) -> Result<u32> {
        self.engine
            .add(spec(words), &mut self.model, self.state.as_ref().unwrap())
    }

    fn remove(&mut self, selectors: &[&str]) -> Result<Vec<u32>> {
        let selectors: Vec<_> = selectors.iter().map(ToString::to_string).collect();
        let removed = self.engine.remove(
            &selectors,
            None,
            &mut self.model,
            self.state.as_ref().unwrap(),
        )?;
        Ok(removed.into_iter().map(|rule| rule.id).collect())
    }

    fn change(&mut self, edits: Vec<Edit>) -> Result<Changed, Rejected> {
        let state = self.state.as_ref().unwrap();
        self.engine.change(edits, &mut self.model, state)
    }

    fn specs(&self) -> Vec<(u32, RuleSpec)> {
        let rules = self.engine.ruleset().iter();
        rules.map(|(id, spec)| (id, spec.clone())).collect()
    }

    fn restart(&mut self) {
        drop(self.state.take());
        let state = self.state.insert(open(self.directory.path()));
        self.engine = Engine::adopt(state, &mut self.model, wan()).unwrap();
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
    let changed = world.engine.try_change(edits()).unwrap();
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
