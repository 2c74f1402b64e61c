//! The systemd unit of the package.

use std::path::Path;

use anyhow::{Context, Result};

/// Where it is in the repository.
pub const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/portfwd.service");

/// The values of a setting, in order.
pub fn values(setting: &str) -> Result<Vec<String>> {
    let path = Path::new(PATH);
    let unit = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let prefix = format!("{setting}=");
    Ok(unit
        .lines()
        .filter_map(|line| line.strip_prefix(&prefix))
        .flat_map(|value| value.split_whitespace().map(str::to_string))
        .collect())
}

/// The capabilities that the unit leaves the daemon, as setpriv(1) names them.
pub fn capabilities() -> Result<Vec<String>> {
    let names = values("CapabilityBoundingSet")?;
    Ok(names
        .iter()
        .map(|name| name.trim_start_matches("CAP_").to_lowercase())
        .collect())
}
