//! What is in the package and is not in the repository: manual pages, completions, changelog.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use xtask::workspace_root;

use crate::{host, steps};

/// The reference of the configuration file, and its manual page.
const REFERENCE: (&str, &str) = ("docs/portfwd.toml.md", "portfwd.toml.5");

/// Writes everything; `programs` is where the release build is.
pub fn run(programs: &Path) -> Result<()> {
    let stage = super::folder().join("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage).with_context(|| format!("clear {}", stage.display()))?;
    }
    fs::create_dir_all(&stage).with_context(|| format!("make {}", stage.display()))?;
    let manuals = stage.join("man");
    let mut pages = host::cargo();
    pages
        .args(["run", "--quiet", "--package", "portfwd-tests"])
        .args(["--bin", "man_pages", "--"])
        .arg(&manuals);
    steps::run("manual pages", &mut pages)?;
    reference(&manuals)?;
    completions(programs, &stage.join("completions"))?;
    let changelog = stage.join("changelog");
    fs::copy(workspace_root().join("CHANGELOG.md"), &changelog)
        .with_context(|| format!("write {}", changelog.display()))?;
    Ok(())
}

fn reference(manuals: &Path) -> Result<()> {
    let (source, page) = REFERENCE;
    let mut lowdown = Command::new("lowdown");
    lowdown
        .args([
            "-s",
            "-T",
            "man",
            "-M",
            "title=portfwd.toml",
            "-M",
            "section=5",
        ])
        .arg("-o")
        .arg(manuals.join(page))
        .arg(workspace_root().join(source));
    steps::run("reference of the configuration file", &mut lowdown)
}

/// What makes a shell ask the program how a word goes on.
fn completions(programs: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    for (shell, file) in [
        ("bash", "portfwd.bash"),
        ("zsh", "_portfwd"),
        ("fish", "portfwd.fish"),
    ] {
        // By its name alone: as it is found, so it will be asked.
        let output = Command::new("portfwd")
            .env("PATH", super::path_with(programs)?)
            .env("COMPLETE", shell)
            .stdin(Stdio::null())
            .output()
            .context("cannot run portfwd")?;
        ensure!(
            output.status.success(),
            "portfwd has no completions for {shell}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut script = output.stdout;
        if shell == "zsh" {
            // zsh runs the file at the first completion, and its functions at the following ones.
            script.extend_from_slice(
                b"\n[[ $funcstack[1] = _portfwd ]] && _clap_dynamic_completer_portfwd \"$@\"\n",
            );
        }
        let path = folder.join(file);
        fs::write(&path, script).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
