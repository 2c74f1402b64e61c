//! How the command line goes on, as shells ask for it.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use portfwd_tests::daemon::{Mode, binary};
use portfwd_tests::deadline::is_slow;
use portfwd_tests::process::run_for_text;

use crate::scene::Scene;

/// A daemon with a rule of a name and one without.
fn scene() -> Result<Scene> {
    let scene = Scene::new(Mode::Tc)?;
    scene.daemon.add("web", "tcp", "8080", "10.2.0.2:80")?;
    scene.daemon.ok(&["add", "udp", "5000", "10.2.0.2"])?;
    Ok(scene)
}

/// A shell that finds the program by its name.
fn shell(program: &str) -> Result<Command> {
    let binary = binary()?.canonicalize()?;
    let directory = binary.parent().context("the program is in a directory")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{}:{path}", directory.display()));
    Ok(command)
}

#[test]
fn bash_is_told_the_names_of_rules() -> Result<()> {
    let scene = scene()?;
    let script = r#"
        source <(COMPLETE=bash portfwd)
        COMP_WORDS=(portfwd -n "$1" remove "") COMP_CWORD=4 COMP_TYPE=9
        _clap_complete_portfwd portfwd "" remove
        printf '%s\n' "${COMPREPLY[@]}""#;
    let answer = run_for_text(
        shell("bash")?
            .args(["--norc", "-c", script, "bash"])
            .arg(scene.lab.gateway.name()),
    )?;
    let words: Vec<_> = answer.lines().map(str::trim).collect();
    expect(words.contains(&"web") && words.contains(&"2"), &answer)
}

#[test]
fn fish_is_told_the_names_of_rules_with_what_they_are() -> Result<()> {
    let scene = scene()?;
    let script = format!(
        "COMPLETE=fish portfwd | source; complete --do-complete 'portfwd -n {} remove '",
        scene.lab.gateway.name()
    );
    let answer = run_for_text(shell("fish")?.args(["--no-config", "-c", &script]))?;
    let is_told = answer
        .lines()
        .any(|line| line == "web\ttcp 8080 -> 10.2.0.2:80");
    expect(is_told, &answer)
}

/// As its script asks: the words of the line in the environment and behind `--`.
#[test]
fn zsh_is_told_the_names_of_rules_and_nothing_when_no_daemon_runs() -> Result<()> {
    let mut scene = scene()?;
    let namespace = scene.lab.gateway.name().to_string();
    let ask = || -> Result<String> {
        run_for_text(
            shell("portfwd")?
                .args(["--", "portfwd", "-n", &namespace, "remove", "w"])
                .env("COMPLETE", "zsh")
                .env("_CLAP_IFS", "\n")
                .env("_CLAP_COMPLETE_INDEX", "4"),
        )
    };
    let answer = ask()?;
    expect(answer.lines().any(|line| line.starts_with("web:")), &answer)?;
    scene.daemon.kill9()?;
    let answer = ask()?;
    ensure!(!answer.contains("web"), "{answer:?}");
    Ok(())
}

/// Fails if a shell was not told. Names of rules come within a second or not at all, and on a machine that is emulated they may take
/// longer.
fn expect(is_told: bool, answer: &str) -> Result<()> {
    let may_be_late = is_slow() && answer.trim().is_empty();
    ensure!(is_told || may_be_late, "{answer:?}");
    Ok(())
}
