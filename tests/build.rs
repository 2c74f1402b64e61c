//! Builds the test lab's kernel object.

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::ebpf::build_script("lab", "PORTFWD_LAB_OBJECT")
}
