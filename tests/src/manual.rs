//! The commands of a document, as somebody finds them who reads it from top to bottom.
//!
//! A document's code blocks hold commands, unless a language is named behind the fence. A block with prompts (`# ` for
//! root, `$ ` for everybody) shows what the commands print; one without is nothing but commands. In running text, what
//! stands between backticks is a command if it has several words of which the first is a program.

use std::path::Path;

use anyhow::{Result, ensure};

/// Where programs are. Those that only the package or a toolchain bring are named besides.
const PROGRAMS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
const OTHER_PROGRAMS: [&str; 6] = ["portfwd", "cargo", "apt-get", "systemctl", "man", "mount"];
/// The language of a block that is the configuration file.
const CONFIGURATION: &str = "toml";

/// What a document asks its reader to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Type a command.
    Command(Command),
    /// Write this to the configuration file.
    Configuration(String),
}

/// A command of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// What is typed, without prompt; a comment of the shell may be behind it.
    pub line: String,
    /// What the document shows of what it prints.
    pub printed: Option<Vec<String>>,
    /// The line in the document, from 1.
    pub number: usize,
    /// Whether it stands in running text.
    pub in_text: bool,
}

impl Command {
    /// The command without a comment behind it.
    pub fn bare(&self) -> &str {
        let line = self.line.as_str();
        line.split_once("  #").map_or(line, |(bare, _)| bare).trim()
    }

    /// Whether the words of this one are the first words of the other, which has more.
    pub fn begins(&self, other: &Self) -> bool {
        let rest = other.bare().strip_prefix(self.bare());
        rest.is_some_and(|rest| rest.starts_with(' '))
    }
}

/// What a document asks its reader to do, from top to bottom.
pub fn steps(document: &str) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    let mut block: Option<(usize, &str, Vec<&str>)> = None;
    for (index, line) in document.lines().enumerate() {
        let fence = line.strip_prefix("```");
        block = match (block.take(), fence) {
            (None, Some(language)) => Some((index + 2, language.trim(), Vec::new())),
            (None, None) => {
                steps.extend(in_text(line, index + 1).map(Step::Command));
                None
            }
            (Some((first, language, lines)), Some(end)) => {
                ensure!(end.is_empty(), "line {}: a fence inside a block", index + 1);
                match language {
                    "" => steps.extend(commands(&lines, first)?.into_iter().map(Step::Command)),
                    CONFIGURATION => steps.push(Step::Configuration(lines.join("\n") + "\n")),
                    _ => {}
                }
                None
            }
            (Some((first, language, mut lines)), None) => {
                lines.push(line);
                Some((first, language, lines))
            }
        };
    }
    ensure!(block.is_none(), "the last block does not end");
    Ok(steps)
}

fn prompted(line: &str) -> Option<&str> {
    line.strip_prefix("# ").or_else(|| line.strip_prefix("$ "))
}

/// The commands of a block that begins in line `first`.
fn commands(lines: &[&str], first: usize) -> Result<Vec<Command>> {
    let has_prompts = lines.iter().any(|line| prompted(line).is_some());
    let mut commands: Vec<Command> = Vec::new();
    for (number, line) in (first..).zip(lines) {
        let begun = if has_prompts {
            prompted(line)
        } else {
            Some(*line).filter(|line| !line.trim().is_empty())
        };
        let last = commands.last_mut();
        match (begun, last) {
            (_, Some(last)) if last.line.ends_with('\\') => {
                last.line.push('\n');
                last.line.push_str(line);
            }
            (Some(line), _) => commands.push(Command {
                line: line.to_owned(),
                printed: has_prompts.then(Vec::new),
                number,
                in_text: false,
            }),
            (None, Some(last)) => last
                .printed
                .get_or_insert_default()
                .push((*line).to_owned()),
            (None, None) => anyhow::bail!("line {number}: {line:?} belongs to no command"),
        }
    }
    // A prompt without anything below it says nothing about what is printed.
    for command in &mut commands {
        let printed = command.printed.take();
        command.printed = printed.filter(|lines| lines.iter().any(|line| !line.is_empty()));
    }
    Ok(commands)
}

/// The commands in a line of running text.
fn in_text(line: &str, number: usize) -> impl Iterator<Item = Command> {
    let quoted = line.split('`').skip(1).step_by(2);
    quoted
        .filter(|text| is_command(text))
        .map(move |text| Command {
            // In tables a bar is escaped.
            line: text.replace("\\|", "|"),
            printed: None,
            number,
            in_text: true,
        })
}

fn is_command(text: &str) -> bool {
    let mut words = text
        .split_whitespace()
        .skip_while(|word| is_assignment(word));
    let Some(program) = words.next() else {
        return false;
    };
    let is_word = program
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    words.next().is_some()
        && is_word
        && (OTHER_PROGRAMS.contains(&program)
            || PROGRAMS
                .iter()
                .any(|folder| Path::new(folder).join(program).is_file()))
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=')
        .is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_in_blocks_and_in_text() -> Result<()> {
        let document = "# A heading\n\nType `portfwd rules --tag shop`, or `tc`, and `so many words`.\n\n\
            ```\n# portfwd add tcp 80 10.0.0.2\n1: tcp 80 -> 10.0.0.2\n$ portfwd rules\n```\n\n\
            ```\nportfwd save  # prints it\ncurl http://localhost \\\n  --json '{}'\n```\n\n\
            ```toml\n[gateway]\n```\n\n```text\nno command\n```\n";
        let found: Vec<_> = steps(document)?
            .into_iter()
            .map(|step| match step {
                Step::Configuration(text) => format!("file {text:?}"),
                Step::Command(command) => format!(
                    "{} {:?} {:?}",
                    command.number,
                    command.bare(),
                    command.printed.as_deref().unwrap_or_default()
                ),
            })
            .collect();
        assert_eq!(
            found,
            [
                r#"3 "portfwd rules --tag shop" []"#,
                r#"6 "portfwd add tcp 80 10.0.0.2" ["1: tcp 80 -> 10.0.0.2"]"#,
                r#"8 "portfwd rules" []"#,
                r#"12 "portfwd save" []"#,
                r#"13 "curl http://localhost \\\n  --json '{}'" []"#,
                r#"file "[gateway]\n""#,
            ]
        );
        Ok(())
    }

    #[test]
    fn a_line_that_belongs_to_no_command_is_an_error() {
        assert!(steps("```\nnot a command\n# portfwd rules\n```\n").is_err());
    }
}
