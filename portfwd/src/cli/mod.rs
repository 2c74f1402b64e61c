//! The command line. Nouns read (`rules`, `flows`, `counters`, `status`), verbs write (`add`,
//! `remove`, `detach`), `run` is the daemon.

mod add;
mod apply;
mod check;
mod check_port;
mod complete;
mod config;
mod configuration;
mod counters;
mod detach;
mod diff;
mod doctor;
mod explain;
mod facts;
mod flows;
mod output;
mod remove;
mod replace;
mod rules;
mod run;
mod save;
mod source;
mod status;

use std::{future::Future, process::ExitCode};

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::{ArgValueCandidates, CompleteEnv};

use self::output::Output;
use crate::{
    failure::{Failure, Kind, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
Examples:
  portfwd run --wan eth0 --lan eth1           forward from eth0 to machines behind eth1
  portfwd add tcp 8080 10.0.0.2:80            publish a web server
  portfwd add both 27000-27050 10.0.0.3       a range, TCP and UDP, ports kept
  portfwd replace web tcp 8080 10.0.0.3:80    another server for new connections
  portfwd rules                               what is forwarded, with counters
  portfwd remove web 7                        by name and by id
  portfwd -n lab status                       of the daemon in network namespace lab

Exit codes: 0 ok, 1 failed, 2 usage, 3 daemon not running, 4 permission denied, 5 not found, 6 conflict.";

/// Forwards ports in the kernel, by XDP and TC.
#[derive(Debug, Parser)]
#[command(name = "portfwd", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Work in this network namespace, as `ip -n` does
    #[arg(short = 'n', long, value_name = "NAME", global = true, add = ArgValueCandidates::new(complete::namespaces))]
    netns: Option<String>,
    /// Name of the instance [default: the network namespace, or "default"]
    #[arg(long, value_name = "NAME", global = true)]
    instance: Option<String>,
    /// Print JSON
    #[arg(short, long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Run(run::Arguments),
    /// Add a rule; it holds for the next packet
    Add(add::Arguments),
    /// Make a rule say something else, without a gap
    Replace(replace::Arguments),
    /// Remove rules by id or name, all or none
    Remove(remove::Arguments),
    /// Make the rules those of the configuration, all at once or not at all
    Apply(apply::Arguments),
    /// Keep what `apply --confirm` has applied
    #[command(after_help = apply::CONFIRM_HELP)]
    Confirm,
    /// Take back what `apply --confirm` has applied
    #[command(after_help = apply::ROLLBACK_HELP)]
    Rollback,
    /// Say what is wrong with a configuration, and change nothing
    Check(check::Arguments),
    /// Say what applying the configuration would change
    Diff(diff::Arguments),
    /// Print the rules as a configuration
    Save(save::Arguments),
    /// Print a sample of a configuration, or its schema
    Config(config::Arguments),
    /// List the rules with their counters
    Rules(rules::Arguments),
    /// List the live flows, those active last first
    #[command(after_help = flows::AFTER_HELP)]
    Flows,
    /// Show counters by port, and why packets were dropped or passed
    #[command(after_help = counters::AFTER_HELP)]
    Counters,
    /// Show daemon, interfaces and connection table [default command]
    #[command(after_help = status::AFTER_HELP)]
    Status,
    /// Look for what is wrong with the gateway, and say which command mends it
    Doctor(doctor::Arguments),
    /// Tell what would happen to a packet and to the answer to it, and why
    Explain(explain::Arguments),
    /// Say whether a published port answers, from inside or from another machine
    CheckPort(check_port::Arguments),
    /// Take everything of this instance off the machine
    Detach(detach::Arguments),
}

/// The whole command line, for manuals.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// The process: what `main` calls.
pub fn main() -> ExitCode {
    // A shell that wants to know how a word goes on; there is no return then.
    CompleteEnv::with_factory(Cli::command).complete();
    let done = match Cli::try_parse() {
        Ok(Cli { global, command }) => run(&global, &command.unwrap_or(Command::Status)),
        Err(mistake) if mistake.use_stderr() => Err(usage(&mistake)),
        // Help and version are no mistakes.
        Err(answer) => answer.exit(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("portfwd: {failure}");
            failure.kind.into()
        }
    }
}

fn run(global: &Global, command: &Command) -> Result<()> {
    let instance = Instance::new(global.instance.as_deref(), global.netns.as_deref())?;
    let output = Output::stdout(global.json);
    let done = match command {
        Command::Run(arguments) => run::run(instance.clone(), arguments),
        Command::Add(arguments) => block_on(add::run(&instance, output, arguments)),
        Command::Replace(arguments) => block_on(replace::run(&instance, output, arguments)),
        Command::Remove(arguments) => block_on(remove::run(&instance, output, arguments)),
        Command::Apply(arguments) => block_on(apply::run(&instance, output, arguments)),
        Command::Confirm => block_on(apply::confirm(&instance, output)),
        Command::Rollback => block_on(apply::rollback(&instance, output)),
        Command::Check(arguments) => block_on(check::run(&instance, output, arguments)),
        Command::Diff(arguments) => block_on(diff::run(&instance, output, arguments)),
        Command::Save(arguments) => block_on(save::run(&instance, output, arguments)),
        Command::Config(arguments) => config::run(output, arguments),
        Command::Rules(arguments) => block_on(rules::run(&instance, output, arguments)),
        Command::Flows => block_on(flows::run(&instance, output)),
        Command::Counters => block_on(counters::run(&instance, output)),
        Command::Status => block_on(status::run(&instance, output)),
        Command::Doctor(arguments) => block_on(doctor::run(&instance, output, arguments)),
        Command::Explain(arguments) => block_on(explain::run(&instance, output, arguments)),
        Command::CheckPort(arguments) => block_on(check_port::run(&instance, output, arguments)),
        Command::Detach(arguments) => block_on(detach::run(&instance, output, arguments)),
    };
    done.map_err(|failure| {
        let missing = match failure.kind {
            // Nothing of an instance whose namespace is not even there: rather a name mistyped.
            Kind::NotRunning => instance.open_netns().err(),
            Kind::Failed | Kind::Usage | Kind::Permission | Kind::NotFound | Kind::Conflict => None,
        };
        missing.unwrap_or_else(|| for_instance(failure, &instance))
    })
}

/// A mistake on the command line, in one line: clap's own words are a page.
fn usage(mistake: &clap::Error) -> Failure {
    let page = mistake.render().to_string();
    let mut paragraphs = page.split("\n\n").map(str::trim);
    let what = paragraphs.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    let hint = paragraphs
        .find_map(|text| {
            text.strip_prefix("tip: ")
                .or_else(|| text.strip_prefix("Usage: "))
        })
        .and_then(|text| text.lines().next())
        .unwrap_or("`portfwd --help` shows what there is");
    Failure::new(Kind::Usage, what).hint(hint)
}

/// A command in a hint is to be typed as it stands: it names the instance as the caller did.
fn for_instance(failure: Failure, instance: &Instance) -> Failure {
    let command = instance.command();
    let hint = failure.hint.map(|hint| {
        if hint.contains(&format!("`{command} ")) {
            hint
        } else {
            hint.replace("`portfwd ", &format!("`{command} "))
        }
    });
    Failure { hint, ..failure }
}

/// Runs a command on this thread alone.
fn block_on(command: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build();
    runtime
        .map_err(|error| Failure::during("start", &error))?
        .block_on(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_that_parses() {
        let commands = Cli::command();
        let help = |command: &clap::Command| {
            command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default()
        };
        let mut examples = 0;
        for command in commands.get_subcommands().chain([&commands]) {
            let help = help(command);
            let lines: Vec<_> = help
                .lines()
                .filter_map(|line| line.strip_prefix("  portfwd"))
                .collect();
            assert!(!lines.is_empty(), "{} has no example", command.get_name());
            for line in lines {
                // Two blanks end the example; a pipe ends our part of it.
                let line = line
                    .split("   ")
                    .next()
                    .unwrap()
                    .split(" | ")
                    .next()
                    .unwrap();
                let words = line.split_whitespace().map(|word| word.trim_matches('\''));
                Cli::try_parse_from(["portfwd"].into_iter().chain(words))
                    .unwrap_or_else(|error| panic!("portfwd{line}: {error}"));
                examples += 1;
            }
        }
        assert!(examples > 10);
    }

    #[test]
    fn a_mistake_is_one_line_with_a_hint() {
        for (words, expected) in [
            (
                "portfwd fly",
                "unrecognized subcommand 'fly' (hint: portfwd [OPTIONS] [COMMAND])",
            ),
            (
                "portfwd flow",
                "unrecognized subcommand 'flow' (hint: a similar subcommand exists: 'flows')",
            ),
            (
                "portfwd add tcp 80",
                "the following required arguments were not provided: <TARGET> \
                 (hint: portfwd add <PROTO> <LISTEN> <TARGET>)",
            ),
        ] {
            let mistake = Cli::try_parse_from(words.split(' ')).unwrap_err();
            assert_eq!(usage(&mistake).to_string(), expected);
        }
    }

    #[test]
    fn commands_in_hints_are_typed_as_they_stand() {
        let lab = Instance::new(None, Some("lab")).unwrap();
        for (hint, expected) in [
            (
                "`portfwd rules` lists them",
                "`portfwd -n lab rules` lists them",
            ),
            (
                "`portfwd -n lab run` starts it",
                "`portfwd -n lab run` starts it",
            ),
            ("tcp, udp, both or icmp", "tcp, udp, both or icmp"),
        ] {
            let failure = Failure::new(Kind::Failed, "x").hint(hint);
            assert_eq!(for_instance(failure, &lab).hint.as_deref(), Some(expected));
        }
    }

    #[test]
    fn globals_stand_before_and_behind_the_command() {
        for line in [
            "portfwd -n lab -j rules",
            "portfwd rules -n lab --json",
            "portfwd --netns lab rules -j",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(
                (cli.global.netns.as_deref(), cli.global.json),
                (Some("lab"), true),
                "{line}"
            );
            assert!(matches!(cli.command, Some(Command::Rules(_))));
        }
        assert!(Cli::try_parse_from(["portfwd"]).unwrap().command.is_none());
    }
}
