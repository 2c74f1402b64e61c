//! Writes a manual page for every command into a directory: `man_pages DIRECTORY`.
//!
//! The pages are what `--help` says. It is not a command of `portfwd` itself, because only the package needs it.

use std::{
    env, fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use clap_mangen::Man;

/// What the page of `portfwd` has beside its help.
const FILES: &str = "\
.SH FILES
.TP
.I /etc/portfwd/portfwd.toml
The gateway and its rules; see
.BR portfwd.toml (5).
.TP
.I /var/lib/portfwd/INSTANCE.redb
The rules of an instance, and what else outlives its daemon.
.TP
.I /run/portfwd/INSTANCE.sock
The control socket. Root and members of the group portfwd may use it.
.TP
.I /sys/fs/bpf/portfwd/INSTANCE/
Programs, tables and links. They forward with and without a daemon.
";

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1) else {
        eprintln!("usage: man_pages DIRECTORY");
        return ExitCode::from(2);
    };
    match write_pages(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write the manual pages: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_pages(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut portfwd = portfwd::cli::command();
    portfwd.build();
    let commands: Vec<_> = portfwd
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .cloned()
        .collect();
    let names: Vec<_> = commands.iter().map(title).collect();
    for command in &commands {
        let mut page = page(command)?;
        see_also(&mut page, &["portfwd".to_owned()], &["portfwd.toml(5)"])?;
        fs::write(directory.join(format!("{}.1", title(command))), page)?;
    }
    let mut page = page(&portfwd)?;
    page.write_all(FILES.as_bytes())?;
    see_also(&mut page, &names, &["portfwd.toml(5)", "bpf(2)", "nft(8)"])?;
    fs::write(directory.join("portfwd.1"), page)
}

/// `portfwd-add` for the command `add`.
fn title(command: &clap::Command) -> String {
    let name = command.get_display_name();
    name.unwrap_or_else(|| command.get_name()).to_owned()
}

fn page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone()).manual("portfwd manual");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let help = command.get_after_long_help().or(command.get_after_help());
    if let Some(help) = help {
        notes(&mut page, &help.to_string())?;
    }
    Ok(page)
}

/// What stands below the options: a line like `Examples:` is a heading, indented lines stay as they are, others are text.
fn notes(page: &mut impl Write, help: &str) -> io::Result<()> {
    let mut is_literal = false;
    let mut is_headed = false;
    let mut is_paragraph = false;
    for line in help.lines() {
        let literal = line.starts_with("  ");
        if literal != is_literal {
            writeln!(page, "{}", if literal { ".nf" } else { ".fi" })?;
            is_literal = literal;
        }
        let heading = line.strip_suffix(':').filter(|text| !text.contains(' '));
        if let Some(heading) = heading {
            writeln!(page, ".SH {}", heading.to_uppercase())?;
            is_headed = true;
            is_paragraph = false;
            continue;
        }
        if !is_headed {
            writeln!(page, ".SH NOTES")?;
            is_headed = true;
        }
        // Before a heading or an example a blank line is no paragraph.
        if line.is_empty() {
            is_paragraph = true;
            continue;
        }
        if std::mem::take(&mut is_paragraph) && !literal {
            writeln!(page, ".PP")?;
        }
        writeln!(page, "{}", escaped(line))?;
    }
    if is_literal {
        writeln!(page, ".fi")?;
    }
    Ok(())
}

/// A line as roff has to read it to print it.
fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    if line.starts_with(['.', '\'']) {
        format!("\\&{line}")
    } else {
        line
    }
}

fn see_also(page: &mut impl Write, commands: &[String], others: &[&str]) -> io::Result<()> {
    let commands = commands.iter().map(|name| format!("{name}(1)"));
    let pages: Vec<_> = commands
        .chain(others.iter().map(|other| (*other).to_owned()))
        .collect();
    writeln!(page, ".SH SEE ALSO\n{}", escaped(&pages.join(", ")))
}
