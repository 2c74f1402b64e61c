//! A portfwd whose kernel object is another one, as an upgrade's is.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use portfwd::bpf::OBJECT;
use tempfile::TempPath;

use crate::daemon::binary;

/// A word of the object's debugging information, and what it becomes: the programs do the same.
const CHANGE: (&[u8], &[u8]) = (b"rustc version", b"rustc Version");

/// A copy of the binary under test with another object in it; gone on drop.
pub struct OtherBuild(TempPath);

impl OtherBuild {
    /// Makes the copy.
    pub fn new() -> Result<Self> {
        let path = binary()?;
        let mut bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let object = find_object(&bytes)
            .with_context(|| format!("{} has another object than this test", path.display()))?;
        let word = OBJECT
            .windows(CHANGE.0.len())
            .position(|word| word == CHANGE.0)
            .context("the object does not say who built it")?;
        bytes[object + word..][..CHANGE.1.len()].copy_from_slice(CHANGE.1);
        let copy = tempfile::NamedTempFile::new()?.into_temp_path();
        fs::write(&copy, bytes).with_context(|| format!("write {}", copy.display()))?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(Self(copy))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Where the object begins in the binary. It lies where the loader may read its headers as they are.
fn find_object(binary: &[u8]) -> Option<usize> {
    const ALIGNMENT: usize = 8;
    (0..binary.len())
        .step_by(ALIGNMENT)
        .find(|start| binary[*start..].starts_with(OBJECT))
}
