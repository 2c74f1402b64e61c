//! Development tasks of portfwd. The library part builds the kernel object, for the build
//! scripts of the workspace and for `cargo xtask`; it finds the BPF toolchain, but installs nothing.

mod btf;
pub mod ebpf;
mod object_check;
mod object_strip;
pub mod toolchain;

use std::path::Path;

/// The root of the workspace that this crate was compiled in.
#[must_use]
pub fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the workspace")
}
