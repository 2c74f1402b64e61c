//! Control inputs that nobody thought of: configuration files, rules as words, requests.

use std::path::Path;

use portfwd_common::model::mutation::{Random, Run, mutate};

use crate::{
    config::{Document, schema::FileWords, to_toml},
    ruleset::{RuleSpec, RuleWords},
};

/// Inputs that every day's run tries.
const USUAL: u64 = 4_000;

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
        "tcp 80 10.0.0.2:8080",
        "both 203.0.113.5:1-65535 [2001:db8::2]",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

/// Reads an input in every way in which one comes in.
fn read(input: &[u8]) {
    if let Ok(words) = serde_json::from_slice::<RuleWords>(input) {
        settles(&words);
    }
    let text = String::from_utf8_lossy(input);
    let mut words = text.splitn(3, ' ');
    if let (Some(proto), Some(listen), Some(target)) = (words.next(), words.next(), words.next()) {
        settles(&RuleWords::new(proto, listen, target));
    }
    let mut problems = Vec::new();
    let document = Document::parse(&text, Path::new("p.toml"), &mut problems);
    if !problems.is_empty() {
        return;
    }
    let rule: Vec<_> = document
        .rules
        .iter()
        .map(|rule| rule.words.clone())
        .collect();
    rule.iter().for_each(settles);
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
fn settles(words: &RuleWords) {
    if let Ok(spec) = RuleSpec::parse(words) {
        let again = RuleSpec::parse(&spec.words());
        assert_eq!(again.as_ref().ok(), Some(&spec), "{words:?}");
    }
}

struct Guard<'a>(&'a [u8]);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input was {:?}", String::from_utf8_lossy(self.0));
        }
    }
}

#[test]
fn no_control_input_panics_and_what_is_accepted_reads_back() {
    let seeds = seeds();
    for seed in &seeds {
        read(seed);
    }
    let mut rest = Run::of_environment(USUAL);
    let mut random = Random::new(rest.seed());
    let mut inputs = 0_u64;
    while rest.goes_on() {
        inputs += 1;
        let mut input = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        mutate(&mut random, &mut input, other, &WORDS);
        let guard = Guard(&input);
        read(&input);
        drop(guard);
    }
    println!("{inputs} inputs");
}
