//! `portfwd config`.

use clap::{Args, Subcommand};

use super::output::Output;
use crate::{config::schema, failure::Result};

const AFTER_HELP: &str = "\
Examples:
  portfwd config sample
  portfwd config schema";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Print a configuration with every key and what it means
    Sample,
    /// Print the JSON schema of a configuration
    Schema,
}

pub fn run(output: Output, arguments: &Arguments) -> Result<()> {
    match arguments.what {
        What::Sample => output.print(&schema::SAMPLE, |out, sample| {
            out.write_all(sample.as_bytes())
        }),
        // JSON it is, whether asked for or not.
        What::Schema => Output::stdout(true).print(&schema::schema(), |_, _| Ok(())),
    }
}
