//! Configurations, right and wrong.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};

use proptest::prelude::*;

use super::{schema::FileWords, *};

/// The mistakes in a text, a line each.
fn mistakes(text: &str) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.toml");
    fs::write(&path, text).unwrap();
    match Config::read(&path) {
        Ok(_) => Vec::new(),
        Err(problems) => {
            assert!(!problems.list.is_empty(), "{}", problems.failure);
            let line = |problem: &Problem| {
                let place = &problem.place;
                format!("{}:{}: {}", place.line, place.column, problem.error)
            };
            problems.list.iter().map(line).collect()
        }
    }
}

fn hints(text: &str) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.toml");
    fs::write(&path, text).unwrap();
    let problems = Config::read(&path).unwrap_err();
    problems
        .list
        .into_iter()
        .filter_map(|problem| problem.hint)
        .collect()
}

const RULES: &str = r#"
[gateway]
wan = ["eth0"]
lan = ["eth1"]

[[rule]]
name = "web"
proto = "tcp"
listen = "8080"
target = "10.0.0.2:80"
tags = ["shop"]

[[rule]]
proto = "udp"
listen = "203.0.113.5:5000-5099"
target = "10.0.0.3"
expires = 2030-12-31T23:59:59+01:00
"#;

#[test]
fn a_file_is_read_as_it_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.toml");
    fs::write(&path, RULES).unwrap();
    let config = Config::read(&path).unwrap();
    assert_eq!(config.gateway.wan, ["eth0"]);
    let words = config.words();
    assert_eq!(
        words[0],
        RuleWords {
            tags: vec!["shop".into()],
            ..RuleWords::line("tcp 8080 10.0.0.2:80 web")
        }
    );
    assert_eq!(
        words[1].expires.as_deref(),
        Some("2030-12-31T23:59:59+01:00")
    );
    assert!(
        config
            .check_gateway(&Instance::new(None, None).unwrap(), &path)
            .is_ok()
    );
}

#[test]
fn every_mistake_is_told_with_its_place() {
    let text = r#"
[gateway]
wna = ["eth0"]
max_flows = "many"
max_ports = -1

[[rule]]
name = "web"
proto = "tpc"
listen = "8080"
target = "10.0.0.2:80"

[[rule]]
proto = "tcp"
lisen = "8081"
target = "10.0.0.2"

[[rule]]
proto = 6
listen = "0"
target = "10.0.0.2"

[[rule]]
proto = "tcp"
  listen = "9-5"
target = "10.0.0.2"

[[rule]]
proto = "tcp"
listen = "80"
target = "10.0.0.2"
schedule = "mon 08:00-25:00"

[[rule]]
proto = "udp"
listen = "53"
target = "127.0.0.1"

[rul]
"#;
    assert_eq!(
        mistakes(text),
        [
            "3:1: [gateway] has no key \"wna\"",
            "4:13: max_flows: invalid type: string \"many\", expected u32",
            "5:13: max_ports: invalid value: integer `-1`, expected u32",
            "9:1: \"tpc\" is not a protocol",
            "13:1: [[rule]]: missing field `listen`",
            "15:1: [[rule]] has no key \"lisen\"",
            "19:9: proto: invalid type: integer `6`, expected a string",
            "23:1: \"9-5\" is not a port or a range of ports",
            "32:1: schedule \"mon 08:00-25:00\" is not understood",
            "37:1: TARGET 127.0.0.1 is not an address that packets are forwarded to (unspecified, loopback, link-local, multicast or reserved)",
            "39:2: a file has no key \"rul\"",
        ]
    );
    let hints = hints(text);
    assert_eq!(hints[0], "did you mean wan?");
    assert_eq!(hints[5], "did you mean listen?");
    assert_eq!(hints.last().unwrap(), "did you mean rule?");
}

#[test]
fn rules_in_each_others_way_are_told_with_both_places() {
    let rule = |listen: &str, name: &str| {
        format!(
            "[[rule]]\nname = \"{name}\"\nproto = \"tcp\"\nlisten = \"{listen}\"\ntarget = \"10.0.0.2\"\n"
        )
    };
    let text = [
        rule("80", "a"),
        rule("80", "b"),
        rule("90-99", "c"),
        rule("95-105", "d"),
        rule("1", "a"),
    ]
    .concat();
    let told: Vec<_> = mistakes(&text)
        .into_iter()
        .map(|line| {
            // The directory of a test is not always the same.
            let (head, tail) = line.split_once("the rule at ").unwrap();
            format!("{head}the rule at {}", tail.split_once("p.toml").unwrap().1)
        })
        .collect();
    assert_eq!(
        told,
        [
            "9:1: the rule at :1:1 listens on tcp 80 too",
            "19:1: tcp 95-105 overlaps the rule at :11:1, which listens on tcp 90-99",
            "22:1: the rule at :1:1 is called a too",
        ]
    );
}

#[test]
fn what_is_no_toml_is_told_with_its_place() {
    assert_eq!(mistakes("[[rule]\nproto = \"tcp\"\n").len(), 1);
    let told = mistakes("[gateway]\nwan = [\"eth0\"\n");
    assert!(told[0].starts_with("2:"), "{told:?}");
    assert_eq!(mistakes("rule = 7\ngateway = []\n").len(), 2);
}

#[test]
fn a_directory_is_read_in_the_order_of_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let missing = Config::read(path).unwrap_err();
    assert_eq!(missing.failure.kind, Kind::NotFound);
    fs::create_dir(path.join("conf.d")).unwrap();
    let rule = |port: u16| {
        format!("[[rule]]\nproto = \"tcp\"\nlisten = \"{port}\"\ntarget = \"10.0.0.2\"\n")
    };
    fs::write(path.join("portfwd.toml"), RULES).unwrap();
    fs::write(path.join("conf.d/20-b.toml"), rule(2)).unwrap();
    fs::write(path.join("conf.d/10-a.toml"), rule(1)).unwrap();
    fs::write(path.join("conf.d/.30-c.toml"), "nonsense").unwrap();
    fs::write(path.join("conf.d/30-c.toml~"), "nonsense").unwrap();
    let listens: Vec<_> = Config::read(path)
        .unwrap()
        .words()
        .into_iter()
        .map(|words| words.listen)
        .collect();
    assert_eq!(listens, ["8080", "203.0.113.5:5000-5099", "1", "2"]);
    fs::write(path.join("conf.d/30-c.toml"), "[gateway]\n").unwrap();
    let twice = Config::read(path).unwrap_err();
    assert_eq!(twice.list.len(), 1);
    assert!(
        twice.list[0].error.starts_with("[gateway] is in "),
        "{}",
        twice.list[0]
    );
}

#[test]
fn what_everybody_may_write_to_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (main, more) = (path.join("portfwd.toml"), path.join("conf.d"));
    fs::create_dir(&more).unwrap();
    let beside = more.join("10-a.toml");
    fs::write(&main, RULES).unwrap();
    fs::write(&beside, "").unwrap();
    Config::read(path).unwrap();
    for open in [&main, &beside, &more, &path.to_owned()] {
        let before = fs::metadata(open).unwrap().permissions();
        fs::set_permissions(open, Permissions::from_mode(before.mode() | 0o002)).unwrap();
        let failure = Config::read(path).unwrap_err().failure;
        assert_eq!(failure.kind, Kind::Permission);
        let name = format!("everybody may write to {},", open.display());
        assert!(failure.error.starts_with(&name), "{failure}");
        fs::set_permissions(open, before).unwrap();
    }
    // By its own name and by a link, it is the same file.
    let link = path.join("link.toml");
    symlink(&main, &link).unwrap();
    Config::read(&link).unwrap();
    fs::set_permissions(&main, Permissions::from_mode(0o666)).unwrap();
    for name in [&main, &link] {
        assert_eq!(
            Config::read(name).unwrap_err().failure.kind,
            Kind::Permission
        );
    }
}

#[test]
fn a_file_that_is_too_long_or_no_text_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("long.toml");
    fs::write(&path, vec![b'#'; MAX_FILE as usize + 1]).unwrap();
    assert_eq!(Config::read(&path).unwrap_err().failure.kind, Kind::Usage);
    fs::write(&path, [0xFF, 0xFE]).unwrap();
    assert_eq!(Config::read(&path).unwrap_err().failure.kind, Kind::Usage);
}

/// The sample with every key that stands behind a `#`.
fn sample() -> String {
    let live = |line: &'static str| {
        let key = line.strip_prefix('#').filter(|rest| !rest.starts_with(' '));
        key.unwrap_or(line)
    };
    schema::SAMPLE
        .lines()
        .map(live)
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_sample_has_every_key_and_makes_sense_as_it_is_and_in_full() {
    for text in [schema::SAMPLE.to_owned(), sample()] {
        assert_eq!(mistakes(&text), [] as [String; 0]);
        let read: toml::Table = text.parse().unwrap();
        let gateway: GatewayWords = read["gateway"].clone().try_into().unwrap();
        gateway.options(Instance::new(None, None).unwrap()).unwrap();
    }
    let read: toml::Table = sample().parse().unwrap();
    let keys = |value: &toml::Value| -> BTreeSet<String> {
        value.as_table().unwrap().keys().cloned().collect()
    };
    let known: BTreeSet<_> = schema::keys::<GatewayWords>().into_iter().collect();
    assert_eq!(keys(&read["gateway"]), known);
    let known: BTreeSet<_> = schema::keys::<RuleWords>().into_iter().collect();
    let mut used = BTreeSet::new();
    for rule in read["rule"].as_array().unwrap() {
        used.extend(keys(rule));
    }
    assert_eq!(used, known);
}

#[test]
fn the_schema_says_what_every_key_means_and_that_there_are_no_others() {
    let schema = serde_json::to_value(schema::schema()).unwrap();
    let definitions = schema["$defs"].as_object().unwrap();
    assert_eq!(definitions.len(), 2);
    for definition in definitions.values() {
        assert_eq!(definition["additionalProperties"], false);
        for (key, property) in definition["properties"].as_object().unwrap() {
            let description = property["description"].as_str().unwrap_or_default();
            assert!(!description.is_empty(), "{key}");
        }
    }
}

/// Words of a rule, most of them sensible.
fn words() -> impl Strategy<Value = RuleWords> {
    let of = |words: &'static [&'static str]| {
        prop::sample::select(words.to_vec()).prop_map(str::to_owned)
    };
    let option = |words| proptest::option::weighted(0.3, of(words));
    (
        (
            of(&["tcp", "udp", "both"]),
            1..200_u16,
            of(&["10.0.0.2", "10.0.0.3:99", "2001:db8::2"]),
        ),
        (
            option(&["a", "b", "web.1"]),
            option(&["keep", "drain", "kill"]),
            proptest::option::of(any::<bool>()),
        ),
        (
            option(&["a \"line\"", "ünïcode \\ it is", "#"]),
            prop::collection::vec(of(&["x", "y"]), 0..2),
        ),
        (
            option(&["2040-01-01T00:00:00Z"]),
            option(&["mon-fri 08:00-18:00 Europe/Berlin", "daily 22:00-06:00"]),
            any::<bool>(),
        ),
        proptest::option::weighted(
            0.2,
            prop::collection::vec(
                prop::sample::select(vec!["tcp/22", "udp/500-4500", "icmp"]),
                0..3,
            ),
        ),
    )
        .prop_map(
            |(
                (proto, port, target),
                (name, flows, enabled),
                (comment, tags),
                (expires, schedule, keeps_mss),
                rest,
            )| RuleWords {
                proto: rest.as_ref().map_or(proto, |_| "dmz".to_owned()),
                listen: rest
                    .as_ref()
                    .map_or(port.to_string(), |_| "rest".to_owned()),
                target: rest.as_ref().map_or(target, |_| "10.0.0.2".to_owned()),
                except: distinct(rest.unwrap_or_default()),
                name,
                flows,
                enabled,
                comment,
                tags,
                expires,
                schedule,
                mss_clamp: keeps_mss.then_some(false),
                ..RuleWords::default()
            },
        )
}

/// Each exception once, as a rule keeps them.
fn distinct(except: Vec<&str>) -> Vec<String> {
    let mut once: Vec<String> = Vec::new();
    for text in except {
        if !once.iter().any(|known| known == text) {
            once.push(text.to_owned());
        }
    }
    once
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(portfwd_common::model::effort::cases(200)))]

    /// What is saved reads back as the same rules in the same order.
    #[test]
    fn what_is_saved_reads_back(rules in prop::collection::vec(words(), 0..12)) {
        let mut ruleset = Ruleset::default();
        for (id, words) in (1..).zip(&rules) {
            let spec = RuleSpec::parse(words).unwrap();
            if ruleset.check(&spec, &[]).is_ok() {
                ruleset.insert(id, spec);
            }
        }
        let rule: Vec<_> = ruleset.iter().map(|(_, spec)| spec.words()).collect();
        let text = to_toml(&FileWords { gateway: None, rule: rule.clone() }).unwrap();
        let mut problems = Vec::new();
        let document = Document::parse(&text, Path::new("p.toml"), &mut problems);
        prop_assert!(problems.is_empty(), "{problems:?}");
        let read: Vec<_> = document.rules.iter().map(|rule| rule.words.clone()).collect();
        prop_assert_eq!(&read, &rule);
        let specs: Vec<_> = read.iter().map(|words| RuleSpec::parse(words).unwrap()).collect();
        let difference = crate::ruleset::difference::difference(&ruleset, &specs, None, |_| false);
        prop_assert!(difference.edits.is_empty());
    }

    #[test]
    fn no_text_panics(text in "\\PC*", bytes in prop::collection::vec("[a-z\\[\\]=\"0-9\\n .#-]{0,12}", 0..30)) {
        let mut problems = Vec::new();
        Document::parse(&text, Path::new("p.toml"), &mut problems);
        Document::parse(&bytes.concat(), Path::new("p.toml"), &mut problems);
        Document::parse(&format!("[[rule]]\n{}", bytes.concat()), Path::new("p.toml"), &mut problems);
    }
}
