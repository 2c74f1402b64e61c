//! Cargo runs for the host: the workspace without the kernel object, which build scripts build.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use xtask::workspace_root;

/// Always the whole workspace, so that every run agrees on the features of the dependencies and
/// none of them is compiled twice.
const WORKSPACE: [&str; 3] = ["--workspace", "--exclude", "portfwd-ebpf"];

/// The cargo that runs this task.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace_root());
    cargo
}

/// `cargo SUBCOMMAND` for all packages that run on the host.
pub fn cargo_workspace(subcommand: &str) -> Command {
    let mut cargo = cargo();
    cargo.arg(subcommand).args(WORKSPACE);
    cargo
}

/// Where cargo puts what it builds.
pub fn target_dir() -> PathBuf {
    let default = workspace_root().join("target");
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace_root().join(folder),
        None => default,
    }
}

/// Makes cargo start the programs that it builds as root: as they are if this is root already,
/// else through sudo. The build itself stays the user's.
///
/// # Errors
/// When this is not root and there is no sudo.
pub fn as_root(cargo: &mut Command) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    if find_program("sudo").is_none() {
        bail!("network namespaces and BPF need root, and there is no sudo: run this as root");
    }
    let variable = format!("CARGO_TARGET_{}_RUNNER", variable_part(&host_triple()?));
    cargo.env(variable, "sudo --preserve-env");
    Ok(())
}

/// A program that is started as root, by sudo if this is not root.
///
/// # Errors
/// When this is not root and there is no sudo.
pub fn root_command(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let sudo = find_program("sudo").with_context(|| {
        format!(
            "{} needs root, and there is no sudo: run this as root",
            program.display()
        )
    })?;
    let mut command = Command::new(sudo);
    command.arg("--preserve-env").arg(program);
    Ok(command)
}

/// Whether this process may do everything.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The path of a program: in PATH, or where the system keeps those of the administrator, which
/// are not in every user's PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

fn host_triple() -> Result<String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .current_dir(workspace_root())
        .output()
        .context("cannot run rustc")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_owned)
        .context("rustc -vV does not tell the host")
}

/// A target triple as it stands in the names of cargo's variables.
fn variable_part(triple: &str) -> String {
    triple.to_uppercase().replace(['-', '.'], "_")
}
