//! Control groups that limit the memory of a process and of what the kernel keeps for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

/// The second version has one tree for everything; the first has one for memory.
const UNIFIED: &str = "/sys/fs/cgroup/cgroup.controllers";
const TREES: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"];

/// A control group, removed on drop.
pub struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// A group whose processes get at most so many bytes.
    pub fn with_memory(bytes: u64) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pfwd-{}-{number}", std::process::id());
        let is_unified = Path::new(UNIFIED).exists();
        let (tree, limit) = if is_unified {
            (TREES[0], "memory.max")
        } else {
            (TREES[1], "memory.limit_in_bytes")
        };
        let group = Self {
            directory: Path::new(tree).join(name),
        };
        fs::create_dir(&group.directory)
            .with_context(|| format!("make {}", group.directory.display()))?;
        let limit = group.directory.join(limit);
        fs::write(&limit, bytes.to_string())
            .with_context(|| format!("write {}", limit.display()))?;
        Ok(group)
    }

    /// The same command, in this group.
    #[must_use]
    pub fn confine(&self, command: &Command) -> Command {
        let mut confined = Command::new("sh");
        confined
            .args(["-ec", "echo $$ > \"$0\"; exec \"$@\""])
            .arg(self.directory.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        confined
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}
