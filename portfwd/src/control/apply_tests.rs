//! What is said of a set of rules beforehand, and what becomes of it.

use std::{collections::BTreeSet, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::{
    ruleset::{Site, model::Model},
    state::State,
};

const MAX_PORTS: u32 = 40;

fn now() -> Now {
    Now {
        wall: "2026-11-23T12:00:00Z".parse().unwrap(),
        boot: Duration::from_secs(1_000),
    }
}

/// Rules that get into each other's way, and some that make no sense.
fn words() -> impl Strategy<Value = RuleWords> {
    let listen = prop_oneof![
        6 => (1..8_u16).prop_map(|port| port.to_string()),
        2 => (1..8_u16, 0..20_u16).prop_map(|(first, more)| format!("{first}-{}", first + more)),
        1 => (1..4_u16).prop_map(|port| format!("203.0.113.5:{port}")),
        1 => Just("0".to_owned()),
    ];
    let text = |words: &'static [&'static str]| {
        prop::sample::select(words.to_vec()).prop_map(str::to_owned)
    };
    (
        text(&["tcp", "tcp", "udp", "both"]),
        listen,
        text(&["10.0.0.2", "10.0.0.3", "2001:db8::2", "127.0.0.1"]),
        proptest::option::of(text(&["a", "b", "c", "A"])),
        proptest::option::weighted(0.3, any::<bool>()),
        proptest::option::weighted(
            0.1,
            text(&["2h", "2020-01-01T00:00:00Z", "2040-01-01T00:00:00Z"]),
        ),
    )
        .prop_map(
            |(proto, listen, target, name, enabled, expires)| RuleWords {
                name,
                enabled,
                expires,
                ..RuleWords::new(&proto, &listen, &target)
            },
        )
}

/// Whether all rules were taken; which of two that are in each other's way is named may differ.
fn is_taken(done: &Result<Applied>) -> bool {
    done.as_ref()
        .is_ok_and(|applied| applied.refused.is_empty())
}

fn outcome(
    engine: &mut Engine,
    request: &ApplyRequest,
    change: impl FnOnce(&mut Engine, Vec<Edit>) -> Result<Changed, Rejected>,
) -> Result<Applied> {
    match Comparison::of(request, engine, &BTreeSet::new(), now()) {
        Ok(comparison) => {
            let before = engine.ruleset().len();
            let done = change(engine, comparison.edits());
            comparison.outcome(done, before)
        }
        Err(refused) => Ok(Applied {
            refused,
            ..Applied::default()
        }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(portfwd_common::model::effort::cases(200)))]

    #[test]
    fn what_the_check_says_of_a_set_is_what_applying_it_does(
        before in prop::collection::vec(words(), 0..6), after in prop::collection::vec(words(), 0..6),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(&directory.path().join("state.redb")).unwrap();
        // Places for the old rules beside those of the new.
        let mut model = Model::new(10 * MAX_PORTS);
        macro_rules! site {
            () => {
                Site { maps: &mut model, state: &state, now: now() }
            };
        }
        let mut engine = Engine::adopt(site!(), Vec::new()).unwrap();
        let specs = before.iter().filter_map(|words| RuleSpec::parse(words).ok());
        for spec in specs {
            // Some are in the way of others.
            drop(engine.change(vec![Edit::Add(spec)], site!()));
        }
        let request = ApplyRequest { rules: after, ..ApplyRequest::default() };
        let mut paper = Engine::on_paper(None, now(), 10 * MAX_PORTS, Vec::new()).unwrap();
        let checked = outcome(&mut paper, &request, |engine, edits| engine.try_change(edits, now()));
        let foretold = outcome(&mut engine, &request, |engine, edits| engine.try_change(edits, now()));
        let done = outcome(&mut engine, &request, |engine, edits| engine.change(edits, site!()));
        prop_assert_eq!(is_taken(&checked), is_taken(&done));
        prop_assert_eq!(&foretold, &done);
        if is_taken(&done) {
            let again = outcome(&mut engine, &request, |engine, edits| engine.try_change(edits, now()));
            let again = again.unwrap();
            prop_assert!(again.added.is_empty() && again.replaced.is_empty() && again.removed.is_empty());
        }
    }
}
