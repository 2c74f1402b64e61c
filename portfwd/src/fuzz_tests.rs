//! Control inputs that nobody thought of: configuration files, rules as words, bodies of requests. Those that did something new are
//! kept in `tests/corpus`.

use std::{
    any::type_name,
    cell::RefCell,
    collections::BTreeSet,
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher as _},
    panic::catch_unwind,
    path::Path,
};

use portfwd_common::model::corpus::{Corpus, Matter};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    config::{Document, schema::FileWords, to_toml},
    control::protocol::{ApplyRequest, RemoveRequest},
    ruleset::{RuleSpec, RuleWords},
};

/// Inputs that every day's run tries.
const USUAL: u64 = 4_000;
/// Longest input that is kept, bytes.
const LONGEST: usize = 1_000;

/// Pieces of what is written to portfwd.
const WORDS: [&[u8]; 24] = [
    b"[[rule]]\n",
    b"[gateway]\n",
    b"proto = \"tcp\"\n",
    b"listen = \"80\"\n",
    b"target = \"10.0.0.2\"\n",
    b"\"",
    b"\\u0000",
    b"{",
    b"}",
    b"[",
    b"]",
    b"=",
    b"\n",
    b"-",
    b":",
    b"65535",
    b"65536",
    b"[2001:db8::1]:80",
    b"1-65535",
    b"masquerade = true\n",
    b"from = [\"10.0.0.0/8\"]\n",
    b"200/s:5",
    b"\xc3\xa9",
    b"#",
];

fn seeds() -> Vec<Vec<u8>> {
    let sample = include_str!("../../packaging/portfwd.toml");
    // As it is, and with what it only explains switched on.
    let switched: String = sample
        .lines()
        .map(|line| format!("{}\n", line.trim_start_matches("# ")))
        .collect();
    let texts = [
        sample,
        &switched,
        "[[rule]]\nproto = \"both\"\nlisten = \"203.0.113.5:1000-1999\"\ntarget = \"10.0.0.2:5000-5999\"\n",
        "{\"proto\":\"udp\",\"listen\":\"[2001:db8::1]:53\",\"target\":\"dns.example\",\"masquerade\":true}",
        "{\"rules\":[{\"proto\":\"tcp\",\"listen\":\"80\",\"target\":\"10.0.0.2\",\"tags\":[\"web\"]}],\"flows\":\"keep\",\"confirm_s\":60}",
        "{\"rules\":[\"web\",\"3\"],\"tags\":[\"old\"],\"flows\":\"kill\"}",
        "tcp 80 10.0.0.2:8080",
        "both 203.0.113.5:1-65535 [2001:db8::2]",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

/// What an input did, as far as it shows: each thing by a number.
#[derive(Default)]
struct Things(BTreeSet<u64>);

impl Things {
    fn note(&mut self, thing: impl Hash) {
        let mut hasher = DefaultHasher::new();
        thing.hash(&mut hasher);
        self.0.insert(hasher.finish());
    }
}

/// How a message begins whatever the input: its first longer words that are not the input's own. What follows may be a list of all
/// that would be right, of which any part may be in the input.
fn gist<'a>(message: &'a str, input: &str) -> Vec<&'a str> {
    let words = message.split(|c: char| !c.is_ascii_alphabetic());
    words
        .filter(|word| word.len() > 3 && !input.contains(word))
        .take(2)
        .collect()
}

/// Reads an input in every way in which one comes in.
fn read(input: &[u8]) -> BTreeSet<u64> {
    let mut things = Things::default();
    read_request::<RuleWords>(input, &mut things, |words| vec![words]);
    read_request::<ApplyRequest>(input, &mut things, |request| request.rules);
    read_request::<RemoveRequest>(input, &mut things, |_| Vec::new());
    let text = String::from_utf8_lossy(input);
    let mut words = text.splitn(3, ' ');
    if let (Some(proto), Some(listen), Some(target)) = (words.next(), words.next(), words.next()) {
        settles(&RuleWords::new(proto, listen, target), &mut things);
    }
    read_file(&text, &mut things);
    things.0
}

/// The body of a request to the daemon, and the rules that are in it.
fn read_request<T: DeserializeOwned + Serialize + PartialEq + Debug>(
    input: &[u8],
    things: &mut Things,
    rules: impl Fn(T) -> Vec<RuleWords>,
) {
    let name = type_name::<T>();
    match serde_json::from_slice::<T>(input) {
        Ok(request) => {
            things.note((name, "is read"));
            let written = serde_json::to_vec(&request).expect("what was read can be written");
            let again: T = serde_json::from_slice(&written).expect("what was written can be read");
            assert_eq!(again, request);
            rules(request)
                .iter()
                .for_each(|words| settles(words, things));
        }
        Err(error) => {
            let input = String::from_utf8_lossy(input);
            things.note((name, gist(&error.to_string(), &input)));
        }
    }
}

fn read_file(text: &str, things: &mut Things) {
    let mut problems = Vec::new();
    let document = Document::parse(text, Path::new("p.toml"), &mut problems);
    for problem in &problems {
        things.note(("file", gist(&problem.error, text)));
    }
    if !problems.is_empty() {
        return;
    }
    let rule: Vec<_> = document
        .rules
        .iter()
        .map(|rule| rule.words.clone())
        .collect();
    rule.iter().for_each(|words| settles(words, things));
    let words = FileWords {
        gateway: None,
        rule: rule.clone(),
    };
    let written = to_toml(&words).expect("what was read can be written");
    let again = Document::parse(&written, Path::new("p.toml"), &mut problems);
    assert!(problems.is_empty(), "{written}: {problems:?}");
    let read: Vec<_> = again.rules.iter().map(|rule| rule.words.clone()).collect();
    assert_eq!(read, rule);
}

/// A rule that is accepted is the same when it is written down and read again.
fn settles(words: &RuleWords, things: &mut Things) {
    match RuleSpec::parse(words) {
        Ok(spec) => {
            let again = RuleSpec::parse(&spec.words());
            assert_eq!(again.as_ref().ok(), Some(&spec), "{words:?}");
            let said = serde_json::to_value(spec.words()).expect("words can be written");
            let said: Vec<_> = said
                .as_object()
                .into_iter()
                .flat_map(|o| o.keys())
                .collect();
            things.note(("rule", said));
        }
        Err(refusal) => {
            let shown = format!("{refusal:?}");
            things.note(("refused", shown.split([' ', '(']).next()));
        }
    }
}

#[test]
fn no_control_input_panics_and_what_is_accepted_reads_back() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let matter = Matter {
        seeds: seeds(),
        words: &WORDS,
        usual: USUAL,
    };
    let found = Corpus::new(folder, LONGEST).explore(matter, read);
    println!("{found:?}");
}

#[test]
fn an_input_that_fails_is_kept_and_tried_again_first() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = Corpus::new(folder.path().join("corpus"), LONGEST);
    let matter = || Matter {
        seeds: vec![b"begins well".to_vec()],
        words: &[b"fatal"],
        usual: 1_000,
    };
    let fails = |input: &[u8]| {
        assert!(!input.windows(5).any(|word| word == b"fatal"));
        BTreeSet::new()
    };
    let failed = catch_unwind(|| corpus.explore(matter(), fails));
    assert!(failed.is_err(), "no input had the word in it");
    let kept: Vec<_> = corpus.kept().into_values().collect();
    assert_eq!(kept.len(), 1);

    let tried = RefCell::new(Vec::new());
    let notes = |input: &[u8]| {
        tried.borrow_mut().push(input.to_vec());
        BTreeSet::new()
    };
    let found = corpus.explore(matter(), notes);
    assert_eq!(tried.borrow()[1], kept[0]);
    // What is not new is not kept.
    assert_eq!((found.new, corpus.kept().len()), (0, 1));
}
