//! The JSON schema of a configuration, and the sample that has every key.

use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

use crate::{daemon::words::GatewayWords, ruleset::RuleWords};

/// A configuration with every key, each with what it means; it is also what packages install.
pub const SAMPLE: &str = include_str!("../../../packaging/portfwd.toml");

/// What is in a file.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "portfwd.toml")]
pub struct FileWords {
    /// Settings of the daemon, in one file of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<GatewayWords>,
    /// Rules, in any number of files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rule: Vec<RuleWords>,
}

/// The schema of a file.
pub fn schema() -> Schema {
    schema_for!(FileWords)
}

/// The keys of a table: the fields of a type.
pub fn keys<T: JsonSchema>() -> Vec<String> {
    let schema = schema_for!(T);
    let properties = schema.get("properties").and_then(|keys| keys.as_object());
    properties.map_or_else(Vec::new, |keys| keys.keys().cloned().collect())
}
