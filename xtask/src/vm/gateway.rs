//! The machine is the gateway: package `portfwd-tests` gives it network cards, and drives clients through it.

use anyhow::{Context, Result};

use super::{SLOWNESS, kernel::Kernel, machine::Machine};
use crate::{host, steps};

/// Does what is typed on the serial line, line by line, and says after each how it ended.
const SHELL: &str = r#"
stty -echo
# What the kernel has to say would be in the middle of answers; `dmesg` has it.
dmesg --console-level emerg
set +e
echo "vm: ready"
while IFS= read -r line; do
  (eval "$line") < /dev/null 2>&1
  printf '\nvm: done %d\n' $?
done
"#;

/// Builds what runs in the machine, and what drives it.
pub(super) fn build() -> Result<()> {
    steps::run("build", &mut host::cargo_workspace("build"))
}

/// Boots a kernel, and sees that everything that is sent through it arrives.
pub(super) fn run(machine: &Machine, kernel: &Kernel) -> Result<()> {
    let mut gateway = host::cargo();
    gateway
        .args(["run", "--quiet", "--package", "portfwd-tests"])
        .args(["--bin", "gateway", "--", "--linux", kernel.version(), "--"])
        .args(machine.command_line(kernel, SHELL)?)
        .env("PORTFWD_SLOWNESS", SLOWNESS.to_string());
    host::as_root(&mut gateway)?;
    let told = format!(
        "portfwd between network cards, on Linux {}",
        kernel.version()
    );
    steps::run_as("gateway", &told, &mut gateway)
        .with_context(|| format!("on Linux {}", kernel.version()))
}
