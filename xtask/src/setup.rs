//! `cargo xtask setup`: what the build and the tests need, installed if it is missing.

mod install;
mod needs;

use anyhow::{Result, bail};
use needs::Needs;

/// The other recipe for the kernel object, which needs no packages.
const WITHOUT_DEBIAN: &str = "\
Without these packages the kernel object is built by a rustup toolchain whose LLVM is 22:
  rustup component add rust-src
  cargo install bpf-linker@0.10.3 --locked";

/// Installs what is missing. Says what that is and what for, before it begins.
///
/// # Errors
/// When something cannot be installed; on a system other than Debian 12 whenever something is
/// missing, after a list of it.
pub fn run() -> Result<()> {
    install_missing(Needs::missing)
}

/// [`run`] for the tools that make the package and look at it.
///
/// # Errors
/// As for [`run`].
pub fn for_dist() -> Result<()> {
    install_missing(Needs::missing_for_dist)
}

/// [`run`] for what portfwd is measured beside.
///
/// # Errors
/// As for [`run`].
pub fn for_bench() -> Result<()> {
    install_missing(Needs::missing_for_bench)
}

/// [`run`] for what boots other kernels.
///
/// # Errors
/// As for [`run`].
pub fn for_vm() -> Result<()> {
    install_missing(Needs::missing_for_vm)
}

fn install_missing(find: impl Fn() -> Needs) -> Result<()> {
    let missing = find();
    if missing.is_empty() {
        eprintln!("set-up: everything is there");
        return Ok(());
    }
    eprintln!("set-up: missing on this machine:");
    eprint!("{missing}");
    if !install::is_debian_12() {
        if missing.lacks_bpf_toolchain() {
            eprintln!("{WITHOUT_DEBIAN}");
        }
        bail!(
            "only on Debian 12 does set-up install by itself: install the above, then run `cargo xtask setup` again"
        );
    }
    install::install(&missing)?;

    let missing = find();
    if !missing.is_empty() {
        bail!("installed, and yet missing:\n{missing}");
    }
    eprintln!("set-up: done");
    Ok(())
}
