//! What the README shows of looking for a fault is what happens: every command is typed, every line compared.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portfwd_tests::daemon::{Mode, binary};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::process::{Process, output_within};
use portfwd_tests::{Family, tcp};

use crate::scene::Scene;

const HEADING: &str = "When a forward does not work";
/// Names and addresses of the README, and those of the lab.
const NAMES: [(&str, &str); 5] = [
    ("198.51.100.7", "10.1.0.2"),
    ("198.51.100.1", "10.1.0.1"),
    ("10.0.0.2", "10.2.0.2"),
    ("eth0", "wan0"),
    ("eth1", "lan0"),
];
const LONG: Duration = Duration::from_secs(40);

/// A command of the README, and what it prints.
struct Example {
    command: String,
    output: Vec<String>,
}

fn in_lab(text: &str) -> String {
    NAMES.iter().fold(text.to_owned(), |text, (there, here)| {
        text.replace(there, here)
    })
}

fn examples() -> Result<Vec<Example>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace")?;
    let readme = fs::read_to_string(root.join("README.md"))?;
    let section = readme
        .split("\n## ")
        .find(|section| section.lines().next() == Some(HEADING))
        .with_context(|| format!("the README has no heading {HEADING:?}"))?;
    let mut examples: Vec<Example> = Vec::new();
    for block in section.split("```").skip(1).step_by(2) {
        for line in block.trim_matches('\n').lines() {
            match (line.strip_prefix("# "), examples.last_mut()) {
                (Some(command), _) => examples.push(Example {
                    command: in_lab(command),
                    output: Vec::new(),
                }),
                (None, Some(example)) => example.output.push(in_lab(line)),
                (None, None) => anyhow::bail!("{line:?} belongs to no command"),
            }
        }
    }
    Ok(examples)
}

/// A line without what differs from run to run: packets counted, MAC addresses.
fn gist(line: &str) -> String {
    let is_mac = |word: &str| word.len() == 17 && word.split(':').count() == 6;
    let words = line.split(' ').map(|word| {
        let bare = word.trim_matches(['(', ')']);
        if is_mac(bare) {
            "MAC".to_owned()
        } else if bare.chars().all(|c| c.is_ascii_digit()) && !bare.is_empty() {
            "N".to_owned()
        } else {
            word.to_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn the_readme_shows_what_is_printed() -> Result<()> {
    let scene = Scene::new(Mode::Tc)?;
    let lab = &scene.lab;
    // As in the README's lab: IPv4 only, with a public address and a way to the internet.
    lab.gateway.ip("addr add 203.0.113.1/24 dev wan0\n\
         route add default dev wan0\n\
         addr del 2001:db8:1::1/64 dev wan0\n")?;
    scene.daemon.add("web", "tcp", "8080", "10.2.0.2:80")?;
    scene
        .daemon
        .add("game", "both", "27000-27050", "10.2.0.2")?;
    let _web = tcp::Echo::start(&lab.server, Family::V4, 80)?;
    let mut stream = tcp::connect(&lab.client, "10.1.0.1:8080".parse()?)?;
    tcp::exchange(&mut stream, b"so that it has answered before")?;
    let mut helper = Command::new(binary()?);
    helper.args([
        "-n",
        lab.client.name(),
        "check-port",
        "--serve",
        "[::]:7373",
    ]);
    let helper = Process::spawn(helper)?;
    helper.wait_for_output("ready to dial back", PATIENCE)?;

    let examples = examples()?;
    ensure!(examples.len() >= 8, "only {} examples", examples.len());
    let prefix = format!("ip netns exec {} ", lab.gateway.name());
    for Example { command, output } in examples {
        let words: Vec<_> = command.split(' ').collect();
        let mut typed = match words[0] {
            "portfwd" => scene.daemon.command(),
            program => lab.gateway.command(program)?,
        };
        let printed = output_within(typed.args(&words[1..]), LONG)?;
        let text = String::from_utf8(printed.stdout)?.replace(&prefix, "");
        let printed: Vec<_> = text.lines().map(gist).collect();
        let expected: Vec<_> = output.iter().map(|line| gist(line)).collect();
        ensure!(
            printed == expected,
            "{command} prints\n{text}\nwhere the README has\n{}",
            output.join("\n")
        );
    }
    Ok(())
}
