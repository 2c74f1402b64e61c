//! What runs, as a file that says the same.

use super::schema::FileWords;
use crate::failure::{Failure, Result};

/// A file in TOML.
pub fn to_toml(words: &FileWords) -> Result<String> {
    toml::to_string(words)
        .map_err(|error| Failure::during("write the configuration as TOML", &error))
}
