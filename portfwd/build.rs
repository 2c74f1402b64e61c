//! Builds the kernel object; the crate embeds it from the path in `PORTFWD_OBJECT`.

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::ebpf::build_script("portfwd", "PORTFWD_OBJECT")
}
