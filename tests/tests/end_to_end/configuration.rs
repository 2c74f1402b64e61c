//! Rules from a file: checked, compared, applied, saved.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::{DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, wait_until};
use portfwd_tests::{Daemon, Family, LabOptions, udp};
use rstest::rstest;
use tempfile::TempDir;

use crate::scene::Scene;

/// A directory with a configuration.
pub struct Files(TempDir);

impl Files {
    /// An empty one.
    pub fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    /// Writes `portfwd.toml`, and returns its path.
    pub fn write(&self, text: &str) -> Result<String> {
        let path = self.0.path().join("portfwd.toml");
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }
}

/// A rule of a file: `NAME PROTO LISTEN TARGET`, then lines of options.
pub fn rule(words: &str, options: &str) -> String {
    let words: Vec<_> = words.split(' ').collect();
    format!(
        "[[rule]]\nname = \"{}\"\nproto = \"{}\"\nlisten = \"{}\"\ntarget = \"{}\"\n{options}\n",
        words[0], words[1], words[2], words[3]
    )
}

/// The names of the rules, and their targets.
pub fn targets(daemon: &Daemon) -> Result<BTreeMap<String, String>> {
    let rules = daemon.rules()?.into_iter();
    rules
        .map(|rule| Ok((rule.name.context("a rule without name")?, rule.target)))
        .collect()
}

fn endpoint(port: u16) -> SocketAddr {
    GATEWAY_WAN.endpoint(Family::V4, port)
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn applying_a_file_changes_what_differs_and_nothing_else(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let (daemon, files) = (&scene.daemon, Files::new()?);
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 81)?;
    let before = [
        rule("stays udp 8081 10.2.0.2:81", ""),
        rule("moves udp 8082 10.2.0.2:81", ""),
        rule("goes udp 8083 10.2.0.2:81", ""),
    ];
    let path = files.write(&before.concat())?;
    daemon.ok(&["apply", &path])?;
    let ids: BTreeMap<_, _> = daemon
        .rules()?
        .into_iter()
        .map(|rule| (rule.name, rule.id))
        .collect();
    let stream = udp::Stream::start(&scene.lab.client, endpoint(8081), 1000)?;
    stream.wait_for_more(100)?;

    daemon.add("by-hand", "udp", "9000", "10.2.0.2:81")?;
    let after = [
        rule("comes udp 8084 10.2.0.2:81", "comment = \"new\""),
        rule("moves udp 8082 10.2.0.2:82", ""),
        rule("stays udp 8081 10.2.0.2:81", ""),
    ];
    let path = files.write(&after.concat())?;
    let foretold = daemon.json(&["diff", &path])?;
    assert_eq!(daemon.json(&["apply", "--dry-run", &path])?, foretold);
    assert_eq!(
        daemon.rules()?.len(),
        4,
        "only looking has changed something"
    );
    let kept = daemon.json(&["apply", "--keep-others", "--dry-run", &path])?;
    assert_eq!(kept["removed"].as_array().map(Vec::len), Some(1));

    let done = daemon.json(&["apply", &path])?;
    assert_eq!(done, foretold);
    let count = |what: &str| done[what].as_array().map_or(0, Vec::len);
    assert_eq!(
        (count("added"), count("replaced"), count("removed")),
        (1, 1, 2)
    );
    assert_eq!(done["unchanged"], 1);
    let targets = targets(daemon)?;
    assert_eq!(
        targets.keys().collect::<Vec<_>>(),
        ["comes", "moves", "stays"]
    );
    assert_eq!(targets["moves"], "10.2.0.2:82");
    for name in ["stays", "moves"] {
        assert_eq!(
            daemon.rule(name)?.id,
            ids[&Some(name.to_string())],
            "{name}"
        );
    }
    stream.wait_for_more(100)?;
    let sent = stream.finish()?;
    assert_eq!(daemon.rule("stays")?.to_target.packets, sent);

    // Once more is nothing more.
    let again = daemon.json(&["apply", &path])?;
    assert_eq!(again["unchanged"], 3);
    assert_eq!(daemon.rule("stays")?.to_target.packets, sent);
    scene.expect_no_errors()
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_swapped_pair_is_never_missing_and_each_answer_is_old_or_new(#[case] mode: Mode) -> Result<()> {
    let scene = Scene::new(mode)?;
    let (daemon, client, server) = (&scene.daemon, &scene.lab.client, &scene.lab.server);
    let files = Files::new()?;
    let _servers = [
        udp::Named::start(server, Family::V4, 81, "a")?,
        udp::Named::start(server, Family::V4, 82, "b")?,
    ];
    let _echo = udp::Echo::start(server, Family::V4, 83)?;
    let pair = |first: u16, second: u16| {
        [
            rule(&format!("first udp 8081 10.2.0.2:{first}"), ""),
            rule(&format!("second udp 8082 10.2.0.2:{second}"), ""),
            rule("unchanged udp 8083 10.2.0.2:83", ""),
        ]
        .concat()
    };
    let (straight, crossed) = (pair(81, 82), pair(82, 81));
    let path = files.write(&straight)?;
    daemon.ok(&["apply", &path])?;
    let unchanged = udp::Stream::start(client, endpoint(8083), 1000)?;
    let swapping = AtomicBool::new(true);
    let answers = std::thread::scope(|scope| -> Result<BTreeMap<String, u64>> {
        // Probes that know of nothing: each is answered, by one of the two.
        let asking = scope.spawn(|| -> Result<_> {
            let mut answers = BTreeMap::new();
            // From a port of its own each: two rules that lead to one target cannot have the same
            // client endpoint at once.
            for source in 10_000..30_000 {
                if !swapping.load(Ordering::Relaxed) {
                    break;
                }
                let asked = endpoint(8081 + source % 2);
                let name = udp::ask_name_from(client, source, asked)?;
                *answers.entry(name).or_default() += 1;
            }
            Ok(answers)
        });
        let swaps = (0..40).try_for_each(|number| {
            let (text, names) = if number % 2 == 0 {
                (&crossed, ["b", "a"])
            } else {
                (&straight, ["a", "b"])
            };
            files.write(text)?;
            daemon.ok(&["apply", &path, "--flows", "keep"])?;
            // Once it is applied, it is the new one alone.
            let source = 50_000 + 2 * number;
            let now = [
                udp::ask_name_from(client, source, endpoint(8081))?,
                udp::ask_name_from(client, source + 1, endpoint(8082))?,
            ];
            ensure!(now == names, "swap {number}: {now:?} answer, not {names:?}");
            Ok(())
        });
        swapping.store(false, Ordering::Relaxed);
        swaps?;
        asking.join().expect("no panic")
    })?;
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["a", "b"]);
    let sent = unchanged.finish()?;
    assert_eq!(daemon.rule("unchanged")?.to_target.packets, sent);
    scene.expect_no_errors()
}

#[test]
fn a_file_with_mistakes_is_told_all_of_them_and_changes_nothing() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    let (daemon, files) = (&scene.daemon, Files::new()?);
    daemon.add("web", "tcp", "80", "10.2.0.2")?;
    let wrong = [
        rule("a tcp 81 10.2.0.2", "shedule = \"daily 08:00-09:00\""),
        rule("b tpc 82 10.2.0.2", ""),
        rule("c tcp 83 10.2.0.2", "expires = \"2h\""),
    ];
    let path = files.write(&wrong.concat())?;
    for command in [
        vec!["check", &path],
        vec!["apply", &path],
        vec!["diff", &path],
    ] {
        let output = daemon.cli(&command)?;
        assert_eq!(output.status.code(), Some(2), "{command:?}");
        let text = String::from_utf8(output.stderr)?;
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].contains(&format!("{path}:6:1: ")) && lines[0].contains("schedule?"));
        assert!(lines[1].contains(&format!("{path}:9:1: ")), "{text}");
        assert!(lines[2].contains("2 mistakes"), "{text}");
    }
    // What only a rule among others, or the running gateway, can be wrong about.
    let own = GATEWAY_WAN.endpoint(Family::V4, 80).ip();
    for (text, code, what) in [
        (rule("c tcp 83 10.2.0.2", "expires = \"2h\""), 2, ":6:1: "),
        (
            rule("a tcp 81 10.2.0.2", "") + &rule("b tcp 81 10.2.0.3", ""),
            6,
            ":10:1: ",
        ),
        (rule(&format!("a tcp 81 {own}"), ""), 2, ":5:1: "),
    ] {
        let path = files.write(&text)?;
        for command in ["check", "apply"] {
            let output = daemon.cli(&[command, &path])?;
            let told = String::from_utf8(output.stderr)?;
            assert_eq!(output.status.code(), Some(code), "{command}: {told}");
            assert!(told.contains(what), "{command}: {told}");
        }
    }
    let missing = daemon.cli(&["check", "/nowhere/portfwd.toml"])?;
    assert_eq!(missing.status.code(), Some(5));
    assert_eq!(targets(daemon)?.len(), 1);
    Ok(())
}

/// The settings of `[gateway]`, then rules.
fn with_gateway(settings: &str, rules: &str) -> String {
    format!("[gateway]\nwan = [\"wan0\"]\nlan = [\"lan0\"]\n{settings}\n{rules}")
}

fn from_files(files: &Files) -> DaemonOptions {
    DaemonOptions {
        wan: Vec::new(),
        lan: Vec::new(),
        config: Some(files.directory().to_owned()),
        ..DaemonOptions::new(Mode::Xdp)
    }
}

#[test]
fn a_daemon_takes_everything_from_a_file_and_reads_it_again_when_told() -> Result<()> {
    let files = Files::new()?;
    files.write(&with_gateway("", &rule("web udp 8080 10.2.0.2:80", "")))?;
    let mut scene = Scene::with(LabOptions::for_mode(Mode::Xdp), from_files(&files))?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 80)?;
    let socket = udp::connect(&scene.lab.client, endpoint(8080))?;
    udp::exchange(&socket, b"by the file")?;
    scene.daemon.add("by-hand", "udp", "9000", "10.2.0.2:80")?;

    let more = files.directory().join("conf.d");
    fs::create_dir(&more)?;
    fs::write(
        more.join("10-more.toml"),
        rule("more udp 8081 10.2.0.2:80", ""),
    )?;
    scene.daemon.reload()?;
    let expect = |scene: &Scene, names: &[&str]| {
        wait_until(&format!("the rules {names:?}"), PATIENCE, || {
            Ok(targets(&scene.daemon)?.keys().eq(names))
        })
    };
    expect(&scene, &["by-hand", "more", "web"])?;
    // A mistake keeps all as it is, and the daemon alive.
    fs::write(more.join("10-more.toml"), "[[rule]]\nprot = 1\n")?;
    scene.daemon.reload()?;
    scene.daemon.kill9()?;
    scene
        .daemon
        .start()
        .expect_err("a daemon has started with a mistake in its file");
    fs::write(
        more.join("10-more.toml"),
        rule("other udp 8082 10.2.0.2:80", ""),
    )?;
    scene.daemon.start()?;
    expect(&scene, &["by-hand", "other", "web"])?;
    udp::exchange(&socket, b"by the file")?;
    assert_eq!(scene.daemon.rule("web")?.flows, 1);
    scene.expect_no_errors()
}

#[test]
fn a_file_that_everybody_may_write_to_leaves_the_old_rules() -> Result<()> {
    let files = Files::new()?;
    files.write(&with_gateway("", &rule("web udp 8080 10.2.0.2:80", "")))?;
    let scene = Scene::with(LabOptions::for_mode(Mode::Xdp), from_files(&files))?;
    let path = files.write(&with_gateway("", &rule("theirs udp 8080 10.2.0.9:80", "")))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    scene.daemon.reload()?;
    wait_until("the daemon to say why it stays as it is", PATIENCE, || {
        let log = scene.daemon.log()?;
        Ok(log.contains(&format!("everybody may write to {path}"))
            && log.contains("stay as they are"))
    })?;
    assert!(targets(&scene.daemon)?.keys().eq(["web"]));
    // Nor by hand, which tells in one line what to do.
    let applied = scene.daemon.cli(&["apply", &path])?;
    let told = String::from_utf8(applied.stderr)?;
    assert_eq!(applied.status.code(), Some(4), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains(&format!("chmod o-w {path}")), "{told}");
    assert!(targets(&scene.daemon)?.keys().eq(["web"]));
    Ok(())
}

#[test]
fn a_file_for_which_there_is_no_room_leaves_the_old_rules() -> Result<()> {
    let files = Files::new()?;
    let old = rule("old udp 8080 10.2.0.2:80", "");
    let path = files.write(&with_gateway("max_ports = 1000", &old))?;
    let scene = Scene::with(LabOptions::for_mode(Mode::Xdp), from_files(&files))?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 80)?;
    let stream = udp::Stream::start(&scene.lab.client, endpoint(8080), 500)?;
    let mut rules = rule("new udp 8080 10.2.0.2:81", "");
    for number in 0..1_001 {
        rules += &rule(&format!("r{number} tcp {} 10.2.0.2", 10_000 + number), "");
    }
    files.write(&with_gateway("max_ports = 1000", &rules))?;
    for command in ["check", "apply"] {
        let output = scene.daemon.cli(&[command, &path])?;
        let told = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{command}: {told}");
        assert!(told.contains("no room"), "{command}: {told}");
    }
    assert_eq!(targets(&scene.daemon)?["old"], "10.2.0.2:80");
    stream.wait_for_more(50)?;
    stream.finish()?;
    scene.expect_no_errors()
}

#[test]
fn what_is_saved_and_applied_again_is_the_same() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    let (daemon, files) = (&scene.daemon, Files::new()?);
    for arguments in [
        "add tcp 8080 10.2.0.2:80 --name web --tag shop --tag public --flows keep",
        "add both 27000-27050 10.2.0.3 --disabled",
        "add udp 203.0.113.5:5000-5099 10.2.0.3:6000-6099 --expires 2h --comment lease",
        "add tcp [2001:db8:ffff::1]:443 2001:db8::2 --schedule mon-fri",
    ] {
        let mut words: Vec<_> = arguments.split(' ').collect();
        if words.last() == Some(&"mon-fri") {
            words.pop();
            words.push("mon-fri 08:00-18:00; sun 22:00-02:00 Europe/Berlin");
        }
        daemon.ok(&words)?;
    }
    let saved = files.directory().join("saved.toml").display().to_string();
    daemon.ok(&["save", &saved])?;
    let text = fs::read_to_string(&saved)?;
    assert_eq!(daemon.ok(&["save"])?, text);
    assert!(text.contains("[gateway]"), "{text}");
    let same = daemon.json(&["diff", &saved])?;
    assert_eq!(same["unchanged"], 4);
    let rules = daemon.json(&["rules"])?;
    // Gone and back: the same rules in the same order, under new numbers.
    let empty = files.write("")?;
    daemon.ok(&["apply", &empty])?;
    assert!(daemon.rules()?.is_empty());
    daemon.ok(&["apply", &saved])?;
    assert_eq!(daemon.ok(&["save"])?, text);
    let words = |rules: &serde_json::Value| -> Vec<_> {
        let rules = rules.as_array().cloned().unwrap_or_default();
        rules.iter().map(|rule| rule["listen"].clone()).collect()
    };
    assert_eq!(words(&daemon.json(&["rules"])?), words(&rules));
    Ok(())
}

#[test]
fn check_diff_and_save_need_no_daemon() -> Result<()> {
    let mut scene = Scene::new(Mode::Xdp)?;
    let files = Files::new()?;
    scene.daemon.add("web", "tcp", "80", "10.2.0.2")?;
    scene.daemon.stop()?;
    let path = files.write(&rule("web tcp 81 10.2.0.2", ""))?;
    scene.daemon.ok(&["check", &path])?;
    let diff = scene.daemon.json(&["diff", &path])?;
    assert_eq!(diff["replaced"][0]["after"]["listen"], "81");
    let saved = scene.daemon.ok(&["save"])?;
    assert!(saved.contains("listen = \"80\""), "{saved}");
    let output = scene.daemon.cli(&["apply", &path])?;
    assert_eq!(output.status.code(), Some(3));
    Ok(())
}

#[test]
fn the_sample_passes_the_check_and_the_schema_is_json() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    let files = Files::new()?;
    let path = files.write(&scene.daemon.ok(&["config", "sample"])?)?;
    scene.daemon.ok(&["check", &path])?;
    let schema: serde_json::Value = serde_json::from_str(&scene.daemon.ok(&["config", "schema"])?)?;
    assert_eq!(schema["title"], "portfwd.toml");
    Ok(())
}

/// Seen by reading: while a change of many rules was written, packets to some of its ports met the new rules already, and packets to
/// others, though sent later, the old ones still.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn ten_thousand_rules_change_at_one_instant(#[case] mode: Mode) -> Result<()> {
    const FIRST: u16 = 20_000;
    const LAST: u16 = FIRST + 9_999;
    let scene = Scene::new(mode)?;
    let (daemon, client, server) = (&scene.daemon, &scene.lab.client, &scene.lab.server);
    let files = Files::new()?;
    let _servers = [
        udp::Named::start(server, Family::V4, 81, "old")?,
        udp::Named::start(server, Family::V4, 82, "new")?,
    ];
    // Behind a rule without address for all of their ports, so that a packet looks for the one with its address.
    let rules = |target: u16| -> String {
        let one = |port| {
            rule(
                &format!("r{port} udp 10.1.0.1:{port} 10.2.0.2:{target}"),
                "",
            )
        };
        let others = rule(&format!("others udp {FIRST}-{LAST} 10.2.0.2"), "");
        (FIRST..=LAST).map(one).chain([others]).collect()
    };
    let path = files.write(&rules(81))?;
    daemon.ok(&["apply", &path])?;
    files.write(&rules(82))?;
    let changing = AtomicBool::new(true);
    let answers = std::thread::scope(|scope| -> Result<Vec<String>> {
        // One after the other, from the first port to the last and back, each a flow of its own.
        let asking = scope.spawn(|| -> Result<Vec<String>> {
            let ports = [FIRST, LAST, 25_000, LAST, FIRST, 25_000]
                .into_iter()
                .cycle();
            let sources = (2_000..FIRST).chain(LAST + 1..60_000);
            let mut answers = Vec::new();
            for (source, port) in sources.zip(ports) {
                // Those behind the change find nothing but the new rules.
                let is_last = !changing.load(Ordering::Relaxed);
                answers.push(udp::ask_name_from(client, source, endpoint(port))?);
                if is_last {
                    break;
                }
            }
            Ok(answers)
        });
        let done = daemon.ok(&["apply", &path, "--flows", "keep"]);
        changing.store(false, Ordering::Relaxed);
        done?;
        asking.join().expect("no panic")
    })?;
    let turn = answers.iter().position(|name| name == "new");
    let turn = turn.context("no probe met a new rule")?;
    let late = answers[turn..].iter().filter(|name| *name != "new").count();
    assert_eq!(
        late,
        0,
        "of {} behind the first new one",
        answers.len() - turn
    );
    ensure!(turn > 0, "no probe met an old rule");
    scene.expect_no_errors()
}

#[test]
fn ten_thousand_rules_are_one_change() -> Result<()> {
    let scene = Scene::new(Mode::Xdp)?;
    let (daemon, files) = (&scene.daemon, Files::new()?);
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, 80)?;
    let rules = |last: &str| {
        let mut text = String::new();
        for number in 0..9_999 {
            text += &rule(
                &format!("r{number} udp {} 10.2.0.2:80", 20_000 + number),
                "",
            );
        }
        text + &rule(last, "")
    };
    let path = files.write(&rules("last udp 9000 10.2.0.2:80"))?;
    daemon.ok(&["check", &path])?;
    daemon.ok(&["apply", &path])?;
    assert_eq!(daemon.rules()?.len(), 10_000);
    let stream = udp::Stream::start(&scene.lab.client, endpoint(25_000), 500)?;
    stream.wait_for_more(50)?;
    files.write(&rules("last udp 9001 10.2.0.2:80"))?;
    let done = daemon.json(&["apply", &path])?;
    assert_eq!(done["unchanged"], 9_999);
    for port in [20_000, 29_998, 9_001] {
        udp::exchange(&udp::connect(&scene.lab.client, endpoint(port))?, b"knock")?;
    }
    let empty = files.write(&rule("last udp 25000 10.2.0.2:80", ""))?;
    daemon.ok(&["apply", &empty, "--flows", "keep"])?;
    assert_eq!(daemon.rules()?.len(), 1);
    stream.wait_for_more(50)?;
    stream.finish()?;
    scene.expect_no_errors()
}
