//! Copies of the sources, to change something in.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use xtask::workspace_root;

/// Brings a copy up to what git knows of the sources, as they are now. Files that did not change keep their times, so that only
/// what changed is built anew.
///
/// # Errors
/// When the sources are no git repository, or the copy cannot be written.
pub fn copy_to(copy: &Path) -> Result<()> {
    let listed = Command::new("git")
        .current_dir(workspace_root())
        .args(["ls-files", "-z"])
        .output()
        .context("cannot run git")?;
    ensure!(
        listed.status.success(),
        "`git ls-files` failed: the sources are no git repository"
    );
    let names = String::from_utf8(listed.stdout).context("a file's name is not UTF-8")?;
    for name in names.split_terminator('\0') {
        // One that is removed and not committed yet is listed, too.
        let Ok(content) = fs::read(workspace_root().join(name)) else {
            continue;
        };
        write_if_new(&copy.join(name), &content)?;
    }
    Ok(())
}

/// Writes a file, unless it is as it should be.
///
/// # Errors
/// When it cannot be written.
pub fn write_if_new(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}
