//! `portfwd save`.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    output::Output,
    source::{Remains, ask},
};
use crate::{
    config::{schema::FileWords, to_toml},
    failure::{Failure, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
Prints the rules as they are, and the settings of the daemon, as a configuration: applied, it changes nothing. With FILE, that file
is written, whole or not at all.

Examples:
  portfwd save
  portfwd save rules.toml
  portfwd -j save | jq '.rule[].listen'";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// File to write
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let words: FileWords = ask(instance, "/v1/words", Remains::words).await?;
    let text = to_toml(&words)?;
    match &arguments.file {
        Some(file) => write_whole(file, &text),
        None => output.print(&words, |out, _| out.write_all(text.as_bytes())),
    }
}

/// Writes a file beside it and puts that in its place.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let failed =
        |error: std::io::Error| Failure::during(format!("write {}", path.display()), &error);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    });
    if written.is_err() {
        // What is half written is no use to anybody; the failure is told all the same.
        drop(fs::remove_file(&beside));
    }
    written.map_err(failed)
}
