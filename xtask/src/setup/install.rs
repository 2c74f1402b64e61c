//! Installing, on Debian 12.

use std::{fs, process::Command};

use anyhow::{Result, bail};
use xtask::toolchain::Recipe;

use super::needs::Needs;
use crate::{host, steps};

/// Where `llvm-22-dev` puts LLVM.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// Installs the packages that are its arguments. A package may bring a service (coturn, nginx and haproxy do): it is
/// neither started now nor at the next boot, the tests start their own in their namespaces.
const INSTALL_PACKAGES: &str = r#"
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
apt-get -q update
apt-get -q install --yes --no-install-recommends --no-remove -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@"
for package in "$@"; do
    case "$package" in coturn | nginx | haproxy)
        if [ -d /run/systemd/system ]; then
            systemctl disable --quiet "$package"
        fi
    esac
done
"#;

/// Whether this is the system that the list of packages is for.
pub fn is_debian_12() -> bool {
    let Ok(release) = fs::read_to_string("/etc/os-release") else {
        return false;
    };
    let has = |name: &str, value: &str| {
        release.lines().any(|line| {
            line.split_once('=')
                .is_some_and(|(n, v)| n == name && v.trim_matches('"') == value)
        })
    };
    has("ID", "debian") && has("VERSION_ID", "12")
}

/// Installs all of it.
///
/// # Errors
/// At the first thing that cannot be installed.
pub fn install(missing: &Needs) -> Result<()> {
    install_packages(missing)?;
    if !missing.components.is_empty() {
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add"]).args(&missing.components);
        steps::run("rustup components", &mut rustup)?;
    }
    if let Some(recipe) = missing.linker {
        install_linker(recipe)?;
    }
    Ok(())
}

fn install_packages(missing: &Needs) -> Result<()> {
    let packages: Vec<_> = missing
        .packages
        .iter()
        .map(|package| package.name)
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    let mut shell = if host::is_root() {
        Command::new("sh")
    } else if host::find_program("sudo").is_some() {
        let mut sudo = Command::new("sudo");
        sudo.arg("sh");
        sudo
    } else {
        bail!(
            "installing packages needs root, and there is no sudo: as root, run `apt-get install --no-install-recommends {}`, then `cargo xtask setup` again",
            packages.join(" ")
        );
    };
    shell
        .args(["-c", INSTALL_PACKAGES, "apt-get install"])
        .args(&packages);
    steps::run_as(
        "packages",
        &format!("apt-get install {}", packages.join(" ")),
        &mut shell,
    )
}

fn install_linker(recipe: Recipe) -> Result<()> {
    let version = recipe.linker_versions()[0];
    let mut cargo = host::cargo();
    cargo
        .arg("install")
        .arg(format!("bpf-linker@{version}"))
        // One of another version, or one that does not start any more, is replaced.
        .args(["--locked", "--force"]);
    match recipe {
        // Its default is a newer LLVM than the compiler's.
        Recipe::PrebuiltCore => {
            cargo
                .args(["--no-default-features", "--features", "llvm-22"])
                .env("LLVM_PREFIX", LLVM_PREFIX);
        }
        Recipe::BuildStd => {}
    }
    steps::run("bpf-linker", &mut cargo)
}
